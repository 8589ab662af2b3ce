"""Choice whether a new vision cache saves time."""

from dataclasses import replace

from vision_cache_fixtures import make_train_state

from finesight.encode.context_shard import SampleShape
from finesight.train.vision_cache_choice import ENCODING_EFFICIENCY, find_slow_reason


def test_gpu_builds_a_cache_that_saves_more_than_it_takes(tmp_path):
    state = make_train_state(tmp_path / "task")
    stats = state.data.train.stats
    counter = state.engine.flop_counter
    assert counter is not None
    num_samples = 4 * len(stats.sample_indices)

    def find(setting, gpu_flops, num_samples=num_samples, num_ranks=1):
        arguments = setting, stats, num_samples, counter, gpu_flops, num_ranks
        return find_slow_reason(*arguments)

    assert find("auto", None) is None
    assert "save 0.0 s" in find("auto", 1e15)
    assert find("auto", 1e3) is None
    assert find("memory", 1e15) is None
    assert "fewer than 1.25 uses" in find("memory", 1e3, num_samples=len(stats.sample_indices))
    # Each epoch but the first saves the time of an encoding: here 0.5 s.
    grids = tuple(grid for sample in stats.sample_stats for grid in sample.grid_thw)
    flops = counter.count_by_part(SampleShape((0,), grids, 0))
    encoding = sum(flops.matmul_by_part[part] for part in ("vision", "merger"))
    gpu_flops = (encoding + flops.vision_attention) / (0.5 * ENCODING_EFFICIENCY)
    epoch = len(stats.sample_indices)
    for epochs, saved in ((2, "0.5 s"), (4, "1.5 s")):
        assert f"1.6 s to build, and save {saved}" in find("auto", gpu_flops, epochs * epoch)
    assert find("auto", gpu_flops, 5 * epoch) is None
    assert "save 1.0 s" in find("auto", gpu_flops, 5 * epoch, num_ranks=2)


def test_cache_of_many_small_images_takes_longer_to_build(tmp_path):
    """It pays by the number of epochs, not by that of images."""
    state = make_train_state(tmp_path / "task")
    counter = state.engine.flop_counter
    assert counter is not None
    few = state.data.train.stats
    factor = 1000
    many = replace(
        few,
        num_images=few.num_images * factor,
        num_unique_images=few.num_unique_images * factor,
        sample_stats=few.sample_stats * factor,
        sample_indices=range(factor * len(few.sample_indices)),
    )
    grids = tuple(grid for sample in many.sample_stats for grid in sample.grid_thw)
    flops = counter.count_by_part(SampleShape((0,), grids, 0))
    encoding = sum(flops.matmul_by_part[part] for part in ("vision", "merger"))
    gpu_flops = (encoding + flops.vision_attention) / (10.0 * ENCODING_EFFICIENCY)
    found = {}
    for epochs in (2, 3, 4, 5):
        num_samples = epochs * len(many.sample_indices)
        found[epochs] = find_slow_reason("auto", many, num_samples, counter, gpu_flops, 1)
    assert many.num_unique_images == 11_000
    assert "34.6 s to build, and save 30.0 s" in found[4]
    assert found[5] is None
    shared = find_slow_reason("auto", many, 5 * len(many.sample_indices), counter, gpu_flops, 2)
    assert shared is not None, "several GPUs share the encoding of steps only"
    assert "34.6 s to build, and save 20.0 s" in shared
