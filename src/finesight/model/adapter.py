"""Adapters as files, in PEFT's format: what is trained here loads in peft, and the reverse.

Names. peft's keys follow the module names of the transformers release that wrote them:
`base_model.model.model.language_model.layers...` and `base_model.model.model.visual...` since
release 5, `base_model.model.model.layers...` and `base_model.model.visual...` before. Both are
read, the first are written. A key that fits no layer is refused here, where peft says nothing
and leaves the layer's B at zero.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from finesight.digests import DIGESTS, verify_folder
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.model.any_family import AnyModel
from finesight.model.lora import Factors, LoraGroup, LowRank, adaptable_layers, adapters, hub_name
from finesight.model.peft_config import (
    CURRENT,
    FIRST,
    LoraSpec,
    Names,
    layer_name,
    module_name,
    read_settings,
    spec_of,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_NUMBERED = re.compile(r"(?P<stem>.+\.(?:layers|blocks))\.(?P<index>\d+)\.(?P<tail>.+)")
_FINGERPRINT = "base_fingerprint"


def write_adapter(
    folder: Path,
    model: AnyModel,
    *,
    base: str,
    base_fingerprint: str | None = None,
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapters of `model` into an existing folder, in fp32.

    `base` is the folder or hub name of the model below; its fingerprint, where given, is kept in
    the header of the file and another base refused later. `values` gives exacter values (fp32
    masters) by native parameter name. For the folder to be written whole or not at all, let
    `storage.write_folder` make it.
    """
    values = values or {}
    layers: dict[str, LowRank] = {}
    tensors: dict[str, Tensor] = {}
    dropout = 0.0
    for path, _, adapter in adapters(model):
        dropout = adapter.dropout
        stacked_SI = values.get(f"{path}.adapter.a", adapter.a)
        for output, band in adapter.bands.items():
            name = hub_name(path, output)
            layers[name] = adapter.layers[output]
            b_OR = values.get(f"{path}.adapter.b.{output}", adapter.b[output])
            key = f"{_PREFIX}{module_name(name, model.module_names)}"
            tensors[f"{key}.lora_A.weight"] = _for_file(stacked_SI[band.rows])
            tensors[f"{key}.lora_B.weight"] = _for_file(b_OR)
    assert layers, "the model has no adapter to write"
    config = _config(model, layers, base, dropout)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    metadata = {"format": "pt"}
    if base_fingerprint is not None:
        metadata[_FINGERPRINT] = base_fingerprint
    save_file(tensors, folder / WEIGHTS, metadata)
    _order_metadata(folder / WEIGHTS)


def _order_metadata(path: Path) -> None:
    """The library writes the notes of a file in any order; in one order, the same adapter is the
    same file. The header keeps its length: the spaces that pad it may grow."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, f"a header of {len(text)} bytes in place of {size}"
        file.seek(8)
        file.write(text.ljust(size))


def _for_file(tensor: Tensor) -> Tensor:
    # A copy: slices of a stacked tensor share their memory, which the file format refuses.
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _config(
    model: AnyModel, layers: dict[str, LowRank], base: str, dropout: float
) -> dict[str, object]:
    names = model.module_names
    usual = Counter(layers.values()).most_common(1)[0][0]
    odd = {re.escape(module_name(name, names)): low for name, low in layers.items() if low != usual}
    return {
        "alpha_pattern": {module: _number(low.alpha) for module, low in odd.items()},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(usual.alpha),
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": usual.rank,
        "rank_pattern": {module: low.rank for module, low in odd.items()},
        "target_modules": target_pattern(list(layers), list(adaptable_layers(model)), names),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def target_pattern(chosen: list[str], existing: list[str], names: Names = CURRENT) -> str:
    """A regular expression whose full match finds the `chosen` layers by these names, and no
    other: a bare `gate_proj` would also find the vision tower's in Qwen2.5-VL."""
    numbers = _indices(existing)
    singles = [
        re.escape(module_name(name, names)) for name in chosen if not _NUMBERED.fullmatch(name)
    ]
    rows: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (stem, tail), found in _indices(chosen).items():
        rows.setdefault((stem, tuple(found)), []).append(re.escape(tail))
    patterns = []
    for (stem, indices), tails in rows.items():
        depth = {i for (other, _), all_of in numbers.items() if other == stem for i in all_of}
        which = r"\d+" if set(indices) == depth else f"({'|'.join(map(str, indices))})"
        start = re.escape(module_name(f"{stem}.", names))
        patterns.append(rf"{start}{which}\.({'|'.join(tails)})")
    return "|".join(f"({pattern})" for pattern in patterns + singles)


