"""Packs of a tiny task, trainable models and graph caches for the CUDA graph tests."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finesight.encode.batch import PackedBatch
from finesight.encode.packing import find_shared_prefix_length, pack
from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.model.trainable import configure_tuning, trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder, locate_model
from finesight.samples.corpus import load_corpus
from finesight.settings.config import PixelRange, TrainFileSettings, TuneSettings
from finesight.train import step
from finesight.train.cuda_graphs import CudaGraphRunner
from finesight.train.objectives.sft import Settings
from finesight.train.objectives.sft.loss import SftObjective
from finesight.train.step import forward_backward

CPU = torch.device("cpu")
PARTS = "vision", "merger", "language"
LORA = TuneSettings.model_validate({"lora": {"rank": 8, "dropout": 0.1}})
VISION_LORA = TuneSettings.model_validate(
    dict.fromkeys(PARTS, "lora") | {"lora": {"rank": 8, "dropout": 0.0}}
)
FULL_FINETUNE = TuneSettings.model_validate(dict.fromkeys((*PARTS, "embeddings"), "full"))
TINY = locate_model("finesight-tiny")


class EagerGraphCache:
    """Graph cache that runs eagerly and records the keys of the graphs."""

    def __init__(self, device: torch.device) -> None:
        self.keys: list[int] = []

    def contains(self, key: int) -> bool:
        return False

    def run(self, key: int, function: Callable[[], Tensor]) -> Tensor:
        self.keys.append(key)
        return function()


def encode_samples(
    folder: Path, model_folder: ModelFolder = TINY, max_pixels: int | None = 7056
) -> list[EncodedSample]:
    """Encode the training samples of a task, without an image size if `max_pixels` is None."""
    rule = PixelRange(min_pixels=784, max_pixels=max_pixels) if max_pixels else None
    corpus = load_corpus((TrainFileSettings(path=folder / "train.jsonl"),))
    renderer = NativeRenderer(model_folder, rule)
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


def make_loss_inputs(batch: PackedBatch, weight: float = 1.0) -> dict[str, Tensor]:
    return SftObjective(Settings()).loss_inputs(
        batch, torch.tensor(weight, device=batch.ids_T.device)
    )


def make_runner(model: VisionLanguageModel) -> CudaGraphRunner:
    return CudaGraphRunner(
        forward_backward,
        model,
        SftObjective(Settings()),
        list(trainable_parameters(model).values()),
    )


def run_pack(
    runner: CudaGraphRunner, batch: PackedBatch, features: Tensor | None, weight: Tensor
) -> Tensor:
    """Run a pack of a training step, and return the weighted loss."""
    engine: Any = SimpleNamespace(
        model=runner.model, objective=runner.objective, graph_runner=runner
    )
    return step.run_pack(engine, batch, features, weight)


def encode_images(model: VisionLanguageModel, batch: PackedBatch) -> Tensor | None:
    with torch.no_grad():
        return model.encode_images(batch.patches_ND, batch.grid_thw) if batch.grid_thw else None


def collect_grads(model: VisionLanguageModel) -> list[Tensor | None]:
    """Return the gradients of the trainable parameters, and clear them."""
    parameters = list(trainable_parameters(model).values())
    grads = [None if p.grad is None else p.grad.float().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return grads


def pack_shared_prefix(samples: Sequence[EncodedSample]) -> PackedBatch:
    """Pack samples with their shared prefix stored once."""
    prefix_length = find_shared_prefix_length([one.tokenized for one in samples])
    assert prefix_length, "the samples share no prefix"
    return pack(samples, prefix_length=prefix_length)


def make_text_pack(lengths: Sequence[int], prefix_length: int, seed: int) -> PackedBatch:
    """Create a pack of random tokens; each predicts the next one of its sequence."""
    generator = np.random.default_rng(seed)
    lengths = (prefix_length, *lengths) if prefix_length else tuple(lengths)
    starts = np.cumsum([0, *lengths])
    ids_T = torch.from_numpy(generator.integers(0, 90, sum(lengths)))
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    if prefix_length:
        positions_T[prefix_length:] += prefix_length
    has_label_T = torch.ones(sum(lengths), dtype=torch.bool)
    has_label_T[torch.from_numpy(starts[1:] - 1)] = False
    logit_indices_L = has_label_T.nonzero().squeeze(1)
    return PackedBatch(
        sample_ids=tuple(map(str, range(len(lengths)))),
        lengths=lengths,
        grid_thw=(),
        ids_T=ids_T,
        position_ids_3T=positions_T.expand(3, -1),
        cu_seqlens_S1=torch.from_numpy(starts.astype(np.int32)),
        patches_ND=torch.empty(0, 1536, dtype=torch.uint8),
        visual_indices_M=torch.empty(0, dtype=torch.int64),
        logit_indices_L=logit_indices_L,
        labels_L=ids_T[logit_indices_L + 1],
        prefix_length=prefix_length,
    )
