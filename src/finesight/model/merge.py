"""Adapters added into the weights: a model folder that needs nothing of LoRA to be served, nor of
the four bits that its base was published in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finesight.bounded_files import read_json_object
from finesight.config import PixelRange, Precision
from finesight.encode.borrowed import is_native
from finesight.errors import UserError
from finesight.hub import PREPROCESSOR, PROCESSOR, ModelFolder
from finesight.manifest import MANIFEST, Manifest
from finesight.model.adapter import install_adapter
from finesight.model.frozen import FrozenWeight
from finesight.model.linear import GroupedLinear
from finesight.model.lora import adapters
from finesight.model.network import VisionLanguageModel
from finesight.model.weights import DTYPES, hub_tensors, load_model, save_model, stored_precision
from finesight.remote.address import model_address
from finesight.storage import write_folder

SHARD_BYTES = 5e9
"""Of a file of weights, at most: what hubs and other programs cope with best."""


@torch.no_grad()
def merge_into(model: nn.Module) -> int:
    """Add every adapter's `scale * B A` into its weight and take the adapter off.

    The sum is made in fp32 and rounded once to the weight's type. Returns how many layers changed.
    """
    merged = 0
    for path, group, adapter in list(adapters(model)):
        assert isinstance(group.weight, nn.Parameter), (
            f"{path} is in few bits: nothing is added to it"
        )
        for name, (a_RI, b_OR) in adapter.factors().items():
            band = adapter.bands[name]
            rows_OI = group.weight[band.columns]
            rows_OI.copy_(rows_OI.float().addmm_(b_OR.float(), a_RI.float(), alpha=band.scale))
            merged += 1
        group.adapter = None
    return merged


@torch.no_grad()
def thaw(model: nn.Module) -> int:
    """Put the dense numbers of every weight in few bits in its place; returns of how many layers.

    They are those that the bits stand for, rounded once to the type of the computation.
    """
    layers = 0
    for module in model.modules():
        if isinstance(module, GroupedLinear) and isinstance(module.weight, FrozenWeight):
            module.thaw()
            layers += len(module.outputs)
    return layers


@torch.no_grad()
def round_to(model: VisionLanguageModel, dtype: torch.dtype) -> None:
    """Give every number the value that it has in a file of that type. Raises UserError for one
    beyond it."""
    most = torch.finfo(dtype).max
    for tensor in hub_tensors(model):
        assert isinstance(tensor.data, torch.Tensor), f"{tensor.name} is in few bits: not thawed"
        largest = float(tensor.data.abs().max())
        if largest > most:
            raise UserError(
                f"{tensor.name} reaches {largest:.3g}",
                where="precision",
                expected=f"numbers up to {most:.3g}, the largest of {dtype}",
                remedy="merge with --precision bf16 or fp32",
            )
        tensor.data.copy_(tensor.data.to(dtype))


@dataclass(frozen=True)
class Merged:
    """What `merge_folder` wrote: where, how many layers changed, how many were in four bits, and
    the type of the weights."""

    folder: Path
    layers: int
    thawed: int
    precision: str


def refuse_foreign(base: ModelFolder) -> None:
    """Raise UserError for a family without code of its own here."""
    if not is_native(base):
        raise UserError(
            f"a model of the family {base.family}, which has no code of its own here",
            where="finesight merge",
            expected="a native family",
            remedy="merge it with peft: PeftModel.from_pretrained(...).merge_and_unload()",
        )


def kept_precision(base: ModelFolder, asked: Precision) -> tuple[str, torch.dtype]:
    """The type of the weights to write, by name, and the least that their sum is made in: auto
    keeps the type of the base's weights, and is fp32 where they have several."""
    stored = stored_precision(base)
    kept = stored if asked == "auto" else asked
    # In another type than the base's the sum would be rounded twice, unless kept in fp32.
    return kept, DTYPES[stored] if kept == stored else torch.float32


def merge_folder(
    base: ModelFolder,
    adapter: Path | None,
    out: Path,
    precision: Precision = "auto",
    manifest: Manifest | None = None,
) -> Merged:
    """Write the model of `base` with the adapter merged to a new folder `out`, in the hub's layout.
    What was published in four bits is written in full, also where there is no adapter.

    `precision` is as in `kept_precision`, `manifest` as in `write_merged`. The weights of `base`
    are taken as published, also where the run had them in few bits. Computed on the CPU. Raises
    UserError for an existing `out`, an adapter that does not fit (another base's fingerprint
    included) and a full disk; then nothing is left at `out`. Nothing is proved here:
    `export.merging` does that.
    """
    refuse_foreign(base)
    with write_folder(out) as folder:
        kept, computed = kept_precision(base, precision)
        model = load_model(base, computed, torch.device("cpu"))
        thawed = thaw(model)
        if adapter is not None:
            install_adapter(model, adapter, base=base, dtype=torch.float32)
        layers = merge_into(model)
        write_merged(model, base, folder, DTYPES[kept], manifest)
    return Merged(out, layers, thawed, kept)


def write_merged(
    model: VisionLanguageModel,
    base: ModelFolder,
    folder: Path,
    dtype: torch.dtype,
    manifest: Manifest | None,
    max_shard_bytes: float = SHARD_BYTES,
) -> None:
    """Write a merged model into the empty `folder`, beside the descriptions of its base.

    `manifest` is that of the adapter's run: it goes along, so that the folder is asked as the run
    was trained; where its base lay is nobody else's business.
    """
    save_model(model, base, folder, dtype, max_shard_bytes)
    if manifest is not None:
        named = manifest.model_copy(update={"base": public_name(manifest.base)})
        (folder / MANIFEST).write_text(named.model_dump_json(indent=1) + "\n")
        if isinstance(manifest.picture, PixelRange):
            _tell_servers(folder, manifest.picture)


def public_name(base: str) -> str:
    """A base as others may read of it: a hub's name whole, of a path its last piece."""
    return base if model_address(base) is not None else Path(base).name


def _tell_servers(folder: Path, rule: PixelRange) -> None:
    """The pixel limits of the training, where other programs look for them: in each file that has
    the picture settings. A new one would hide what the other says of patches and colours."""
    processor, alone = _settings(folder / PROCESSOR), folder / PREPROCESSOR
    nested = processor.get("image_processor")
    if isinstance(nested, dict):
        processor["image_processor"] = _limited(nested, rule)
        _write(folder / PROCESSOR, processor)
    if alone.exists() or not isinstance(nested, dict):
        _write(alone, _limited(_settings(alone), rule))


def _limited(settings: dict[str, Any], rule: PixelRange) -> dict[str, Any]:
    """With the limits under the names of transformers 4 and, where it is there, under the `size` of
    transformers 5."""
    limited = settings | {"min_pixels": rule.min_pixels, "max_pixels": rule.max_pixels}
    if "size" in settings:
        limited["size"] = {"shortest_edge": rule.min_pixels, "longest_edge": rule.max_pixels}
    return limited


def _settings(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
