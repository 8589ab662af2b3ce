"""Packs of a tiny task and trainable models for the CUDA graph tests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finesight.config import PixelRange, TrainFileSettings, TuneSettings
from finesight.data.corpus import load_corpus
from finesight.encode.packing import PackedBatch, find_shared_prefix_length, pack
from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.model.trainable import configure_tuning, trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder, locate_model
from finesight.train.graph_buffers import GraphShape

CPU = torch.device("cpu")
LORA = TuneSettings.model_validate({"lora": {"rank": 8, "dropout": 0.1}})
PARTS = "vision", "merger", "language"
VISION_LORA = TuneSettings.model_validate(
    dict.fromkeys(PARTS, "lora") | {"lora": {"rank": 8, "dropout": 0.0}}
)
LORA_DROPOUT = VISION_LORA.model_copy(update={"lora": LORA.lora})
FULL_FINETUNE = TuneSettings.model_validate(dict.fromkeys((*PARTS, "embeddings"), "full"))


TINY = locate_model("finesight-tiny")


def encode_samples(folder: Path, model_folder: ModelFolder = TINY) -> list[EncodedSample]:
    renderer = NativeRenderer(model_folder, PixelRange(min_pixels=784, max_pixels=7056))
    corpus = load_corpus((TrainFileSettings(path=folder / "train.jsonl"),))
    return [renderer.encode(sample) for sample in corpus.read_samples()]


def make_model(
    dtype: torch.dtype,
    device: torch.device,
    tune: TuneSettings = LORA,
    model_folder: ModelFolder = TINY,
) -> VisionLanguageModel:
    model = load_model(model_folder, dtype, device)
    configure_tuning(model, tune, 0)
    for name, parameter in trainable_parameters(model).items():
        if ".adapter.lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model.train()


def encode_images(model: VisionLanguageModel, batch: PackedBatch) -> Tensor | None:
    with torch.no_grad():
        return model.encode_images(batch.patches_ND, batch.grid_thw) if batch.grid_thw else None


def pack_shared_prefix(samples: Sequence[EncodedSample]) -> PackedBatch:
    """Pack samples with their shared prefix stored once."""
    prefix_length = find_shared_prefix_length([one.tokenized for one in samples])
    assert prefix_length, "they begin with nothing"
    return pack(samples, prefix_length=prefix_length)


def make_pack(
    some: PackedBatch, lengths: Sequence[int], prefix_length: int, labels: int
) -> PackedBatch:
    """Create a pack of these sequence lengths with arbitrary content."""
    loss_mask_T = torch.zeros(sum(lengths), dtype=torch.int64)
    return replace(
        some,
        lengths=tuple(lengths),
        prefix_length=prefix_length,
        ids_T=loss_mask_T,
        position_ids_3T=loss_mask_T.expand(3, -1),
        cu_seqlens_S1=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        logit_indices_L=torch.zeros(labels, dtype=torch.int64),
        labels_L=torch.zeros(labels, dtype=torch.int64),
    )


def make_packs(
    samples: Sequence[EncodedSample], monkeypatch: pytest.MonkeyPatch
) -> list[PackedBatch]:
    """Make small packs that share a CUDA graph, but differ in size by more than an eighth."""
    monkeypatch.setattr("finesight.train.graph_buffers.MAX_PADDING_DIVISOR", 2)
    packs = [pack(samples[:4]), pack(samples[2:8]), pack(samples[4:8]), pack(samples[1:7])]
    kinds = [GraphShape.from_batch(one) for one in packs]
    assert len({*kinds}) == 2
    assert all(kinds[0].widen(kinds).fits(kind) for kind in kinds)
    return packs
