"""What `adapter_config.json` says of an adapter, as peft reads it, and what is refused of it."""

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
from finesight.model.lora import LowRank

_INERT = {
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
"""Settings that do not change what a trained adapter computes, or only with another one set."""

_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to start A and B that leave the base weight as it is (PiSSA and others change it)."""


_NOT_MERGED = {
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "megatron_config",
    "r",
    "use_qalora",
}
"""Settings of adapters that peft cannot merge into a base."""

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
"""Types that learn prompts, or choose between adapters by the input: nothing to merge."""

_PLAIN = {"peft_type": "with peft_type=LORA", "r": "with a rank of at least 1"}

Value = TypeVar("Value")


Alpha = Annotated[int | float, Field(ge=-1e9, le=1e9)]
"""A finite number: divided by a rank, fp16 and bf16 can hold it."""


class PeftSettings(BaseModel):
    """The settings that are honoured; any other one that is in force is refused by name."""

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

    def targets(self, module: str) -> bool:
        """Whether peft would adapt the linear layer `module` of a model (never the head)."""
        if self.target_modules is None or _names(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules == "all-linear" or _names(self.target_modules, module)
        if not _names(self.target_modules, module):
            return False
        chosen = self.layers_to_transform
        if chosen is None or chosen == [] or module in self.target_modules:
            return True
        number = self._layer_number(module)
        return number == chosen if isinstance(chosen, int) else number in chosen

    def _layer_number(self, module: str) -> int | None:
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else None
        for pattern in patterns or self.layers_pattern or ["[^.]*"]:
            if match := re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", module):
                return int(match[1])
        return None

    def patterns(self) -> list[str]:
        """The regular expressions among the settings."""
        rules = [self.target_modules, self.exclude_modules]
        layers = self.layers_pattern or []
        return [
            *(rule for rule in rules if isinstance(rule, str)),
            *([layers] if isinstance(layers, str) else layers),
            *(self.rank_pattern or {}),
            *(self.alpha_pattern or {}),
        ]

    def low_rank(self, module: str) -> LowRank:
        """Rank and alpha of one layer: the first pattern that fits the end of its name counts.

        Rank-stabilised adapters (Kalajdzievski 2023) scale with alpha / sqrt(rank); their alpha
        is converted.
        """
        rank = _first_fit(self.rank_pattern or {}, module, self.r)
        alpha = float(_first_fit(self.alpha_pattern or {}, module, self.lora_alpha))
        return LowRank(rank, alpha * math.sqrt(rank) if self.use_rslora else alpha)


def _names(rule: str | list[str] | None, module: str) -> bool:
    """A regular expression has to match the whole name; an item of a list its last pieces."""
    if not rule:
        return False
    if isinstance(rule, str):
        return re.fullmatch(rule, module) is not None
    return any(module == item or module.endswith(f".{item}") for item in rule)


def _first_fit(patterns: Mapping[str, Value], module: str, otherwise: Value) -> Value:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


Names = tuple[tuple[str, str], ...]
"""Native beginnings of layers' names, and those of the same modules in other code."""

CURRENT: Names = (("model.layers.", "model.language_model.layers."), ("visual.", "model.visual."))
"""In transformers since release 5."""

FIRST: Names = (
    ("model.layers.", "transformer.h."),
    ("visual.blocks.", "transformer.visual.transformer.resblocks."),
    ("visual.merger.attn_pool.", "transformer.visual.attn_pool."),
)
"""In the code that the first Qwen-VL was published with."""


def module_name(layer: str, names: Names = CURRENT) -> str:
    """The name of a layer's module by these names; without any, its own."""
    for native, theirs in names:
        if layer.startswith(native):
            return theirs + layer.removeprefix(native)
    assert not names, f"no adapter is published for a layer named {layer}"
    return layer


def layer_name(module: str, known: Sequence[Names] = (CURRENT, FIRST)) -> str:
    """The name here of a module by any of the `known` names; by none of them its own, as those of
    release 4 of transformers are."""
    for native, theirs in chain(*known):
        if module.startswith(theirs):
            return native + module.removeprefix(theirs)
    return module


def _names_of(modules: Collection[str], known: Sequence[Names]) -> Names:
    """The names that all these modules have; none for those of release 4, which are native."""
    for names in known:
        if all(module.startswith(tuple(theirs for _, theirs in names)) for module in modules):
            return names
    return ()


@dataclass(frozen=True)
class LoraSpec:
    """An adapter's description: its base as named when it was trained and, where finesight wrote
    it, that base's fingerprint; the dropout of its training; rank and alpha of each layer by
    native name."""

    base: str
    base_fingerprint: str | None
    dropout: float
    layers: Mapping[str, LowRank]
    settings: PeftSettings
    names: Names

    def asks_for(self, layer: str) -> bool:
        """Whether peft would adapt the native layer `layer` by `target_modules` and its kin."""
        return self.settings.targets(module_name(layer, self.names))


def spec_of(
    settings: PeftSettings,
    path: Path,
    ranks: Mapping[str, int],
    fingerprint: str | None,
    known: Sequence[Names] = (CURRENT, FIRST),
) -> LoraSpec:
    """Describe an adapter by its settings at `path` and the ranks of the layers in its file.

    Args:
        settings: What `read_settings` gave.
        path: The settings' file, which errors name.
        ranks: Ranks by the module's name in the file, which is one of the `known` ones.
        fingerprint: That of the base, where finesight wrote the adapter.
        known: Names that other code has for the same modules.

    Raises:
        UserError: A rank differs from the one in the settings.
    """
    layers = {}
    for module, rank in ranks.items():
        low = settings.low_rank(module)
        if low.rank != rank:
            raise UserError(
                f"{module} has rank {low.rank}, but {rank} in the adapter's tensors",
                where=str(path),
                expected="r and rank_pattern as the adapter was trained",
                remedy="take both files from the same training",
            )
        layers[layer_name(module, known)] = low
    return LoraSpec(
        base=settings.base_model_name_or_path or "",
        base_fingerprint=fingerprint,
        dropout=settings.lora_dropout,
        layers=layers,
        settings=settings,
        names=_names_of(ranks, known),
    )


def read_settings(path: Path) -> PeftSettings:
    """Read `adapter_config.json`.

    Raises:
        UserError: The file is missing or broken, or a setting is in force that finesight does not
            support; the message names it.
    """
    remedy = "give the folder of an adapter saved by finesight or peft"
    if not path.is_file():
        raise UserError(f"{path.name} is missing", where=str(path.parent), remedy=remedy)
    try:
        content = read_bytes(path, expected="a JSON object, as PEFT writes it", remedy=remedy)
        settings = PeftSettings.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(map(str, first["loc"])) or "the file"
        value = "" if first["type"] == "json_invalid" else f" (found {first['input']!r:.200})"
        raise UserError(
            f"{setting}: {first['msg']}{value}", where=str(path), remedy=remedy
        ) from error
    _refuse_unsupported(settings, path)
    for pattern in settings.patterns():
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{pattern!r} is not a regular expression: {error}", where=str(path), remedy=remedy
            ) from error
    return settings


