"""What a fused layer is said to keep, and to have at its fullest moments, against what it really
allocates: on a card, and without one by kernels that launch nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from memory_profile import MemoryProfile, profile_memory
from stub_kernels import stub_triton_kernels
from torch import nn

from finesight.model.attention import PackedAttention, Segments, SharedPrefixAttention
from finesight.model.config import DecoderConfig
from finesight.model.decoder import DecoderLayer
from finesight.model.lora.layer import LoraConfig, LoraLinear
from finesight.model.quant.base import HAS_TRITON
from finesight.model.quant.fp8 import Fp8Weight
from finesight.model.quant.rowwise_quant import Fp8Matrix, Int8Matrix
from finesight.model.rope import RotaryCosSin
from finesight.plan.fused_layer_memory import FusedLayerMemory
from finesight.plan.layer_stack import compute_layer_memory
from finesight.plan.saved_activations import ComputeConfig, LayerInputShape

SMALL = DecoderConfig(
    vocab_size=64,
    hidden_size=192,
    intermediate_size=640,
    num_layers=1,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    use_qk_norm=False,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    mrope_axes=(0,) * 16,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)
LARGE = replace(
    SMALL,
    hidden_size=1536,
    intermediate_size=8960,
    num_heads=12,
    head_dim=128,
    mrope_axes=(0,) * 64,
)
CLOSE = 0.02
"""What cuBLAS takes to work in, and what is left over of a piece of memory."""


def with_adapters(rank: int, dropout: float = 0.0) -> Callable[[DecoderLayer], None]:
    def tune(layer: DecoderLayer) -> None:
        layer.requires_grad_(False)
        for group in layer.fusible_linears:
            layers = {name: LoraConfig(rank, 2.0 * rank) for name in group.output_sizes}
            group.adapter = LoraLinear(group, layers, dropout)

    return tune


def with_one_adapter(layer: DecoderLayer) -> None:
    layer.requires_grad_(False)
    down = layer.fusible_linears[-1]
    down.adapter = LoraLinear(down, {"down_proj": LoraConfig(16, 16.0)}, 0.1)


def to_fp8(layer: DecoderLayer) -> None:
    for group in layer.fusible_linears:
        group.set_quantized_weight(Fp8Matrix, Fp8Weight)
    with_adapters(16, 0.05)(layer)


def to_int8(layer: DecoderLayer) -> None:
    for group in layer.fusible_linears:
        group.set_quantized_weight(Int8Matrix)
    with_adapters(16, 0.05)(layer)


TUNES: dict[str, Callable[[DecoderLayer], object]] = {
    "dropout": with_adapters(16, 0.05),
    "adapted": with_adapters(72),
    "one adapted": with_one_adapter,
    "frozen": lambda layer: layer.requires_grad_(False),
    "all trainable": lambda layer: layer.requires_grad_(True),
    "fp8": to_fp8,
    "int8": to_int8,
}


@dataclass(frozen=True)
class CountedBytes:
    """Bytes that a pass keeps beside its input, and the most that it has at once: forwards beside
    its input, backwards beside what it keeps."""

    saved: int
    forward: int
    backward: int


@dataclass(frozen=True)
class LayerCase:
    """A layer and a pack to pass through it, all of its rows to the end or every seventh; whether
    its input has a gradient."""

    tune: str
    reached: bool
    some: bool

    def __str__(self) -> str:
        return f"{self.tune}, {'reached' if self.reached else 'first'}, {'labels' * self.some}"


CASES = [LayerCase(*of) for of in product(TUNES, (True, False), (True, False))]


@dataclass(frozen=True)
class StubComputing:
    """Where layers are counted: numbers of this type on this device."""

    device: torch.device
    dtype: torch.dtype
    allocated: Callable[[], AbstractContextManager[MemoryProfile]]


@contextmanager
def measure_gpu_bytes() -> Iterator[MemoryProfile]:
    """What torch allocates on the card while it is open."""
    found, before = MemoryProfile(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield found
    found.peak_bytes = torch.cuda.max_memory_allocated() - before
    found.live_bytes = torch.cuda.memory_allocated() - before


BARE = StubComputing(torch.device("cpu"), torch.float32, profile_memory)
CARD = StubComputing(torch.device("cuda"), torch.bfloat16, measure_gpu_bytes)


class MeasuredLayer:
    """One of these sizes, tuned, with packs of these sequences."""

    def __init__(
        self, case: LayerCase, geometry: DecoderConfig, lengths: tuple[int, ...], on: StubComputing
    ) -> None:
        self.case, self.lengths, self.tokens, self.on = case, lengths, sum(lengths), on
        self.shape = self.tokens, geometry.hidden_size
        with on.device:
            self.layer = DecoderLayer(geometry, 0).to(on.dtype).train()
            TUNES[case.tune](self.layer)
            angles = torch.zeros(self.tokens, geometry.head_dim // 2)
            self.rotation = RotaryCosSin.from_angles(angles, on.dtype)
            segments, seed_1 = (
                Segments.from_lengths(lengths, on.device),
                torch.ones(1, dtype=torch.int32),
            )
            self.attention = PackedAttention(segments, seed_1)
            self.only = torch.arange(0, self.tokens, 7) if case.some else None

    @property
    def estimate(self) -> FusedLayerMemory:
        """As the plan sees it."""
        computing = ComputeConfig(
            is_cuda=True, element_size=self.on.dtype.itemsize, has_varlen_attention=True
        )
        found = compute_layer_memory(self.layer, self.case.reached, computing)
        assert isinstance(found, FusedLayerMemory), f"a {type(found).__name__}"
        return found

    def estimated_bytes(self) -> CountedBytes:
        """What a pass is said to take."""
        layer, rows = self.estimate, self.tokens if self.only is None else len(self.only)
        location = LayerInputShape(self.lengths, self.tokens, rows)
        retained, entering = layer.saved_bytes(location), self.tokens * layer.input_row_bytes
        return CountedBytes(
            saved=retained - entering * layer.has_qkv_grad,
            forward=retained + layer.forward_workspace(location) - entering,
            backward=layer.backward_workspace(location),
        )

    def measure_bytes(self) -> CountedBytes:
        """What one really takes."""
        self.layer.zero_grad(set_to_none=True)
        x = torch.zeros(self.shape, device=self.on.device, dtype=self.on.dtype)
        x.requires_grad_(self.case.reached)
        with self.on.allocated() as forward:
            y = self.layer(x, self.rotation, self.attention, self.only)
        if not y.requires_grad:
            return CountedBytes(0, forward.peak_bytes, 0)
        # The gradient of a sum is one number, which the layer lays out: nobody else holds that.
        total = y.sum()
        with self.on.allocated() as back:
            total.backward()
        return CountedBytes(
            forward.live_bytes - y.nbytes, forward.peak_bytes, back.peak_bytes - total.nbytes
        )


@pytest.mark.skipif(HAS_TRITON, reason="where Triton is, kernels are launched")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_estimated_bytes_match_allocated_bytes(
    case: LayerCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_triton_kernels(monkeypatch)
    layer = MeasuredLayer(case, SMALL, (140, 3, 250, 64, 171, 90), BARE)
    # The first pass makes what stays.
    layer.measure_bytes()
    assert layer.measure_bytes() == layer.estimated_bytes()


@pytest.mark.skipif(HAS_TRITON, reason="where Triton is, kernels are launched")
def test_extra_weight_columns_are_allocated_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stub_triton_kernels(monkeypatch)
    for tune in ("dropout", "adapted", "one adapted", "all trainable"):
        layer = MeasuredLayer(LayerCase(tune, True, False), SMALL, (20, 30), BARE)
        layer.measure_bytes()
        weights = [group.weight for group in layer.layer.fusible_linears]
        extra = 0
        for weight in weights:
            assert isinstance(weight, nn.Parameter), f"a {type(weight).__name__}"
            extra += weight.untyped_storage().nbytes() - weight.nbytes
        assert layer.estimate.persistent_bytes == extra
        assert (extra > 0) == (tune != "all trainable")


@pytest.mark.skipif(HAS_TRITON, reason="where Triton is, kernels are launched")
@pytest.mark.parametrize("reached", [True, False])
def test_fp8_codes_are_duplicated_if_gradients_pass(
    reached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_triton_kernels(monkeypatch)
    layer = MeasuredLayer(LayerCase("fp8", reached, False), SMALL, (20, 30), BARE)
    layer.measure_bytes()
    made = 0
    for group in layer.layer.fusible_linears:
        weight = group.weight
        assert isinstance(weight, Fp8Weight), f"a {type(weight).__name__}"
        with profile_memory() as anew:
            weight._transpose()
        made += weight.num_elements + 4 * group.in_features - anew.live_bytes
    assert layer.estimate.persistent_bytes == made


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("lengths", [(250,) * 120, (1500,) * 20], ids=["short", "long"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_estimated_gpu_bytes_match_allocated_bytes(
    case: LayerCase, lengths: tuple[int, ...]
) -> None:
    layer = MeasuredLayer(case, LARGE, lengths, CARD)
    layer.measure_bytes()
    found, output = layer.measure_bytes(), layer.estimated_bytes()
    assert output.saved == pytest.approx(found.saved, rel=CLOSE)
    assert output.forward == pytest.approx(found.forward, rel=CLOSE)
    assert output.backward == pytest.approx(found.backward, rel=CLOSE)


def test_shared_prefix_kv_copies_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys and values as attention keeps them, where sequences are too long for its own kernel."""
    stub_triton_kernels(monkeypatch)
    layer = MeasuredLayer(CASES[0], SMALL, (64, 60, 3), BARE)
    output = layer.estimate
    for prefix_length, copied in ((15, False), (300, True)):
        lengths = prefix_length, 60, 30
        tokens = sum(lengths)
        attention = SharedPrefixAttention(
            Segments.from_lengths(lengths, BARE.device), num_tokens=tokens
        )
        k_TKD = torch.zeros(tokens, SMALL.num_kv_heads, SMALL.head_dim, dtype=BARE.dtype)
        one = attention._expand(k_TKD).nbytes
        branched = LayerInputShape(attention.full_segments.lengths, tokens, tokens)
        baseline = LayerInputShape(lengths, tokens, tokens)
        assert output.saved_bytes(branched) - output.saved_bytes(baseline) == 2 * one * copied
