"""Estimate the time of a training step on a device: a GPU model, or this machine.

GPU models have the speed of their data sheet. The speed of this machine is measured. The estimate
counts FLOPs, memory traffic, kernel launches on the host, the optimizer and data loading.

The GPU constants are from runs on one H200 (benchmarks/results/recipes_h200.json,
grounding_full_h200.json, first_qwen_vl_h200.json). tests/plan/test_measured_runs.py compares the
estimates with these runs. The constants of fused layers with adapters are from the steps of 16
samples in ladder_h200.json, those of sharded layers from scaling_h200_x2.json. The CPU constants
are from two cores. Measure them again if kernels change.
"""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from statistics import fmean
from typing import Literal

import torch

from finesight.errors import UserError
from finesight.host_memory import total_memory
from finesight.infer.model_loader import resolve_device, resolve_precision
from finesight.model.decoder import FusibleLayer
from finesight.model.kernels.runtime import get_device_capability
from finesight.model.linear import FusedLinear, iter_adapters
from finesight.model.quant.base import find_quantized_weights
from finesight.model.quant.fp8 import Fp8Weight
from finesight.model.trainable import MODEL_PARTS, ModelPart, get_part
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import DTYPES
from finesight.plan.dry_run import ComputeTarget, PlannedPack, StepTracer
from finesight.plan.peak_memory import PersistentMemory, plan_graph
from finesight.plan.sharded_memory import FP32_BYTES, GPUS_PER_MACHINE
from finesight.settings.config import Device, Precision
from finesight.train.flops import FlopBreakdown, FlopCounter, measure_peak_flops
from finesight.train.logging import get_device_name
from finesight.train.prefetch import default_num_workers

Link = Literal["PCIe 3", "PCIe 4", "PCIe 5", "NVLink 2", "NVLink 3", "NVLink 4", "NVLink 5"]

LINK_BYTES_PER_S: Mapping[Link, float] = {
    "PCIe 3": 16e9,
    "PCIe 4": 32e9,
    "PCIe 5": 64e9,
    "NVLink 2": 150e9,
    "NVLink 3": 300e9,
    "NVLink 4": 450e9,
    "NVLink 5": 900e9,
}
"""Bytes/s of the connection of a GPU in one direction, by its data sheet (16 lanes of PCIe)."""

NVLINK_FRACTION = 0.8
"""Assumed fraction of these bytes/s that collectives of NCCL reach; not measured yet."""

PCIE_FRACTION = 0.4
"""Assumed fraction of these bytes/s that collectives reach over PCIe; not measured yet.

GPUs without peer-to-peer access exchange data through the memory of the host.
"""

NETWORK_BYTES_PER_S = 12.5e9
"""Assumed bytes/s of each GPU between machines, a network of 100 Gbit/s."""

HOST_COPY_BYTES_PER_S = 20e9
"""Assumed bytes/s of copies between host and GPU, and of the optimizer of one rank on the CPU."""


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """Data sheet values of a GPU model.

    Attributes:
        name: Name of the GPU model.
        memory_gb: Memory in 10^9 bytes.
        tflops: Dense 16-bit matrix products in 10^12 FLOP/s.
        gb_per_s: Memory bandwidth in 10^9 bytes/s.
        capability: CUDA compute capability, major and minor.
        link: Connection between the GPUs of a machine.
    """

    name: str
    memory_gb: float
    tflops: float
    gb_per_s: float
    capability: tuple[int, int]
    link: Link = "PCIe 4"


