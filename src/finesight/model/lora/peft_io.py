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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, NoReturn, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from finesight.errors import UserError
from finesight.files.bounded_files import read_bytes
from finesight.files.pattern_matcher import PatternMatcher
from finesight.files.storage import DIGESTS_FILE, verify_folder
from finesight.model.backend_model import BackendModel
from finesight.model.families import (
    KEY_MAPPINGS,
    TRANSFORMERS_V5_MAPPING,
    KeyMapping,
    to_layer_name,
    to_module_name,
)
from finesight.model.linear import (
    FusedLinear,
    LoraConfig,
    LoraFactors,
    LoraLinear,
    find_adaptable_layers,
    hub_name,
    iter_adapters,
)
from finesight.model.weights_io import open_safetensors
from finesight.model_folder import ModelFolder

_IGNORED_SETTINGS = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
"""PEFT settings without effect on a trained adapter, or only in combination with another
setting."""

_SUPPORTED_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Supported values of `init_lora_weights`, which leave the base weight unchanged. Others, such as
PiSSA, change it."""

_NOT_MERGED = {
    "alora_invocation_tokens", "arrow_config", "layer_replication", "megatron_config", "r",
    "use_qalora",
}  # fmt: skip
"""Settings of LoRA adapters that peft cannot merge into a base model."""

_PROMPTS = {
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING",
    "PROMPT_TUNING", "P_TUNING", "SHADOW", "XLORA",
}  # fmt: skip
"""PEFT types that train prompts or route by the input, and cannot be merged into a base model."""

_SUPPORTED_FORMS = {"peft_type": "with peft_type=LORA", "r": "with a rank of at least 1"}

_MERGE_WITH_PEFT = (
    "merge the adapter into its base with peft (merge_and_unload), and use the merged model"
)

Value = TypeVar("Value")

Alpha = Annotated[int | float, Field(ge=-1e9, le=1e9)]
"""LoRA alpha in a PEFT config, limited to magnitudes up to 1e9."""


class PeftConfig(BaseModel):
    """Supported settings of a PEFT config."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    r: int = 8
    lora_alpha: Alpha = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

    def check_patterns(self, matcher: PatternMatcher) -> None:
        """Raise UserError for a pattern that is no regular expression."""
        patterns: list[str] = []
        for rule in (self.target_modules, self.exclude_modules):
            if isinstance(rule, str):
                patterns.append(rule)
        patterns += _as_list(self.layers_pattern)
        patterns += self.rank_pattern or ()
        patterns += self.alpha_pattern or ()
        matcher.match_first(patterns)

    def select_targets(self, modules: Sequence[str], matcher: PatternMatcher) -> list[str]:
        """Return the linear layers that peft would adapt, by module name."""
        excluded = set(_find_matches(self.exclude_modules, modules, matcher))
        included = [module for module in modules if module not in excluded]
        targets = self.target_modules
        if targets == "all-linear":
            return included
        selected = _find_matches(targets, included, matcher)
        allowed = self.layers_to_transform
        if targets is None or isinstance(targets, str) or allowed is None or allowed == []:
            return selected
        if isinstance(allowed, int):
            allowed = [allowed]
        indexed = [module for module in selected if module not in targets]
        layer_indices = self._find_layer_indices(indexed, matcher)
        return [
            module
            for module in selected
            if module in targets or layer_indices.get(module) in allowed
        ]

    def _find_layer_indices(
        self, modules: Sequence[str], matcher: PatternMatcher
    ) -> dict[str, int]:
        """Return the index of the layer of each module; none for a module without one."""
        names = _as_list(self.layers_pattern) or ["[^.]*"]
        patterns = [rf"(?:.*?\.)?{name}\.(\d+)\." for name in names]
        found: dict[str, int] = {}
        for module, match in zip(modules, matcher.match_first(patterns, modules), strict=True):
            if match is None:
                continue
            # A group of the pattern itself would come first, as in peft.
            index = match.groups[0] or ""
            if index.isdecimal():
                found[module] = int(index)
        return found

    def find_lora_configs(
        self, modules: Sequence[str], matcher: PatternMatcher
    ) -> dict[str, LoraConfig]:
        """Return the LoRA config of each layer by module name.

        The first entry of `rank_pattern` or `alpha_pattern` that matches the end of the module name
        takes precedence over `r` or `lora_alpha`. Rank-stabilized adapters (Kalajdzievski 2023)
        scale with alpha / sqrt(rank); their alpha is converted.
        """
        ranks = _find_first_matches(self.rank_pattern or {}, modules, matcher)
        alphas = _find_first_matches(self.alpha_pattern or {}, modules, matcher)
        configs: dict[str, LoraConfig] = {}
        for module in modules:
            rank = ranks.get(module, self.r)
            alpha = float(alphas.get(module, self.lora_alpha))
            if self.use_rslora:
                alpha *= math.sqrt(rank)
            configs[module] = LoraConfig(rank, alpha)
        return configs


