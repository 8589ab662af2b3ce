"""Reading and writing of LoRA adapters in PEFT format, compatible with peft in both directions.

PEFT keys follow the module names of the transformers release that wrote them:
`base_model.model.model.language_model.layers...` and `base_model.model.model.visual...` since
release 5, `base_model.model.model.layers...` and `base_model.model.visual...` before. Both forms
are read, and the first one is written. A key without a matching layer raises an error; peft would
silently leave the layer's B at zero.
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

from finesight.digests import DIGESTS_FILE, verify_folder
from finesight.errors import UserError
from finesight.model.auto_model import AnyModel
from finesight.model.lora.layer import (
    LoraConfig,
    LoraFactors,
    LoraLinear,
    find_adaptable_layers,
    hub_name,
    iter_adapters,
)
from finesight.model.lora.peft_config import (
    QWEN_VL_MAPPING,
    TRANSFORMERS_V5_MAPPING,
    AdapterSpec,
    KeyMapping,
    build_adapter_spec,
    read_peft_config,
    to_layer_name,
    to_module_name,
)
from finesight.model_folder import ModelFolder

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"

_PEFT_PREFIX = "base_model.model."
_KEY_PATTERN = re.compile(re.escape(_PEFT_PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_NUMBERED_LAYER = re.compile(r"(?P<stem>.+\.(?:layers|blocks))\.(?P<index>\d+)\.(?P<tail>.+)")
_FINGERPRINT_KEY = "base_fingerprint"


def save_adapter(
    folder: Path,
    model: AnyModel,
    *,
    base_model: str,
    base_fingerprint: str | None = None,
    master_values: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the LoRA adapters of a model to a folder, in PEFT format and fp32.

    The folder must exist; use `storage.write_folder` for an atomic write.

    Args:
        folder: Target folder.
        model: Model with adapters.
        base_model: Folder or hub name of the base model.
        base_fingerprint: Fingerprint of the base, stored in the file header; loading rejects
            another base.
        master_values: More precise values (fp32 master weights) by native parameter name.
    """
    master_values = master_values or {}
    layers: dict[str, LoraConfig] = {}
    tensors: dict[str, Tensor] = {}
    dropout = 0.0
    for path, _, adapter in iter_adapters(model):
        dropout = adapter.dropout
        lora_A_SI = master_values.get(f"{path}.adapter.lora_A", adapter.lora_A)
        for output, lora_slice in adapter.slices.items():
            name = hub_name(path, output)
            layers[name] = adapter.configs[output]
            lora_B_OR = master_values.get(f"{path}.adapter.lora_B.{output}", adapter.lora_B[output])
            key = f"{_PEFT_PREFIX}{to_module_name(name, model.adapter_key_mapping)}"
            tensors[f"{key}.lora_A.weight"] = _to_file_tensor(lora_A_SI[lora_slice.rank_slice])
            tensors[f"{key}.lora_B.weight"] = _to_file_tensor(lora_B_OR)
    assert layers, "the model has no adapter to write"
    config = _build_peft_config(model, layers, base_model, dropout)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / ADAPTER_CONFIG_FILE).write_text(text, encoding="utf-8")
    metadata = {"format": "pt"}
    if base_fingerprint is not None:
        metadata[_FINGERPRINT_KEY] = base_fingerprint
    save_file(tensors, folder / ADAPTER_WEIGHTS_FILE, metadata)
    _sort_metadata(folder / ADAPTER_WEIGHTS_FILE)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in a safetensors header, so that equal adapters give equal files.

    safetensors writes the metadata in arbitrary order. The header's length does not change.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, f"metadata of {len(text)} bytes exceeds {size} bytes"
        file.seek(8)
        file.write(text.ljust(size))


