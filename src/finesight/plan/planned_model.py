"""Build the model of a recipe on the meta device, configured for tuning and quantized."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from finesight.config import QuantizablePart, Recipe
from finesight.encode.renderer import is_native
from finesight.errors import UserError
from finesight.model.linear import find_adaptable_layers
from finesight.model.quant.base import find_quantized_weights
from finesight.model.quant.int4 import gptq_group_size, quantize_gptq_layers
from finesight.model.trainable import ModelPart, configure_tuning, get_part, trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import build_empty_model
from finesight.model_folder import ModelFolder
from finesight.plan.dry_run import StepTracer
from finesight.plan.peak_memory import PersistentMemory, compute_persistent_memory
from finesight.plan.step_time import StepTimeEstimator
from finesight.plan.target_device import TargetDevice
from finesight.train.objectives.sft import SftObjective


@dataclass(frozen=True)
class PlannedModel:
    """Model on the meta device, with its traces and estimates."""

    model: VisionLanguageModel
    tracer: StepTracer
    persistent: PersistentMemory
    step_timer: StepTimeEstimator

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.model.model.layers)

    @property
    def num_params(self) -> int:
        """Number of parameters, including adapters and quantized weights."""
        num_quantized = sum(
            weight.num_elements for weight in find_quantized_weights(self.model).values()
        )
        return num_quantized + sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in trainable_parameters(self.model).values())

    @property
    def is_encoder_frozen(self) -> bool:
        """True if the vision encoder and its mergers are frozen.

        Image features are then constant, so that a vision cache is possible.
        """
        return not any(parameter.requires_grad for parameter in self.model.visual.parameters())


def build_planned_model(
    folder: ModelFolder,
    recipe: Recipe,
    nf4_parts: tuple[QuantizablePart, ...],
    target: TargetDevice,
) -> PlannedModel:
    """Build a planned model from the small files of a model folder, without reading weights.

    Raises:
        UserError: The family has no native implementation, so the layers are unknown.
    """
    if not is_native(folder):
        raise UserError(
            f"family {folder.family} uses the transformers backend",
            where=recipe.model,
            expected="a model of a native family; the memory of other layers is unknown",
            remedy="start with train.pack_tokens=1024, and increase it while memory is available",
        )
    fp8_parts = [part for part in recipe.tune.quantize.fp8 or () if part not in nf4_parts]
    model, train = build_meta_model(folder, target.dtype, nf4_parts, fp8_parts), recipe.train
    configure_tuning(model.train(), recipe.tune, train.seed)
    persistent = compute_persistent_memory(model, train, target.compute)
    tracer = StepTracer(model, SftObjective(), target.compute)
    num_workers = target.num_workers if train.num_workers is None else train.num_workers
    return PlannedModel(
        model, tracer, persistent, StepTimeEstimator(tracer, target, persistent, train, num_workers)
    )


def build_meta_model(
    folder: ModelFolder,
    dtype: torch.dtype,
    nf4_parts: Collection[ModelPart],
    fp8_parts: Collection[ModelPart],
) -> VisionLanguageModel:
    """Build the model that `model.weights_io.load_model` would load, on the meta device."""
    model = build_empty_model(folder, dtype, nf4_parts, fp8_parts=fp8_parts)
    group_size = gptq_group_size(folder)
    if group_size is not None:
        layers = [name for name in find_adaptable_layers(model) if get_part(name) == "language"]
        quantize_gptq_layers(model, layers, group_size, str(folder.path))
    return model
