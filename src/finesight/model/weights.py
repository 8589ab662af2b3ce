"""Weights in and out of hub folders: safetensors, published names, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from finesight.errors import UserError
from finesight.hub import PICKLED_INDEX, PREPROCESSOR_DEFAULTS, ModelFolder
from finesight.manifest import MANIFEST
from finesight.model.geometry import Settings
from finesight.model.linear import GroupedLinear
from finesight.model.network import VisionLanguageModel, build
from finesight.model.nf4 import Nf4Matrix, Nf4Weight, bitsandbytes
from finesight.model.parts import Part, part_of
from finesight.model.qwen_vl import Pool
from finesight.storage import DIGESTS, verify_folder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The types that weights are stored in and computed with, by the name a user gives them."""

_STORED = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
"""The same by their name in the header of a safetensors file."""

_HEAD = "lm_head.weight"
_PATCH_EMBED = "visual.patch_embed.proj.weight"
_INDEX = "model.safetensors.index.json"
_DESCRIPTIONS = {".json", ".txt", ".jinja", ".model", ".tiktoken"}
_REMEDY = "download the model again"


@dataclass(frozen=True)
class HubTensor:
    """A tensor as the hub has it: its own name here (`Architecture.published_name` has the hub's)
    and its shape; `data` is the stretch of a parameter that holds it (a group holds several, and
    the patch embedding is kept flat), or the matrix in NF4."""

    name: str
    data: Tensor | Nf4Matrix
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many it has."""
        return math.prod(self.shape)

    def put(self, values: Tensor) -> None:
        """Give it the values of a file."""
        if isinstance(self.data, Nf4Matrix):
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
    parent, widths = path.rpartition(".")[0], list(group.outputs.values())
    weights: Sequence[Tensor | Nf4Matrix] = (
        group.weight.matrices
        if isinstance(group.weight, Nf4Weight)
        else torch.split(group.weight.detach(), widths)
    )
    biases = (
        [None] * len(widths) if group.bias is None else torch.split(group.bias.detach(), widths)
    )
    for output, weight, bias in zip(group.outputs, weights, biases, strict=True):
        shape = group.outputs[output], group.inputs
        yield HubTensor(f"{parent}.{output}.weight", weight, shape)
        if bias is not None:
            yield HubTensor(f"{parent}.{output}.bias", bias, tuple(bias.shape))


@dataclass(frozen=True)
class _Stored:
    """What a file's header says of a tensor; `native` is the name here of what it calls `name`."""

    file: Path
    name: str
    native: str
    shape: tuple[int, ...]
    dtype: str

    def fits(self, wanted: HubTensor) -> bool:
        """Whether it can stand there; transformers 5 writes experts with their outputs first."""
        turned = (self.shape[0], self.shape[2], self.shape[1]) if len(self.shape) == 3 else None
        return wanted.shape in (self.shape, turned)


def load_model(
    folder: ModelFolder, dtype: torch.dtype, device: torch.device, nf4: Collection[Part] = ()
) -> VisionLanguageModel:
    """The model of a hub folder, every tensor read exactly once.

    The linear layers of the parts `nf4` are quantised one by one as they are read, from the type
    that they are stored in, so that the bits are the same whatever is computed in.

    Raises UserError for a damaged file, for missing, unknown, repeated or wrongly shaped tensors,
    for quantised weights, for a folder that has changed since finesight wrote it, and where
    quantising needs a package that is missing.
    """
    _refuse_quantised(folder)
    if nf4:
        bitsandbytes("tune.nf4")
    config = Settings(folder.config, str(folder.path / "config.json"))
    preprocessor = Settings(folder.preprocessor, str(folder.path / "preprocessor_config.json"))
    files = folder.weight_files()
    if (folder.path / DIGESTS).is_file():
        verify_folder(folder.path)
    model = build(config, preprocessor, dtype, torch.device("meta"))
    _keep_in_nf4(model, nf4)
    model.to_empty(device=device)
    wanted = {tensor.name: tensor for tensor in hub_tensors(model)}
    named = model.architecture.native_name
    stored = [tensor for file in files for tensor in _header(file, named)]
    if model.geometry.language.tied:
        # A tied head may be written out; the embedding is what it is tied to.
        stored = [tensor for tensor in stored if tensor.native != _HEAD]
    _check(stored, wanted, folder.path)
    for file in files:
        with _open(file) as weights:
            for tensor in stored:
                if tensor.file == file:
                    values = weights.get_tensor(tensor.name)
                    aim = wanted[tensor.native]
                    aim.put(values if tensor.shape == aim.shape else values.mT)
    return model


def _keep_in_nf4(model: VisionLanguageModel, parts: Collection[Part]) -> None:
    """Make room for four bits in these parts of a model without numbers."""
    for path, module in list(model.named_modules()):
        if isinstance(module, GroupedLinear) and part_of(f"{path}.weight") in parts:
            with torch.device("meta"):
                module.keep_in_nf4()


