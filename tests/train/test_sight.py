"""Recordings with the tower in them: what fills a pack's pictures up changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import make_task
from torch import Tensor

from finesight.config import DataFile, PixelRange, Tune
from finesight.data.sources import load_sources
from finesight.encode.pack import EVEN, PackedBatch, pack
from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.model import attention, layers
from finesight.model.attention import Segments
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import apply_tuning, trainable
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model
from finesight.train import recorded, sight
from finesight.train.held import Held, Kind
from finesight.train.loss import label_loss
from finesight.train.recorded import Passes
from finesight.train.sight import SightKind, sees, watches

CPU = torch.device("cpu")
PARTS = "vision", "merger", "language", "embeddings"
ALL = dict.fromkeys(PARTS, "full")
FAMILIES = ["qwen2_vl", "qwen2_5_vl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sight")
    make_task(folder)
    for family in (*FAMILIES, "qwen3_vl", "qwen"):
        make_tiny(folder / family, family)
    return folder


def tuned(folder: Path, family: str, tune: dict[str, Any] = ALL) -> VisionLanguageModel:
    model = load_model(ModelFolder(folder / family), torch.float32, CPU)
    apply_tuning(model, Tune.model_validate(tune), 0)
    return model.train()


def packs(folder: Path, family: str, each: int) -> list[PackedBatch]:
    rule = None if family == "qwen" else PixelRange(min_pixels=784, max_pixels=30000)
    renderer = Renderer(ModelFolder(folder / family), rule)
    corpus = load_sources((DataFile(path=folder / "train.jsonl"),))
    samples = [renderer.encode(sample) for sample in corpus.read()]
    return [pack(samples[at : at + each]) for at in range(0, 3 * each, each)]


def off(mine: Tensor, theirs: Tensor) -> float:
    """How far one is from the other, as a share of its length."""
    return float((mine - theirs).norm() / theirs.norm().clamp(min=1e-12))


def without_empty(segments: Segments) -> Segments:
    """Without a kernel for segments of any length, empty ones have to be left out."""
    full = [length for length in segments.bounds_S1.diff().tolist() if length]
    return Segments.of(full, CPU)


def learned(model: VisionLanguageModel, held: Held) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of what lies there, and all gradients."""
    assert held.sight is not None
    ways = {id(own): without_empty(own) for own in held.sight.route.segments}
    route = replace(
        held.sight.route, segments=tuple(ways[id(own)] for own in held.sight.route.segments)
    )
    features = replace(held.sight, route=route).features(model.visual)
    inside = without_empty(Segments(held.batch.lengths, held.batch.bounds_S1, held.kind.longest))
    filled = replace(held.batch, lengths=inside.lengths, bounds_S1=inside.bounds_S1)
    h_LD = model(filled, features)
    # The kernel leaves rows without a target out; here those of the pack come first.
    count = int((held.batch.target_L >= 0).sum())
    loss = label_loss(h_LD, model.head_weight, held.batch.target_L[:count], held.share)
    named = trainable(model)
    return loss, dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_fills_pictures_up_changes_nothing(folder: Path, family: str) -> None:
    model = tuned(folder, family)
    other, batch, _ = packs(folder, family, 3)
    assert watches(model)
    tower = model.visual
    merge = tower.geometry.merge
    # Room for both of them, with more than one segment of nothing.
    kinds = [SightKind.of(one, tower) for one in (other, batch)]
    patches = max(kind.patches for kind in kinds) + 2 * EVEN * merge**2
    ways = tuple(
        (max(a[0], b[0]) + 8, max(a[1], b[1]))
        for a, b in zip(*(k.ways for k in kinds), strict=True)
    )
    kind = Kind.of(batch)._replace(
        sight=SightKind(patches, kinds[1].bytes, ways),
        places=patches // merge**2,
        tokens=2048,
        sequences=16,
        longest=1024,
        labels=512,
    )
    held = Held.room(kind, batch, None, tower)
    # Another one was there before.
    held.lay(other, None, torch.tensor(2.0), tower)
    held.lay(batch, None, torch.tensor(0.5), tower)
    assert held.sight is not None
    for own in held.sight.route.segments:
        lengths = own.bounds_S1.diff()
        assert int(own.bounds_S1[-1]) == patches, "patches that nothing looks at"
        assert 0 <= int(lengths.min()) <= int(lengths.max()) <= own.longest
    loss, found = learned(model, held)
    expected = label_loss(model(batch), model.head_weight, batch.target_L, torch.tensor(0.5))
    torch.testing.assert_close(loss, expected)
    named = trainable(model)
    for name, grad in zip(named, torch.autograd.grad(expected, list(named.values())), strict=True):
        assert off(found[name], grad) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_room_for_all_packs_of_a_kind(folder: Path, family: str) -> None:
    """Whatever fills them up: of each size of filling the bounds end where the patches do."""
    model = tuned(folder, family)
    for each in (1, 2, 3, 5):
        for batch in packs(folder, family, each):
            kind = Kind.of(batch, SightKind.of(batch, model.visual))
            assert kind.sight is not None
            assert kind.places * model.visual.geometry.merge**2 == kind.sight.patches
            held = Held.room(kind, batch, None, model.visual)
            held.lay(batch, None, torch.tensor(1.0), model.visual)
            assert held.sight is not None
            for own in held.sight.route.segments:
                assert int(own.bounds_S1[-1]) == kind.sight.patches
                assert int(own.bounds_S1.diff().max()) <= own.longest


