"""Choice whether a new vision cache saves time, which a run and its plan share."""

from __future__ import annotations

from itertools import chain

from finesight.encode.context_shard import SampleShape
from finesight.settings.config import VisionCacheMode
from finesight.train.dataset_stats import DatasetStats
from finesight.train.flops import FlopCounter

MIN_IMAGE_USES = 1.25
"""Mean uses of an image from which the cache saves time (`benchmarks/vision_cache_gain.py`)."""

BUILD_S = 1.6
"""Seconds to build a cache of any size on a GPU: start of workers, digest and copy of the encoder.

Measured on an H200 as the stages of a cache of 496 images (`benchmarks/full_recipe.py`), as is
`BUILD_S_PER_IMAGE`.
"""

BUILD_S_PER_IMAGE = 0.003
"""Seconds to hash, decode and store an image, in addition to its encoding."""

ENCODING_EFFICIENCY = 0.5
"""Share of the peak FLOP/s at which a GPU encodes images."""


def find_slow_reason(
    setting: VisionCacheMode,
    stats: DatasetStats,
    num_samples: int,
    flop_counter: FlopCounter,
    gpu_flops: float | None,
    num_ranks: int,
) -> str | None:
    """Return why a run is faster without a new vision cache; None if the cache saves time.

    Args:
        setting: `train.vision_cache`. Only `auto` compares times on a GPU.
        stats: Statistics of all training samples.
        num_samples: Number of samples of the run, over all epochs.
        gpu_flops: Peak FLOP/s of a GPU; None on a CPU.
        num_ranks: Number of GPUs, which share the images of a step. Each hashes and stores all.
    """
    num_uses = stats.count_image_uses(num_samples)
    if num_uses < MIN_IMAGE_USES:
        return f"images have fewer than {MIN_IMAGE_USES} uses"
    if gpu_flops is None or setting != "auto":
        return None
    grids = tuple(chain.from_iterable(sample.grid_thw for sample in stats.sample_stats))
    flops = flop_counter.count_by_part(SampleShape((0,), grids, 0))
    dataset_flops = flops.matmul_by_part["vision"] + flops.matmul_by_part["merger"]
    dataset_flops += flops.vision_attention
    run_flops = dataset_flops * num_samples / len(stats.sample_stats)
    saved_s = run_flops * (1 - 1 / num_uses) / (gpu_flops * ENCODING_EFFICIENCY) / num_ranks
    build_s = BUILD_S + BUILD_S_PER_IMAGE * stats.num_unique_images
    if saved_s < build_s:
        return f"a cache would take {build_s:.1f} s to build, and save {saved_s:.1f} s of encoding"
    return None
