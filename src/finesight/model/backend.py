"""Choice of the backend of a model by its family: native code, or else transformers.

Only this module knows the classes of both backends. Others read `BackendModel.capabilities`; code
for one backend gets the class from `as_native` or `as_transformers`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from finesight.encode.renderer import is_native
from finesight.model.backend_model import BackendModel
from finesight.model.hf_backend import HfModel, load_hf_model, save_hf_model
from finesight.model.trainable import ModelPart
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model, save_model
from finesight.model_folder import ModelFolder
from finesight.settings.setting_types import WeightFormat


def load_auto_model(
    folder: ModelFolder,
    dtype: torch.dtype,
    device: torch.device,
    nf4_parts: Collection[ModelPart] = (),
    weight_format: WeightFormat = "auto",
    fp8_parts: Collection[ModelPart] = (),
) -> BackendModel:
    """Load a model with native code if its family has some, or else with transformers."""
    loader = load_model if is_native(folder) else load_hf_model
    return loader(folder, dtype, device, nf4_parts, weight_format, fp8_parts)


def save_auto_model(
    model: BackendModel, folder: ModelFolder, target: Path, dtype: torch.dtype
) -> None:
    """Write all weights to `target`, with the other files of the base model in `folder`."""
    if isinstance(model, HfModel):
        save_hf_model(model, folder, target, dtype)
    else:
        save_model(as_native(model), folder, target, dtype)


def as_native(model: BackendModel) -> VisionLanguageModel:
    """Return a model with native code as its class."""
    assert isinstance(model, VisionLanguageModel), f"a {type(model).__name__} has no native code"
    return model


def as_transformers(model: BackendModel) -> HfModel:
    """Return a model of transformers as its class."""
    assert isinstance(model, HfModel), f"a {type(model).__name__} is not of transformers"
    return model