def _indices(names: list[str]) -> dict[tuple[str, str], list[int]]:
    """(what stands before the layer's number, what stands after it) to the numbers."""
    found: dict[tuple[str, str], list[int]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            found.setdefault((match["stem"], match["tail"]), []).append(int(match["index"]))
    return found


def read_adapter(
    folder: Path, known: Sequence[Names] = (CURRENT, FIRST)
) -> tuple[LoraSpec, dict[str, Factors]]:
    """Read a PEFT adapter: what it says of itself, and A and B by the layer's name here, which is
    one of the `known` names in the file.

    Raises UserError for a missing or damaged file, a setting that changes the arithmetic (DoRA,
    trained biases and the like), a key that is no LoRA factor, a layer with only one factor or
    named twice, and ranks that contradict the configuration.
    """
    # First: most of what peft can set shows in the keys of the tensors as well.
    settings = read_settings(folder / CONFIG)
    if (folder / DIGESTS).exists():
        verify_folder(folder)
    tensors, metadata = _tensors(folder)
    sides: dict[str, dict[str, tuple[str, Tensor]]] = {}
    strange, doubled = [], []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.dim() != 2 or not tensor.is_floating_point():
            strange.append(key)
            continue
        pair = sides.setdefault(layer_name(match["module"], known), {})
        if match["side"] in pair:
            doubled.append(key)
        pair[match["side"]] = match["module"], tensor
    where = str(folder / WEIGHTS)
    _refuse(strange, "are not factors of linear layers", where, _merge_remedy(strange))
    _refuse(doubled, "name layers that other keys name as well", where)
    single = [f"{pair[s][0]}.lora_{s}" for pair in sides.values() if len(pair) == 1 for s in pair]
    _refuse(single, "lack the other factor of their layer (A or B)", where)
    factors = {name: Factors(pair["A"][1], pair["B"][1]) for name, pair in sides.items()}
    ranks = {pair["A"][0]: len(pair["A"][1]) for pair in sides.values()}
    fingerprint = metadata.get(_FINGERPRINT)
    return spec_of(settings, folder / CONFIG, ranks, fingerprint, known), factors


def _merge_remedy(keys: Sequence[str]) -> str:
    """The remedy where peft saved other tensors beside factors, such as embeddings; else none."""
    if not all(key.startswith(_PREFIX) and key.endswith((".weight", ".bias")) for key in keys):
        return ""
    return "merge the adapter into its base with peft (merge_and_unload), and use the merged model"


def _tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise UserError(
            f"{WEIGHTS} is missing" + (", and adapter_model.bin is a pickle" if pickled else ""),
            where=str(folder),
            expected=f"an adapter in PEFT's format: {CONFIG} and {WEIGHTS}",
            remedy="save the adapter again with safe_serialization=True"
            if pickled
            else "give the folder that holds the adapter itself",
        )
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            tensors = {key: file.get_tensor(key) for key in keys}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"not readable as safetensors: {error}", where=str(path), remedy="copy the file again"
        ) from error
    if not tensors:
        raise UserError("the adapter holds no tensors", where=str(path), remedy="save it again")
    return tensors, metadata


def _refuse(names: list[str], why: str, where: str, remedy: str = "") -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise UserError(
            f"{len(names)} keys {why}: {', '.join(names[:5])}{more}",
            where=where,
            expected=f"{_PREFIX}model.language_model.layers.N.MODULE.lora_A.weight and the like",
            remedy=remedy or "take an adapter of this family, saved whole by finesight or peft",
        )


