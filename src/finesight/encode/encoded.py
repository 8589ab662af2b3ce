"""What a sample becomes: first an outline (tokens, no pixels), then with its patches, then a pack.

Shapes: T tokens of a sequence or pack, N patches, D numbers of a patch, M placeholder tokens of
pictures, L learned tokens, S sequences of a pack, G pictures and videos.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, int]
"""Height and width in pixels."""

Grid = tuple[int, int, int]
"""Patches along time, height and width."""


@dataclass(frozen=True, slots=True)
class Span:
    """One picture or video among the tokens: its placeholders stand at [start, stop)."""

    kind: Literal["image", "video"]
    start: int
    stop: int
    grid: Grid
    files: tuple[Path, ...]
    original: Size
    resized: Size


@dataclass(frozen=True, slots=True)
class Outline:
    """A sample as tokens, made from its text and the headers of its pictures alone.

    `learned_T` marks the tokens that carry loss; `positions_3T` are the rows time, height and
    width of M-RoPE (Wang et al. 2024, Qwen2-VL, section 2.1).
    """

    id: str
    ids_T: NDArray[np.int32]
    learned_T: NDArray[np.bool_]
    positions_3T: NDArray[np.int32]
    spans: tuple[Span, ...]

    @property
    def tokens(self) -> int:
        return len(self.ids_T)

    @property
    def supervised(self) -> int:
        """Tokens that carry loss; the first one has no predecessor that could predict it."""
        return int(self.learned_T[1:].sum())

    @property
    def needed(self) -> int:
        """Tokens that a pack has of it: those behind its last picture and the one that predicts the
        last learned token see the others and are seen by none. All, where none is learned."""
        predicting = np.flatnonzero(self.learned_T[1:])
        if not len(predicting):
            return self.tokens
        return max(int(predicting[-1]) + 1, self.spans[-1].stop if self.spans else 0)

    @property
    def patches(self) -> int:
        return sum(t * h * w for t, h, w in (span.grid for span in self.spans))


@dataclass(frozen=True, slots=True)
class Encoded:
    """An outline with the patches of all its pictures, end to end.

    `patches_ND` is uint8 in the reference processor's own order: patches of each picture grouped
    by merge block, D = channels x frames x patch x patch. Where there are stills only, patches hold
    one frame, which the reference repeats (`vision.patches.whole`). A family without native code
    has no patches but `inputs`, by name: what its own processor made for it.
    """

    outline: Outline
    patches_ND: NDArray[np.uint8]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
