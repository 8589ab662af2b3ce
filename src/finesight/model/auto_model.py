"""Loading and saving of models of any family, with native code or through transformers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from finesight.config import WeightFormat
from finesight.encode.family import is_native
from finesight.model.hf_backend import HfModel, load_hf_model, save_hf_model
from finesight.model.trainable import ModelPart
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model, save_model
from finesight.model_folder import ModelFolder

AnyModel = VisionLanguageModel | HfModel


def load_auto_model(
    folder: ModelFolder,
    dtype: torch.dtype,
    device: torch.device,
    nf4_parts: Collection[ModelPart] = (),
    weight_format: WeightFormat = "auto",
    fp8_parts: Collection[ModelPart] = (),
) -> AnyModel:
    """Load the model of a folder with native code or, for other families, transformers.

    Arguments and errors are those of `load_model` and `load_hf_model`.
    """
    loader = load_model if is_native(folder) else load_hf_model
    return loader(folder, dtype, device, nf4_parts, weight_format, fp8_parts)


def save_auto_model(model: AnyModel, folder: ModelFolder, target: Path, dtype: torch.dtype) -> None:
    """Write the weights of a model without adapters to `target`.

    Config and tokenizer files are copied from `folder`, which the model was loaded from.
    """
    if isinstance(model, HfModel):
        save_hf_model(model, folder, target, dtype)
    else:
        save_model(model, folder, target, dtype)
