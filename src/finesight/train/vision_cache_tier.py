"""Choice of the storage tier of the vision cache: GPU memory, CPU memory or disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from finesight.config import VisionCacheMode
from finesight.model.vlm import VisionLanguageModel

CacheTier = Literal["gpu", "memory", "disk"]

MAX_GPU_FRACTION = 1 / 16
"""Maximum fraction of the free GPU memory, after loading the model, for cached features.

Training and evaluation need an unknown amount of the rest, and the other tiers are fast enough as
well.
"""

MAX_RAM_FRACTION = 1 / 2
"""Maximum fraction of the available CPU memory for cached features."""


@dataclass(frozen=True, slots=True)
class FreeBytes:
    """Free bytes for cached features in each storage tier.

    Attributes:
        gpu: GPU memory; None without a GPU.
        memory: CPU memory per rank.
        disk: Disk space.
    """

    gpu: int | None
    memory: int
    disk: int


def estimate_feature_bytes(num_patches: int, model: VisionLanguageModel, dtype: torch.dtype) -> int:
    """Compute the size in bytes of the cached features of a number of patches.

    The weights of the model are not read. The result is an upper bound if samples share images.
    """
    vision_encoder, decoder_config = model.visual, model.config.decoder
    num_features = num_patches // vision_encoder.config.merge_size**2
    return (
        num_features
        * vision_encoder.features_per_token
        * decoder_config.hidden_size
        * dtype.itemsize
    )


def choose_cache_tier(
    setting: VisionCacheMode, needed_bytes: int, missing_bytes: int, free: FreeBytes
) -> CacheTier | None:
    """Choose the fastest storage tier with enough free space: GPU, CPU memory, then disk.

    The setting restricts the choice: `memory` excludes the disk, and `disk` allows only the disk.

    Args:
        setting: Value of `train.vision_cache`.
        needed_bytes: Size of all features.
        missing_bytes: Size of the features that are not yet on disk.
        free: Free bytes in each tier.

    Returns:
        Storage tier; None if no tier fits, or for `never`.
    """
    if setting == "never":
        return None
    fits_on_disk = missing_bytes <= free.disk
    if setting == "disk":
        return "disk" if fits_on_disk else None
    if free.gpu is not None and needed_bytes <= MAX_GPU_FRACTION * free.gpu:
        return "gpu"
    if needed_bytes <= MAX_RAM_FRACTION * free.memory:
        return "memory"
    return "disk" if setting == "auto" and fits_on_disk else None


def free_gpu_memory(device: torch.device) -> int | None:
    """Return the bytes of GPU memory available to this process; None on a CPU.

    Memory that PyTorch has cached but does not use counts as available.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