def _as_list(rule: str | list[str] | None) -> list[str]:
    if isinstance(rule, str):
        return [rule]
    return rule or []


def _find_matches(
    rule: str | list[str] | None, modules: Sequence[str], matcher: PatternMatcher
) -> list[str]:
    """Return the module names that a rule of PEFT matches."""
    found: list[str] = []
    if not rule:
        return found
    if isinstance(rule, str):
        matches = matcher.match(rule, modules, is_full=True)
        for module, groups in zip(modules, matches, strict=True):
            if groups is not None:
                found.append(module)
        return found
    endings = tuple(f".{item}" for item in rule)
    for module in modules:
        if module in rule or module.endswith(endings):
            found.append(module)
    return found


def _find_first_matches(
    patterns: Mapping[str, Value], modules: Sequence[str], matcher: PatternMatcher
) -> dict[str, Value]:
    """Return the value of the first pattern that matches the end of each module name."""
    values = list(patterns.values())
    endings = [rf"(.*\.)?({pattern})$" for pattern in patterns]
    found: dict[str, Value] = {}
    for module, match in zip(modules, matcher.match_first(endings, modules), strict=True):
        if match is not None:
            found[module] = values[match.pattern_index]
    return found


def _detect_key_mapping(modules: Collection[str], key_mappings: Sequence[KeyMapping]) -> KeyMapping:
    """Return the mapping that matches all PEFT module names in an adapter file."""
    for key_mapping in key_mappings:
        prefixes = tuple(foreign for _, foreign in key_mapping)
        if all(module.startswith(prefixes) for module in modules):
            return key_mapping
    return ()


@dataclass(frozen=True)
class AdapterSpec:
    """Description of a PEFT adapter."""

    peft_config: PeftConfig
    base_fingerprint: str | None
    configs: Mapping[str, LoraConfig]
    key_mapping: KeyMapping

    @property
    def base_model(self) -> str:
        """Folder or hub name of the base model, as stated in the config."""
        return self.peft_config.base_model_name_or_path or ""

    @property
    def dropout(self) -> float:
        return self.peft_config.lora_dropout

    def select_targets(self, layers: Sequence[str], matcher: PatternMatcher) -> list[str]:
        """Return the layers that the config targets, by native name."""
        layers_by_module = {to_module_name(layer, self.key_mapping): layer for layer in layers}
        targets = self.peft_config.select_targets(list(layers_by_module), matcher)
        return [layers_by_module[module] for module in targets]


def read_peft_config(path: Path) -> PeftConfig:
    """Read `adapter_config.json`."""
    remedy = "give the folder of an adapter saved by finesight or peft"
    if not path.is_file():
        raise UserError(f"{path.name} is missing", where=str(path.parent), remedy=remedy)
    try:
        content = read_bytes(path, expected="a JSON object, as PEFT writes it", remedy=remedy)
        peft_config = PeftConfig.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(map(str, first["loc"])) or "the file"
        what = f"{setting}: {first['msg']}"
        if first["type"] != "json_invalid":
            what += f" (found {first['input']!r:.200})"
        raise UserError(what, where=str(path), remedy=remedy) from error
    _check_supported(peft_config, path)
    return peft_config


