"""PEFT's `adapter_config.json`: parsing, supported settings and layer name mappings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finesight.bounded_files import read_bytes
from finesight.errors import UserError
from finesight.model.lora.layer import LoraConfig

_IGNORED_SETTINGS = {
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
"""PEFT settings without effect on a trained adapter, or only in combination with another
setting."""

_SUPPORTED_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Supported values of `init_lora_weights`, which leave the base weight unchanged. Others, such as
PiSSA, change it."""


_NOT_MERGED = {
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "megatron_config",
    "r",
    "use_qalora",
}
"""Settings of LoRA adapters that peft cannot merge into a base model."""

_PROMPTS = {
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "POLY",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "SHADOW",
    "XLORA",
}
"""PEFT types that train prompts or route by the input, and cannot be merged into a base model."""

_SUPPORTED_FORMS = {"peft_type": "with peft_type=LORA", "r": "with a rank of at least 1"}

Value = TypeVar("Value")


Alpha = Annotated[int | float, Field(ge=-1e9, le=1e9)]
"""LoRA alpha in a PEFT config, limited to magnitudes up to 1e9."""


class PeftConfig(BaseModel):
    """Supported settings of a PEFT config.

    `read_peft_config` raises an error that names any other active setting.
    """

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

    def is_target(self, module: str) -> bool:
        """Return True if peft would adapt the linear layer with this module name.

        Callers exclude the output head, which peft never adapts.
        """
        if self.target_modules is None or _matches(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules == "all-linear" or _matches(self.target_modules, module)
        if not _matches(self.target_modules, module):
            return False
        layer_indices = self.layers_to_transform
        if layer_indices is None or layer_indices == [] or module in self.target_modules:
            return True
        layer_index = self._layer_index(module)
        return (
            layer_index == layer_indices
            if isinstance(layer_indices, int)
            else layer_index in layer_indices
        )

    def _layer_index(self, module: str) -> int | None:
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else None
        for pattern in patterns or self.layers_pattern or ["[^.]*"]:
            if match := re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", module):
                return int(match[1])
        return None

    def regex_patterns(self) -> list[str]:
        """Return all settings of the config that are regular expressions."""
        rules = [self.target_modules, self.exclude_modules]
        layers = self.layers_pattern or []
        return [
            *(rule for rule in rules if isinstance(rule, str)),
            *([layers] if isinstance(layers, str) else layers),
            *(self.rank_pattern or {}),
            *(self.alpha_pattern or {}),
        ]

    def lora_config(self, module: str) -> LoraConfig:
        """Return the LoRA config of one layer.

        The first entry of `rank_pattern` or `alpha_pattern` that matches the end of the module name
        takes precedence over `r` or `lora_alpha`. Rank-stabilized adapters (Kalajdzievski 2023)
        scale with alpha / sqrt(rank); their alpha is converted.
        """
        rank = _first_match(self.rank_pattern or {}, module, self.r)
        alpha = float(_first_match(self.alpha_pattern or {}, module, self.lora_alpha))
        return LoraConfig(rank, alpha * math.sqrt(rank) if self.use_rslora else alpha)


def _matches(rule: str | list[str] | None, module: str) -> bool:
    """Return True if a rule of PEFT matches a module name.

    A regular expression must match the full name, a list item the last components.
    """
    if not rule:
        return False
    if isinstance(rule, str):
        return re.fullmatch(rule, module) is not None
    return any(module == item or module.endswith(f".{item}") for item in rule)


def _first_match(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


KeyMapping = tuple[tuple[str, str], ...]
"""Pairs of a prefix of native layer names and the corresponding prefix of PEFT module names."""

TRANSFORMERS_V5_MAPPING: KeyMapping = (
    ("model.layers.", "model.language_model.layers."),
    ("visual.", "model.visual."),
)
"""Mapping to the module names of transformers 5 and later."""

QWEN_VL_MAPPING: KeyMapping = (
    ("model.layers.", "transformer.h."),
    ("visual.blocks.", "transformer.visual.transformer.resblocks."),
    ("visual.merger.attn_pool.", "transformer.visual.attn_pool."),
)
"""Mapping to the module names in the published code of the first Qwen-VL."""


def to_module_name(layer: str, key_mapping: KeyMapping = TRANSFORMERS_V5_MAPPING) -> str:
    """Map a native layer name to a PEFT module name.

    With an empty mapping the name is unchanged; otherwise a prefix must match.
    """
    for native, foreign in key_mapping:
        if layer.startswith(native):
            return foreign + layer.removeprefix(native)
    assert not key_mapping, f"no adapter is published for a layer named {layer}"
    return layer


def to_layer_name(
    module: str, key_mappings: Sequence[KeyMapping] = (TRANSFORMERS_V5_MAPPING, QWEN_VL_MAPPING)
) -> str:
    """Map a PEFT module name to the native layer name, by the first matching prefix.

    Names without a match are unchanged, such as those of transformers 4.
    """
    for native, foreign in chain(*key_mappings):
        if module.startswith(foreign):
            return native + module.removeprefix(foreign)
    return module


def _detect_key_mapping(modules: Collection[str], key_mappings: Sequence[KeyMapping]) -> KeyMapping:
    """Return the mapping that matches all PEFT module names in an adapter file.

    It is empty for the module names of transformers 4.
    """
    for key_mapping in key_mappings:
        if all(
            module.startswith(tuple(foreign for _, foreign in key_mapping)) for module in modules
        ):
            return key_mapping
    return ()


@dataclass(frozen=True)
class AdapterSpec:
    """Description of a PEFT adapter.

    Attributes:
        base_model: Folder or hub name of the base model, as stated in the config.
        base_fingerprint: Fingerprint of the base model if finesight wrote the adapter, else None.
        dropout: LoRA dropout probability.
        configs: Rank and alpha of each layer by native layer name.
        peft_config: Settings in the PEFT config.
        key_mapping: Mapping to the module names in the adapter file.
    """

    base_model: str
    base_fingerprint: str | None
    dropout: float
    configs: Mapping[str, LoraConfig]
    peft_config: PeftConfig
    key_mapping: KeyMapping

    def targets_layer(self, layer: str) -> bool:
        """Return True if peft would adapt the layer with this native name."""
        return self.peft_config.is_target(to_module_name(layer, self.key_mapping))


def build_adapter_spec(
    peft_config: PeftConfig,
    path: Path,
    ranks: Mapping[str, int],
    fingerprint: str | None,
    key_mappings: Sequence[KeyMapping] = (TRANSFORMERS_V5_MAPPING, QWEN_VL_MAPPING),
) -> AdapterSpec:
    """Build the description of an adapter from its settings and the ranks in its file.

    Args:
        peft_config: Settings from `read_peft_config`.
        path: Path of the settings file, for error messages.
        ranks: Rank of each layer by its module name in the file.
        fingerprint: Fingerprint of the base, if finesight wrote the adapter.
        key_mappings: Supported mappings of layer names to module names.

    Raises:
        UserError: A rank differs from the one in the settings.
    """
    configs = {}
    for module, rank in ranks.items():
        lora_config = peft_config.lora_config(module)
        if lora_config.rank != rank:
            raise UserError(
                f"{module} has rank {lora_config.rank}, but {rank} in the adapter's tensors",
                where=str(path),
                expected="r and rank_pattern as the adapter was trained",
                remedy="take both files from the same training",
            )
        configs[to_layer_name(module, key_mappings)] = lora_config
    return AdapterSpec(
        base_model=peft_config.base_model_name_or_path or "",
        base_fingerprint=fingerprint,
        dropout=peft_config.lora_dropout,
        configs=configs,
        peft_config=peft_config,
        key_mapping=_detect_key_mapping(ranks, key_mappings),
    )


def read_peft_config(path: Path) -> PeftConfig:
    """Read `adapter_config.json`.

    Raises:
        UserError: The file is missing or damaged, or an active setting is not supported; the
            message names it.
    """
    remedy = "give the folder of an adapter saved by finesight or peft"
    if not path.is_file():
        raise UserError(f"{path.name} is missing", where=str(path.parent), remedy=remedy)
    try:
        content = read_bytes(path, expected="a JSON object, as PEFT writes it", remedy=remedy)
        peft_config = PeftConfig.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(map(str, first["loc"])) or "the file"
        value = "" if first["type"] == "json_invalid" else f" (found {first['input']!r:.200})"
        raise UserError(
            f"{setting}: {first['msg']}{value}", where=str(path), remedy=remedy
        ) from error
    _check_supported(peft_config, path)
    for pattern in peft_config.regex_patterns():
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{pattern!r} is not a regular expression: {error}", where=str(path), remedy=remedy
            ) from error
    return peft_config


def _check_supported(peft_config: PeftConfig, path: Path) -> None:
    unsupported = {
        name: value
        for name, value in (peft_config.model_extra or {}).items()
        if value and name not in _IGNORED_SETTINGS
    }
    if peft_config.peft_type != "LORA":
        unsupported["peft_type"] = peft_config.peft_type
    if peft_config.bias != "none":
        unsupported["bias"] = peft_config.bias
    if peft_config.init_lora_weights not in _SUPPORTED_INITS:
        unsupported["init_lora_weights"] = peft_config.init_lora_weights
    if peft_config.r <= 0:
        unsupported["r"] = peft_config.r
    if unsupported:
        listed = ", ".join(f"{name}={json.dumps(value):.80}" for name, value in unsupported.items())
        raise UserError(
            f"the adapter was made with {listed}, which finesight does not support",
            where=str(path),
            expected="standard LoRA of linear layers (rank-stabilized scale, rank_pattern and "
            "alpha_pattern included)",
            remedy=_remedy(unsupported),
        )


def _remedy(unsupported: Mapping[str, object]) -> str:
    """Return the remedy for unsupported settings in an error message.

    It is merging with peft if peft supports all of these settings, otherwise training again.
    """
    fixed = [name for name in unsupported if name in _NOT_MERGED]
    if unsupported.get("peft_type") in _PROMPTS:
        fixed.append("peft_type")
    if fixed:
        supported = ", ".join(_SUPPORTED_FORMS.get(name, f"without {name}") for name in fixed)
        return f"train the adapter again, {supported}: peft cannot merge such an adapter"
    merge = "merge the adapter into its base with peft (merge_and_unload), and use the merged model"
    if "lora_bias" in unsupported:
        again = "or train the adapter again, with lora_bias=false"
        return f"{merge}; {again}, where an adapted layer of the base has no bias"
    return merge
