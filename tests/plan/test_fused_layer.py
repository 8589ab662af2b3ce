"""What a fused layer is said to keep, and to have at its fullest moments, against what it really
allocates: on a card, and without one by kernels that launch nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from allocations import Allocated, allocated
from bare_kernels import launch_nothing
from torch import nn

from finesight.model.attention import BranchedAttention, PackedAttention, Segments
from finesight.model.fp8 import Fp8Weight
from finesight.model.frozen import KERNELS
from finesight.model.geometry import LanguageGeometry
from finesight.model.language import DecoderLayer
from finesight.model.lora import LoraGroup, LowRank
from finesight.model.rope import Rotation
from finesight.model.rowwise import Fp8Matrix, Int8Matrix
from finesight.plan.fused_layer import FusedLayer
from finesight.plan.kept import Computing, Place
from finesight.plan.stack import layer_of

SMALL = LanguageGeometry(
    vocabulary=64,
    width=192,
    mlp_width=640,
    depth=1,
    heads=6,
    kv_heads=2,
    head_width=32,
    normed_heads=False,
    norm_eps=1e-6,
    theta=1e4,
    rows=(0,) * 16,
    positions=4096,
    tied=True,
)
LARGE = replace(SMALL, width=1536, mlp_width=8960, heads=12, head_width=128, rows=(0,) * 64)
CLOSE = 0.02
"""What cuBLAS takes to work in, and what is left over of a piece of memory."""


def adapted(rank: int, dropout: float = 0.0) -> Callable[[DecoderLayer], None]:
    def tune(layer: DecoderLayer) -> None:
        layer.requires_grad_(False)
        for group in layer.fusible:
            layers = {name: LowRank(rank, 2.0 * rank) for name in group.outputs}
            group.adapter = LoraGroup(group, layers, dropout)

    return tune


def one_adapted(layer: DecoderLayer) -> None:
    layer.requires_grad_(False)
    down = layer.fusible[-1]
    down.adapter = LoraGroup(down, {"down_proj": LowRank(16, 16.0)}, 0.1)


def in_fp8(layer: DecoderLayer) -> None:
    for group in layer.fusible:
        group.freeze_as(Fp8Matrix, Fp8Weight)
    adapted(16, 0.05)(layer)


def in_int8(layer: DecoderLayer) -> None:
    for group in layer.fusible:
        group.freeze_as(Int8Matrix)
    adapted(16, 0.05)(layer)


TUNES: dict[str, Callable[[DecoderLayer], object]] = {
    "dropped": adapted(16, 0.05),
    "adapted": adapted(72),
    "one adapted": one_adapted,
    "frozen": lambda layer: layer.requires_grad_(False),
    "all learns": lambda layer: layer.requires_grad_(True),
    "fp8": in_fp8,
    "int8": in_int8,
}


@dataclass(frozen=True)
class Counted:
    """Bytes that a pass keeps beside its input, and the most that it has at once: forwards beside
    its input, backwards beside what it keeps."""

    kept: int
    forth: int
    back: int


@dataclass(frozen=True)
class Case:
    """A layer and a pack to pass through it, all of its rows to the end or every seventh; whether
    its input has a gradient."""

    tune: str
    reached: bool
    some: bool

    def __str__(self) -> str:
        return f"{self.tune}, {'reached' if self.reached else 'first'}, {'labels' * self.some}"


CASES = [Case(*of) for of in product(TUNES, (True, False), (True, False))]


@dataclass(frozen=True)
class Counting:
    """Where layers are counted: numbers of this type on this device."""

    device: torch.device
    dtype: torch.dtype
    allocated: Callable[[], AbstractContextManager[Allocated]]


@contextmanager
def on_card() -> Iterator[Allocated]:
    """What torch allocates on the card while it is open."""
    found, before = Allocated(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield found
    found.most = torch.cuda.max_memory_allocated() - before
    found.left = torch.cuda.memory_allocated() - before


BARE = Counting(torch.device("cpu"), torch.float32, allocated)
CARD = Counting(torch.device("cuda"), torch.bfloat16, on_card)


class Layer:
    """One of these sizes, tuned, with packs of these sequences."""

    def __init__(
        self, case: Case, geometry: LanguageGeometry, lengths: tuple[int, ...], on: Counting
    ) -> None:
        self.case, self.lengths, self.tokens, self.on = case, lengths, sum(lengths), on
        self.shape = self.tokens, geometry.width
        with on.device:
            self.layer = DecoderLayer(geometry, 0).to(on.dtype).train()
            TUNES[case.tune](self.layer)
            angles = torch.zeros(self.tokens, geometry.head_width // 2)
            self.rotation = Rotation.by(angles, on.dtype)
            segments, seed_1 = Segments.of(lengths, on.device), torch.ones(1, dtype=torch.int32)
            self.attention = PackedAttention(segments, seed_1)
            self.only = torch.arange(0, self.tokens, 7) if case.some else None

    @property
    def said(self) -> FusedLayer:
        """As the plan sees it."""
        computing = Computing(cuda=True, number=self.on.dtype.itemsize, flash=True)
        found = layer_of(self.layer, self.case.reached, computing)
        assert isinstance(found, FusedLayer), f"a {type(found).__name__}"
        return found

    def planned(self) -> Counted:
        """What a pass is said to take."""
        layer, rows = self.said, self.tokens if self.only is None else len(self.only)
        place = Place(self.lengths, self.tokens, rows)
        kept, entering = layer.of_pack(place), self.tokens * layer.entering
        return Counted(
            kept=kept - entering * layer.enters,
            forth=kept + layer.going_forth(place) - entering,
            back=layer.going_back(place),
        )

    def passed(self) -> Counted:
        """What one really takes."""
        self.layer.zero_grad(set_to_none=True)
        x = torch.zeros(self.shape, device=self.on.device, dtype=self.on.dtype)
        x.requires_grad_(self.case.reached)
        with self.on.allocated() as forth:
            y = self.layer(x, self.rotation, self.attention, self.only)
        if not y.requires_grad:
            return Counted(0, forth.most, 0)
        # The gradient of a sum is one number, which the layer lays out: nobody else holds that.
        total = y.sum()
        with self.on.allocated() as back:
            total.backward()
        return Counted(forth.left - y.nbytes, forth.most, back.most - total.nbytes)


@pytest.mark.skipif(KERNELS, reason="where Triton is, kernels are launched")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_are_those_that_are_allocated(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_nothing(monkeypatch)
    layer = Layer(case, SMALL, (140, 3, 250, 64, 171, 90), BARE)
    # The first pass makes what stays.
    layer.passed()
    assert layer.passed() == layer.planned()


@pytest.mark.skipif(KERNELS, reason="where Triton is, kernels are launched")
def test_columns_beside_weights_are_there_from_the_first_pass_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch_nothing(monkeypatch)
    for tune in ("dropped", "adapted", "one adapted", "all learns"):
        layer = Layer(Case(tune, True, False), SMALL, (20, 30), BARE)
        layer.passed()
        weights = [group.weight for group in layer.layer.fusible]
        beside = 0
        for weight in weights:
            assert isinstance(weight, nn.Parameter), f"a {type(weight).__name__}"
            beside += weight.untyped_storage().nbytes() - weight.nbytes
        assert layer.said.stays == beside
        assert (beside > 0) == (tune != "all learns")


@pytest.mark.skipif(KERNELS, reason="where Triton is, kernels are launched")
@pytest.mark.parametrize("reached", [True, False])
def test_codes_are_there_twice_where_a_gradient_goes_through(
    reached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_nothing(monkeypatch)
    layer = Layer(Case("fp8", reached, False), SMALL, (20, 30), BARE)
    layer.passed()
    made = 0
    for group in layer.layer.fusible:
        weight = group.weight
        assert isinstance(weight, Fp8Weight), f"a {type(weight).__name__}"
        with allocated() as anew:
            weight._turned()
        made += weight.numbers + 4 * group.inputs - anew.left
    assert layer.said.stays == made


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("lengths", [(250,) * 120, (1500,) * 20], ids=["short", "long"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_on_a_card_are_those_that_are_allocated(case: Case, lengths: tuple[int, ...]) -> None:
    layer = Layer(case, LARGE, lengths, CARD)
    layer.passed()
    found, said = layer.passed(), layer.planned()
    assert said.kept == pytest.approx(found.kept, rel=CLOSE)
    assert said.forth == pytest.approx(found.forth, rel=CLOSE)
    assert said.back == pytest.approx(found.back, rel=CLOSE)


def test_copies_of_what_long_sequences_go_on_from_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys and values as attention keeps them, where sequences are too long for its own kernel."""
    launch_nothing(monkeypatch)
    layer = Layer(CASES[0], SMALL, (64, 60, 3), BARE)
    said = layer.said
    for trunk, copied in ((15, False), (300, True)):
        lengths = trunk, 60, 30
        tokens = sum(lengths)
        attention = BranchedAttention(Segments.of(lengths, BARE.device), rows=tokens)
        k_TKD = torch.zeros(tokens, SMALL.kv_heads, SMALL.head_width, dtype=BARE.dtype)
        one = attention._branched(k_TKD).nbytes
        branched = Place(attention.whole.lengths, tokens, tokens)
        plain = Place(lengths, tokens, tokens)
        assert said.of_pack(branched) - said.of_pack(plain) == 2 * one * copied
