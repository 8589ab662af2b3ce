"""Read the parallelism that accelerate, DeepSpeed or FSDP configures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import yaml

from finesight.convert.external_config import is_empty
from finesight.convert.source_file import CONFIG_SUFFIXES, find_file, load_settings_file
from finesight.errors import UserError
from finesight.files.bounded_files import load_yaml
from finesight.settings.config import ParallelMode

_ZERO_MODES: tuple[ParallelMode, ...] = ("ddp", "zero2", "zero2", "fsdp")
"""Modes by stage of DeepSpeed ZeRO."""

_DEFAULT_STAGE = 2
"""Stage of DeepSpeed ZeRO that accelerate selects without a setting."""

_ZERO_NAME = re.compile(r"(?:zero|(?<![a-z])z)[-_]?([0-3])", re.IGNORECASE)
"""Stage in the name of a DeepSpeed configuration, such as ds_z3_config.json or zero2_offload."""

_FSDP_MODES: dict[str, ParallelMode] = {
    **dict.fromkeys(("full_shard", "1", "hybrid_shard", "4", "true"), "fsdp"),
    **dict.fromkeys(("shard_grad_op", "2", "hybrid_shard_zero2", "5", "false"), "zero2"),
    **dict.fromkeys(("no_shard", "3"), "ddp"),
}
"""Modes by sharding strategy of FSDP or its number, and by the flag `reshard_after_forward`."""

_NO_BRACKETS = str.maketrans("[]',\"", "     ")
_UNSHARDED_TYPES = ("", "NO", "MULTI_GPU", "MULTI_CPU", "MULTI_NPU", "MULTI_XPU")
_SECTIONS = ("deepspeed_config", "fsdp_config", "megatron_lm_config", "parallelism_config")
_SWITCHES = {
    "use_deepspeed": "DEEPSPEED",
    "use_fsdp": "FSDP",
    "use_megatron_lm": "MEGATRON_LM",
    "multi_gpu": "MULTI_GPU",
}
"""Options of `accelerate launch` for the type of distribution."""


class Sharding(NamedTuple):
    """Parallelism of a recipe, with a comment on its origin."""

    mode: ParallelMode
    source: str


def flatten_accelerate_config(content: Mapping[str, object]) -> dict[str, object]:
    """Return all settings of a configuration of accelerate, with those of its sections.

    YAML that was copied without its indentation has the settings of the sections on top.
    """
    settings = dict(content)
    for name in _SECTIONS:
        section = settings.get(name)
        if isinstance(section, Mapping):
            settings |= section
        elif name == "deepspeed_config" and isinstance(section, str):
            settings["deepspeed_config_file"] = section
        elif section is not None:
            continue  # Conversion reports it as an unknown setting.
        settings.pop(name, None)
    return settings


def name_accelerate_settings(name: str) -> dict[str, object]:
    """Return the settings that the name of a configuration of accelerate states.

    The file itself is on the machine of the training, or built into TRL.
    """
    text = name.lower().rpartition("/")[2]
    offload = "none"
    if "offload" in text:
        offload = "cpu"
    if match := _ZERO_NAME.search(text):
        return {
            "distributed_type": "DEEPSPEED",
            "zero_stage": match[1],
            "offload_optimizer_device": offload,
        }
    if "fsdp" in text:
        return {"distributed_type": "FSDP", "fsdp_offload_params": offload == "cpu"}
    if re.search("(multi|single)[-_]?gpu", text):
        return {"distributed_type": "NO"}
    return {"distributed_type": name}


def read_accelerate_sharding(settings: Mapping[str, object]) -> Sharding | None:
    """Return the sharding of flat settings of accelerate, None if it is unknown."""
    kind = str(settings.get("distributed_type") or "").rpartition(".")[2].upper()
    for switch, name in _SWITCHES.items():
        if settings.get(switch) not in (None, False, "false"):
            kind = name
    if kind == "" and "zero_stage" in settings:
        kind = "DEEPSPEED"
    if kind == "DEEPSPEED":
        if is_empty(settings.get("zero_stage")):
            settings = {**settings, "zero_stage": _DEFAULT_STAGE}
        return read_deepspeed_sharding(settings)
    if kind == "FSDP":
        return read_fsdp_sharding("", settings)
    if kind in _UNSHARDED_TYPES:
        return Sharding("ddp", "no sharding")
    return None


def load_config_value(value: object, origin: Path) -> Mapping[str, object] | str:
    """Return the content of a configuration, or its name if it has no file here.

    `value` is a path, a built-in name, the content, or the content as text.
    """
    if isinstance(value, Mapping):
        return value
    text = str(value)
    if "{" in text:
        with suppress(yaml.YAMLError, ValueError, UserError):
            content = load_yaml(text)
            if isinstance(content, dict):
                return content
        return text
    if text.endswith(CONFIG_SUFFIXES):
        file = find_file(text, origin)
        with suppress(UserError):
            if file is not None:
                return load_settings_file(file)
    return text.rpartition("/")[2]


def read_deepspeed_sharding(config: Mapping[str, object] | str) -> Sharding | None:
    """Return the sharding of a DeepSpeed configuration, or by its name; None without a stage."""
    if isinstance(config, str):
        match = _ZERO_NAME.search(config)
        if match is None:
            return None
        stage: object = match[1]
        offload = "offload" in config.lower()
    else:
        section = config.get("zero_optimization")
        if not isinstance(section, Mapping):
            section = config
        stage = section.get("stage", section.get("zero_stage", 0))
        offload = _is_offloaded(section, "optimizer") or _is_offloaded(section, "param")
    if str(stage) not in ("0", "1", "2", "3"):
        return None
    mode = _ZERO_MODES[int(str(stage))]
    if mode == "ddp" or not offload:
        return Sharding(mode, f"DeepSpeed stage {stage}")
    return Sharding("fsdp_offload", f"DeepSpeed stage {stage}, offload")


def _is_offloaded(section: Mapping[str, object], part: str) -> bool:
    """Return whether optimizer or parameters are offloaded to the CPU or a disk.

    DeepSpeed has a section for each, accelerate a setting.
    """
    value = section.get(f"offload_{part}")
    device = section.get(f"offload_{part}_device")
    if isinstance(value, Mapping):
        device = value.get("device", "none")
    return str(device).lower() in ("cpu", "nvme")


def read_fsdp_sharding(options: object, settings: object) -> Sharding | None:
    """Return the sharding of FSDP, None if it is off.

    Args:
        options: Setting `fsdp` of the transformers Trainer, such as `full_shard auto_wrap`.
        settings: Its `fsdp_config`, or settings of accelerate; names may start with `fsdp_`.
    """
    words = str(options).lower().translate(_NO_BRACKETS).split()
    if words in (["false"], ["none"]):
        return None
    named: dict[str, object] = {}
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            named[str(key).removeprefix("fsdp_")] = value
    # FSDP2 has the flag `reshard_after_forward` instead of a strategy.
    known: list[str] = []
    for one in (named.get("sharding_strategy"), *words, named.get("reshard_after_forward")):
        strategy = str(one).rpartition(".")[2].lower()
        if strategy in _FSDP_MODES:
            known.append(strategy)
    if "true" in words and len(known) > 1:
        known.remove("true")  # It only switches FSDP on.
    strategy = [*known, "full_shard"][0]
    mode = _FSDP_MODES[strategy]
    flags = [str(named.get(key)).lower() for key in ("offload_params", "cpu_offload")]
    if mode != "ddp" and ("offload" in words or "true" in flags):
        return Sharding("fsdp_offload", f"fsdp: {strategy} offload")
    return Sharding(mode, f"fsdp: {strategy}")
