"""A model of any family: by native code where there is some, else by transformers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from finesight.config import Weights
from finesight.encode.borrowed import is_native
from finesight.hub import ModelFolder
from finesight.model.fallback import FallbackModel, load_fallback, save_fallback
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import Part
from finesight.model.weights import load_model, save_model

AnyModel = VisionLanguageModel | FallbackModel


def load_any(
    folder: ModelFolder,
    dtype: torch.dtype,
    device: torch.device,
    nf4: Collection[Part] = (),
    kind: Weights = "auto",
    fp8: Collection[Part] = (),
) -> AnyModel:
    """The model of a folder; UserError as `load_model` and `load_fallback`."""
    load = load_model if is_native(folder) else load_fallback
    return load(folder, dtype, device, nf4, kind, fp8)


def save_any(model: AnyModel, folder: ModelFolder, target: Path, dtype: torch.dtype) -> None:
    """Write the weights of a model from `folder` into the folder `target`, without adapters."""
    if isinstance(model, FallbackModel):
        save_fallback(model, folder, target, dtype)
    else:
        save_model(model, folder, target, dtype)
