"""Small packs as recordings: which are recorded, and that one learns what its launches would."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_packs import ALL, CPU, DROPPING, LORA, SEEING, encoded, once, seen, tuned, various
from small_run import make_task
from torch import Tensor

from finesight.config import Tune
from finesight.encode.encoded import Encoded
from finesight.encode.pack import PackedBatch, pack
from finesight.model import attention
from finesight.model.parts import trainable
from finesight.train import left, recorded, sight
from finesight.train.held import Held, Kind
from finesight.train.recorded import Passes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    make_task(folder)
    return folder


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

    def has(self, number: int) -> bool:
        return False

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

    def has(self, number: int) -> bool:
        return False

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
    assert asked([larger] * several) == several - recorded.LATE
    assert asked([longer] * several) == 0, "too large for any card"
    card.half_free = False
    assert asked([larger] * several) == 0
    assert asked([batch] * (recorded.LAUNCHED + 2)) == 2
    card.half_free, card.ahead, card.asked = True, recorded.LATE, 0
    assert asked([larger] * 4 * several) == 0, "not so often in a row"


def test_where_the_card_waits_for_launches_packs_share_recordings(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card()
    monkeypatch.setattr(recorded, "_recordable", lambda model, device: True)
    monkeypatch.setattr(recorded, "Recorded", Counted)
    monkeypatch.setattr(recorded, "_mark", lambda device: card)
    monkeypatch.setattr(recorded, "_half_free", lambda device: card.half_free)
    model = tuned(torch.float32, CPU).eval()
    monkeypatch.setattr(recorded, "LAUNCHED", recorded.LATE)
    packs = various(encoded(folder), monkeypatch) * recorded.LATE
    share = torch.tensor(0.25)

    def learned() -> tuple[int, int]:
        passes = Passes(model, list(trainable(model).values()))
        monkeypatch.setattr(passes, "_forth_and_back", lambda held: share)
        found = passes._recorded
        for one in packs:
            passes.learn(one, None, share)
        assert isinstance(found, Counted)
        return len(packs) - found.asked, len(passes._held)

    assert learned() == (recorded.LATE, 1)
    # Kinds may be hundreds: they are gone through for a recording that is made, not for every pack.
    monkeypatch.setattr(Kind, "among", None)
    card.half_free = False
    assert learned() == (2 * recorded.LAUNCHED, 2), "each kind has its own"
    card.half_free, card.ahead, card.asked = True, 2, 0
    assert learned() == (2 * recorded.LAUNCHED, 2), "the card had something left to do"


def test_recordings_are_shared_no_more_where_they_take_longer_than_launches(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card()
    monkeypatch.setattr(recorded, "_recordable", lambda model, device: True)
    monkeypatch.setattr(recorded, "Recorded", Counted)
    monkeypatch.setattr(recorded, "_mark", lambda device: card)
    monkeypatch.setattr(recorded, "_half_free", lambda device: True)
    model = tuned(torch.float32, CPU).eval()
    monkeypatch.setattr(recorded, "LAUNCHED", 100)
    packs = various(encoded(folder), monkeypatch)
    larger = max(packs, key=lambda batch: len(batch.ids_T))
    smaller = next(one for one in packs if Kind.of(one) != Kind.of(larger))
    passes, share = Passes(model, list(trainable(model).values())), torch.tensor(0.25)
    monkeypatch.setattr(passes, "_forth_and_back", lambda held: share)
    found = passes._recorded
    assert isinstance(found, Counted)
    for one in [smaller, larger] * recorded.LATE:
        passes.learn(one, None, share)
    assert found.asked == recorded.LATE, "both kinds, once they were late"
    monkeypatch.setattr(passes._pace, "replays_sooner", lambda tokens: False)
    for one in [smaller, larger] * 3:
        passes.learn(one, None, share)
    assert found.asked == recorded.LATE, "it is of neither's own kind"
    monkeypatch.setattr(passes._pace, "replays_sooner", lambda tokens: True)
    card.ahead, card.asked = 1, 0
    for one in [smaller, larger] * 3:
        passes.learn(one, None, share)
    assert found.asked == recorded.LATE + 6, "however busy the card is"


def test_of_recordings_that_take_a_pack_it_goes_into_the_smallest(folder: Path) -> None:
    passes = Passes(tuned(torch.float32, CPU), [torch.nn.Parameter(torch.zeros(1))])
    batch = pack(encoded(folder)[:4])
    kind = Kind.of(batch)._replace(tokens=1024)
    sizes = [kind._replace(tokens=1088 + n, sequences=16) for n in (8, 0, 16)]
    for size in (*sizes, sizes[1]._replace(labels=2 * kind.labels)):
        passes._held[size] = Held.room(size, batch, None, passes._tower)
    found = passes._wider(kind)
    assert found is not None
    assert found.kind == sizes[1]


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_shared_recording_learns_what_launches_would(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = torch.device("cuda")
    model = tuned(torch.bfloat16, cuda, SEEING)
    packs = [one.to(cuda) for one in various(encoded(folder), monkeypatch)]
    learning = list(trainable(model).values())
    passes = Passes(model, learning)
    monkeypatch.setattr(recorded, "LATE", 0)
    monkeypatch.setattr(recorded, "LAUNCHED", 100)
    monkeypatch.setattr(sight, "MOST_PATCHES", 0)
    # Of so few tokens a replay always is the sooner one; but a test hangs on no clock.
    monkeypatch.setattr(passes._pace, "replays_sooner", lambda tokens: True)
    # As if each kind had come already, and none had been recorded.
    passes._met.update(Kind.of(one) for one in packs)

    def learned(most: int) -> list[tuple[Tensor, list[Tensor]]]:
        monkeypatch.setattr(recorded, "MOST_WHERE_LATE", most)
        results = []
        for batch in [*packs, *reversed(packs), *packs]:
            torch.manual_seed(len(batch.ids_T))
            share = torch.tensor(1.0 / batch.supervised, device=cuda)
            loss = passes.learn(batch, None, share)
            results.append((loss, [p.grad.float().clone() for p in learning if p.grad is not None]))
            for parameter in learning:
                parameter.grad = None
        return results

    launched, shared = learned(0), learned(6144)
    assert passes._recorded is not None, "recording failed"
    assert len(passes._recorded._graphs) == len(passes._held) == 1
    for (loss, grads), (loss_1, grads_1) in zip(launched, shared, strict=True):
        torch.testing.assert_close(loss_1, loss, rtol=2e-3, atol=2e-3)
        assert len(grads) == len(grads_1)
        for one, other in zip(grads_1, grads, strict=True):
            assert float((one - other).norm()) <= 0.05 * float(other.norm()) + 1e-5
