"""Estimate the time of a training step.

Counts FLOPs, memory traffic, kernel launches on the host, the optimizer and data loading.

The GPU constants are from runs on one H200 (benchmarks/results/recipes_h200.json,
grounding_full_h200.json, first_qwen_vl_h200.json). tests/plan/test_measured_runs.py compares the
estimates with these runs. The constants of fused layers with adapters are from the steps of 16
samples in ladder_h200.json. The CPU constants are from two cores. Measure them again if kernels
change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from statistics import fmean

import torch

from finesight.model.decoder import FusibleLayer
from finesight.model.linear import FusedLinear, iter_adapters
from finesight.model.quant.base import find_quantized_weights
from finesight.model.quant.fp8 import Fp8Weight
from finesight.model.trainable import MODEL_PARTS, ModelPart, get_part
from finesight.model.vlm import VisionLanguageModel
from finesight.plan.dry_run import PlannedPack, StepTracer
from finesight.plan.peak_memory import PersistentMemory, plan_graph
from finesight.plan.target_device import TargetDevice
from finesight.train.flops import FlopBreakdown, FlopCounter


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
    """

    matmul_fraction: float
    traffic_per_saved_byte: float
    host_forward_s: float
    host_train_s: float
    host_lora_s: float
    host_fused_s: tuple[float, float]


