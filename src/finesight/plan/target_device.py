"""Device for which a run is planned: a GPU model, or this machine.

GPU models have the speed of their data sheet. The speed of this machine is measured.
"""

from __future__ import annotations

import difflib
import re
import time
from dataclasses import dataclass

import torch

from finesight.config import Device, Precision
from finesight.errors import UserError
from finesight.host_memory import total_memory
from finesight.infer.model_loader import resolve_device, resolve_precision
from finesight.model.kernels.runtime import get_device_capability
from finesight.model.weights_io import DTYPES
from finesight.plan.dry_run import ComputeTarget
from finesight.train.dataloader import default_num_workers
from finesight.train.flops import measure_peak_flops
from finesight.train.logging import get_device_name


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """Data sheet values of a GPU model.

    Attributes:
        name: Name of the GPU model.
        memory_gb: Memory in 10^9 bytes.
        tflops: Dense 16-bit matrix products in 10^12 FLOP/s.
        gb_per_s: Memory bandwidth in 10^9 bytes/s.
        capability: CUDA compute capability, major and minor.
    """

    name: str
    memory_gb: float
    tflops: float
    gb_per_s: float
    capability: tuple[int, int]

    @property
    def supports_bf16(self) -> bool:
        """True if the GPU supports bf16 matrix products. Older GPUs use fp16."""
        return self.capability >= (8, 0)


# Sources: NVIDIA data sheets of T4, V100, A10, A30, A40, A100, A6000, L4, L40S, RTX 6000 Ada, H100,
# H200, B200 and B300; GA102 whitepaper (RTX 30), Ada data sheets (RTX 40), RTX Blackwell whitepaper
# (RTX 50). If a data sheet states sparse FLOP/s, half of the value is used.
GPU_SPECS: tuple[GpuSpec, ...] = (
    GpuSpec("T4", 16, 65, 320, (7, 5)),
    GpuSpec("V100-16GB", 16, 125, 900, (7, 0)),
    GpuSpec("V100-32GB", 32, 125, 900, (7, 0)),
    GpuSpec("RTX 3060", 12, 25.5, 360, (8, 6)),
    GpuSpec("RTX 3080", 10, 59.5, 760, (8, 6)),
    GpuSpec("RTX 3090", 24, 71, 936, (8, 6)),
    GpuSpec("RTX 4060", 8, 30.2, 272, (8, 9)),
    GpuSpec("RTX 4060 Ti 16GB", 16, 44.1, 288, (8, 9)),
    GpuSpec("RTX 4070", 12, 58.3, 504, (8, 9)),
    GpuSpec("RTX 4080", 16, 97.5, 717, (8, 9)),
    GpuSpec("RTX 4090", 24, 165.2, 1008, (8, 9)),
    GpuSpec("RTX 5080", 16, 112.6, 960, (12, 0)),
    GpuSpec("RTX 5090", 32, 209.5, 1792, (12, 0)),
    GpuSpec("RTX A6000", 48, 154.8, 768, (8, 6)),
    GpuSpec("RTX 6000 Ada", 48, 364.2, 960, (8, 9)),
    GpuSpec("A10", 24, 125, 600, (8, 6)),
    GpuSpec("A10G", 24, 70, 600, (8, 6)),
    GpuSpec("A30", 24, 165, 933, (8, 0)),
    GpuSpec("A40", 48, 149.7, 696, (8, 6)),
    GpuSpec("A100-40GB", 40, 312, 1555, (8, 0)),
    GpuSpec("A100-80GB", 80, 312, 2039, (8, 0)),
    GpuSpec("L4", 24, 121, 300, (8, 9)),
    GpuSpec("L40S", 48, 362, 864, (8, 9)),
    GpuSpec("H100", 80, 989, 3350, (9, 0)),
    GpuSpec("H100-PCIe", 80, 756, 2000, (9, 0)),
    GpuSpec("H200", 141, 989, 4800, (9, 0)),
    GpuSpec("B200", 180, 2250, 7700, (10, 0)),
    GpuSpec("B300", 288, 2250, 8000, (10, 3)),
)


def find_gpu_spec(name: str) -> GpuSpec:
    """Return the specification of a GPU model by name, in any spelling.

    Accepts, for example, `a100-80gb`, `A100 80 GB` and `NVIDIA GeForce RTX 4090`.

    Raises:
        UserError: The GPU is unknown. The message lists the most similar names.
    """
    by_key = {_normalize_name(spec.name): spec for spec in GPU_SPECS}
    key = _normalize_name(name)
    match = by_key.get(key)
    if match is not None:
        return match
    close_matches = difflib.get_close_matches(key, by_key, n=4, cutoff=0.5)
    prefix_matches = [
        candidate for candidate in by_key if key and (candidate in key or candidate.startswith(key))
    ]
    names = list(dict.fromkeys([*prefix_matches, *close_matches]))[:4] or list(by_key)
    raise UserError(
        f"unknown GPU {name!r}",
        where="--gpu",
        expected=f"one of {', '.join(by_key[candidate].name for candidate in names)}",
        remedy="choose the most similar GPU, or run without --gpu on the target machine to"
        " measure its GPU",
    )


def _normalize_name(name: str) -> str:
    """Remove vendor names and punctuation from a GPU name, for comparison."""
    stripped = re.sub(r"nvidia|geforce|tesla|rtx|tensor core|gpu|sxm\d?", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", stripped)


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
        name: Name of a GPU in `GPU_SPECS`, in any spelling.
        precision: Precision of the run; `auto` selects bf16 if the GPU supports it.

    Raises:
        UserError: The GPU is unknown.
    """
    spec = find_gpu_spec(name)
    automatic = torch.bfloat16 if spec.supports_bf16 else torch.float16
    dtype = automatic if precision == "auto" else DTYPES[precision]
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


def measure_local_target(device: Device, precision: Precision) -> TargetDevice:
    """Build the target for this machine.

    Measures a large matrix product and a large copy, and queries the memory size.

    Raises:
        UserError: `device` is cuda and there is no GPU.
    """
    torch_device = resolve_device(device)
    dtype = resolve_precision(precision, torch_device)
    return build_local_target(torch_device, dtype, measure_peak_flops(torch_device, dtype))


def build_local_target(
    device: torch.device,
    dtype: torch.dtype,
    peak_flops: float,
    memory_bandwidth: float | None = None,
) -> TargetDevice:
    """Build the target for a device of this machine from its measured FLOP/s.

    The memory bandwidth is measured unless it is given.
    """
    is_cuda = device.type == "cuda"
    return TargetDevice(
        name=get_device_name(device),
        memory_bytes=torch.cuda.mem_get_info(device)[1] if is_cuda else total_memory(),
        peak_flops=peak_flops,
        memory_bandwidth=memory_bandwidth or _measure_bandwidth(device),
        dtype=dtype,
        compute=ComputeTarget(is_cuda, dtype, get_device_capability(device)),
        num_workers=default_num_workers(device),
        is_measured=True,
    )


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
