"""Packs of a tiny task, and models that learn from them, for the tests of recordings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finesight.config import DataFile, PixelRange, Tune
from finesight.data.sources import load_sources
from finesight.encode.encoded import Encoded
from finesight.encode.pack import PackedBatch, beginning_of, pack
from finesight.encode.render import Renderer
from finesight.hub import locate
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import apply_tuning, trainable
from finesight.model.weights import load_model
from finesight.train.held import Kind

CPU = torch.device("cpu")
LORA = Tune.model_validate({"lora": {"rank": 8, "dropout": 0.1}})
PARTS = "vision", "merger", "language"
SEEING = Tune.model_validate(dict.fromkeys(PARTS, "lora") | {"lora": {"rank": 8, "dropout": 0.0}})
DROPPING = SEEING.model_copy(update={"lora": LORA.lora})
ALL = Tune.model_validate(dict.fromkeys((*PARTS, "embeddings"), "full"))


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


def made(some: PackedBatch, lengths: Sequence[int], beginning: int, labels: int) -> PackedBatch:
    """A pack of sequences of these lengths, whose content does not matter."""
    whole_T = torch.zeros(sum(lengths), dtype=torch.int64)
    return replace(
        some,
        lengths=tuple(lengths),
        beginning=beginning,
        ids_T=whole_T,
        positions_3T=whole_T.expand(3, -1),
        bounds_S1=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        predict_L=torch.zeros(labels, dtype=torch.int64),
        target_L=torch.zeros(labels, dtype=torch.int64),
    )


def various(samples: Sequence[Encoded], monkeypatch: pytest.MonkeyPatch) -> list[PackedBatch]:
    """Packs of two kinds, of which a recording takes both: these are small, and differ by more than
    an eighth."""
    monkeypatch.setattr("finesight.train.held.SPARE", 2)
    packs = [pack(samples[:4]), pack(samples[2:8]), pack(samples[4:8]), pack(samples[1:7])]
    kinds = [Kind.of(one) for one in packs]
    assert len({*kinds}) == 2
    assert all(kinds[0].among(kinds).takes(kind) for kind in kinds)
    return packs
