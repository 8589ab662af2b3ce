"""What a recording reads: what fills a pack up changes nothing, and kinds are few."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recorded_packs import ALL, CPU, encoded, made, once, seen, tuned
from small_run import make_task

from finesight.encode.encoded import Encoded
from finesight.encode.pack import PackedBatch, contexts, pack
from finesight.train.held import Held, Kind
from finesight.train.sight import SightKind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    make_task(folder)
    return folder


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("packed", [pack, once])
def test_what_fills_a_pack_up_changes_nothing(
    folder: Path,
    packed: Callable[[Sequence[Encoded]], PackedBatch],
    shared: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tuned(torch.float32, CPU).eval()
    samples = encoded(folder)
    batch = packed(samples[:5])
    features = seen(model, batch)
    kind = Kind.of(batch)
    if shared:
        monkeypatch.setattr("finesight.train.held.SPARE", 1)
        larger = Kind.of(packed(samples[:9]))
        kind = kind.among([larger])
        assert kind.takes(larger)
        assert kind != Kind.of(batch)
    held = Held.room(kind, batch, features, model.visual)
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
        batch = made(some, lengths, beginning, some.supervised)
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


def test_a_recording_among_several_kinds_takes_packs_of_each(folder: Path) -> None:
    model, chance = tuned(torch.float32, CPU), random.Random(0)
    some, taken = pack(encoded(folder)[:2]), 0
    for _ in range(100):
        beginning, most = chance.choice([0, 15, 200]), chance.choice([40, 140, 300])
        count = chance.randint(3, 20)
        packs = []
        for _ in range(6):
            lengths = [chance.randint(most // 2, most) for _ in range(count + chance.randint(0, 2))]
            lengths = [beginning, *lengths] if beginning else lengths
            labels = chance.randint(count, 3 * count)
            packs.append(made(some, lengths, beginning, labels))
        kinds = [Kind.of(one) for one in packs]
        kind = kinds[0].among(kinds[1:])
        assert kind.takes(kinds[0])
        assert kind.tokens <= kinds[0].tokens * 9 // 8
        held = Held.room(kind, packs[0], None, model.visual)
        for own, batch in zip(kinds, packs, strict=True):
            if not kind.takes(own):
                continue
            taken += own != kind
            held.lay(batch, None, torch.tensor(1.0), model.visual)
            laid, count = held.batch.bounds_S1.diff(), len(batch.lengths)
            assert laid[:count].tolist() == list(batch.lengths)
            assert int(laid.sum()) == kind.tokens
            assert int(laid.min()) >= 0
            assert int(laid[beginning > 0 :].max()) + beginning <= kind.longest
            assert len(held.batch.target_L) >= batch.supervised
    assert taken > 100


def test_a_recording_takes_no_packs_of_another_way(folder: Path) -> None:
    samples = encoded(folder)
    kind = Kind.of(pack(samples[:4]))._replace(tokens=1024, sequences=16)
    assert kind.takes(kind)
    for other in (
        kind._replace(beginning=8),
        kind._replace(sight=SightKind(256, 588, ((8, 64),))),
        kind._replace(places=0),
        kind._replace(tokens=kind.tokens * 7 // 8),
        kind._replace(tokens=kind.tokens + 64),
        # What fills it up is a sequence more.
        kind._replace(tokens=kind.tokens - 64),
        kind._replace(labels=kind.labels // 3),
        kind._replace(labels=kind.labels + 64),
        kind._replace(longest=kind.longest + 256),
        kind._replace(places=kind.places + 64),
        kind._replace(sequences=kind.sequences + 1),
        kind._replace(sequences=kind.sequences // 2 - 1),
    ):
        assert not kind.takes(other), other
    assert kind.takes(kind._replace(tokens=kind.tokens - 64, sequences=15))
    long = kind._replace(longest=1024)
    assert not long.takes(kind), "they have other kernels"
    assert long.takes(long._replace(longest=512))


def test_a_recording_among_others_has_room_for_all_of_each(folder: Path) -> None:
    kind = Kind.of(pack(encoded(folder)[:4]))._replace(tokens=1024, places=512, labels=128)
    for other in (
        kind._replace(places=768),
        kind._replace(labels=192),
        kind._replace(tokens=1088),
        kind._replace(sequences=kind.sequences + 8),
    ):
        wider = kind.among([other])
        assert wider.takes(other)
        assert wider.takes(kind)
    assert kind.among([kind._replace(tokens=2048), kind._replace(beginning=4)]) == kind


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
