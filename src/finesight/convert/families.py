"""Which family another program's model is of: by its folder, its name, or what it was told."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from finesight.bounded_files import read_json
from finesight.errors import UserError

_GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """What of a family decides a recipe: the side of a token's square in pixels (0: sizes are
    fixed), the fewest pixels of its own rule, the longest text, and the names of its parts' linear
    layers."""

    name: str
    side: int
    least: int
    longest: int
    language: tuple[str, ...]
    vision: tuple[str, ...]
    merger: tuple[str, ...]


_QWEN2 = Family(
    "qwen2_vl", 28, 3136, 32_768, _GATED, ("qkv", "proj", "fc1", "fc2"), ("mlp.0", "mlp.2")
)
_QWEN2_5 = Family(
    "qwen2_5_vl",
    28,
    3136,
    128_000,
    _GATED,
    ("qkv", "proj", "gate_proj", "up_proj", "down_proj"),
    ("mlp.0", "mlp.2"),
)
_QWEN3 = Family(
    "qwen3_vl",
    32,
    65_536,
    262_144,
    _GATED,
    ("qkv", "proj", "linear_fc1", "linear_fc2"),
    ("linear_fc1", "linear_fc2"),
)
_QWEN3_MOE = Family(
    "qwen3_vl_moe",
    32,
    65_536,
    262_144,
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("qkv", "proj", "linear_fc1", "linear_fc2"),
    ("linear_fc1", "linear_fc2"),
)
_QWEN = Family(
    "qwen",
    0,
    0,
    8192,
    ("c_attn", "c_proj", "w1", "w2"),
    ("in_proj", "out_proj", "c_fc", "c_proj"),
    ("kv_proj", "out_proj"),
)

_BY_TYPE = {family.name: family for family in (_QWEN, _QWEN2, _QWEN2_5, _QWEN3, _QWEN3_MOE)} | {
    "qwen_vl": _QWEN,
    "qvq": _QWEN2,
    "qwen3_vl_nothink": _QWEN3,
    "qwen3_moe_vl": _QWEN3_MOE,
}
"""By `model_type` of config.json, and by what the programs call models and templates."""

_BY_NAME = (
    (r"qwen3-?vl.*-a\d+b", _QWEN3_MOE),
    (r"qwen3-?vl", _QWEN3),
    (r"qwen2[.-]5-?vl", _QWEN2_5),
    (r"qwen2-?vl|qvq-", _QWEN2),
    (r"qwen-?vl", _QWEN),
)


def family_of(model: str, told: tuple[str | None, ...], where: str) -> Family:
    """The family of a model's name or folder; `told` are the types and templates that the program
    was given for it. Raises UserError for a model of no Qwen-VL family, and where nothing tells."""
    if not model:
        raise _refused("no model is named", where)
    configured = _configured(Path(model).expanduser())
    if configured is not None:
        if configured in _BY_TYPE:
            return _BY_TYPE[configured]
        raise _refused(f"{model} is a model of type {configured}", where)
    name = re.sub(r"[_ ]", "-", model.rstrip("/").rpartition("/")[2].lower())
    for pattern, family in _BY_NAME:
        if re.search(pattern, name):
            return family
    for word in told:
        # What is called qwen, without vl, is a model of text in both programs.
        if word in _BY_TYPE and word != "qwen":
            return _BY_TYPE[word]
    raise _refused(f"nothing tells that {model!r} is a Qwen vision-language model", where)


def _configured(folder: Path) -> str | None:
    """The type in a folder's configuration; None where there is none to read."""
    try:
        content = read_json(folder / "config.json")
    except UserError:
        return None
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind == "qwen" and "visual" not in content:
        return "qwen, without a tower"
    return kind if isinstance(kind, str) else None


def _refused(what: str, where: str) -> UserError:
    return UserError(
        what,
        where=where,
        expected="a model of the families Qwen-VL, Qwen2-VL, Qwen2.5-VL or Qwen3-VL",
        remedy="name the model as its hub does, or run this where the model's folder is",
    )
