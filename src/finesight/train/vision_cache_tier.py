"""Choice of the storage tier of the vision cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from finesight.config import VisionCacheMode
from finesight.model.vlm import VisionLanguageModel

CacheTier = Literal["gpu", "memory", "disk"]

MAX_GPU_FRACTION = 1 / 16
"""Maximum share of the GPU memory that is free after loading the model.

Training and evaluation need an unknown amount of the rest. Other tiers are fast enough as well.
"""

MAX_RAM_FRACTION = 1 / 2
"""Maximum share of the available memory of this machine."""


@dataclass(frozen=True, slots=True)
class FreeBytes:
    """Free bytes for features: on the GPU (None on a CPU), in memory and on disk."""

    gpu: int | None
    memory: int
    disk: int


def estimate_feature_bytes(num_patches: int, model: VisionLanguageModel, dtype: torch.dtype) -> int:
    """Compute the size of the features of this many patches; model weights are not read.

    The result is an upper bound if samples share images.
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
    """Choose the fastest tier with enough free space: GPU, memory, then disk.

    The setting restricts the choice: `memory` excludes the disk, `disk` allows only the disk.

    Args:
        setting: Value of `train.vision_cache`.
        needed_bytes: Size of all features.
        missing_bytes: Size of the features that are not on disk.
        free: Free space.

    Returns:
        The tier; None if no tier fits, or for `never`.
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
    """Return the bytes of GPU memory available to this process; None on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
