"""Weights in and out of hub folders: safetensors, published names, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finesight.config import Weights
from finesight.digests import DIGESTS, verify_folder
from finesight.errors import UserError
from finesight.hub import PICKLED_INDEX, PREPROCESSOR_DEFAULTS, ModelFolder
from finesight.manifest import MANIFEST
from finesight.model.few_bits import keep_in_few_bits
from finesight.model.frozen import STORED, FrozenMatrix, FrozenWeight, Piece, frozen_weights
from finesight.model.geometry import Settings
from finesight.model.headers import Stored, header, misfit, opened
from finesight.model.int4 import keep_in_int4, published_group
from finesight.model.linear import GroupedLinear
from finesight.model.lora import hub_name
from finesight.model.network import VisionLanguageModel, build, fitting, make_room
from finesight.model.parts import Part
from finesight.model.qwen_vl import Pool

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The types that weights are stored in and computed with, by the name a user gives them."""

_HEAD = "lm_head.weight"
_PATCH_EMBED = "visual.patch_embed.proj.weight"
_PACKED = ".qweight"
"""The ending of the one tensor that only a quantised layer has."""
_INDEX = "model.safetensors.index.json"
_DESCRIPTIONS = {".json", ".txt", ".jinja", ".model", ".tiktoken"}
_REMEDY = "download the model again"