def test_which_towers_are_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(family: str, tune: dict[str, Any], recompute: float = 0.0) -> bool:
        return watches(tuned(folder, family, tune)) and sees(100, recompute)

    lora: dict[str, Any] = {"language": "lora", "vision": "lora"}
    for family in FAMILIES:
        assert seen(family, ALL)
        assert seen(family, lora | {"lora": {"rank": 4, "dropout": 0.0}})
        assert not seen(family, lora | {"lora": {"rank": 4, "dropout": 0.1}}), "draws elsewhere"
        assert not seen(family, {"language": "full"}), "a frozen tower"
        assert not seen(family, ALL, recompute=1.0), "draws again"
    assert not seen("qwen3_vl", ALL), "positions that hang on sizes"
    assert not seen("qwen", ALL)
    odd = tuned(folder, "qwen2_vl")
    odd.visual.geometry = replace(odd.visual.geometry, heads=odd.visual.geometry.width // 4)
    assert not watches(odd), "heads that the kernel does not take"
    monkeypatch.setattr(sight, "MOST_PATCHES", 99)
    assert not seen("qwen2_vl", ALL)
    assert not sees(0, 0.0), "texts"


class Played:
    """Recordings that are launched each time."""

    def __init__(self, device: torch.device) -> None:
        self.numbers: list[int] = []

    def has(self, number: int) -> bool:
        return False

    def run(self, number: int, function: Callable[[], Tensor]) -> Tensor:
        self.numbers.append(number)
        return function()


def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, what a recording reads goes the way of kernels on a card: attention takes its
    segments from their bounds, and the loss leaves filling out."""
    attend = attention.attend

    def by_bounds(
        q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, keys: None = None
    ) -> Tensor:
        return attend(q, k, v, without_empty(segments), causal=causal)

    def of_targets(h_LD: Tensor, head_VD: Tensor, target_L: Tensor, scale: Tensor) -> Tensor:
        return label_loss(h_LD, head_VD, target_L[: int((target_L >= 0).sum())], scale)

    for module in (attention, layers):
        monkeypatch.setattr(module, "attend", by_bounds)
    monkeypatch.setattr(recorded, "label_loss", of_targets)
    monkeypatch.setattr(recorded, "_recordable", lambda *_: True)
    monkeypatch.setattr(recorded, "Recorded", Played)
    monkeypatch.setattr(recorded, "LAUNCHED", 0)


@pytest.mark.parametrize("parts", [PARTS, ("merger", "language")], ids=len)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_pack_brings_its_own_gradients(
    folder: Path, family: str, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures with the tower inside, pictures that are too many for that, and texts, in turn: what
    one recording has left is none of the next one's."""
    launched(monkeypatch)
    model = tuned(folder, family, dict.fromkeys(parts, "full"))
    few, many = packs(folder, family, 1)[0], packs(folder, family, 5)[0]
    monkeypatch.setattr(sight, "MOST_PATCHES", len(many.patches_ND) - 1)
    texts = replace(
        few,
        grids=(),
        patches_ND=few.patches_ND[:0],
        visual_at_M=few.visual_at_M[:0],
    )
    learning = list(trainable(model).values())
    passes, share = Passes(model, learning), torch.tensor(0.5)
    for batch in (few, texts, few, many, few, texts, many, few):
        loss = passes.learn(batch, None, share)
        found = [None if p.grad is None else p.grad.clone() for p in learning]
        for parameter in learning:
            parameter.grad = None
        exact = label_loss(model(batch), model.head_weight, batch.target_L, share)
        torch.testing.assert_close(loss, exact.detach())
        expected = torch.autograd.grad(exact, learning, allow_unused=True)
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or off(mine, theirs) < 1e-5
    assert isinstance(passes._recorded, Played)
    assert len(passes._recorded.numbers) == 8
    assert [kind.sight is not None for kind in passes._held] == [True, False, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_packs_that_share_a_recording_bring_their_own_gradients(
    folder: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch)
    monkeypatch.setattr(recorded, "LATE", 0)
    monkeypatch.setattr(recorded, "LAUNCHED", 100)
    monkeypatch.setattr(recorded, "_half_free", lambda device: True)
    monkeypatch.setattr("finesight.train.held.SPARE", 1)
    # The tower stays outside: with it, pictures would have to be as many.
    monkeypatch.setattr(sight, "MOST_PATCHES", 0)
    model = tuned(folder, family, {"merger": "full", "language": "full"})
    few, more = packs(folder, family, 2)[0], packs(folder, family, 3)[0]
    texts = replace(few, grids=(), patches_ND=few.patches_ND[:0], visual_at_M=few.visual_at_M[:0])
    assert Kind.of(few) != Kind.of(more)
    learning = list(trainable(model).values())
    passes, share = Passes(model, learning), torch.tensor(0.5)
    passes._met.update(map(Kind.of, (few, more)))
    monkeypatch.setattr(passes._pace, "replays_sooner", lambda tokens: True)
    for batch in (few, more, texts, few, more, texts, few):
        loss = passes.learn(batch, None, share)
        found = [None if p.grad is None else p.grad.clone() for p in learning]
        for parameter in learning:
            parameter.grad = None
        exact = label_loss(model(batch), model.head_weight, batch.target_L, share)
        torch.testing.assert_close(loss, exact.detach())
        expected = torch.autograd.grad(exact, learning, allow_unused=True)
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or off(mine, theirs) < 1e-5
    assert isinstance(passes._recorded, Played)
    assert passes._recorded.numbers == [0, 0, 1, 0, 0, 1, 0]


def test_packs_of_rare_sizes_are_recorded_without_the_tower(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch)
    monkeypatch.setattr(recorded, "LAUNCHED", 3)
    model = tuned(folder, "qwen2_vl")
    passes = Passes(model, list(trainable(model).values()))
    batch, sizes = packs(folder, "qwen2_vl", 2)[0], iter(range(100))
    # Each of another kind.
    monkeypatch.setattr(
        SightKind, "of", lambda *_: SightKind(256, 588, ((8, 64 * (4 + next(sizes))),))
    )
    for _ in range(5):
        passes.learn(batch, None, torch.tensor(1.0))
    assert [kind.sight for kind in passes._held] == [None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorded_tower_learns_what_its_launches_would(
    folder: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = torch.device("cuda")
    model = tuned(folder, family).to(cuda, torch.bfloat16)
    monkeypatch.setattr(recorded, "LAUNCHED", 0)
    learning = list(trainable(model).values())
    share, passes = torch.tensor(0.1, device=cuda), Passes(model, learning)
    batches = [batch.to(cuda) for batch in packs(folder, family, 3)]
    first = batches[0]
    nothing = first.patches_ND[:0], first.visual_at_M[:0]
    batches.append(replace(first, grids=(), patches_ND=nothing[0], visual_at_M=nothing[1]))

    def launched(batch: PackedBatch) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        # Its graph ends here: what it knows of streams would spoil the next recording.
        loss = label_loss(model(batch), model.head_weight, batch.target_L, share)
        return loss.detach(), torch.autograd.grad(loss, learning, allow_unused=True)

    for batch in [*batches, *batches, *batches]:
        loss = passes.learn(batch, None, share)
        grads = [None if p.grad is None else p.grad.float() for p in learning]
        for parameter in learning:
            parameter.grad = None
        exact, expected = launched(batch)
        torch.testing.assert_close(loss, exact, rtol=2e-3, atol=0)
        for mine, theirs in zip(grads, expected, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert off(mine, theirs.float()) < 0.05
    assert passes._recorded is not None, "a recording failed"
    assert any(held.sight is not None for held in passes._held.values())
