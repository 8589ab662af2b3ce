"""Estimated saved and peak memory of a fused layer compared with allocated memory.

Tests without a GPU use stub kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from decoder_fixtures import SMALL_DECODER
from memory_profile import MemoryProfile, profile_memory
from stub_kernels import stub_triton_kernels, without_triton
from torch import nn

from finesight.model.attention import PackedAttention, Segments, SharedPrefixAttention
from finesight.model.config import DecoderConfig
from finesight.model.decoder import DecoderLayer
from finesight.model.lora.layer import LoraConfig, LoraLinear
from finesight.model.quant.fp8 import Fp8Matrix, Fp8Weight
from finesight.model.quant.int8 import Int8Matrix
from finesight.model.rope import RotaryCosSin
from finesight.plan.fused_layer_memory import FusedLayerMemory
from finesight.plan.layer_stack import compute_layer_memory
from finesight.plan.saved_activations import ComputeConfig, LayerInputShape

LARGE = replace(
    SMALL_DECODER,
    hidden_size=1536,
    intermediate_size=8960,
    num_heads=12,
    head_dim=128,
    mrope_axes=(0,) * 64,
)
TOLERANCE = 0.02
"""Relative tolerance: cuBLAS workspace and rounding of the allocator."""


def with_adapters(rank: int, dropout: float = 0.0) -> Callable[[DecoderLayer], None]:
    def tune(layer: DecoderLayer) -> None:
        layer.requires_grad_(False)
        for group in layer.fusible_linears:
            layers = {name: LoraConfig(rank, 2.0 * rank) for name in group.output_sizes}
            group.adapter = LoraLinear(group, layers, dropout)

    return tune


def with_one_adapter(layer: DecoderLayer) -> None:
    layer.requires_grad_(False)
    down_proj = layer.fusible_linears[-1]
    down_proj.adapter = LoraLinear(down_proj, {"down_proj": LoraConfig(16, 16.0)}, 0.1)


def to_fp8(layer: DecoderLayer) -> None:
    for group in layer.fusible_linears:
        group.set_quantized_weight(Fp8Matrix, Fp8Weight)
    with_adapters(16, 0.05)(layer)


def to_int8(layer: DecoderLayer) -> None:
    for group in layer.fusible_linears:
        group.set_quantized_weight(Int8Matrix)
    with_adapters(16, 0.05)(layer)


TUNES: dict[str, Callable[[DecoderLayer], object]] = {
    "lora with dropout": with_adapters(16, 0.05),
    "lora": with_adapters(72),
    "one adapter": with_one_adapter,
    "frozen": lambda layer: layer.requires_grad_(False),
    "full": lambda layer: layer.requires_grad_(True),
    "fp8": to_fp8,
    "int8": to_int8,
}


@dataclass(frozen=True)
class CountedBytes:
    """Saved bytes and peak bytes of a pass, without its input.

    The backward peak does not include the saved bytes.
    """

    saved: int
    forward: int
    backward: int


@dataclass(frozen=True)
class LayerCase:
    """A tuned layer; whether its input has a gradient, and whether it selects output rows."""

    tune: str
    has_input_grad: bool
    selects_rows: bool

    def __str__(self) -> str:
        position = "reached" if self.has_input_grad else "first"
        return f"{self.tune}, {position}, {'labels' * self.selects_rows}"


CASES = [LayerCase(*values) for values in product(TUNES, (True, False), (True, False))]


@dataclass(frozen=True)
class DeviceSetup:
    """Device and dtype of a measured layer, and the memory profiler of the device."""

    device: torch.device
    dtype: torch.dtype
    profile: Callable[[], AbstractContextManager[MemoryProfile]]


@contextmanager
def measure_gpu_bytes() -> Iterator[MemoryProfile]:
    """Measure the bytes that torch allocates on the GPU in the block."""
    memory, allocated_before = MemoryProfile(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield memory
    memory.peak_bytes = torch.cuda.max_memory_allocated() - allocated_before
    memory.live_bytes = torch.cuda.memory_allocated() - allocated_before


CPU_SETUP = DeviceSetup(torch.device("cpu"), torch.float32, profile_memory)
GPU_SETUP = DeviceSetup(torch.device("cuda"), torch.bfloat16, measure_gpu_bytes)


class MeasuredLayer:
    """Tuned layer with a pack of sequences of these lengths."""

    def __init__(
        self, case: LayerCase, config: DecoderConfig, lengths: tuple[int, ...], setup: DeviceSetup
    ) -> None:
        self.case, self.lengths, self.tokens, self.setup = case, lengths, sum(lengths), setup
        self.shape = self.tokens, config.hidden_size
        with setup.device:
            self.layer = DecoderLayer(config, 0).to(setup.dtype).train()
            TUNES[case.tune](self.layer)
            angles = torch.zeros(self.tokens, config.head_dim // 2)
            self.rotation = RotaryCosSin.from_angles(angles, setup.dtype)
            segments, seed_1 = (
                Segments.from_lengths(lengths, setup.device),
                torch.ones(1, dtype=torch.int32),
            )
            self.attention = PackedAttention(segments, seed_1)
            self.selected_rows = torch.arange(0, self.tokens, 7) if case.selects_rows else None

    @property
    def estimate(self) -> FusedLayerMemory:
        """Memory of the layer as estimated by the plan."""
        compute = ComputeConfig(
            is_cuda=True, element_size=self.setup.dtype.itemsize, has_varlen_attention=True
        )
        memory = compute_layer_memory(self.layer, self.case.has_input_grad, compute)
        assert isinstance(memory, FusedLayerMemory), f"a {type(memory).__name__}"
        return memory

    def estimated_bytes(self) -> CountedBytes:
        """Return the estimated bytes of a pass."""
        estimate, num_rows = (
            self.estimate,
            self.tokens if self.selected_rows is None else len(self.selected_rows),
        )
        input_shape = LayerInputShape(self.lengths, self.tokens, num_rows)
        saved, input_bytes = (
            estimate.saved_bytes(input_shape),
            self.tokens * estimate.input_row_bytes,
        )
        return CountedBytes(
            saved=saved - input_bytes * estimate.has_qkv_grad,
            forward=saved + estimate.forward_workspace(input_shape) - input_bytes,
            backward=estimate.backward_workspace(input_shape),
        )

    def measure_bytes(self) -> CountedBytes:
        """Return the allocated bytes of a pass."""
        self.layer.zero_grad(set_to_none=True)
        x = torch.zeros(self.shape, device=self.setup.device, dtype=self.setup.dtype)
        x.requires_grad_(self.case.has_input_grad)
        with self.setup.profile() as forward:
            y = self.layer(x, self.rotation, self.attention, self.selected_rows)
        if not y.requires_grad:
            return CountedBytes(0, forward.peak_bytes, 0)
        # The gradient of a sum is an expanded scalar, which only the layer materializes.
        total = y.sum()
        with self.setup.profile() as backward:
            total.backward()
        return CountedBytes(
            forward.live_bytes - y.nbytes, forward.peak_bytes, backward.peak_bytes - total.nbytes
        )


@without_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_estimated_bytes_match_allocated_bytes(
    case: LayerCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_triton_kernels(monkeypatch)
    layer = MeasuredLayer(case, SMALL_DECODER, (140, 3, 250, 64, 171, 90), CPU_SETUP)
    # The first pass allocates persistent buffers.
    layer.measure_bytes()
    assert layer.measure_bytes() == layer.estimated_bytes()


@without_triton
def test_extra_weight_columns_are_allocated_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stub_triton_kernels(monkeypatch)
    for tune in ("lora with dropout", "lora", "one adapter", "full"):
        layer = MeasuredLayer(LayerCase(tune, True, False), SMALL_DECODER, (20, 30), CPU_SETUP)
        layer.measure_bytes()
        weights = [group.weight for group in layer.layer.fusible_linears]
        padding_bytes = 0
        for weight in weights:
            assert isinstance(weight, nn.Parameter), f"a {type(weight).__name__}"
            padding_bytes += weight.untyped_storage().nbytes() - weight.nbytes
        assert layer.estimate.persistent_bytes == padding_bytes
        assert (padding_bytes > 0) == (tune != "full")


@without_triton
@pytest.mark.parametrize("has_input_grad", [True, False])
def test_fp8_codes_are_duplicated_if_gradients_pass(
    has_input_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_triton_kernels(monkeypatch)
    layer = MeasuredLayer(
        LayerCase("fp8", has_input_grad, False), SMALL_DECODER, (20, 30), CPU_SETUP
    )
    layer.measure_bytes()
    num_bytes = 0
    for group in layer.layer.fusible_linears:
        weight = group.weight
        assert isinstance(weight, Fp8Weight), f"a {type(weight).__name__}"
        with profile_memory() as transposed:
            weight._transpose()
        num_bytes += weight.num_elements + 4 * group.in_features - transposed.live_bytes
    assert layer.estimate.persistent_bytes == num_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("lengths", [(250,) * 120, (1500,) * 20], ids=["short", "long"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_estimated_gpu_bytes_match_allocated_bytes(
    case: LayerCase, lengths: tuple[int, ...]
) -> None:
    layer = MeasuredLayer(case, LARGE, lengths, GPU_SETUP)
    layer.measure_bytes()
    measured, estimated = layer.measure_bytes(), layer.estimated_bytes()
    assert estimated.saved == pytest.approx(measured.saved, rel=TOLERANCE)
    assert estimated.forward == pytest.approx(measured.forward, rel=TOLERANCE)
    assert estimated.backward == pytest.approx(measured.backward, rel=TOLERANCE)


def test_shared_prefix_kv_copies_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Attention copies the shared prefix if sequences are too long for the Triton kernel."""
    stub_triton_kernels(monkeypatch)
    layer = MeasuredLayer(CASES[0], SMALL_DECODER, (64, 60, 3), CPU_SETUP)
    estimate = layer.estimate
    for prefix_length, is_copied in ((15, False), (300, True)):
        lengths = prefix_length, 60, 30
        num_tokens = sum(lengths)
        attention = SharedPrefixAttention(
            Segments.from_lengths(lengths, CPU_SETUP.device), num_tokens=num_tokens
        )
        k_TKD = torch.zeros(
            num_tokens, SMALL_DECODER.num_kv_heads, SMALL_DECODER.head_dim, dtype=CPU_SETUP.dtype
        )
        expanded_bytes = attention._expand(k_TKD).nbytes
        expanded_shape = LayerInputShape(attention.full_segments.lengths, num_tokens, num_tokens)
        shared_shape = LayerInputShape(lengths, num_tokens, num_tokens)
        assert (
            estimate.saved_bytes(expanded_shape) - estimate.saved_bytes(shared_shape)
            == 2 * expanded_bytes * is_copied
        )