# Sources: NVIDIA data sheets of T4, V100, A10, A30, A40, A100, A6000, L4, L40S, RTX 6000 Ada, H100,
# H200, B200 and B300; GA102 whitepaper (RTX 30), Ada data sheets (RTX 40), RTX Blackwell whitepaper
# (RTX 50). If a data sheet states sparse FLOP/s, half of the value is used.
GPU_SPECS: tuple[GpuSpec, ...] = (
    GpuSpec("T4", 16, 65, 320, (7, 5), "PCIe 3"),
    GpuSpec("V100-16GB", 16, 125, 900, (7, 0), "NVLink 2"),
    GpuSpec("V100-32GB", 32, 125, 900, (7, 0), "NVLink 2"),
    GpuSpec("RTX 3060", 12, 25.5, 360, (8, 6)),
    GpuSpec("RTX 3080", 10, 59.5, 760, (8, 6)),
    GpuSpec("RTX 3090", 24, 71, 936, (8, 6)),
    GpuSpec("RTX 4060", 8, 30.2, 272, (8, 9)),
    GpuSpec("RTX 4060 Ti 16GB", 16, 44.1, 288, (8, 9)),
    GpuSpec("RTX 4070", 12, 58.3, 504, (8, 9)),
    GpuSpec("RTX 4080", 16, 97.5, 717, (8, 9)),
    GpuSpec("RTX 4090", 24, 165.2, 1008, (8, 9)),
    GpuSpec("RTX 5080", 16, 112.6, 960, (12, 0), "PCIe 5"),
    GpuSpec("RTX 5090", 32, 209.5, 1792, (12, 0), "PCIe 5"),
    GpuSpec("RTX A6000", 48, 154.8, 768, (8, 6)),
    GpuSpec("RTX 6000 Ada", 48, 364.2, 960, (8, 9)),
    GpuSpec("A10", 24, 125, 600, (8, 6)),
    GpuSpec("A10G", 24, 70, 600, (8, 6)),
    GpuSpec("A30", 24, 165, 933, (8, 0)),
    GpuSpec("A40", 48, 149.7, 696, (8, 6)),
    GpuSpec("A100-40GB", 40, 312, 1555, (8, 0), "NVLink 3"),
    GpuSpec("A100-80GB", 80, 312, 2039, (8, 0), "NVLink 3"),
    GpuSpec("L4", 24, 121, 300, (8, 9)),
    GpuSpec("L40S", 48, 362, 864, (8, 9)),
    GpuSpec("H100", 80, 989, 3350, (9, 0), "NVLink 4"),
    GpuSpec("H100-PCIe", 80, 756, 2000, (9, 0), "PCIe 5"),
    GpuSpec("H200", 141, 989, 4800, (9, 0), "NVLink 4"),
    GpuSpec("B200", 180, 2250, 7700, (10, 0), "NVLink 5"),
    GpuSpec("B300", 288, 2250, 8000, (10, 3), "NVLink 5"),
)


