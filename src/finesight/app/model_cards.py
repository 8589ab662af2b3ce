"""Cards of base models with estimates of their memory and time."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from finesight.model_folder import TINY_MODEL
from finesight.settings.recipe_template import choose_batch_size, choose_duration

QUERY_GPUS = (
    "nvidia-smi",
    "--query-gpu=memory.total,index,uuid,mig.mode.current",
    "--format=csv,noheader,nounits",
)
QUERY_TIMEOUT_S = 10.0

RETRY_INTERVAL_S = 60.0
"""Seconds after a failed query without another one, which would delay each page."""


@dataclass(frozen=True, slots=True)
class PlannedGpu:
    """Estimate of `finesight plan` for LoRA on one GPU, with the settings that it proposes.

    Images have 1008 x 1008 pixels.

    Attributes:
        gpu_gb: Memory of the GPU in 10^9 bytes.
        needs_nf4: Whether the model fits only with frozen weights in NF4.
    """

    gpu_gb: float
    samples_per_s: float
    needs_nf4: bool = False


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Base model on the page.

    Attributes:
        about: What the model reads, in English.
        num_params_b: Number of parameters in billions. Published weights have 2 bytes each.
        estimates: One for each memory size of GPUs that the model fits, smallest first.
    """

    name: str
    title: str
    about: str
    num_params_b: float
    estimates: Sequence[PlannedGpu] = ()

    @property
    def download_gb(self) -> float:
        """Size of the weights; 0 for the bundled model."""
        return 0.0 if self.is_practice else 2 * self.num_params_b

    @property
    def is_practice(self) -> bool:
        """Return whether it is the bundled model, which trains without a GPU."""
        return self.name == TINY_MODEL

    def find_estimate(self, gpu_gb: float) -> PlannedGpu | None:
        """Return the estimate for a GPU with this memory; None if the model does not fit."""
        fitting = [one for one in self.estimates if one.gpu_gb <= gpu_gb]
        return fitting[-1] if fitting else None

    def estimate_minutes(self, gpu_gb: float, num_samples: int) -> int | None:
        """Return the minutes of a run of the usual length, without evaluations.

        It is None if the model does not fit.
        """
        estimate = self.find_estimate(gpu_gb)
        if estimate is None:
            return None
        batch_size = choose_batch_size(num_samples)
        setting, text = choose_duration(num_samples, batch_size, is_short=False).popitem()
        number = int(text.split()[0])
        num_processed = number * (num_samples if setting == "train.epochs" else batch_size)
        return max(1, round(num_processed / estimate.samples_per_s / 60))


MODEL_CARDS = (
    ModelCard(
        TINY_MODEL,
        "Practice model",
        "Generated tickets, receipts and drawings. No photos, no handwriting.",
        0.0126,
    ),
    ModelCard(
        "Qwen/Qwen2-VL-2B-Instruct",
        "Qwen2-VL 2B",
        "Photos, documents and screenshots. Small and fast, for one simple task.",
        2.21,
        (
            PlannedGpu(8, 0.739),
            PlannedGpu(12, 0.738),
            PlannedGpu(16, 1.48),
            PlannedGpu(24, 4.56),
            PlannedGpu(32, 3.26),
            PlannedGpu(40, 8.33),
            PlannedGpu(48, 8.07),
            PlannedGpu(80, 8.71),
            PlannedGpu(141, 26.3),
        ),
    ),
    ModelCard(
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "Qwen2.5-VL 3B",
        "Photos, documents, tables and boxes. A good first choice.",
        3.75,
        (
            PlannedGpu(8, 0.494, needs_nf4=True),
            PlannedGpu(12, 0.458),
            PlannedGpu(16, 0.93),
            PlannedGpu(24, 3.55),
            PlannedGpu(32, 2.49),
            PlannedGpu(40, 6.44),
            PlannedGpu(48, 6.08),
            PlannedGpu(80, 6.79),
            PlannedGpu(141, 20.3),
        ),
    ),
    ModelCard(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "Qwen2.5-VL 7B",
        "Photos, documents and long texts, also in Chinese.",
        8.29,
        (
            PlannedGpu(12, 0.222, needs_nf4=True),
            PlannedGpu(16, 0.464, needs_nf4=True),
            PlannedGpu(24, 1.45),
            PlannedGpu(32, 1.17),
            PlannedGpu(40, 3.74),
            PlannedGpu(48, 3.72),
            PlannedGpu(80, 3.88),
            PlannedGpu(141, 11.8),
        ),
    ),
)
"""Models by size. The estimates are those of LoRA in benchmarks/results/which_card.json, by the
slowest GPU of each memory size."""


def find_gpu_memory() -> float:
    """Return the memory of the largest usable NVIDIA GPU in 10^9 bytes; 0 without one.

    A GPU in MIG mode counts as none, because the query does not state the sizes of its parts.
    """
    sizes = [0.0]
    for line in _query_gpus():
        size, index, uuid, mig_mode = (*(word.strip() for word in line.split(",")), "", "", "")[:4]
        if _is_visible(index, uuid) and mig_mode != "Enabled":
            with suppress(ValueError):  # N/A for a GPU without memory of its own
                sizes.append(float(size) * 2**20 / 1e9)
    return max(sizes)


def _is_visible(index: str, uuid: str) -> bool:
    """Return whether CUDA_VISIBLE_DEVICES names a GPU, by its index or the start of its UUID."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return True
    for word in visible.split(","):
        name = word.strip()
        if name and (name == index or uuid.startswith(name)):
            return True
    return False


@dataclass(slots=True)
class GpuQuery:
    """Result of the last query.

    Attributes:
        lines: Its lines; empty after a failure.
        next_s: Time of the monotonic clock from which a failed query is repeated.
    """

    lines: Sequence[str] = ()
    next_s: float = 0.0


gpu_query = GpuQuery()


def _query_gpus() -> Sequence[str]:
    """Return the lines of the query. A failed one is repeated, since a driver may start later."""
    if not gpu_query.lines and time.monotonic() >= gpu_query.next_s:
        with suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(
                QUERY_GPUS, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=True
            )
            gpu_query.lines = answer.stdout.splitlines()
        gpu_query.next_s = time.monotonic() + RETRY_INTERVAL_S
    return gpu_query.lines
