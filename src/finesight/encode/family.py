"""The families that can be encoded, each in its own file, and what a family must say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finesight.encode.dialect import Box, Piece, PlacedBox
from finesight.encode.encoded import Size
from finesight.encode.qwen2_5_vl import Qwen25VL
from finesight.encode.qwen2_vl import Qwen2VL
from finesight.errors import UserError
from finesight.hub import ModelFolder

FAMILIES = ("qwen2_vl", "qwen2_5_vl")


class Family(Protocol):
    """What differs between families on the way from a sample to tokens and back."""

    @property
    def name(self) -> str:
        """The `model_type` of the family's configuration."""

    @property
    def system_prompt(self) -> str:
        """The system prompt of the published chat template."""

    def write_boxes(self, boxes: Sequence[PlacedBox]) -> list[Piece]:
        """A run of adjacent boxes, at least one, in the family's dialect."""

    def read_boxes(self, text: str, original: Size, resized: Size) -> list[Box]:
        """The boxes of an answer, special tokens included, in pixels of the original picture."""

    def time_steps(self, groups: int, seconds: float) -> NDArray[np.int64]:
        """Temporal positions, from 0, of groups of frames that lie `seconds` apart."""


def family_of(model_type: str, config: dict[str, Any] | None = None, where: str = "") -> Family:
    """The family of that `model_type`, with what its configuration says of time.

    Raises UserError, naming `where` and the known families, for any other.
    """
    if model_type == "qwen2_vl":
        return Qwen2VL()
    if model_type == "qwen2_5_vl":
        return Qwen25VL(_tokens_per_second(config or {}, where))
    raise UserError(
        f"a model of the family {model_type}",
        where=where,
        expected=f"one of {', '.join(FAMILIES)}",
        remedy="choose a Qwen2-VL or Qwen2.5-VL model",
    )


def _tokens_per_second(config: dict[str, Any], where: str) -> float:
    vision = config.get("vision_config")
    value = vision.get("tokens_per_second", 2) if isinstance(vision, dict) else 2
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise UserError(
            f"vision_config.tokens_per_second is {value!r}",
            where=where,
            expected="a number above 0",
            remedy="take the config.json of the published model",
        )
    return value


def family_of_folder(folder: ModelFolder) -> Family:
    """The family that a folder's config.json names."""
    return family_of(folder.family, folder.config, where=str(folder.path / "config.json"))
