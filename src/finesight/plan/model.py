"""The recipe's model as shapes: built on no device, tuned and quantised as the run will."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from finesight.config import Quantisable, Recipe
from finesight.encode.borrowed import is_native
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.model.few_bits import keep_in_few_bits
from finesight.model.frozen import frozen_weights
from finesight.model.geometry import Settings
from finesight.model.int4 import keep_in_int4, published_group
from finesight.model.lora import adaptable_layers
from finesight.model.network import VisionLanguageModel, build
from finesight.model.parts import Part, apply_tuning, part_of, trainable
from finesight.plan.kept import Computing
from finesight.plan.memory import Standing, standing
from finesight.plan.seconds import Clock
from finesight.plan.target import Target


@dataclass(frozen=True)
class Sized:
    """A model without numbers, what stays of it in memory, and how long its steps take."""

    model: VisionLanguageModel
    computing: Computing
    stays: Standing
    clock: Clock

    @property
    def depth(self) -> int:
        """Layers of the decoder."""
        return len(self.model.model.layers)

    @property
    def numbers(self) -> int:
        """All of its numbers, adapters included."""
        few = sum(weight.numbers for weight in frozen_weights(self.model).values())
        return few + sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def learning(self) -> int:
        """Those that learn."""
        return sum(parameter.numel() for parameter in trainable(self.model).values())

    @property
    def tower_is_frozen(self) -> bool:
        """Whether features of a picture never change: nothing of tower and mergers learns."""
        return not any(parameter.requires_grad for parameter in self.model.visual.parameters())

    @property
    def patch_bytes(self) -> int:
        """Of a patch on its way to the tower: one frame of bytes."""
        vision = self.model.geometry.vision
        return vision.channels * vision.patch**2


def sized(folder: ModelFolder, recipe: Recipe, nf4: tuple[Quantisable, ...], on: Target) -> Sized:
    """The model of a folder, of which only the small files are read.

    Raises UserError for a family without native code, whose layers are not known.
    """
    if not is_native(folder):
        raise UserError(
            f"a model of the family {folder.family}, which transformers computes",
            where=recipe.model,
            expected="a model of a native family: what the layers of others keep is not known",
            remedy="begin with train.pack_tokens=1024, and raise it as the memory allows",
        )
    fp8 = [part for part in recipe.tune.fp8 or () if part not in nf4]
    model, train = shapes(folder, on.dtype, nf4, fp8), recipe.train
    apply_tuning(model.train(), recipe.tune, train.seed)
    stays = standing(model, train, on.computing)
    workers = on.workers if train.workers is None else train.workers
    return Sized(model, on.computing, stays, Clock(model, on, stays, train, workers))


def shapes(
    folder: ModelFolder, dtype: torch.dtype, nf4: Collection[Part], fp8: Collection[Part]
) -> VisionLanguageModel:
    """As `model.weights.load_model` makes room for it, without the room."""
    config = Settings(folder.config, str(folder.path / "config.json"))
    preprocessor = Settings(folder.preprocessor, str(folder.path / "preprocessor_config.json"))
    model = build(config, preprocessor, dtype, torch.device("meta"))
    keep_in_few_bits(model, nf4, fp8, "auto", folder.path)
    group = published_group(folder)
    if group is not None:
        layers = [name for name in adaptable_layers(model) if part_of(name) == "language"]
        keep_in_int4(model, layers, group, str(folder.path))
    return model