def stored_precision(folder: ModelFolder) -> str:
    """The type of most of a folder's tensors, a key of DTYPES. Raises UserError for others."""
    _refuse_quantised(folder)
    types = Counter(tensor.dtype for file in folder.weight_files() for tensor in _header(file))
    usual = max(types, key=types.__getitem__, default="none")
    if usual not in _STORED:
        raise UserError(
            f"weights of type {usual}",
            where=str(folder.path),
            expected=f"one of {', '.join(_STORED)}",
            remedy=_REMEDY,
        )
    return _STORED[usual]


def _refuse_quantised(folder: ModelFolder) -> None:
    quantised = folder.config.get("quantization_config")
    if quantised is not None:
        raise UserError(
            f"quantised weights: quantization_config is {quantised!r:.80}",
            where=str(folder.path / "config.json"),
            expected="weights in bf16, fp16 or fp32",
            remedy="take the same model without quantisation: tune.nf4=[language] in a recipe"
            " quantises it while it is loaded",
        )


def _header(file: Path, named: Callable[[str], str] = str) -> list[_Stored]:
    with _open(file) as weights:
        pieces = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
        return [
            _Stored(file, name, named(name), tuple(piece.get_shape()), piece.get_dtype())
            for name, piece in pieces.items()
        ]


def _check(stored: Sequence[_Stored], wanted: Mapping[str, HubTensor], folder: Path) -> None:
    """Every wanted tensor once and nothing else, found by the headers before any number is read."""
    unknown = [t for t in stored if t.native not in wanted]
    if unknown:
        names = [t.name for t in unknown]
        raise _misfit(names, "unknown to this model", "those of config.json", unknown[0].file)
    counts = Counter(t.native for t in stored)
    repeated = [t for t in stored if counts[t.native] > 1]
    if repeated:
        raise _misfit([t.name for t in repeated], "there twice", "each once", repeated[-1].file)
    misshapen = [t for t in stored if not t.fits(wanted[t.native])]
    if misshapen:
        shapes = [f"{t.name} {t.shape} not {wanted[t.native].shape}" for t in misshapen]
        raise _misfit(shapes, "of another shape", "those of config.json", misshapen[0].file)
    strange = [t for t in stored if t.dtype not in _STORED]
    if strange:
        types = [f"{t.name} {t.dtype}" for t in strange]
        raise _misfit(types, "of another type", f"one of {', '.join(_STORED)}", strange[0].file)
    missing = [name for name in wanted if name not in counts]
    if missing:
        raise _misfit(missing, "missing", "all those of config.json", folder)


def _misfit(names: list[str], what: str, expected: str, where: Path) -> UserError:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return UserError(
        f"{len(names)} tensors are {what}: {shown}",
        where=str(where),
        expected=expected,
        remedy=_REMEDY,
    )


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"not a whole safetensors file ({error})",
            where=str(file),
            expected="a safetensors file as it was published",
            remedy=_REMEDY,
        ) from error


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
    merged before. What the model holds in NF4 is written as `folder` holds it, in its type.
    """
    groups = [module for module in model.modules() if isinstance(module, GroupedLinear)]
    adapters = sum(group.adapter is not None for group in groups)
    assert adapters == 0, f"{adapters} groups still carry an adapter: merge before saving"
    copy_descriptions(folder, target, dtype)
    shards = _shards(list(hub_tensors(model)), dtype.itemsize, max_shard_bytes)
    published = model.architecture.published_name
    originals = _originals(folder, model) if _holds_nf4(model) else {}
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = (
            "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        # Copied even where nothing changes: safetensors refuses stretches of a shared parameter.
        tensors = {published(t.name): _for_file(t, dtype, originals) for t in shard}
        save_file(tensors, target / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        size = sum(t.numbers for shard in shards for t in shard) * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": names}
        (target / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shards(tensors: Sequence[HubTensor], itemsize: int, most: float) -> list[list[HubTensor]]:
    shards: list[list[HubTensor]] = [[]]
    size = 0
    for tensor in tensors:
        bytes_ = tensor.numbers * itemsize
        if shards[-1] and size + bytes_ > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += bytes_
    return shards


def _holds_nf4(model: nn.Module) -> bool:
    return any(isinstance(module, Nf4Matrix) for module in model.modules())


def _originals(folder: ModelFolder, model: VisionLanguageModel) -> dict[str, _Stored]:
    named = model.architecture.native_name
    return {t.native: t for file in folder.weight_files() for t in _header(file, named)}


def _for_file(tensor: HubTensor, dtype: torch.dtype, originals: Mapping[str, _Stored]) -> Tensor:
    if isinstance(tensor.data, Nf4Matrix):
        original = originals[tensor.name]
        with _open(original.file) as weights:
            values: Tensor = weights.get_tensor(original.name)
        return values
    return tensor.data.to("cpu", dtype, copy=True).view(tensor.shape)


def copy_descriptions(folder: ModelFolder, target: Path, dtype: torch.dtype) -> None:
    """Write config.json, saying the type, and the tokenizer's and other small files to `target`."""
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
