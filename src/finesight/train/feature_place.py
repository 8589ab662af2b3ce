"""Where the features of a run's pictures have room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from finesight.config import Cache
from finesight.model.network import VisionLanguageModel

Place = Literal["gpu", "memory", "disk"]

GPU_SHARE = 1 / 16
"""Of what is free on the GPU once the model is there: the rest is for what steps and answers take,
which is not known yet. From anywhere else features come in time as well."""

MEMORY_SHARE = 1 / 2
"""Of what is free for the processes of this machine."""


@dataclass(frozen=True, slots=True)
class Free:
    """Bytes that are free: on the GPU (None: on a CPU alone), in memory, and on disk for features
    that are not there yet."""

    gpu: int | None
    memory: int
    disk: int


def feature_bytes(patches: int, model: VisionLanguageModel, dtype: torch.dtype) -> int:
    """Bytes that the features of pictures of so many patches take: those of a corpus, where no
    picture is in two samples, by `Survey.patches`; otherwise the most that they may take. The
    model's weights are not looked at."""
    tower, language = model.visual, model.geometry.language
    places = patches // tower.geometry.merge**2
    return places * tower.features * language.width * dtype.itemsize


def choose_place(setting: Cache, needed: int, missing: int, free: Free) -> Place | None:
    """The first place with room for `needed` bytes, of which `missing` are not on disk yet: the
    GPU, memory, the disk; without the disk by the setting `memory`, and nowhere else by `disk`.
    None where there is none, and by `never`."""
    if setting == "never":
        return None
    on_disk = missing <= free.disk
    if setting == "disk":
        return "disk" if on_disk else None
    if free.gpu is not None and needed <= GPU_SHARE * free.gpu:
        return "gpu"
    if needed <= MEMORY_SHARE * free.memory:
        return "memory"
    return "disk" if setting == "auto" and on_disk else None


def free_on_gpu(device: torch.device) -> int | None:
    """Bytes that this process may still take of the GPU's memory; None for a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
