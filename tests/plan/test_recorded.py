"""What recordings are said to hold against what they do."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from small_run import make_task
from torch import Tensor

from finesight.config import DataFile, PixelRange, Train, Tune
from finesight.data.sources import load_sources
from finesight.encode.pack import PackedBatch, pack
from finesight.encode.render import Renderer
from finesight.hub import ModelFolder, locate
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import apply_tuning
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model
from finesight.plan.activations import Activations
from finesight.plan.kept import Computing
from finesight.plan.load import Load
from finesight.plan.memory import CONTEXT, LIBRARIES, Peak, peak_of, standing
from finesight.plan.recorded import recording
from finesight.train import recorded as train_recorded
from finesight.train.held import MOST_TOKENS, Held, Kind
from finesight.train.recorded import MOST_KINDS
from finesight.train.sight import SightKind

CPU = torch.device("cpu")
CARD = Computing(cuda=True, number=2, flash=True)
LORA = {"language": "lora", "lora": {"rank": 8}}
SEEING = LORA | {"vision": "lora"}
WATCHING = SEEING | {"lora": {"rank": 8, "dropout": 0.0}}
"""Of a tower that draws nothing, and is recorded, too."""


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> PackedBatch:
    folder = tmp_path_factory.mktemp("recorded")
    make_task(folder)
    renderer = Renderer(locate("finesight-tiny"), PixelRange(min_pixels=784, max_pixels=7056))
    corpus = load_sources((DataFile(path=folder / "train.jsonl"),))
    return pack([renderer.encode(sample) for sample in corpus.read()])


def tuned(tune: dict[str, object]) -> VisionLanguageModel:
    model = load_model(locate("finesight-tiny"), torch.bfloat16, CPU).train()
    apply_tuning(model, Tune.model_validate(tune), 0)
    return model


def load_of(batch: PackedBatch) -> Load:
    return Load(batch.lengths, batch.grids, batch.supervised)


@pytest.mark.parametrize("tune", [LORA, SEEING])
def test_rooms_are_those_of_a_run(batch: PackedBatch, tune: dict[str, object]) -> None:
    model = tuned(tune)
    features = model.see(batch.patches_ND, batch.grids)
    held = Held.room(Kind.of(batch), batch, features, model.visual)
    found = recording(model, CARD, 0.0, load_of(batch))
    assert found is not None
    assert found.kind == held.kind
    assert found.load.tokens == held.kind.tokens
    values = [getattr(held.batch, field.name) for field in fields(held.batch)]
    tensors = [
        value for value in (*values, held.features_MKD, held.back_MKD) if isinstance(value, Tensor)
    ]
    assert found.room == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_so_are_those_of_a_tower_that_is_recorded(
    batch: PackedBatch, family: str, tmp_path: Path
) -> None:
    make_tiny(tmp_path / family, family)
    model = load_model(ModelFolder(tmp_path / family), torch.bfloat16, CPU).train()
    apply_tuning(model, Tune.model_validate(WATCHING), 0)
    kind = Kind.of(batch, SightKind.of(batch, model.visual))
    held = Held.room(kind, batch, None, model.visual)
    found = recording(model, CARD, 0.0, load_of(batch))
    assert found is not None
    assert found.kind == kind
    assert held.sight is not None
    assert (found.load.tokens, found.load.patches) == (kind.tokens, held.sight.kind.patches)
    values = [getattr(held.batch, field.name) for field in fields(held.batch)]
    own = held.sight.route
    ways = {id(way): way.bounds_S1 for way in own.segments}.values()
    values += [held.sight.patches_NB, own.positions_N2, own.order_M, own.back_M, *ways]
    assert found.room == sum(value.nbytes for value in values if isinstance(value, Tensor))


def test_only_small_packs_are_recorded(batch: PackedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, load = tuned(LORA), load_of(batch)
    long = replace(load, lengths=(MOST_TOKENS + 1,))
    assert recording(frozen, CARD, 0.0, load) is not None
    assert recording(frozen, CARD, 0.5, load) is not None
    some = tuned({"language": "lora", "lora": {"rank": 8, "targets": ["q_proj"]}})
    assert recording(some, CARD, 0.0, load) is not None
    assert recording(some, CARD, 0.5, load) is None
    assert recording(frozen, CARD, 0.0, long) is None
    assert recording(frozen, CARD, 0.0, replace(load, supervised=0)) is None
    assert recording(frozen, Computing(cuda=True, number=4, flash=False), 0.0, load) is None
    assert recording(tuned(SEEING), CARD, 0.0, load) is not None
    monkeypatch.setattr(train_recorded, "MOST_LEARNED", 1000)
    assert recording(frozen, CARD, 0.0, load) is None


def peak(model: VisionLanguageModel, loads: list[Load], recompute: float) -> Peak:
    stays, activations = standing(model, Train(), CARD), Activations(model, CARD, recompute)
    return peak_of(stays, activations, loads, CARD, 588, several=False)


def test_a_recording_has_its_own_memory_and_gradients(batch: PackedBatch) -> None:
    model = tuned(LORA)
    load = load_of(batch)
    learning = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    found = peak(model, [load], 0.0)
    within = found.activations + found.working + found.logits + found.gradients - learning
    assert found.gradients >= learning
    assert found.recordings == pytest.approx(within, rel=0.1)
    assert found.allocated == found.in_all - found.recordings - CONTEXT
    assert found.libraries == 2 * LIBRARIES
    again = peak(model, [load], 1.0)
    assert 0 < again.recordings < found.recordings
    long = replace(load, lengths=(MOST_TOKENS + 1,))
    launched = peak(model, [long], 0.0)
    assert (launched.recordings, launched.libraries) == (0, LIBRARIES)


def test_a_tower_that_learns_is_beside_the_recording(batch: PackedBatch) -> None:
    """It keeps what it needs for its way back while the decoder goes forth and back."""
    load = load_of(batch)
    frozen, seeing = tuned(LORA), tuned(SEEING)
    both = [Activations(model, CARD, 0.0) for model in (frozen, seeing)]
    kept = both[1].seen(load)
    assert kept > 4 * both[0].seen(load)
    found = peak(seeing, [load], 0.0)
    assert found.activations + found.working >= kept
    assert found.recordings < 1.05 * peak(frozen, [load], 0.0).recordings


def test_a_tower_that_is_recorded_is_in_the_recording(batch: PackedBatch) -> None:
    load = load_of(batch)
    beside, inside = tuned(SEEING), tuned(WATCHING)
    kept = Activations(inside, CARD, 0.0).seen(load)
    both = [peak(model, [load], 0.0) for model in (beside, inside)]
    assert both[1].recordings > both[0].recordings + 0.9 * kept
    assert both[1].activations + both[1].working == pytest.approx(both[1].recordings, rel=0.2)


def test_later_kinds_are_launched(batch: PackedBatch) -> None:
    model = tuned(LORA)
    kinds = [Load((64 * n,), (), 10) for n in range(1, MOST_KINDS + 1)]
    another = Load((MOST_TOKENS - 64,), (), 10)
    few, many = peak(model, kinds, 0.0), peak(model, [*kinds, another], 0.0)
    assert many.activations > 2 * few.activations
    assert many.recordings == few.recordings