def find_gpu_spec(name: str) -> GpuSpec:
    """Return the specification of a GPU model by name, in any spelling.

    Accepts, for example, `a100-80gb`, `A100 80 GB` and `NVIDIA GeForce RTX 4090`.

    Raises:
        UserError: The GPU is unknown. The message lists the most similar names.
    """
    by_key = {_normalize_name(spec.name): spec for spec in GPU_SPECS}
    key = _normalize_name(name)
    if key in by_key:
        return by_key[key]
    similar = [one for one in by_key if key and (one in key or one.startswith(key))]
    similar += difflib.get_close_matches(key, by_key, n=4, cutoff=0.5)
    keys = [*dict.fromkeys(similar)][:4] or [*by_key]
    names = [by_key[one].name for one in keys]
    raise UserError(
        f"unknown GPU {name!r}",
        where="--gpu",
        expected=f"one of {', '.join(names)}",
        remedy="choose the most similar GPU (several: add --gpus N), or run without --gpu on the"
        " target machine to measure its GPU",
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
        num_workers: Default number of data loader workers of a rank.
        is_measured: True for this machine, False for a data sheet.
        num_gpus: Number of GPUs of the run; the other values are those of each GPU. 1 for a CPU.
        link_bandwidth: Bytes/s between the GPUs in one direction.
        host_memory_bytes: Memory of the machine, for offloaded shards; None if it is unknown.
    """

    name: str
    memory_bytes: int
    peak_flops: float
    memory_bandwidth: float
    dtype: torch.dtype
    compute: ComputeTarget
    num_workers: int
    is_measured: bool
    num_gpus: int = 1
    link_bandwidth: float = LINK_BYTES_PER_S["PCIe 4"] * PCIE_FRACTION
    host_memory_bytes: int | None = None

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
    if precision != "auto":
        dtype = DTYPES[precision]
    elif spec.capability >= (8, 0):
        dtype = torch.bfloat16
    else:  # older GPUs have no bf16 matrix products
        dtype = torch.float16
    datasheet_flops = spec.tflops * 1e12
    if dtype.itemsize != 2:
        # torch computes fp32 products at an eighth or less of the 16-bit speed.
        datasheet_flops /= 8
    return TargetDevice(
        name=spec.name,
        memory_bytes=round(spec.memory_gb * 1e9),
        peak_flops=datasheet_flops * ACHIEVABLE_PEAK_FRACTION,
        memory_bandwidth=spec.gb_per_s * 1e9 * ACHIEVABLE_BANDWIDTH_FRACTION,
        dtype=dtype,
        compute=ComputeTarget(True, dtype, spec.capability),
        num_workers=default_num_workers(torch.device("cuda")),
        is_measured=False,
        link_bandwidth=estimate_link_bandwidth(spec.link),
    )


def estimate_link_bandwidth(link: Link) -> float:
    """Return the bytes/s that collectives reach between the GPUs of a machine."""
    if link.startswith("NVLink"):
        return LINK_BYTES_PER_S[link] * NVLINK_FRACTION
    return LINK_BYTES_PER_S[link] * PCIE_FRACTION


def extend_to_gpus(target: TargetDevice, num_gpus: int) -> TargetDevice:
    """Return the target for a run on several such GPUs, which share the CPU cores.

    With more than `GPUS_PER_MACHINE`, the network between machines limits the communication.
    """
    if num_gpus == 1:
        return target
    num_local = min(num_gpus, GPUS_PER_MACHINE)
    bandwidth = target.link_bandwidth
    if num_gpus > GPUS_PER_MACHINE:
        bandwidth = min(bandwidth, NETWORK_BYTES_PER_S)
    num_workers = default_num_workers(torch.device("cuda"), num_local)
    return replace(target, num_gpus=num_gpus, link_bandwidth=bandwidth, num_workers=num_workers)


def extend_to_local_gpus(target: TargetDevice, num_gpus: int) -> TargetDevice:
    """Return the target for a run on several GPUs of this machine.

    The GPU with the least memory and the slowest one count, because all ranks have equal shares.
    GPUs beyond those of this machine are assumed to be equal to them.

    Args:
        target: First GPU of this machine.
    """
    num_visible = min(num_gpus, torch.cuda.device_count())
    slowest = target
    names = {target.name}
    for index in range(num_visible):
        device = torch.device("cuda", index)
        name = get_device_name(device)
        if name not in names:
            names.add(name)
            flops = measure_peak_flops(device, target.dtype)
            other = build_local_target(device, target.dtype, flops)
            slowest = min(slowest, other, key=lambda one: one.peak_flops)
    memory_bytes = find_min_memory(target, num_gpus)
    link = find_link(slowest.name)
    bandwidth = estimate_link_bandwidth(link)
    first = replace(slowest, memory_bytes=memory_bytes, link_bandwidth=bandwidth)
    return extend_to_gpus(first, num_gpus)


def find_min_memory(target: TargetDevice, num_gpus: int) -> int:
    """Return the memory of the smallest of the first GPUs of this machine, in bytes.

    Properties of a device need no CUDA context on it, which would take memory from its rank.

    Args:
        target: One of these GPUs.
    """
    num_visible = min(num_gpus, torch.cuda.device_count())
    sizes = [torch.cuda.get_device_properties(n).total_memory for n in range(num_visible)]
    return min(target.memory_bytes, *sizes)


def find_link(name: str) -> Link:
    """Return the connection of a GPU by name; PCIe 4 if it is unknown.

    Some cards for PCIe have the name of another form with NVLink, such as `A100 80GB PCIe`.
    """
    key = _normalize_name(name)
    key_without_form = key.replace("pcie", "")
    matches: list[GpuSpec] = []
    for spec in GPU_SPECS:
        spec_key = _normalize_name(spec.name)
        if spec_key in key or spec_key in key_without_form:
            matches.append(spec)
    longest = max(matches, key=lambda spec: len(spec.name), default=None)
    if longest is None:
        return "PCIe 4"
    if "pcie" in key and longest.link.startswith("NVLink"):
        return "PCIe 4" if longest.capability >= (8, 0) else "PCIe 3"
    return longest.link


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
    host_memory_bytes = total_memory()
    memory_bytes = host_memory_bytes
    if is_cuda:
        _, memory_bytes = torch.cuda.mem_get_info(device)
    return TargetDevice(
        name=get_device_name(device),
        memory_bytes=memory_bytes,
        host_memory_bytes=host_memory_bytes,
        peak_flops=peak_flops,
        memory_bandwidth=memory_bandwidth or _measure_bandwidth(device),
        dtype=dtype,
        compute=ComputeTarget(is_cuda, dtype, get_device_capability(device)),
        num_workers=default_num_workers(device),
        is_measured=True,
    )


def _measure_bandwidth(device: torch.device) -> float:
    """Measure the memory bandwidth, reads and writes in bytes/s, with copies above all caches."""
    if device.type == "cuda":
        num_elements = 1 << 28
        num_rounds = 5
    else:
        num_elements = 1 << 25
        num_rounds = 3
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


@dataclass(frozen=True, slots=True)
class DeviceEfficiency:
    """Measured efficiency of a device type.

    Attributes:
        matmul_fraction: Fraction of the peak FLOP/s that the matrix products of the model reach.
        traffic_per_saved_byte: Bytes of memory traffic per saved activation byte, in both passes.
            It covers norms, masks, rotary embeddings and activation functions.
        host_forward_s: Host seconds to launch a layer without gradients.
        host_train_s: Host seconds to launch a layer with gradients.
        host_lora_s: Host seconds to launch a layer with gradients and adapters.
        host_fused_s: Host seconds to launch a fused layer with gradients, without and with
            adapters.
        host_sharded_s: Host seconds to launch a layer of a sharded model, without and with
            adapters.
    """

    matmul_fraction: float
    traffic_per_saved_byte: float
    host_forward_s: float
    host_train_s: float
    host_lora_s: float
    host_fused_s: tuple[float, float]
    host_sharded_s: tuple[float, float]


GPU_EFFICIENCY = DeviceEfficiency(
    0.78,
    11.0,
    host_forward_s=0.4e-3,
    host_train_s=1.5e-3,
    host_lora_s=3.0e-3,
    host_fused_s=(0.75e-3, 1.8e-3),
    host_sharded_s=(3.5e-3, 12e-3),
)
CPU_EFFICIENCY = DeviceEfficiency(
    0.75,
    11.0,
    host_forward_s=0.1e-3,
    host_train_s=0.3e-3,
    host_lora_s=0.6e-3,
    host_fused_s=(0.0, 0.0),
    host_sharded_s=(0.0, 0.0),
)
CPU_16BIT_EFFICIENCY = replace(CPU_EFFICIENCY, matmul_fraction=0.28)
"""Efficiency of a CPU in 16 bits, measured with finesight-tiny, whose matrices are small."""

FP8_SPEEDUP = 1.4
"""Speedup of matrix products in FP8 over 16 bits, including the time of quantization."""

DEQUANTIZE_BYTES_PER_ELEMENT = 10.0
"""Bytes of memory traffic that take as long as dequantizing one 4-bit weight."""

FORWARD_TRAFFIC_FRACTION = 1 / 3
"""Fraction of a step's memory traffic that belongs to the forward pass."""

READ_S_PER_PATCH = 3.1e-6
"""CPU seconds to decode and resize one patch (benchmarks/results/encode_speed.json)."""

STARTUP_S = 9.0
"""Seconds from the command to the first step on a GPU, without reading the weights.

Includes the import of libraries and the compilation of kernels.
"""

DISK_BYTES_PER_S = 1.5e9
"""Assumed bandwidth of reading weights from a disk to a GPU, in bytes/s."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Estimated time of a training step in seconds.

    The device (`matmul_s`, `memory_s` and `communication_s`) and the host, which launches kernels
    (`host_s`), work concurrently, so that the slower one determines the time.
    `is_loading_blocking` is true without data loader workers. `communication_s` is the time of
    collectives between GPUs, and of copies between host and GPU; it is added to that of kernels.
    """

    matmul_s: float
    memory_s: float
    host_s: float
    optimizer_s: float
    data_loading_s: float
    is_loading_blocking: bool
    communication_s: float = 0.0

    @property
    def total(self) -> float:
        """Total seconds of the step.

        Data loading workers run concurrently with the step and count only if they are slower.
        Without workers, data loading is added.
        """
        device_s = self.matmul_s + self.memory_s + self.communication_s
        compute_s = max(device_s, self.host_s) + self.optimizer_s
        if self.is_loading_blocking:
            return compute_s + self.data_loading_s
        return max(compute_s, self.data_loading_s)


def average_step_times(step_times: Sequence[StepTime]) -> StepTime:
    """Return the mean of each part of the step times."""
    parts = zip(*map(astuple, step_times), strict=True)
    matmul_s, memory_s, host_s, optimizer_s, loading_s, is_blocking, communication_s = map(
        fmean, parts
    )
    return StepTime(
        matmul_s,
        memory_s,
        host_s,
        optimizer_s,
        loading_s,
        bool(is_blocking),
        communication_s,
    )


class StepTimeEstimator:
    """Estimates the time of training steps of a model on a target device."""

    def __init__(
        self,
        tracer: StepTracer,
        target: TargetDevice,
        persistent: PersistentMemory,
        num_workers: int,
    ) -> None:
        model = tracer.model
        self._model = model
        self._target = target
        self._num_workers = num_workers
        self._tracer = tracer
        self._efficiency = _select_efficiency(target)
        self._flop_counter = FlopCounter(model)
        self._persistent = persistent
        optimizer_bandwidth = target.memory_bandwidth
        if persistent.layout.is_offloaded:
            optimizer_bandwidth = HOST_COPY_BYTES_PER_S
        self._optimizer_s = persistent.optimizer_traffic_bytes / optimizer_bandwidth
        num_dequantized = 0
        for weight in find_quantized_weights(model).values():
            if not isinstance(weight, Fp8Weight):
                num_dequantized += weight.num_elements
        self._dequantize_bytes = DEQUANTIZE_BYTES_PER_ELEMENT * num_dequantized
        self._fp8_fractions = _compute_fp8_fractions(model)
        # In forward passes; a backward pass takes as long as two, a baseline as one.
        self.num_passes = 3 * tracer.objective.num_updates + tracer.objective.has_baseline
        teacher = tracer.teacher
        self._count_teacher_flops = FlopCounter(model if teacher is None else teacher).count

    def estimate_step(
        self,
        packs: Sequence[PlannedPack],
        activation_checkpointing: float,
        has_cached_features: bool = False,
        use_graphs: bool = True,
    ) -> StepTime:
        """Estimate the time of a step, with the forward passes of a baseline and a teacher.

        Args:
            has_cached_features: Whether image features are read from the vision cache.
        """
        target = self._target
        efficiency = self._efficiency
        flops = 0.0
        memory_bytes = 0.0
        host_s = 0.0
        read_s = 0.0
        for pack in packs:
            breakdown = self._flop_counter.count_by_part(pack)
            # Each token of a split sample attends to those of all ranks.
            decoder_attention = breakdown.decoder_attention * pack.num_ranks
            breakdown = replace(breakdown, decoder_attention=decoder_attention)
            flops += self._effective_flops(breakdown, has_cached_features)
            flops += self._flop_counter.count_checkpointing(pack, activation_checkpointing)
            memory_bytes += (
                efficiency.traffic_per_saved_byte
                * self._tracer.saved_bytes(pack)
                * (1 + FORWARD_TRAFFIC_FRACTION * activation_checkpointing)
            )
            if not has_cached_features:
                memory_bytes += 2 * self._frozen_encoder_bytes(pack)
                read_s += READ_S_PER_PATCH * pack.num_patches
            memory_bytes += self._dequantize_bytes * (2 + activation_checkpointing)
            host_s += self._estimate_host_seconds(
                pack, activation_checkpointing, has_cached_features, use_graphs
            )
        # The sums above are of one forward and one backward pass.
        scale = self.num_passes / 3
        flops *= scale
        memory_bytes *= scale
        host_s *= scale
        teacher = self._tracer.teacher
        if teacher is not None:
            flops += sum(map(self._count_teacher_flops, packs))
            memory_bytes += len(packs) * sum(one.nbytes for one in teacher.parameters())
            host_s += len(packs) * len(teacher.model.layers) * efficiency.host_forward_s
        return StepTime(
            matmul_s=flops / (target.peak_flops * efficiency.matmul_fraction),
            memory_s=memory_bytes / target.memory_bandwidth,
            host_s=host_s,
            optimizer_s=self._optimizer_s,
            data_loading_s=read_s / max(1, self._num_workers),
            is_loading_blocking=self._num_workers == 0,
            communication_s=self._estimate_communication_seconds(len(packs)),
        )

    def _estimate_communication_seconds(self, num_packs: int) -> float:
        """Estimate the seconds of the collectives of a step, without overlap with kernels.

        An all-reduce transfers its data twice: a reduce-scatter, then an all-gather.
        """
        persistent = self._persistent
        layout = persistent.layout
        if layout.num_ranks == 1:
            return 0.0
        other_ranks_fraction = 1 - 1 / layout.num_ranks
        sharded = persistent.sharded
        if sharded is None:
            reduced_bytes = FP32_BYTES * persistent.num_trainable
            num_bytes = 2 * reduced_bytes * other_ranks_fraction
            return num_bytes / self._target.link_bandwidth
        # Two all-reduces of the replicated parameters: of fp32 gradients and of updated values.
        replicated_bytes = sharded.num_replicated * (FP32_BYTES + self._target.dtype.itemsize)
        num_bytes = 2 * replicated_bytes * other_ranks_fraction
        num_passes = num_packs * self.num_passes / 3
        num_bytes += num_passes * sharded.total.communicated_bytes
        seconds = num_bytes / self._target.link_bandwidth
        if layout.is_offloaded:
            seconds += num_passes * sharded.total.transferred_bytes / HOST_COPY_BYTES_PER_S
        return seconds

    def _effective_flops(self, breakdown: FlopBreakdown, has_cached_features: bool) -> float:
        """Return the FLOPs of a pack, with FP8 products divided by their speedup."""
        effective = {}
        for part, count in breakdown.matmul_by_part.items():
            effective[part] = count * (1 - self._fp8_fractions[part] * (1 - 1 / FP8_SPEEDUP))
        flops = sum(effective.values()) + breakdown.decoder_attention
        if has_cached_features:
            return flops - effective["vision"] - effective["merger"]
        return flops + breakdown.vision_attention

    def _frozen_encoder_bytes(self, pack: PlannedPack) -> int:
        """Return the activation bytes of all blocks of a frozen vision encoder.

        Counts hidden states and MLP features, each written and read. Returns 0 for a trainable
        encoder.
        """
        encoder = self._model.visual
        if encoder.is_encoder_trainable:
            return 0
        num_elements = 0
        for block in encoder.blocks:
            linears = [module for module in block.modules() if isinstance(module, FusedLinear)]
            up_features = max(sum(linear.output_sizes.values()) for linear in linears)
            num_elements += encoder.config.hidden_size + up_features
        return pack.num_patches * 2 * num_elements * self._target.dtype.itemsize

    def _estimate_host_seconds(
        self,
        pack: PlannedPack,
        activation_checkpointing: float,
        has_cached_features: bool,
        use_graphs: bool,
    ) -> float:
        efficiency = self._efficiency
        model = self._model
        compute = self._target.compute
        adapted_paths = {path for path, _, _ in iter_adapters(model)}
        relaunched = FORWARD_TRAFFIC_FRACTION * activation_checkpointing
        train_s = efficiency.host_train_s, efficiency.host_lora_s
        fused_s = efficiency.host_fused_s
        if self._persistent.sharded is not None:
            train_s = fused_s = efficiency.host_sharded_s
        seconds = 0.0
        # A CUDA graph launches all layers at once.
        graph = None
        if use_graphs:
            graph = plan_graph(model, compute, activation_checkpointing, pack)
        if graph is None:
            has_lora = any(path.startswith("model.") for path in adapted_paths)
            for layer in model.model.layers:
                is_fused = compute.has_varlen_attention and isinstance(layer, FusibleLayer)
                is_fused = is_fused and bool(layer.fusible_linears)
                layer_s = fused_s if is_fused else train_s
                seconds += layer_s[has_lora]
            seconds *= 1 + relaunched
        runs_encoder = pack.num_patches > 0 and not has_cached_features
        if runs_encoder and (graph is None or graph.shape.vision_shape is None):
            encoder = model.visual
            block_s = efficiency.host_forward_s
            if encoder.is_encoder_trainable:
                has_lora = any(path.startswith("visual.b") for path in adapted_paths)
                block_s = train_s[has_lora] * (1 + relaunched)
            seconds += len(encoder.blocks) * block_s
        return seconds


def _select_efficiency(target: TargetDevice) -> DeviceEfficiency:
    if target.compute.is_cuda:
        return GPU_EFFICIENCY
    if target.dtype == torch.float32:
        return CPU_EFFICIENCY
    return CPU_16BIT_EFFICIENCY


def _compute_fp8_fractions(model: VisionLanguageModel) -> dict[ModelPart, float]:
    """Return the fraction of weights in FP8 for each part of the model."""
    num_fp8 = dict.fromkeys(MODEL_PARTS, 0)
    num_total = dict.fromkeys(MODEL_PARTS, 0)
    for name, weight in find_quantized_weights(model).items():
        num_total[get_part(name)] += weight.num_elements
        if isinstance(weight, Fp8Weight):
            num_fp8[get_part(name)] += weight.num_elements
    for name, parameter in model.named_parameters():
        num_total[get_part(name)] += parameter.numel()
    return {part: num_fp8[part] / max(1, num_total[part]) for part in MODEL_PARTS}


def estimate_startup_seconds(persistent: PersistentMemory, target: TargetDevice) -> float:
    """Estimate the seconds from the start of the command to the first step."""
    seconds = STARTUP_S
    if not target.compute.is_cuda:
        seconds /= 3
    # Every rank reads the complete model.
    weight_bytes = persistent.loading_bytes or persistent.weight_bytes
    return seconds + weight_bytes / DISK_BYTES_PER_S
