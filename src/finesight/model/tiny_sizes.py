"""The sizes that small models come in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SizeName = Literal["test", "small", "finesight-tiny"]


@dataclass(frozen=True)
class TinySize:
    """Geometry: widths in numbers, depths in layers, `vocabulary` tokens before the special ones
    (fewer where the text runs out of words).

    The width of a head must be a multiple of 4 in the vision tower and of 8 in the language model.
    `theta` is the base of the language model's rotary angles, as published 1e6. With a small one
    rows and columns of small pictures turn far, and AdamW soon learns where something is; but then
    no number of a head stays the same from place to place, and what is asked for is hardly found.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    theta: float = 1e6


SIZES: dict[SizeName, TinySize] = {
    "test": TinySize(384, 64, 2, 4, 2, 128, 32, 2, 2),
    "small": TinySize(512, 256, 3, 4, 2, 1152, 192, 2, 4, theta=4.0),
    "finesight-tiny": TinySize(2034, 320, 5, 5, 1, 896, 256, 6, 4),
}
"""`test`: 0.2 M parameters; `small`: 5 M; `finesight-tiny`: 12.6 M."""