def _check_supported(peft_config: PeftConfig, path: Path) -> None:
    unsupported: dict[str, object] = {}
    extra_settings = peft_config.model_extra or {}
    for name, value in extra_settings.items():
        if value and name not in _IGNORED_SETTINGS:
            unsupported[name] = value
    supported_values = {
        "peft_type": peft_config.peft_type == "LORA",
        "bias": peft_config.bias == "none",
        "init_lora_weights": peft_config.init_lora_weights in _SUPPORTED_INITS,
        "r": peft_config.r > 0,
    }
    values = peft_config.model_dump()
    for name, is_supported in supported_values.items():
        if not is_supported:
            unsupported[name] = values[name]
    if not unsupported:
        return
    listed = ", ".join(f"{name}={json.dumps(value):.80}" for name, value in unsupported.items())
    raise UserError(
        f"the adapter was made with {listed}, which finesight does not support",
        where=str(path),
        expected="standard LoRA of linear layers (rank-stabilized scale, rank_pattern and "
        "alpha_pattern included)",
        remedy=_remedy(unsupported),
    )


def _remedy(unsupported: Mapping[str, object]) -> str:
    """Return the remedy for unsupported settings: merging with peft, or training again."""
    fixed = [name for name in unsupported if name in _NOT_MERGED]
    if unsupported.get("peft_type") in _PROMPTS:
        fixed.append("peft_type")
    if fixed:
        supported = ", ".join(_SUPPORTED_FORMS.get(name, f"without {name}") for name in fixed)
        return f"train the adapter again, {supported}: peft cannot merge such an adapter"
    if "lora_bias" in unsupported:
        return (
            f"{_MERGE_WITH_PEFT}; or train the adapter again, with lora_bias=false, where an "
            "adapted layer of the base has no bias"
        )
    return _MERGE_WITH_PEFT


ADAPTER_CONFIG_FILE = "adapter_config.json"

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"

_PEFT_PREFIX = "base_model.model."

