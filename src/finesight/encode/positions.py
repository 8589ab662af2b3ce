"""Three-dimensional positions of tokens: multimodal rotary embedding, M-RoPE."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from finesight.encode.encoded import Span


def rope_positions(
    tokens: int, spans: Sequence[Span], times: Sequence[NDArray[np.int64]], merge: int
) -> NDArray[np.int32]:
    """Rows time, height and width of [3, T] positions (Wang et al. 2024, section 2.1).

    Text counts up alike in all rows. The placeholders of a picture or video start where the text
    before them ends, and take their group of frames' entry of `times`, their row and their
    column. The text after them goes on at one more than the largest position they reached in
    any row: the rule of transformers 4.45 to 5.2, of the makers' own fine-tuning code, of vLLM
    and of SGLang. transformers 5.3 and newer go on after the larger side of the grid instead, so
    that text after a video that lasts longer than its frames are wide takes positions the video
    holds already, while generation counts from the largest and skips ahead. Both agree wherever
    time is the smaller (tests/export/test_video_in_transformers.py).
    """
    positions_3T = np.empty((3, tokens), dtype=np.int32)
    done, reached = 0, 0
    for span, time in zip(spans, times, strict=True):
        t, h, w = span.grid[0], span.grid[1] // merge, span.grid[2] // merge
        assert len(time) == t, f"{len(time)} times for {t} groups of frames"
        assert span.stop - span.start == t * h * w, f"{span} has not {t * h * w} placeholders"
        reached += span.start - done
        positions_3T[:, done : span.start] = np.arange(reached - span.start + done, reached)
        visual_3M = positions_3T[:, span.start : span.stop]
        visual_3M[0] = np.repeat(time, h * w) + reached
        np.add(_rows_columns(t, h, w), reached, out=visual_3M[1:])
        done, reached = span.stop, reached + max(int(time[-1]) + 1, h, w)
    positions_3T[:, done:] = np.arange(reached, reached + tokens - done)
    return positions_3T


@lru_cache(maxsize=256)
def _rows_columns(t: int, h: int, w: int) -> NDArray[np.int32]:
    """Row and column of each placeholder, [2, t x h x w]."""
    return np.indices((t, h, w), dtype=np.int32)[1:].reshape(2, -1)
