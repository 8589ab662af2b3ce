"""What a run will compute on: a card known by name, or this machine, measured for a second."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from finesight.config import Device, Precision
from finesight.infer.load import resolve_device, resolve_precision
from finesight.model.attention import has_varlen
from finesight.model.weights import DTYPES
from finesight.plan.cards import card
from finesight.plan.kept import Computing
from finesight.train.flops import measured_peak
from finesight.train.report import device_name
from finesight.train.workers import default_workers

IN_PRACTICE = 0.79
"""The share of the printed peak that one large product reaches: 784 of 989 TFLOP/s in bf16 on an
H200. A measured peak is what is reached already."""

COPIED = 0.85
"""The share of the printed bandwidth that a large copy reaches."""

HEADS = 128
"""Width of a head that asks for the attention kernel: any multiple of 8 does."""


@dataclass(frozen=True, slots=True)
class Target:
    """A device: `memory` in bytes, `peak` in operations a second of a large product in `dtype`,
    `bandwidth` in bytes a second, `workers` reading processes. `measured`: it is this machine's."""

    name: str
    memory: int
    peak: float
    bandwidth: float
    dtype: torch.dtype
    computing: Computing
    workers: int
    measured: bool

    @property
    def precision(self) -> str:
        """As a recipe calls it."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


def named_target(name: str, precision: Precision) -> Target:
    """A card by its data sheet. Raises UserError for a name that is not known."""
    found = card(name)
    dtype = DTYPES[precision] if precision != "auto" else _best(found.has_bf16)
    # In fp32, torch multiplies at an eighth or less of the speed of 16 bits.
    printed = found.tflops * 1e12 / (1 if dtype.itemsize == 2 else 8)
    flash = found.has_bf16 and dtype.itemsize == 2
    return Target(
        name=found.name,
        memory=round(found.memory_gb * 1e9),
        peak=printed * IN_PRACTICE,
        bandwidth=found.gb_per_s * 1e9 * COPIED,
        dtype=dtype,
        computing=Computing(cuda=True, number=dtype.itemsize, flash=flash),
        workers=default_workers(torch.device("cuda")),
        measured=False,
    )


def _best(has_bf16: bool) -> torch.dtype:
    return torch.bfloat16 if has_bf16 else torch.float16


def own_target(device: Device, precision: Precision) -> Target:
    """This machine: a large product and a large copy are timed, its memory is asked for. Raises
    UserError for cuda where there is none."""
    where = resolve_device(device)
    dtype = resolve_precision(precision, where)
    on_card = where.type == "cuda"
    probe = torch.empty(1, 1, HEADS, dtype=dtype, device=where)
    return Target(
        name=device_name(where),
        memory=torch.cuda.mem_get_info(where)[1] if on_card else _memory_of_machine(),
        peak=measured_peak(where, dtype),
        bandwidth=_measured_bandwidth(where),
        dtype=dtype,
        computing=Computing(cuda=on_card, number=dtype.itemsize, flash=has_varlen(probe)),
        workers=default_workers(where),
        measured=True,
    )


def _memory_of_machine() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _measured_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by copies that no cache holds."""
    numbers, rounds = (1 << 28, 5) if device.type == "cuda" else (1 << 25, 3)
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best