_KEY_PATTERN = re.compile(re.escape(_PEFT_PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

_NUMBERED_LAYER = re.compile(r"(?P<stem>.+\.(?:layers|blocks))\.(?P<index>\d+)\.(?P<tail>.+)")

_FINGERPRINT_KEY = "base_fingerprint"


def save_adapter(
    folder: Path,
    model: BackendModel,
    *,
    base_model: str,
    base_fingerprint: str | None = None,
    master_values: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the LoRA adapters of a model to a folder, in PEFT format and fp32.

    The folder must exist; use `storage.write_folder` for an atomic write.
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
            lora_B_OR = adapter.lora_B[output]
            lora_B_OR = master_values.get(f"{path}.adapter.lora_B.{output}", lora_B_OR)
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
    model: BackendModel, configs: dict[str, LoraConfig], base_model: str, dropout: float
) -> dict[str, object]:
    key_mapping = model.adapter_key_mapping
    most_common, _ = Counter(configs.values()).most_common(1)[0]
    ranks: dict[str, int] = {}
    alphas: dict[str, int | float] = {}
    for name, lora_config in configs.items():
        if lora_config != most_common:
            pattern = re.escape(to_module_name(name, key_mapping))
            ranks[pattern] = lora_config.rank
            alphas[pattern] = _as_int_if_integral(lora_config.alpha)
    available = list(find_adaptable_layers(model))
    return {
        "alpha_pattern": alphas,
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
        "rank_pattern": ranks,
        "target_modules": build_target_pattern(list(configs), available, key_mapping),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _as_int_if_integral(value: float) -> int | float:
    return int(value) if value == int(value) else value


def build_target_pattern(
    selected: list[str], available: list[str], key_mapping: KeyMapping = TRANSFORMERS_V5_MAPPING
) -> str:
    """Build a regular expression for `target_modules` that matches exactly the selected layers."""
    all_indices: dict[str, set[int]] = {}
    for (stem, _), indices in _group_layer_indices(available).items():
        all_indices.setdefault(stem, set()).update(indices)
    tails_by_stem: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (stem, tail), indices in _group_layer_indices(selected).items():
        tails_by_stem.setdefault((stem, tuple(indices)), []).append(re.escape(tail))
    patterns = []
    for (stem, selected_indices), tails in tails_by_stem.items():
        index_pattern = r"\d+"
        if set(selected_indices) != all_indices.get(stem, set()):
            index_pattern = f"({'|'.join(map(str, selected_indices))})"
        prefix = re.escape(to_module_name(f"{stem}.", key_mapping))
        patterns.append(rf"{prefix}{index_pattern}\.({'|'.join(tails)})")
    for name in selected:
        if not _NUMBERED_LAYER.fullmatch(name):
            patterns.append(re.escape(to_module_name(name, key_mapping)))
    return "|".join(f"({pattern})" for pattern in patterns)


def _group_layer_indices(names: list[str]) -> dict[tuple[str, str], list[int]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        if match := _NUMBERED_LAYER.fullmatch(name):
            groups.setdefault((match["stem"], match["tail"]), []).append(int(match["index"]))
    return groups


def read_adapter(
    folder: Path, key_mappings: Sequence[KeyMapping] = KEY_MAPPINGS
) -> tuple[AdapterSpec, dict[str, LoraFactors]]:
    """Read a PEFT adapter: its description, and the LoRA matrices by native layer name.

    Raises UserError if a file is missing or damaged, a setting or tensor is unsupported, or the
    matrices are incomplete, duplicate or contradict the config.
    """
    with _match_patterns(folder) as matcher:
        return _read_files(folder, key_mappings, matcher)


def _read_files(
    folder: Path, key_mappings: Sequence[KeyMapping], matcher: PatternMatcher
) -> tuple[AdapterSpec, dict[str, LoraFactors]]:
    # Read the config first, because most unsupported settings also change the tensor keys.
    settings = read_peft_config(folder / ADAPTER_CONFIG_FILE)
    if (folder / DIGESTS_FILE).exists():
        verify_folder(folder)
    tensors, metadata = _read_tensors(folder)
    pairs = _pair_factors(tensors, key_mappings, str(folder / ADAPTER_WEIGHTS_FILE))
    factors: dict[str, LoraFactors] = {}
    modules: list[str] = []
    for name, pair in pairs.items():
        factors[name] = LoraFactors(pair["A"].tensor, pair["B"].tensor)
        modules.append(pair["A"].module)
    settings.check_patterns(matcher)
    found = settings.find_lora_configs(modules, matcher)
    configs: dict[str, LoraConfig] = {}
    for name, pair in pairs.items():
        module, lora_A_RI = pair["A"]
        lora_config = found[module]
        if lora_config.rank != len(lora_A_RI):
            raise UserError(
                f"{module} has rank {lora_config.rank}, but {len(lora_A_RI)} in the adapter's "
                "tensors",
                where=str(folder / ADAPTER_CONFIG_FILE),
                expected="r and rank_pattern as the adapter was trained",
                remedy="take both files from the same training",
            )
        configs[name] = lora_config
    key_mapping = _detect_key_mapping(modules, key_mappings)
    return AdapterSpec(settings, metadata.get(_FINGERPRINT_KEY), configs, key_mapping), factors


class _StoredFactor(NamedTuple):
    """LoRA factor in a file, with the PEFT module name of its key."""

    module: str
    tensor: Tensor


def _pair_factors(
    tensors: Mapping[str, Tensor], key_mappings: Sequence[KeyMapping], where: str
) -> dict[str, dict[str, _StoredFactor]]:
    """Return the factors A and B of each layer, by native layer name.

    Raises UserError if a key is no factor of a layer, a duplicate, or lacks the other factor.
    """
    pairs: dict[str, dict[str, _StoredFactor]] = {}
    invalid: list[str] = []
    duplicates: list[str] = []
    for key, tensor in tensors.items():
        match = _KEY_PATTERN.fullmatch(key)
        if match is None or tensor.dim() != 2 or not tensor.is_floating_point():
            invalid.append(key)
            continue
        pair = pairs.setdefault(to_layer_name(match["module"], key_mappings), {})
        if match["side"] in pair:
            duplicates.append(key)
        pair[match["side"]] = _StoredFactor(match["module"], tensor)
    # Complete tensors, such as embeddings, can only be merged.
    is_complete = all(
        key.startswith(_PEFT_PREFIX) and key.endswith((".weight", ".bias")) for key in invalid
    )
    remedy = _MERGE_WITH_PEFT if is_complete else ""
    _raise_for_keys(invalid, "are not factors of linear layers", where, remedy)
    _raise_for_keys(duplicates, "duplicate the layers of other keys", where)
    unpaired: list[str] = []
    for pair in pairs.values():
        if len(pair) == 1:
            ((side, factor),) = pair.items()
            unpaired.append(f"{factor.module}.lora_{side}")
    _raise_for_keys(unpaired, "lack the other factor of their layer (A or B)", where)
    return pairs


def _match_patterns(folder: Path) -> PatternMatcher:
    """Return a matcher of the patterns of an adapter, which may come from another user."""
    remedy = "list the names of the layers in the config instead, or use another adapter"
    return PatternMatcher(str(folder / ADAPTER_CONFIG_FILE), remedy)


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = folder / ADAPTER_WEIGHTS_FILE
    if not path.is_file():
        problem = f"{ADAPTER_WEIGHTS_FILE} is missing"
        remedy = "give the folder that holds the adapter itself"
        if (folder / "adapter_model.bin").is_file():
            problem += ", and adapter_model.bin is a pickle"
            remedy = "save the adapter again with safe_serialization=True"
        raise UserError(
            problem,
            where=str(folder),
            expected=f"a PEFT adapter: {ADAPTER_CONFIG_FILE} and {ADAPTER_WEIGHTS_FILE}",
            remedy=remedy,
        )
    with open_safetensors(path, remedy="copy the file again") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    if not tensors:
        raise UserError("the adapter holds no tensors", where=str(path), remedy="save it again")
    return tensors, metadata


class AdapterMismatchError(UserError):
    """Raised for an adapter of other layers, ranks or scales than the section `tune`."""


def _raise_for_keys(names: list[str], reason: str, where: str, remedy: str = "") -> None:
    if names:
        raise UserError(
            f"{len(names)} keys {reason}: {_join_names(names)}",
            where=where,
            expected=f"{_PEFT_PREFIX}model.language_model.layers.N.MODULE.lora_A.weight and "
            "similar keys",
            remedy=remedy or "use an adapter of this family, saved completely by finesight or peft",
        )


def _join_names(names: Sequence[str]) -> str:
    """List up to five names, and count the others."""
    listed = ", ".join(names[:5])
    if len(names) > 5:
        listed += f" and {len(names) - 5} more"
    return listed


def load_adapter(
    model: BackendModel,
    folder: Path,
    *,
    base_folder: ModelFolder | None = None,
    dtype: torch.dtype | None = None,
) -> AdapterSpec:
    """Load the adapter of `folder` into a model without adapters and freeze all parameters.

    The adapter has the model's dtype unless `dtype` is given. The fingerprint of `base_folder` must
    match the adapter's.

    Raises:
        UserError: `read_adapter` fails, the adapter was trained on another base, or a layer is
            missing in the model, has another shape, or is targeted by the config but not in the
            file.
    """
    assert not list(iter_adapters(model)), "the model already has adapters"
    spec, factors = _read_matching_adapter(model, folder, base_folder)
    layers = find_adaptable_layers(model)
    configs: dict[FusedLinear, dict[str, LoraConfig]] = {}
    for name, lora_config in spec.configs.items():
        linear, _, output = layers[name]
        configs.setdefault(linear, {})[output] = lora_config
    for linear, layer_configs in configs.items():
        adapter = LoraLinear(linear, layer_configs, spec.dropout, dtype)
        linear.adapter = adapter.train(linear.training)
    _copy_factors(model, factors)
    model.requires_grad_(False)
    return spec


def load_trainable_adapter(
    model: BackendModel, folder: Path, *, base_folder: ModelFolder | None = None
) -> AdapterSpec:
    """Load an adapter folder into the existing trainable adapters of a model.

    Raises UserError as `load_adapter`, and if layers, ranks or scales differ from the model's.
    """
    spec, factors = _read_matching_adapter(model, folder, base_folder)
    expected: dict[str, LoraConfig] = {}
    for path, _, adapter in iter_adapters(model):
        for output, lora_config in adapter.configs.items():
            expected[hub_name(path, output)] = lora_config

    def reject(problem: str, wanted: str) -> NoReturn:
        raise AdapterMismatchError(
            problem,
            where=str(folder),
            expected=wanted,
            remedy="set tune as the adapter was trained, or merge the adapter and start from the"
            " merged model",
        )

    extra = [name for name in spec.configs if name not in expected]
    missing = [name for name in expected if name not in spec.configs]
    if extra:
        problem = f"{len(extra)} keys have no adapter here: {_join_names(extra)}"
        reject(problem, "an adapter of the layers that tune in the recipe selects")
    if missing:
        problem = f"{len(missing)} keys are not in the adapter: {_join_names(missing)}"
        reject(problem, "an adapter of all layers that tune in the recipe selects")
    for name, lora_config in expected.items():
        found = spec.configs[name]
        if found.rank != lora_config.rank or not math.isclose(found.scale, lora_config.scale):
            reject(
                f"{name} has rank {found.rank} and scale {found.scale:g} in the adapter",
                f"rank {lora_config.rank} and scale {lora_config.scale:g}, as in the recipe",
            )
    _copy_factors(model, factors)
    return spec


def _read_matching_adapter(
    model: BackendModel, folder: Path, base_folder: ModelFolder | None
) -> tuple[AdapterSpec, dict[str, LoraFactors]]:
    """Read an adapter and check that it matches the model and its base."""
    layers = find_adaptable_layers(model)
    with _match_patterns(folder) as matcher:
        spec, factors = _read_files(folder, model.adapter_key_mappings, matcher)
        others = [name for name in layers if name not in factors]
        missing = spec.select_targets(others, matcher)
    if base_folder is not None and spec.base_fingerprint not in (None, base_folder.fingerprint()):
        raise UserError(
            f"the base {base_folder.path} has the fingerprint {base_folder.fingerprint()}",
            where=str(folder),
            expected=f"{spec.base_fingerprint}, the model {spec.base_model} that the adapter was "
            "trained on",
            remedy=f"use {spec.base_model} as in its training; an adapter fits no other",
        )
    where = str(folder / ADAPTER_WEIGHTS_FILE)
    unknown = [name for name in factors if name not in layers]
    _raise_for_keys(unknown, "are no layers of the model", where)
    _raise_for_keys(
        missing, f"are named by target_modules in {ADAPTER_CONFIG_FILE} but missing", where
    )
    for name, (lora_A_RI, lora_B_OR) in factors.items():
        linear, _, output = layers[name]
        found = [tuple(lora_A_RI.shape), tuple(lora_B_OR.shape)]
        rank = len(lora_A_RI)
        expected = [(rank, linear.in_features), (linear.output_sizes[output], rank)]
        if found != expected:
            raise UserError(
                f"A and B of {name} have shapes {found[0]} and {found[1]}",
                where=where,
                expected=f"{expected[0]} and {expected[1]} for this model",
                remedy="use the adapter's own base model",
            )
    return spec, factors


@torch.no_grad()
def _copy_factors(model: nn.Module, factors: Mapping[str, LoraFactors]) -> None:
    for path, _, adapter in iter_adapters(model):
        for output, (lora_A_RI, lora_B_OR) in adapter.factors().items():
            source = factors[hub_name(path, output)]
            lora_A_RI.copy_(source.lora_A)
            lora_B_OR.copy_(source.lora_B)
