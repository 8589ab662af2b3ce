"""Detect the model family of a converted configuration, which determines recipe settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finesight.bounded_files import read_json
from finesight.errors import UserError


@dataclass(frozen=True)
class FamilySettings:
    """Properties of a model family that determine recipe settings.

    Attributes:
        name: Name of the family, as in `model_type` of config.json.
        token_size: Side of the image area of one token in pixels; 0 for a fixed image size.
        min_pixels: Minimum number of pixels per image in the default image processor settings.
        max_length: Maximum number of tokens per sample.
        layers: Last name components of the linear layers, by part of the model.
    """

    name: str
    token_size: int
    min_pixels: int
    max_length: int
    layers: Mapping[str, tuple[str, ...]]


def _list_layers(language: str, vision: str, merger: str) -> dict[str, tuple[str, ...]]:
    texts = {"vision": vision, "merger": merger, "language": language}
    return {part: tuple(text.split()) for part, text in texts.items()}


_ATTENTION = "q_proj k_proj v_proj o_proj"
_DECODER = f"{_ATTENTION} gate_proj up_proj down_proj"
_QWEN3_VISION = "qkv proj linear_fc1 linear_fc2", "linear_fc1 linear_fc2"
_QWEN = FamilySettings(
    "qwen",
    0,
    0,
    8192,
    _list_layers("c_attn c_proj w1 w2", "in_proj out_proj c_fc c_proj", "kv_proj out_proj"),
)
_QWEN2 = FamilySettings(
    "qwen2_vl", 28, 3136, 32_768, _list_layers(_DECODER, "qkv proj fc1 fc2", "mlp.0 mlp.2")
)
_QWEN2_5 = FamilySettings(
    "qwen2_5_vl",
    28,
    3136,
    128_000,
    _list_layers(_DECODER, "qkv proj gate_proj up_proj down_proj", "mlp.0 mlp.2"),
)
_QWEN3 = FamilySettings("qwen3_vl", 32, 65_536, 262_144, _list_layers(_DECODER, *_QWEN3_VISION))
_QWEN3_MOE = FamilySettings(
    "qwen3_vl_moe", 32, 65_536, 262_144, _list_layers(_ATTENTION, *_QWEN3_VISION)
)

_FAMILY_BY_TYPE = {
    family.name: family for family in (_QWEN, _QWEN2, _QWEN2_5, _QWEN3, _QWEN3_MOE)
} | {"qwen_vl": _QWEN, "qvq": _QWEN2, "qwen3_vl_nothink": _QWEN3, "qwen3_moe_vl": _QWEN3_MOE}
"""Family of each `model_type` in config.json, and of model type and template names of ms-swift and
LLaMA-Factory."""

_FAMILY_PATTERNS = (
    (r"qwen3-?vl.*-a\d+b", _QWEN3_MOE),
    (r"qwen3-?vl", _QWEN3),
    (r"qwen2[.-]5-?vl", _QWEN2_5),
    (r"qwen2-?vl|qvq-", _QWEN2),
    (r"qwen-?vl", _QWEN),
)


def detect_family(model: str, hints: tuple[str | None, ...], where: str) -> FamilySettings:
    """Detect the model family from config.json, else from name, else from hints.

    Args:
        model: Hub name or folder of the model.
        hints: Model type and template settings of the configuration.
        where: File of the configuration, for messages.

    Raises UserError if the model is not a Qwen vision-language model.
    """
    what = f"cannot determine whether {model!r} is a Qwen vision-language model"
    model_type = _read_model_type(Path(model).expanduser()) if model else None
    if model_type is not None:
        if model_type in _FAMILY_BY_TYPE:
            return _FAMILY_BY_TYPE[model_type]
        what = f"{model} has the model type {model_type}"
    elif model:
        name = re.sub(r"[_ ]", "-", model.rstrip("/").rpartition("/")[2].lower())
        for pattern, family in _FAMILY_PATTERNS:
            if re.search(pattern, name):
                return family
        for hint in hints:
            # qwen without vl means a text model in both programs.
            if hint in _FAMILY_BY_TYPE and hint != "qwen":
                return _FAMILY_BY_TYPE[hint]
    raise UserError(
        what if model else "the configuration has no model",
        where=where,
        expected="a model of Qwen-VL, Qwen2-VL, Qwen2.5-VL or Qwen3-VL",
        remedy="use the name on its hub, or run this command where the model folder exists",
    )


def _read_model_type(folder: Path) -> str | None:
    """Return `model_type` of config.json in a folder, or None if the file cannot be read."""
    try:
        content = read_json(folder / "config.json")
    except UserError:
        return None
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type == "qwen" and "visual" not in content:
        return "qwen without a vision encoder"
    return model_type if isinstance(model_type, str) else None