def _refuse_unsupported(settings: PeftSettings, path: Path) -> None:
    in_force = {
        name: value
        for name, value in (settings.model_extra or {}).items()
        if value and name not in _INERT
    }
    if settings.peft_type != "LORA":
        in_force["peft_type"] = settings.peft_type
    if settings.bias != "none":
        in_force["bias"] = settings.bias
    if settings.init_lora_weights not in _PLAIN_STARTS:
        in_force["init_lora_weights"] = settings.init_lora_weights
    if settings.r <= 0:
        in_force["r"] = settings.r
    if in_force:
        shown = ", ".join(f"{name}={json.dumps(value):.80}" for name, value in in_force.items())
        raise UserError(
            f"the adapter was made with {shown}, which finesight does not support",
            where=str(path),
            expected="plain LoRA of linear layers (rank-stabilised scale, rank_pattern and "
            "alpha_pattern included)",
            remedy=_remedy(in_force),
        )


def _remedy(in_force: Mapping[str, object]) -> str:
    """Name what peft can do with an adapter of such settings, and else how to train it."""
    fixed = [name for name in in_force if name in _NOT_MERGED]
    if in_force.get("peft_type") in _PROMPTS:
        fixed.append("peft_type")
    if fixed:
        plain = ", ".join(_PLAIN.get(name, f"without {name}") for name in fixed)
        return f"train the adapter again, {plain}: peft cannot merge such an adapter"
    merge = "merge the adapter into its base with peft (merge_and_unload), and use the merged model"
    if "lora_bias" in in_force:
        again = "or train the adapter again, with lora_bias=false"
        return f"{merge}; {again}, where an adapted layer of the base has no bias"
    return merge
