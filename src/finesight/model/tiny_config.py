"""Sizes of tiny models, with presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TinyPreset = Literal["test", "small", "finesight-tiny"]


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of a tiny model.

    `vocab_size` is an upper limit that excludes special tokens. The head dimension must be a
    multiple of 4 in the vision encoder and of 8 in the decoder.

    `rope_theta` is the base of the decoder's rotary embedding (1e6 in published models). A small
    base rotates rows and columns of small images by larger angles, so that AdamW learns positions
    faster; but then no element of a head is nearly constant across positions, which makes retrieval
    by content harder to learn.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vision_hidden_size: int
    num_vision_layers: int
    num_vision_heads: int
    rope_theta: float = 1e6


TINY_PRESETS: dict[TinyPreset, TinyConfig] = {
    "test": TinyConfig(384, 64, 2, 4, 2, 128, 32, 2, 2),
    "small": TinyConfig(512, 256, 3, 4, 2, 1152, 192, 2, 4, rope_theta=4.0),
    "finesight-tiny": TinyConfig(2034, 320, 5, 5, 1, 896, 256, 6, 4),
}
"""Presets by name: `test` has 0.2 M parameters, `small` 5 M and `finesight-tiny` 12.6 M."""