@dataclass(frozen=True)
class HubTensor:
    """A tensor as the hub has it: its own name here (`Architecture.published_name` has the hub's)
    and its shape; `data` is the stretch of a parameter that holds it (a group holds several, and
    the patch embedding is kept flat), or a piece of a matrix in few bits."""

    name: str
    data: Tensor | Piece
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many it has."""
        return math.prod(self.shape)

    @property
    def types(self) -> Collection[str]:
        """Those that a file may have it in."""
        return self.data.types if isinstance(self.data, Piece) else STORED

    @property
    def dense(self) -> bool:
        """Whether a file has its numbers in full, whatever is kept of them here."""
        return not isinstance(self.data, Piece) or self.data.name == "weight"

    def fits(self, stored: Stored) -> bool:
        """Whether that can stand here; transformers 5 writes experts with their outputs first."""
        shape = stored.shape
        turned = (shape[0], shape[2], shape[1]) if len(shape) == 3 else None
        return self.shape in (shape, turned)

    def put(self, values: Tensor) -> None:
        """Give it the values of a file."""
        if isinstance(self.data, Piece):
            self.data.fill(values)
        else:
            self.data.copy_(values.reshape(self.data.shape))


def hub_tensors(model: VisionLanguageModel) -> Iterator[HubTensor]:
    """Every tensor of the model as the hub knows it, without adapters. A tied head has none."""
    inner: list[str] = []
    for path, module in model.named_modules():
        if any(path == one or path.startswith(f"{one}.") for one in inner):
            continue
        if isinstance(module, GroupedLinear):
            inner += [f"{path}.adapter", f"{path}.weight"]
            yield from _group_tensors(path, module)
        else:
            # Buffers are numbers that are stored and never learn.
            own = (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
            for key, parameter in chain(*own):
                name, data = f"{path}.{key}", parameter.detach()
                shape = tuple(data.shape)
                if name == _PATCH_EMBED:
                    shape = (len(data), *model.geometry.vision.patch_shape)
                yield HubTensor(name, data, shape)


def _group_tensors(path: str, group: GroupedLinear) -> Iterator[HubTensor]:
    widths = list(group.outputs.values())
    weights: Sequence[Tensor | FrozenMatrix] = (
        group.weight.matrices
        if isinstance(group.weight, FrozenWeight)
        else torch.split(group.weight.detach(), widths)
    )
    biases = (
        [None] * len(widths) if group.bias is None else torch.split(group.bias.detach(), widths)
    )
    for output, weight, bias in zip(group.outputs, weights, biases, strict=True):
        layer = hub_name(path, output)
        if isinstance(weight, FrozenMatrix):
            for piece in weight.pieces():
                yield HubTensor(f"{layer}.{piece.name}", piece, piece.shape)
        else:
            yield HubTensor(f"{layer}.weight", weight, (group.outputs[output], group.inputs))
        if bias is not None:
            yield HubTensor(f"{layer}.bias", bias, tuple(bias.shape))


def load_model(
    folder: ModelFolder,
    dtype: torch.dtype,
    device: torch.device,
    nf4: Collection[Part] = (),
    kind: Weights = "auto",
    fp8: Collection[Part] = (),
) -> VisionLanguageModel:
    """The model of a hub folder, every tensor read exactly once.

    The linear layers of the parts `nf4` are quantised one by one as they are read, from the type
    that they are stored in, so that the bits are the same whatever is computed in; of the
    embeddings that is the head. Those of the parts `fp8` are multiplied in FP8 while the model
    trains, and have their weights in it always (`model.fp8`). `kind` other than auto is that of the
    decoder and of a head of its own, whatever `nf4` and `fp8` say (`model.few_bits`).

    Layers that were published in four bits (`model.int4`) stay so.

    Raises UserError for a damaged file, for missing, unknown, repeated or wrongly shaped tensors,
    for weights quantised otherwise, for a folder that has changed since finesight wrote it, for a
    head to quantise that is tied, for a decoder to quantise that has experts, and where quantising
    needs a package that is missing.
    """
    group = published_group(folder)
    config = Settings(folder.config, str(folder.path / "config.json"))
    preprocessor = Settings(folder.preprocessor, str(folder.path / "preprocessor_config.json"))
    files = folder.weight_files()
    # Also what was converted here from pickles.
    for made in dict.fromkeys((folder.path, *(file.parent for file in files))):
        if (made / DIGESTS).is_file():
            verify_folder(made)
    model = build(config, preprocessor, dtype, torch.device("meta"))
    keep_in_few_bits(model, nf4, fp8, kind, folder.path)
    named = model.architecture.native_name
    stored = [tensor for file in files for tensor in header(file, named)]
    if group is not None:
        layers = {t.layer for t in stored if t.native.endswith(_PACKED)}
        keep_in_int4(model, layers, group, str(folder.path))
    wanted = {tensor.name: tensor for tensor in hub_tensors(model)}
    if model.geometry.language.tied:
        # A tied head may be written out; the embedding is what it is tied to.
        stored = [tensor for tensor in stored if tensor.native != _HEAD]
    stored = _without_idle_biases(stored, wanted)
    _check(stored, wanted, folder.path)
    with fitting(config.file):
        make_room(model, device)
    # The same, now with room for numbers.
    wanted = {tensor.name: tensor for tensor in hub_tensors(model)}
    turned = _turned(stored, wanted)
    for file in files:
        with opened(file) as weights:
            for tensor in stored:
                if tensor.file == file:
                    values = weights.get_tensor(tensor.name)
                    wanted[tensor.native].put(values.mT if tensor.native in turned else values)
    return model


def _turned(stored: Sequence[Stored], wanted: Mapping[str, HubTensor]) -> set[str]:
    """The stacks of experts whose outputs come first.

    A square one does not say; but never are both stacks of a layer square, whose inner width is
    that of the model for one and half of it for the other. They are written in one order.
    """
    layers = {t.layer for t in stored if t.shape != wanted[t.native].shape}
    return {t.native for t in stored if t.layer in layers and len(t.shape) == 3}


def _without_idle_biases(stored: Sequence[Stored], wanted: Mapping[str, HubTensor]) -> list[Stored]:
    """AutoGPTQ writes a bias for every layer that it quantised: zeros where the model has none."""
    idle = [
        t
        for t in stored
        if t.native.endswith(".bias") and t.native not in wanted and t.layer + _PACKED in wanted
    ]
    for tensor in idle:
        with opened(tensor.file) as weights:
            if weights.get_tensor(tensor.name).any():
                raise misfit([tensor.name], "of layers without a bias", "zeros", tensor.file)
    return [tensor for tensor in stored if tensor not in idle]


def stored_precision(folder: ModelFolder) -> str:
    """The type of a folder's tensors, a key of DTYPES; fp32 where there are several, so that none
    loses digits. Layers in few bits do not count. Raises UserError for other types."""
    quantised = published_group(folder) is not None
    tensors = [tensor for file in folder.weight_files() for tensor in header(file)]
    packed = {t.layer for t in tensors if quantised and t.native.endswith(_PACKED)}
    types = {tensor.dtype for tensor in tensors if tensor.layer not in packed}
    strange = sorted(types.difference(STORED)) if types else ["none"]
    if strange:
        raise UserError(
            f"weights of type {strange[0]}",
            where=str(folder.path),
            expected=f"one of {', '.join(STORED)}",
            remedy=_REMEDY,
        )
    return STORED[types.pop()] if len(types) == 1 else "fp32"


def _check(stored: Sequence[Stored], wanted: Mapping[str, HubTensor], folder: Path) -> None:
    """Every wanted tensor once and nothing else, found by the headers before any number is read."""
    unknown = [t for t in stored if t.native not in wanted]
    if unknown:
        names = [t.name for t in unknown]
        raise misfit(names, "unknown to this model", "those of config.json", unknown[0].file)
    counts = Counter(t.native for t in stored)
    repeated = [t for t in stored if counts[t.native] > 1]
    if repeated:
        raise misfit([t.name for t in repeated], "there twice", "each once", repeated[-1].file)
    misshapen = [t for t in stored if not wanted[t.native].fits(t)]
    if misshapen:
        shapes = [f"{t.name} {t.shape} not {wanted[t.native].shape}" for t in misshapen]
        raise misfit(shapes, "of another shape", "those of config.json", misshapen[0].file)
    strange = [t for t in stored if t.dtype not in wanted[t.native].types]
    if strange:
        types = [f"{t.name} {t.dtype}" for t in strange]
        expected = f"one of {', '.join(wanted[strange[0].native].types)}"
        raise misfit(types, "of another type", expected, strange[0].file)
    missing = [name for name in wanted if name not in counts]
    if missing:
        raise misfit(missing, "missing", "all those of config.json", folder)


def save_model(
    model: VisionLanguageModel,
    folder: ModelFolder,
    target: Path,
    dtype: torch.dtype,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write the weights under their published names into the folder `target`, in shards of at
    most `max_shard_bytes`, beside the configuration and tokenizer files of `folder`.

    `target` comes from `storage.write_folder`, which makes it appear whole. Adapters must be
    merged before. What the model holds in few bits is written as `folder` holds it, in its type.
    """
    groups = [module for module in model.modules() if isinstance(module, GroupedLinear)]
    adapters = sum(group.adapter is not None for group in groups)
    assert adapters == 0, f"{adapters} groups still carry an adapter: merge before saving"
    tensors = list(hub_tensors(model))
    originals = _originals(folder, model) if frozen_weights(model) else {}
    types = {t.name: _type_in_file(t, dtype, originals) for t in tensors}
    shards = _shards(tensors, types, max_shard_bytes)
    dropped = () if any(name.endswith(_PACKED) for name in types) else ("quantization_config",)
    dense = {types[t.name] for t in tensors if t.dense}
    # No number loses digits where the type that config.json names is taken for all.
    copy_descriptions(folder, target, dtype if dense == {dtype} else torch.float32, dropped)
    published = model.architecture.published_name
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = (
            "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        # Copied even where nothing changes: safetensors refuses stretches of a shared parameter.
        content = {published(t.name): _for_file(t, dtype, originals) for t in shard}
        save_file(content, target / file, metadata={"format": "pt"})
        names |= dict.fromkeys(content, file)
    if len(shards) > 1:
        size = sum(t.numbers * types[t.name].itemsize for t in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": names}
        (target / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shards(
    tensors: Sequence[HubTensor], types: Mapping[str, torch.dtype], most: float
) -> list[list[HubTensor]]:
    shards: list[list[HubTensor]] = [[]]
    size = 0
    for tensor in tensors:
        bytes_ = tensor.numbers * types[tensor.name].itemsize
        if shards[-1] and size + bytes_ > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += bytes_
    return shards


def _originals(folder: ModelFolder, model: VisionLanguageModel) -> dict[str, Stored]:
    named = model.architecture.native_name
    return {t.native: t for file in folder.weight_files() for t in header(file, named)}


def _type_in_file(
    tensor: HubTensor, dtype: torch.dtype, originals: Mapping[str, Stored]
) -> torch.dtype:
    if not isinstance(tensor.data, Piece):
        return dtype
    kind = originals[tensor.name].dtype
    return torch.int32 if kind == "I32" else DTYPES[STORED[kind]]


def _for_file(tensor: HubTensor, dtype: torch.dtype, originals: Mapping[str, Stored]) -> Tensor:
    if isinstance(tensor.data, Piece):
        original = originals[tensor.name]
        with opened(original.file) as weights:
            values: Tensor = weights.get_tensor(original.name)
        return values
    return tensor.data.to("cpu", dtype, copy=True).view(tensor.shape)


def copy_descriptions(
    folder: ModelFolder, target: Path, dtype: torch.dtype, dropped: Collection[str] = ()
) -> None:
    """Write config.json without the keys `dropped`, saying the type, and the tokenizer's and other
    small files to `target`."""
    for path in sorted(folder.path.iterdir()):
        wanted = path.suffix in _DESCRIPTIONS or path.name.startswith(("LICENSE", "NOTICE"))
        source = folder.file(path.name) if wanted else None
        if source is None or path.name in (DIGESTS, MANIFEST, _INDEX, PICKLED_INDEX, "config.json"):
            continue
        (target / path.name).write_bytes(source.read_bytes())
    kind = str(dtype).removeprefix("torch.")
    config = {
        key: kind if key in ("dtype", "torch_dtype") else value
        for key, value in folder.config.items()
        if key not in dropped
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")


@torch.no_grad()
def random_model(
    config: Mapping[str, object],
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    preprocessor: Mapping[str, object] = PREPROCESSOR_DEFAULTS,
) -> VisionLanguageModel:
    """A model of this config.json with weights and biases from N(0, 0.02) and norms at one, drawn
    on `device`: a function of the seed, the type and the kind of device. Positions that never learn
    are those of published models."""
    model = build(
        Settings(config), Settings(preprocessor, "preprocessor_config.json"), dtype, device
    )
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        norm = isinstance(module, nn.LayerNorm | nn.RMSNorm)
        for key, parameter in module.named_parameters(recurse=False):
            if norm:
                parameter.fill_(1.0 if key == "weight" else 0.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        if isinstance(module, Pool):
            module.set_positions()
    return model