def install_adapter(
    model: AnyModel,
    folder: Path,
    *,
    base: ModelFolder | None = None,
    dtype: torch.dtype | None = None,
) -> LoraSpec:
    """Put the adapter of `folder` on a model without one, for answering or merging: everything
    is frozen.

    `base` is where the model was loaded from, `dtype` the adapter's type, by default the model's.
    Raises UserError as `read_adapter`; when the adapter tells the fingerprint of its base and
    `base` has another; and when a layer of the adapter does not exist in the model, has another
    shape, or one that the adapter's configuration names is not in its file.
    """
    assert not list(adapters(model)), "the model carries adapters already"
    spec, factors = read_adapter(folder, model.known_names)
    if base is not None:
        _check_base(spec, folder, base)
    places = adaptable_layers(model)
    _check_layers(model, spec, factors, folder)
    for path in dict.fromkeys(places[name].path for name in spec.layers):
        own = {places[n].output: low for n, low in spec.layers.items() if places[n].path == path}
        group = next(place.group for place in places.values() if place.path == path)
        adapter = LoraGroup(group, own, spec.dropout, dtype)
        adapter.train(group.training)
        group.adapter = adapter
    _fill(model, factors)
    model.requires_grad_(False)
    return spec


def continue_adapter(model: AnyModel, folder: Path, *, base: ModelFolder | None = None) -> LoraSpec:
    """Give the adapters that the recipe installed the values of `folder`, to train on.

    Raises UserError as `install_adapter`, and when the layers, ranks or scales differ.
    """
    spec, factors = read_adapter(folder, model.known_names)
    if base is not None:
        _check_base(spec, folder, base)
    _check_layers(model, spec, factors, folder)
    wanted = {
        hub_name(path, output): low
        for path, _, adapter in adapters(model)
        for output, low in adapter.layers.items()
    }
    remedy = (
        "set tune as the adapter was trained, or merge the adapter (finesight merge) and start "
        "from the merged model"
    )
    where = str(folder)
    _refuse([n for n in spec.layers if n not in wanted], "have no adapter here", where, remedy)
    _refuse([n for n in wanted if n not in spec.layers], "are not in the adapter", where, remedy)
    for name, low in wanted.items():
        found = spec.layers[name]
        if found.rank != low.rank or not math.isclose(found.scale, low.scale):
            raise UserError(
                f"{name} has rank {found.rank} and scale {found.scale:g} in the adapter",
                where=where,
                expected=f"rank {low.rank} and scale {low.scale:g}, as the recipe says",
                remedy=remedy,
            )
    _fill(model, factors)
    return spec


def _check_base(spec: LoraSpec, folder: Path, base: ModelFolder) -> None:
    expected, found = spec.base_fingerprint, base.fingerprint()
    if expected is not None and found != expected:
        raise UserError(
            f"the base {base.path} has the fingerprint {found}",
            where=str(folder),
            expected=f"{expected}, the model {spec.base} that the adapter was trained on",
            remedy="give that model; an adapter fits no other",
        )


def _check_layers(
    model: nn.Module, spec: LoraSpec, factors: Mapping[str, Factors], folder: Path
) -> None:
    places, where = adaptable_layers(model), str(folder / WEIGHTS)
    _refuse([name for name in factors if name not in places], "are no layers of the model", where)
    missing = [name for name in places if name not in factors and spec.asks_for(name)]
    _refuse(missing, f"are named by target_modules in {CONFIG} but missing", where)
    for name, (a_RI, b_OR) in factors.items():
        group, _, output = places[name]
        expected = [(len(a_RI), group.inputs), (group.outputs[output], len(a_RI))]
        found = [tuple(a_RI.shape), tuple(b_OR.shape)]
        if found != expected:
            raise UserError(
                f"A and B of {name} have shapes {found[0]} and {found[1]}",
                where=where,
                expected=f"{expected[0]} and {expected[1]} for this model",
                remedy="take the adapter's own base model",
            )


@torch.no_grad()
def _fill(model: nn.Module, factors: Mapping[str, Factors]) -> None:
    for path, _, adapter in adapters(model):
        for output, (a_RI, b_OR) in adapter.factors().items():
            source = factors[hub_name(path, output)]
            a_RI.copy_(source.a)
            b_OR.copy_(source.b)
