"""Small packs as recordings: what fills them up changes nothing, and a recording learns what its
launches would."""

from __future__ import annotations

import itertools
import random
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import make_task
from torch import Tensor

from finesight.config import DataFile, PixelRange, Tune
from finesight.data.sources import load_sources
from finesight.encode.encoded import Encoded
from finesight.encode.pack import PackedBatch, beginning_of, contexts, pack
from finesight.encode.render import Renderer
from finesight.hub import locate
from finesight.model import attention
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import apply_tuning, trainable
from finesight.model.weights import load_model
from finesight.train import left, recorded
from finesight.train.held import Held, Kind
from finesight.train.recorded import Passes

CPU = torch.device("cpu")
LORA = Tune.model_validate({"lora": {"rank": 8, "dropout": 0.1}})
PARTS = "vision", "merger", "language"
SEEING = Tune.model_validate(dict.fromkeys(PARTS, "lora") | {"lora": {"rank": 8}})
DROPPING = SEEING.model_copy(update={"lora": LORA.lora})
ALL = Tune.model_validate(dict.fromkeys((*PARTS, "embeddings"), "full"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    make_task(folder)
    return folder


def encoded(folder: Path) -> list[Encoded]:
    renderer = Renderer(locate("finesight-tiny"), PixelRange(min_pixels=784, max_pixels=7056))
    corpus = load_sources((DataFile(path=folder / "train.jsonl"),))
    return [renderer.encode(sample) for sample in corpus.read()]


def tuned(dtype: torch.dtype, device: torch.device, tune: Tune = LORA) -> VisionLanguageModel:
    model = load_model(locate("finesight-tiny"), dtype, device)
    apply_tuning(model, tune, 0)
    for name, parameter in trainable(model).items():
        if ".adapter.b" in name:
            parameter.data.normal_(0, 0.1)
    return model.train()


def seen(model: VisionLanguageModel, batch: PackedBatch) -> Tensor | None:
    with torch.no_grad():
        return model.see(batch.patches_ND, batch.grids) if batch.grids else None


def once(samples: Sequence[Encoded]) -> PackedBatch:
    """What all of them begin with is laid once."""
    beginning = beginning_of([one.outline for one in samples])
    assert beginning, "they begin with nothing"
    return pack(samples, beginning=beginning)


@pytest.mark.parametrize("packed", [pack, once])
def test_what_fills_a_pack_up_changes_nothing(
    folder: Path, packed: Callable[[Sequence[Encoded]], PackedBatch]
) -> None:
    model = tuned(torch.float32, CPU).eval()
    samples = encoded(folder)
    batch = packed(samples[:5])
    features = seen(model, batch)
    held = Held.room(Kind.of(batch), batch, features, model.visual)
    most = max(contexts(batch.lengths, batch.beginning))
    assert max(contexts(held.batch.lengths, held.batch.beginning)) == held.kind.longest >= most
    assert held.batch.beginning == batch.beginning
    # Another one was there before.
    other = packed(samples[5:9])
    held.lay(other, seen(model, other), torch.tensor(2.0), model.visual)
    held.lay(batch, features, torch.tensor(0.5), model.visual)
    lengths = held.batch.bounds_S1.diff().tolist()
    assert len(lengths) == held.kind.sequences
    assert lengths[: len(batch.lengths)] == list(batch.lengths)
    # Without a kernel for segments of any length, empty ones have to be left out.
    full = [length for length in lengths if length]
    bounds_S1 = held.batch.bounds_S1[: len(full) + 1]
    filled = replace(held.batch, lengths=tuple(full), bounds_S1=bounds_S1)
    found = model(filled, held.features_MKD)[: batch.supervised]
    torch.testing.assert_close(found, model(batch, features))
    assert torch.equal(held.batch.target_L[: batch.supervised], batch.target_L)
    assert set(held.batch.target_L[batch.supervised :].tolist()) <= {-1}
    assert held.share.item() == 0.5


def test_what_fills_a_pack_up_reads_no_more_than_a_kind_has(folder: Path) -> None:
    """Each sequence of nothing goes on from the beginning, too."""
    model, chance = tuned(torch.float32, CPU), random.Random(0)
    some = pack(encoded(folder)[:2])
    for _ in range(300):
        beginning = chance.choice([0, 15, 200, 400])
        own = chance.choice([5, 40, 140, 300])
        count = chance.randint(2, min(60, 16_000 // own))
        lengths = [chance.randint(1, own) for _ in range(count)]
        lengths = [beginning, *lengths] if beginning else lengths
        tokens = sum(lengths)
        whole = torch.zeros(tokens, dtype=torch.int64)
        batch = replace(
            some,
            lengths=tuple(lengths),
            beginning=beginning,
            ids_T=whole,
            positions_3T=whole.expand(3, -1),
            bounds_S1=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        )
        kind = Kind.of(batch)
        held = Held.room(kind, batch, None, model.visual)
        held.lay(batch, None, torch.tensor(1.0), model.visual)
        laid = held.batch.bounds_S1.diff()
        assert laid[: len(lengths)].tolist() == lengths
        assert int(laid.sum()) == kind.tokens
        assert int(laid.min()) >= 0
        assert int(laid[beginning > 0 :].max()) + beginning <= kind.longest


def test_kinds_are_few(folder: Path) -> None:
    samples = encoded(folder)
    packs = [pack(samples[start : start + 4]) for start in range(8)]
    kinds = {Kind.of(batch) for batch in packs}
    assert len(kinds) < len({len(batch.ids_T) for batch in packs})
    for batch in packs:
        kind = Kind.of(batch)
        assert kind.tokens > len(batch.ids_T)
        assert kind.sequences > len(batch.lengths)
        assert kind.longest >= max(batch.lengths)
        assert kind.places >= len(batch.visual_at_M)
        assert kind.labels >= batch.supervised


WAYS = [
    (LORA, True, 0.0),
    (LORA, True, 1.0),
    (LORA, False, 0.0),
    (LORA, False, 1.0),
    (SEEING, False, 0.0),
    (SEEING, False, 1.0),
    (ALL, False, 0.0),
]
"""What is tuned, whether features are known, and the share of layers that are recomputed."""


class Full:
    """Recordings for which there is no memory: what was computed by then waits in the error."""

    def __init__(self, device: torch.device) -> None:
        self.asked = 0

    def run(self, number: int, function: Callable[[], Tensor]) -> Tensor:
        self.asked += 1
        held = torch.zeros(1)
        WAITING.append(weakref.ref(held))
        raise torch.OutOfMemoryError("no room for a recording")


WAITING: list[weakref.ref[Tensor]] = []


class Counted:
    """Recordings that are launched, and how often."""

    def __init__(self, device: torch.device) -> None:
        self.asked = 0

    def run(self, number: int, function: Callable[[], Tensor]) -> Tensor:
        self.asked += 1
        return function()


class Card:
    """Through with what was launched whenever it is asked, but for every so-manieth time; and
    whether half of its memory is free."""

    half_free = True
    ahead = 1_000_000
    asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked % self.ahead > 0


def test_larger_packs_are_recorded_where_the_card_waits_for_launches(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card()
    monkeypatch.setattr(recorded, "_recordable", lambda model, device: True)
    monkeypatch.setattr(recorded, "Recorded", Counted)
    monkeypatch.setattr(recorded, "_mark", lambda device: card)
    monkeypatch.setattr(recorded, "_half_free", lambda device: card.half_free)
    model = tuned(torch.float32, CPU).eval()
    samples = encoded(folder)
    batch, longer = pack(samples[:4]), pack(samples[:12])
    monkeypatch.setattr(recorded, "MOST_TOKENS", len(batch.ids_T))
    monkeypatch.setattr(recorded, "MOST_WHERE_LATE", len(longer.ids_T) - 1)
    share = torch.tensor(0.25)

    def asked(packs: list[PackedBatch]) -> int:
        passes = Passes(model, list(trainable(model).values()))
        # Segments of nothing, as a recording has, are for a card alone.
        monkeypatch.setattr(passes, "_forth_and_back", lambda held: share)
        found = passes._recorded
        for one in packs:
            passes.learn(one, None, share)
        assert isinstance(found, Counted)
        return found.asked

    larger = pack(samples[:8])
    assert len(batch.ids_T) < len(larger.ids_T) < len(longer.ids_T)
    several = recorded.LATE + recorded.LAUNCHED + 2
    assert asked([batch] * (recorded.LAUNCHED + 2)) == 2
    assert asked([larger] * several) == 2
    assert asked([longer] * several) == 0, "too large for any card"
    card.half_free = False
    assert asked([larger] * several) == 0
    assert asked([batch] * (recorded.LAUNCHED + 2)) == 2
    card.half_free, card.ahead, card.asked = True, recorded.LATE, 0
    assert asked([larger] * 4 * several) == 0, "not so often in a row"


def test_where_there_is_no_memory_for_recordings_all_is_launched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "_recordable", lambda model, device: True)
    monkeypatch.setattr(recorded, "Recorded", Full)
    model = tuned(torch.float32, CPU).eval()
    learning = list(trainable(model).values())
    passes, plain = Passes(model, learning), Passes(model, learning)
    plain.forget()
    launch = passes._launch

    def launched(*inputs: Any) -> Tensor:
        assert [one() for one in WAITING] == [None] * len(WAITING), "memory is not given back yet"
        return launch(*inputs)

    monkeypatch.setattr(passes, "_launch", launched)
    full = passes._recorded
    batch, share = pack(encoded(folder)[:4]), torch.tensor(0.25)
    found = []
    for own in (plain, *[passes] * (recorded.LAUNCHED + 2)):
        loss = own.learn(batch, None, share)
        grads = [p.grad.clone() for p in learning if p.grad is not None]
        found.append((loss, grads))
        for parameter in learning:
            parameter.grad = None
    assert isinstance(full, Full)
    assert full.asked == 1, "kinds that come once are not recorded, and one failure is enough"
    assert passes._recorded is None
    (loss, grads), *others = found
    for loss_1, grads_1 in others:
        assert torch.equal(loss, loss_1)
        assert all(torch.equal(one, other) for one, other in zip(grads, grads_1, strict=True))


def test_texts_teach_a_tower_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among pictured packs there may be one of texts alone."""
    monkeypatch.setattr(recorded, "_recordable", lambda model, device: True)
    monkeypatch.setattr(recorded, "Recorded", Full)
    tune = Tune.model_validate({"vision": "lora", "language": "frozen"})
    model = tuned(torch.float32, CPU, tune)
    learning = list(trainable(model).values())
    passes = Passes(model, learning)
    texts = replace(
        pack(encoded(folder)[:2]),
        grids=(),
        patches_ND=torch.empty(0, 588, dtype=torch.uint8),
        visual_at_M=torch.empty(0, dtype=torch.int64),
    )
    for _ in range(recorded.LAUNCHED + 2):
        assert passes.learn(texts, None, torch.tensor(1.0)) > 0
    assert all(parameter.grad is None for parameter in learning)
    assert isinstance(passes._recorded, Full)
    assert passes._recorded.asked == 0
    passes.learn(pack(encoded(folder)[:2]), None, torch.tensor(1.0))
    assert any(parameter.grad is not None for parameter in learning)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_drop_outs_are_the_same_recorded_or_not(folder: Path) -> None:
    """The tower draws first, whoever asks it, and then the seed of the decoder."""
    cuda = torch.device("cuda")
    model = tuned(torch.bfloat16, cuda, DROPPING)
    batch = pack(encoded(folder)[:3]).to(cuda)
    torch.manual_seed(5)
    inside = model(batch)
    torch.manual_seed(5)
    features = model.see(batch.patches_ND, batch.grids)
    torch.testing.assert_close(model(batch, features), inside)


def test_what_learns_much_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned(torch.float32, CPU)
    assert recorded.learns_little(model)
    monkeypatch.setattr(recorded, "MOST_LEARNED", 1000)
    assert not recorded.learns_little(model)


def test_what_comes_back_to_features_goes_on_to_the_tower(folder: Path) -> None:
    model = tuned(torch.float32, CPU, ALL)
    batch = pack(encoded(folder)[:5])
    features = model.see(batch.patches_ND, batch.grids)
    held = Held.room(Kind.of(batch), batch, features, model.visual)
    held.lay(batch, features, torch.tensor(1.0), model.visual)
    ((laid, back),) = held.learned
    assert torch.equal(laid[: len(features)], features)
    # What a pack of nothing was filled up with has no way back.
    back.copy_(torch.arange(back.numel()).view_as(back) / back.numel())
    held.lead_back(features)
    parameters = list(model.visual.parameters())
    found = [parameter.grad for parameter in parameters]
    again = model.see(batch.patches_ND, batch.grids)
    expected = torch.autograd.grad((again * back[: len(again)]).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("tune", "known", "recompute", "packed", "short"),
    [
        *((*way, pack, 256) for way in WAYS),
        *((*way, once, 256) for way in WAYS),
        # With the kernels of long sequences.
        *((*way, once, 0) for way in WAYS[:2]),
    ],
)
def test_a_recording_learns_what_its_launches_would(
    folder: Path,
    tune: Tune,
    known: bool,
    recompute: float,
    packed: Callable[[Sequence[Encoded]], PackedBatch],
    short: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = torch.device("cuda")
    model = tuned(torch.bfloat16, cuda, tune)
    model.recompute = recompute
    samples = encoded(folder)
    monkeypatch.setattr(recorded, "LAUNCHED", 0)
    # So that some take their way by the hooks, and others not.
    monkeypatch.setattr(left, "LARGE", 10_000)
    monkeypatch.setattr(attention, "SHORT", short)
    packs = [packed(samples[start : start + 4]).to(cuda) for start in (0, 4, 0, 4, 2, 0)]
    learning = list(trainable(model).values())
    passes = Passes(model, learning)

    def learned(most: int) -> list[tuple[Tensor, list[Tensor]]]:
        monkeypatch.setattr(recorded, "MOST_TOKENS", most)
        results = []
        for number, batch in enumerate(packs):
            torch.manual_seed(number)
            features = seen(model, batch) if known else None
            share = torch.tensor(1.0 / batch.supervised, device=cuda)
            loss = passes.learn(batch, features, share)
            results.append((loss, [p.grad.float().clone() for p in learning if p.grad is not None]))
            for parameter in learning:
                parameter.grad = None
        return results

    launched, first, again = learned(0), learned(6144), learned(6144)
    assert passes._recorded is not None, "recording failed"
    assert passes._recorded._graphs, "nothing was recorded"
    for (loss, grads), (loss_1, grads_1), (loss_2, grads_2) in zip(
        launched, first, again, strict=True
    ):
        torch.testing.assert_close(loss_1, loss, rtol=2e-3, atol=2e-3)
        assert len(grads) == len(grads_1)
        for one, other in zip(grads_1, grads, strict=True):
            assert float((one - other).norm()) <= 0.05 * float(other.norm()) + 1e-5
        # From the same seed, a replay gives the same bits.
        assert torch.equal(loss_2, loss_1)
        assert all(torch.equal(one, other) for one, other in zip(grads_2, grads_1, strict=True))