def _to_file_tensor(tensor: Tensor) -> Tensor:
    # Copy, since slices of a stacked tensor share memory, which the file format rejects.
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _build_peft_config(
    model: AnyModel, configs: dict[str, LoraConfig], base_model: str, dropout: float
) -> dict[str, object]:
    key_mapping = model.adapter_key_mapping
    most_common = Counter(configs.values()).most_common(1)[0][0]
    exceptions = {
        re.escape(to_module_name(name, key_mapping)): lora_config
        for name, lora_config in configs.items()
        if lora_config != most_common
    }
    return {
        "alpha_pattern": {
            module: _as_int_if_integral(low.alpha) for module, low in exceptions.items()
        },
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _as_int_if_integral(most_common.alpha),
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": most_common.rank,
        "rank_pattern": {module: low.rank for module, low in exceptions.items()},
        "target_modules": build_target_pattern(
            list(configs), list(find_adaptable_layers(model)), key_mapping
        ),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _as_int_if_integral(value: float) -> int | float:
    return int(value) if value == int(value) else value


def build_target_pattern(
    selected: list[str], available: list[str], key_mapping: KeyMapping = TRANSFORMERS_V5_MAPPING
) -> str:
    """Build a regular expression for `target_modules` that matches exactly the selected layers.

    A list item such as `gate_proj` would also match Qwen2.5-VL's vision encoder.
    """
    layer_indices = _group_layer_indices(available)
    unnumbered = [
        re.escape(to_module_name(name, key_mapping))
        for name in selected
        if not _NUMBERED_LAYER.fullmatch(name)
    ]
    tails_by_stem: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (stem, tail), indices in _group_layer_indices(selected).items():
        tails_by_stem.setdefault((stem, tuple(indices)), []).append(re.escape(tail))
    patterns = []
    for (stem, selected_indices), tails in tails_by_stem.items():
        all_indices = {
            i for (other, _), all_of in layer_indices.items() if other == stem for i in all_of
        }
        index_pattern = (
            r"\d+"
            if set(selected_indices) == all_indices
            else f"({'|'.join(map(str, selected_indices))})"
        )
        prefix = re.escape(to_module_name(f"{stem}.", key_mapping))
        patterns.append(rf"{prefix}{index_pattern}\.({'|'.join(tails)})")
    return "|".join(f"({pattern})" for pattern in patterns + unnumbered)


def _group_layer_indices(names: list[str]) -> dict[tuple[str, str], list[int]]:
    """Group layer indices by the parts of the name before and after the index."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        if match := _NUMBERED_LAYER.fullmatch(name):
            groups.setdefault((match["stem"], match["tail"]), []).append(int(match["index"]))
    return groups


def read_adapter(
    folder: Path, key_mappings: Sequence[KeyMapping] = (TRANSFORMERS_V5_MAPPING, QWEN_VL_MAPPING)
) -> tuple[AdapterSpec, dict[str, LoraFactors]]:
    """Read a PEFT adapter: its description, and the LoRA matrices by native layer name.

    Raises:
        UserError: A file is missing or damaged, a setting is unsupported (DoRA, trained biases and
            others), a key is no LoRA matrix, a layer has only one matrix or duplicates, or the
            ranks contradict the config.
    """
    # Read the config first, because most unsupported settings also change the tensor keys.
    settings = read_peft_config(folder / ADAPTER_CONFIG_FILE)
    if (folder / DIGESTS_FILE).exists():
        verify_folder(folder)
    tensors, metadata = _read_tensors(folder)
    sides: dict[str, dict[str, tuple[str, Tensor]]] = {}
    invalid, duplicates = [], []
    for key, tensor in tensors.items():
        match = _KEY_PATTERN.fullmatch(key)
        if match is None or tensor.dim() != 2 or not tensor.is_floating_point():
            invalid.append(key)
            continue
        pair = sides.setdefault(to_layer_name(match["module"], key_mappings), {})
        if match["side"] in pair:
            duplicates.append(key)
        pair[match["side"]] = match["module"], tensor
    where = str(folder / ADAPTER_WEIGHTS_FILE)
    _raise_for_keys(invalid, "are not factors of linear layers", where, _merge_remedy(invalid))
    _raise_for_keys(duplicates, "duplicate the layers of other keys", where)
    unpaired = [f"{pair[s][0]}.lora_{s}" for pair in sides.values() if len(pair) == 1 for s in pair]
    _raise_for_keys(unpaired, "lack the other factor of their layer (A or B)", where)
    factors = {name: LoraFactors(pair["A"][1], pair["B"][1]) for name, pair in sides.items()}
    ranks = {pair["A"][0]: len(pair["A"][1]) for pair in sides.values()}
    fingerprint = metadata.get(_FINGERPRINT_KEY)
    return build_adapter_spec(
        settings, folder / ADAPTER_CONFIG_FILE, ranks, fingerprint, key_mappings
    ), factors


def _merge_remedy(keys: Sequence[str]) -> str:
    """Return the remedy for adapter files with complete tensors, such as embeddings.

    Returns an empty string if peft cannot have written the keys.
    """
    if not all(key.startswith(_PEFT_PREFIX) and key.endswith((".weight", ".bias")) for key in keys):
        return ""
    return "merge the adapter into its base with peft (merge_and_unload), and use the merged model"


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = folder / ADAPTER_WEIGHTS_FILE
    if not path.is_file():
        has_pickle = (folder / "adapter_model.bin").is_file()
        raise UserError(
            f"{ADAPTER_WEIGHTS_FILE} is missing"
            + (", and adapter_model.bin is a pickle" if has_pickle else ""),
            where=str(folder),
            expected=f"a PEFT adapter: {ADAPTER_CONFIG_FILE} and {ADAPTER_WEIGHTS_FILE}",
            remedy="save the adapter again with safe_serialization=True"
            if has_pickle
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


def _raise_for_keys(names: list[str], reason: str, where: str, remedy: str = "") -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise UserError(
            f"{len(names)} keys {reason}: {', '.join(names[:5])}{more}",
            where=where,
            expected=f"{_PEFT_PREFIX}model.language_model.layers.N.MODULE.lora_A.weight and "
            "similar keys",
            remedy=remedy or "use an adapter of this family, saved completely by finesight or peft",
        )


def load_adapter(
    model: AnyModel,
    folder: Path,
    *,
    base_folder: ModelFolder | None = None,
    dtype: torch.dtype | None = None,
) -> AdapterSpec:
    """Load the adapter of `folder` into a model and freeze all parameters.

    Args:
        model: Model without adapters.
        folder: Adapter folder.
        base_folder: Folder of the base model; its fingerprint must match the adapter's.
        dtype: Dtype of the adapter; the model's by default.

    Raises:
        UserError: `read_adapter` fails, the adapter was trained on another base, or a layer is
            missing in the model, has another shape, or is targeted by the config but not in the
            file.
    """
    assert not list(iter_adapters(model)), "the model already has adapters"
    spec, factors = read_adapter(folder, model.adapter_key_mappings)
    if base_folder is not None:
        _check_base_fingerprint(spec, folder, base_folder)
    linears = find_adaptable_layers(model)
    _check_layers(model, spec, factors, folder)
    for path in dict.fromkeys(linears[name].path for name in spec.configs):
        own_configs = {
            linears[n].output_name: lora_config
            for n, lora_config in spec.configs.items()
            if linears[n].path == path
        }
        linear = next(ref.linear for ref in linears.values() if ref.path == path)
        adapter = LoraLinear(linear, own_configs, spec.dropout, dtype)
        adapter.train(linear.training)
        linear.adapter = adapter
    _copy_factors(model, factors)
    model.requires_grad_(False)
    return spec


def load_trainable_adapter(
    model: AnyModel, folder: Path, *, base_folder: ModelFolder | None = None
) -> AdapterSpec:
    """Load an adapter folder into the existing trainable adapters of a model.

    Raises UserError as `load_adapter`, and if layers, ranks or scales differ from the model's.
    """
    spec, factors = read_adapter(folder, model.adapter_key_mappings)
    if base_folder is not None:
        _check_base_fingerprint(spec, folder, base_folder)
    _check_layers(model, spec, factors, folder)
    expected = {
        hub_name(path, output): low
        for path, _, adapter in iter_adapters(model)
        for output, low in adapter.configs.items()
    }
    remedy = (
        "set tune as the adapter was trained, or merge the adapter (finesight merge) and start "
        "from the merged model"
    )
    where = str(folder)
    _raise_for_keys(
        [n for n in spec.configs if n not in expected], "have no adapter here", where, remedy
    )
    _raise_for_keys(
        [n for n in expected if n not in spec.configs], "are not in the adapter", where, remedy
    )
    for name, lora_config in expected.items():
        found = spec.configs[name]
        if found.rank != lora_config.rank or not math.isclose(found.scale, lora_config.scale):
            raise UserError(
                f"{name} has rank {found.rank} and scale {found.scale:g} in the adapter",
                where=where,
                expected=f"rank {lora_config.rank} and scale {lora_config.scale:g}, as in the "
                "recipe",
                remedy=remedy,
            )
    _copy_factors(model, factors)
    return spec


def _check_base_fingerprint(spec: AdapterSpec, folder: Path, base_folder: ModelFolder) -> None:
    expected, found = spec.base_fingerprint, base_folder.fingerprint()
    if expected is not None and found != expected:
        raise UserError(
            f"the base {base_folder.path} has the fingerprint {found}",
            where=str(folder),
            expected=f"{expected}, the model {spec.base_model} that the adapter was trained on",
            remedy="use that model; an adapter fits no other",
        )


def _check_layers(
    model: nn.Module, spec: AdapterSpec, factors: Mapping[str, LoraFactors], folder: Path
) -> None:
    linears, where = find_adaptable_layers(model), str(folder / ADAPTER_WEIGHTS_FILE)
    _raise_for_keys(
        [name for name in factors if name not in linears], "are no layers of the model", where
    )
    missing = [name for name in linears if name not in factors and spec.targets_layer(name)]
    _raise_for_keys(
        missing, f"are named by target_modules in {ADAPTER_CONFIG_FILE} but missing", where
    )
    for name, (lora_A_RI, lora_B_OR) in factors.items():
        linear, _, output = linears[name]
        expected = [
            (len(lora_A_RI), linear.in_features),
            (linear.output_sizes[output], len(lora_A_RI)),
        ]
        found = [tuple(lora_A_RI.shape), tuple(lora_B_OR.shape)]
        if found != expected:
            raise UserError(
                f"A and B of {name} have shapes {found[0]} and {found[1]}",
                where=where,
                expected=f"{expected[0]} and {expected[1]} for this model",
                remedy="use the adapter's own base model",
            )


@torch.no_grad()
def _copy_factors(model: nn.Module, factors: Mapping[str, LoraFactors]) -> None:
    for path, _, adapter in iter_adapters(model):
        for output, (lora_A_RI, lora_B_OR) in adapter.factors().items():
            source = factors[hub_name(path, output)]
            lora_A_RI.copy_(source.lora_A)
            lora_B_OR.copy_(source.lora_B)