GPU_EFFICIENCY = DeviceEfficiency(
    0.78,
    11.0,
    host_forward_s=0.4e-3,
    host_train_s=1.5e-3,
    host_lora_s=3.0e-3,
    host_fused_s=(0.75e-3, 1.8e-3),
)
CPU_EFFICIENCY = DeviceEfficiency(
    0.75,
    11.0,
    host_forward_s=0.1e-3,
    host_train_s=0.3e-3,
    host_lora_s=0.6e-3,
    host_fused_s=(0.0, 0.0),
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

    The device (`matmul_s` and `memory_s`) and the host, which launches kernels (`host_s`), work
    concurrently, so that the slower one determines the time. `is_loading_blocking` is true without
    data loader workers.
    """

    matmul_s: float
    memory_s: float
    host_s: float
    optimizer_s: float
    data_loading_s: float
    is_loading_blocking: bool

    @property
    def total(self) -> float:
        """Total seconds of the step.

        Data loading workers run concurrently with the step and count only if they are slower.
        Without workers, data loading is added.
        """
        compute_s = max(self.matmul_s + self.memory_s, self.host_s) + self.optimizer_s
        return (
            compute_s + self.data_loading_s
            if self.is_loading_blocking
            else max(compute_s, self.data_loading_s)
        )


def average_step_times(step_times: Sequence[StepTime]) -> StepTime:
    """Return the mean of each part of the step times."""
    parts = zip(*map(astuple, step_times), strict=True)
    matmul_s, memory_s, host_s, optimizer_s, loading_s, is_blocking = map(fmean, parts)
    return StepTime(matmul_s, memory_s, host_s, optimizer_s, loading_s, bool(is_blocking))


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
        self._model, self._target, self._num_workers = model, target, num_workers
        self._tracer = tracer
        on_cpu = CPU_EFFICIENCY if target.dtype == torch.float32 else CPU_16BIT_EFFICIENCY
        self._efficiency = GPU_EFFICIENCY if target.compute.is_cuda else on_cpu
        self._flop_counter = FlopCounter(model)
        self._optimizer_s = persistent.optimizer_traffic_bytes / target.memory_bandwidth
        quantized = find_quantized_weights(model)
        dequantized = (w.num_elements for w in quantized.values() if not isinstance(w, Fp8Weight))
        self._dequantize_bytes = DEQUANTIZE_BYTES_PER_ELEMENT * sum(dequantized)
        self._fp8_fractions = _compute_fp8_fractions(model)

    def estimate_step(
        self,
        packs: Sequence[PlannedPack],
        activation_checkpointing: float,
        has_cached_features: bool = False,
        use_graphs: bool = True,
    ) -> StepTime:
        """Estimate the time of a training step.

        Args:
            has_cached_features: Whether image features are read from the vision cache.
        """
        target, efficiency = self._target, self._efficiency
        flops, memory_bytes, host_s, read_s = 0.0, 0.0, 0.0, 0.0
        for pack in packs:
            flops += self._effective_flops(
                self._flop_counter.count_by_part(pack), has_cached_features
            )
            flops += self._flop_counter.count_checkpointing(pack, activation_checkpointing)
            memory_bytes += (
                efficiency.traffic_per_saved_byte
                * self._tracer.saved_bytes(pack)
                * (1 + FORWARD_TRAFFIC_FRACTION * activation_checkpointing)
            )
            memory_bytes += 0 if has_cached_features else 2 * self._frozen_encoder_bytes(pack)
            memory_bytes += self._dequantize_bytes * (2 + activation_checkpointing)
            host_s += self._estimate_host_seconds(
                pack, activation_checkpointing, has_cached_features, use_graphs
            )
            read_s += 0 if has_cached_features else READ_S_PER_PATCH * pack.num_patches
        return StepTime(
            matmul_s=flops / (target.peak_flops * efficiency.matmul_fraction),
            memory_s=memory_bytes / target.memory_bandwidth,
            host_s=host_s,
            optimizer_s=self._optimizer_s,
            data_loading_s=read_s / max(1, self._num_workers),
            is_loading_blocking=self._num_workers == 0,
        )

    def _effective_flops(self, breakdown: FlopBreakdown, has_cached_features: bool) -> float:
        """Return the FLOPs of a pack, with FP8 products divided by their speedup."""
        by_part = breakdown.matmul_by_part.items()
        effective = {
            part: count * (1 - self._fp8_fractions[part] * (1 - 1 / FP8_SPEEDUP))
            for part, count in by_part
        }
        flops = sum(effective.values()) + breakdown.decoder_attention
        return (
            flops - effective["vision"] - effective["merger"]
            if has_cached_features
            else flops + breakdown.vision_attention
        )

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
            linears = (m for m in block.modules() if isinstance(m, FusedLinear))
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
        efficiency, model, compute = self._efficiency, self._model, self._target.compute
        adapted_paths = {path for path, _, _ in iter_adapters(model)}
        relaunched = FORWARD_TRAFFIC_FRACTION * activation_checkpointing
        train_s = efficiency.host_train_s, efficiency.host_lora_s
        seconds = 0.0
        # A CUDA graph launches all layers at once.
        graph = plan_graph(model, compute, activation_checkpointing, pack) if use_graphs else None
        if graph is None:
            has_lora = any(path.startswith("model.") for path in adapted_paths)
            for layer in model.model.layers:
                is_fused = compute.has_varlen_attention and isinstance(layer, FusibleLayer)
                is_fused = is_fused and bool(layer.fusible_linears)
                seconds += (efficiency.host_fused_s if is_fused else train_s)[has_lora]
            seconds *= 1 + relaunched
        runs_encoder = pack.num_patches > 0 and not has_cached_features
        if runs_encoder and (graph is None or graph.shape.vision_shape is None):
            encoder, layer_s = model.visual, efficiency.host_forward_s
            if encoder.is_encoder_trainable:
                has_lora = any(path.startswith("visual.b") for path in adapted_paths)
                layer_s = train_s[has_lora] * (1 + relaunched)
            seconds += len(encoder.blocks) * layer_s
        return seconds


def _compute_fp8_fractions(model: VisionLanguageModel) -> dict[ModelPart, float]:
    """Return the fraction of weights in FP8 for each part of the model."""
    num_fp8, num_total = dict.fromkeys(MODEL_PARTS, 0), dict.fromkeys(MODEL_PARTS, 0)
    for name, weight in find_quantized_weights(model).items():
        num_total[get_part(name)] += weight.num_elements
        num_fp8[get_part(name)] += weight.num_elements * isinstance(weight, Fp8Weight)
    for name, parameter in model.named_parameters():
        num_total[get_part(name)] += parameter.numel()
    return {part: num_fp8[part] / max(1, num_total[part]) for part in MODEL_PARTS}


def estimate_startup_seconds(persistent: PersistentMemory, target: TargetDevice) -> float:
    """Estimate the seconds from the start of the command to the first step."""
    return (
        STARTUP_S if target.compute.is_cuda else STARTUP_S / 3
    ) + persistent.weight_bytes / DISK_BYTES_PER_S
