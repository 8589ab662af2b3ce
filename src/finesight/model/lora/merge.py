"""Merging of LoRA adapters into the weights of a model folder.

The merged folder can be served without LoRA support, and without GPTQ support if its base was
quantized.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finesight.bounded_files import read_json_object
from finesight.config import PixelRange, Precision
from finesight.encode.renderer import is_native
from finesight.errors import UserError
from finesight.hub.address import parse_model_address
from finesight.manifest import MANIFEST_FILE, Manifest
from finesight.model.linear import FusedLinear, iter_adapters
from finesight.model.quant.base import QuantizedWeight
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import DTYPES, hub_tensors, save_model, stored_precision
from finesight.model_folder import PREPROCESSOR_FILE, PROCESSOR_FILE, ModelFolder

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


def require_native_family(base_folder: ModelFolder) -> None:
    """Raise UserError for a model family without a native implementation."""
    if not is_native(base_folder):
        raise UserError(
            f"a model of the family {base_folder.family}, which has no native implementation",
            where="merge",
            expected="a native family",
            remedy="merge it with peft: PeftModel.from_pretrained(...).merge_and_unload()",
        )


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
        (folder / MANIFEST_FILE).write_text(named.model_dump_json(indent=1) + "\n")
        if isinstance(manifest.image_rule, PixelRange):
            _write_pixel_limits(folder, manifest.image_rule)


def public_model_name(base_model: str) -> str:
    """Return the public name of a base model."""
    return base_model if parse_model_address(base_model) is not None else Path(base_model).name


def _write_pixel_limits(folder: Path, pixel_range: PixelRange) -> None:
    """Write the pixel limits of the run to the image settings of a merged model.

    Existing files are changed. A new file is written only if there is none, since it would hide the
    patch and color settings of the others. The limits have the names of transformers 4; `size`, if
    present, has those of transformers 5.
    """
    smallest, largest = pixel_range.min_pixels, pixel_range.max_pixels

    def limit(settings: dict[str, Any]) -> dict[str, Any]:
        size = {"size": {"shortest_edge": smallest, "longest_edge": largest}}
        limits = {"min_pixels": smallest, "max_pixels": largest}
        return settings | limits | (size if "size" in settings else {})

    processor, preprocessor_path = _read_json(folder / PROCESSOR_FILE), folder / PREPROCESSOR_FILE
    nested = processor.get("image_processor")
    if isinstance(nested, dict):
        _write_json(folder / PROCESSOR_FILE, processor | {"image_processor": limit(nested)})
    if preprocessor_path.exists() or not isinstance(nested, dict):
        _write_json(preprocessor_path, limit(_read_json(preprocessor_path)))


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
