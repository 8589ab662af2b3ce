"""Merging of LoRA adapters into the weights of a model folder.

The merged folder can be served without LoRA support, and without GPTQ support if its base was
quantized.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from finesight.errors import UserError
from finesight.files.hub_address import parse_model_address
from finesight.model.linear import FusedLinear, iter_adapters
from finesight.model.quant.base import QuantizedWeight
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import DTYPES, hub_tensors, save_model, stored_precision
from finesight.model_folder import ModelFolder
from finesight.settings.config import Precision
from finesight.settings.manifest import MANIFEST_FILE, Manifest
from finesight.vision.processor_limits import write_processor_limits

MAX_SHARD_BYTES = 5e9
"""Maximum size of a weight file in bytes, as is usual on model hubs."""


@torch.no_grad()
def merge_adapters(model: nn.Module) -> int:
    """Merge all LoRA adapters of a model into its weights and remove them."""
    num_merged = 0
    for path, linear, adapter in list(iter_adapters(model)):
        assert isinstance(linear.weight, nn.Parameter), (
            f"{path} is quantized: an adapter cannot be merged into it"
        )
        for name, (lora_A_RI, lora_B_OR) in adapter.factors().items():
            lora_slice = adapter.slices[name]
            rows_OI = linear.weight[lora_slice.output_slice]
            rows_OI.copy_(
                rows_OI.float().addmm_(lora_B_OR.float(), lora_A_RI.float(), alpha=lora_slice.scale)
            )
            num_merged += 1
        linear.adapter = None
    return num_merged


@torch.no_grad()
def dequantize_model(model: nn.Module) -> int:
    """Replace all quantized weights by dequantized values, rounded once to the compute dtype."""
    num_layers = 0
    for module in model.modules():
        if isinstance(module, FusedLinear) and isinstance(module.weight, QuantizedWeight):
            module.dequantize()
            num_layers += len(module.output_sizes)
    return num_layers


@torch.no_grad()
def round_weights(model: VisionLanguageModel, dtype: torch.dtype) -> None:
    """Round all weights of a model to a storage dtype; raises UserError on overflow.

    Parameters that are always in fp32 are not rounded.
    """
    dtype_max = torch.finfo(dtype).max
    for tensor in hub_tensors(model):
        assert isinstance(tensor.data, torch.Tensor), f"{tensor.name} is quantized"
        if tensor.name.endswith(model.architecture.fp32_suffixes):
            continue
        largest = float(tensor.data.abs().max())
        if largest > dtype_max:
            raise UserError(
                f"{tensor.name} reaches {largest:.3g}",
                where="precision",
                expected=f"values up to {dtype_max:.3g}, the largest of {dtype}",
                remedy="merge with --precision bf16 or fp32",
            )
        tensor.data.copy_(tensor.data.to(dtype))


def resolve_precision(base_folder: ModelFolder, requested: Precision) -> tuple[str, torch.dtype]:
    """Return the dtype name of merged weights and the dtype for loading the base model."""
    stored = stored_precision(base_folder)
    resolved = stored if requested == "auto" else requested
    # For another output dtype the base is loaded in fp32, so that the sum is rounded only once.
    return resolved, DTYPES[stored] if resolved == stored else torch.float32


def save_merged_model(
    model: VisionLanguageModel,
    base_folder: ModelFolder,
    folder: Path,
    dtype: torch.dtype,
    manifest: Manifest | None,
    max_shard_bytes: float = MAX_SHARD_BYTES,
) -> None:
    """Write a merged model with config and tokenizer files to the empty folder `folder`."""
    save_model(model, base_folder, folder, dtype, max_shard_bytes)
    if manifest is not None:
        named = manifest.model_copy(update={"base_model": public_model_name(manifest.base_model)})
        content = named.model_dump_json(indent=1) + "\n"
        (folder / MANIFEST_FILE).write_text(content, encoding="utf-8")
        write_processor_limits(folder, base_folder, manifest.image_rule)


def public_model_name(base_model: str) -> str:
    """Return the public name of a base model."""
    return base_model if parse_model_address(base_model) is not None else Path(base_model).name
