"""Detect the model family of a converted configuration, which determines recipe settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finesight.bounded_files import read_json
from finesight.errors import UserError
from finesight.recipe import load_trainer_settings

PARTS = ("vision", "merger", "language")


@dataclass(frozen=True)
class FamilySettings:
    """Properties of a model family that determine recipe settings, from `trainer_settings.yaml`.

    Attributes:
        names: `model_type` in config.json, and model type and template names of other programs.
        pattern: Regular expression for names of models.
        token_size: Side of the image area of one token in pixels; 0 for a fixed image size.
        min_pixels: Minimum number of pixels per image in the default image processor settings.
        max_length: Maximum number of tokens per sample.
        layers: Last name components of the linear layers, by part of the model.
    """

    name: str
    names: tuple[str, ...]
    pattern: str
    token_size: int
    min_pixels: int
    max_length: int
    layers: Mapping[str, tuple[str, ...]]


def _list_families() -> list[FamilySettings]:
    families = []
    for name, entry in load_trainer_settings()["families"].items():
        texts = {key: tuple(entry[key].split()) for key in ("names", *PARTS)}
        numbers = {key: entry[key] for key in ("token_size", "min_pixels", "max_length")}
        layers = {part: texts[part] for part in PARTS}
        families.append(
            FamilySettings(name, texts["names"], entry["pattern"], **numbers, layers=layers)
        )
    return families


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
    families = _list_families()
    by_type = {name: family for family in families for name in family.names}
    if model_type is not None:
        if model_type in by_type:
            return by_type[model_type]
        what = f"{model} has the model type {model_type}"
    elif model:
        name = re.sub(r"[_ ]", "-", model.rstrip("/").rpartition("/")[2].lower())
        for family in families:
            if re.search(family.pattern, name):
                return family
        for hint in hints:
            # qwen without vl means a text model in both programs.
            if hint in by_type and hint != "qwen":
                return by_type[hint]
    raise UserError(
        what if model else "the configuration has no model",
        where=where,
        expected="a model of Qwen-VL, Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5",
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
