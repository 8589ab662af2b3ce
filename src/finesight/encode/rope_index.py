"""3D position ids of multimodal rotary position embedding (M-RoPE)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from finesight.encode.tokenized_sample import VisualSpan


def get_rope_index(
    num_tokens: int,
    spans: Sequence[VisualSpan],
    temporal_ids: Sequence[NDArray[np.int64]],
    merge_size: int,
) -> NDArray[np.int32]:
    """Compute M-RoPE position ids [3, T] of time, height and width.

    See Wang et al. 2024 (Qwen2-VL), section 2.1. A text token has the same position in all three
    rows. The placeholder tokens of an image or video start at the next text position, to which
    their temporal id, row and column are added. Later text continues at the largest position in any
    row plus one, as in transformers 4.45 to 5.2, the official fine-tuning code, vLLM and SGLang.

    transformers 5.3 and later continue after the larger side of the grid instead. If a video is
    longer than its frames are wide, text then reuses positions of the video, while generation
    continues from the largest position. Both rules agree if time is the smallest dimension
    (tests/export/test_video_in_transformers.py).

    Args:
        num_tokens: Number of tokens of the sample.
        spans: Images and videos in token order.
        temporal_ids: Temporal position ids of the frame groups of each span, starting at 0.
        merge_size: Number of patches per side of a merged token.
    """
    position_ids_3T = np.empty((3, num_tokens), dtype=np.int32)
    num_filled, next_position = 0, 0
    for span, frame_ids in zip(spans, temporal_ids, strict=True):
        t, h, w = span.grid_thw[0], span.grid_thw[1] // merge_size, span.grid_thw[2] // merge_size
        assert len(frame_ids) == t, f"{len(frame_ids)} temporal ids for {t} frame groups"
        assert span.stop - span.start == t * h * w, f"{span} has not {t * h * w} placeholders"
        next_position += span.start - num_filled
        position_ids_3T[:, num_filled : span.start] = np.arange(
            next_position - span.start + num_filled, next_position
        )
        span_ids_3M = position_ids_3T[:, span.start : span.stop]
        span_ids_3M[0] = np.repeat(frame_ids, h * w) + next_position
        np.add(_grid_rows_columns(t, h, w), next_position, out=span_ids_3M[1:])
        num_filled, next_position = span.stop, next_position + max(int(frame_ids[-1]) + 1, h, w)
    position_ids_3T[:, num_filled:] = np.arange(
        next_position, next_position + num_tokens - num_filled
    )
    return position_ids_3T


@lru_cache(maxsize=256)
def _grid_rows_columns(t: int, h: int, w: int) -> NDArray[np.int32]:
    """Return the row and column of each placeholder token of a grid: [2, t x h x w]."""
    return np.indices((t, h, w), dtype=np.int32)[1:].reshape(2, -1)
