"""Device for which a run is planned: a GPU model, or this machine.

GPU models have the speed of their data sheet. The speed of this machine is measured.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from finesight.config import Device, Precision
from finesight.infer.model_loader import resolve_device, resolve_precision
from finesight.model.fused_ops import get_device_capability
from finesight.model.weights_io import DTYPES
from finesight.plan.dry_run import ComputeTarget
from finesight.plan.gpu_specs import find_gpu_spec
from finesight.train.dataloader import default_num_workers
from finesight.train.flops import measure_peak_flops
from finesight.train.logging import get_device_name

ACHIEVABLE_PEAK_FRACTION = 0.79
"""Fraction of the FLOP/s in a data sheet that a large matrix product reaches.

An H200 reaches 784 of 989 TFLOP/s in bf16. Measured FLOP/s need no such correction.
"""

ACHIEVABLE_BANDWIDTH_FRACTION = 0.85
"""Fraction of the memory bandwidth in a data sheet that a large copy reaches."""


@dataclass(frozen=True, slots=True)
class TargetDevice:
    """Device for which a run is planned, with its speed and memory.

    Attributes:
        name: Name of the device.
        memory_bytes: Total memory of the device.
        peak_flops: FLOP/s of a large matrix product in `dtype`.
        memory_bandwidth: Memory bandwidth in bytes/s.
        dtype: Data type of the weights.
        compute: Properties that determine saved activations.
        num_workers: Default number of data loader workers.
        is_measured: True for this machine, False for a data sheet.
    """

    name: str
    memory_bytes: int
    peak_flops: float
    memory_bandwidth: float
    dtype: torch.dtype
    compute: ComputeTarget
    num_workers: int
    is_measured: bool

    @property
    def precision(self) -> str:
        """Name of the precision in a recipe, such as `bf16`."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


def build_named_target(name: str, precision: Precision) -> TargetDevice:
    """Build the target for a GPU from its data sheet.

    Args:
        name: Name of a GPU in `plan.gpu_specs`, in any spelling.
        precision: Precision of the run; `auto` selects bf16 if the GPU supports it.

    Raises:
        UserError: The GPU is unknown.
    """
    spec = find_gpu_spec(name)
    dtype = DTYPES[precision] if precision != "auto" else _select_dtype(spec.supports_bf16)
    # torch computes fp32 products at an eighth or less of the 16-bit speed.
    datasheet_flops = spec.tflops * 1e12 / (1 if dtype.itemsize == 2 else 8)
    return TargetDevice(
        name=spec.name,
        memory_bytes=round(spec.memory_gb * 1e9),
        peak_flops=datasheet_flops * ACHIEVABLE_PEAK_FRACTION,
        memory_bandwidth=spec.gb_per_s * 1e9 * ACHIEVABLE_BANDWIDTH_FRACTION,
        dtype=dtype,
        compute=ComputeTarget(True, dtype, spec.capability),
        num_workers=default_num_workers(torch.device("cuda")),
        is_measured=False,
    )


def _select_dtype(supports_bf16: bool) -> torch.dtype:
    return torch.bfloat16 if supports_bf16 else torch.float16


def measure_local_target(device: Device, precision: Precision) -> TargetDevice:
    """Build the target for this machine.

    Measures a large matrix product and a large copy, and queries the memory size.

    Raises:
        UserError: `device` is cuda and there is no GPU.
    """
    torch_device = resolve_device(device)
    dtype = resolve_precision(precision, torch_device)
    is_cuda = torch_device.type == "cuda"
    return TargetDevice(
        name=get_device_name(torch_device),
        memory_bytes=torch.cuda.mem_get_info(torch_device)[1]
        if is_cuda
        else _get_physical_memory(),
        peak_flops=measure_peak_flops(torch_device, dtype),
        memory_bandwidth=_measure_bandwidth(torch_device),
        dtype=dtype,
        compute=ComputeTarget(is_cuda, dtype, get_device_capability(torch_device)),
        num_workers=default_num_workers(torch_device),
        is_measured=True,
    )


def _get_physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _measure_bandwidth(device: torch.device) -> float:
    """Measure the memory bandwidth with copies that exceed all caches.

    Returns bytes per second, reads and writes together.
    """
    num_elements, num_rounds = (1 << 28, 5) if device.type == "cuda" else (1 << 25, 3)
    source = torch.ones(num_elements, device=device)
    target = torch.empty_like(source)
    best_s = float("inf")
    for _ in range(num_rounds):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * source.nbytes / best_s
