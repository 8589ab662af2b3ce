"""Rows of time, height and width, against transformers where it keeps to the published rule."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from chat_reference import rope_model

from finesight.encode.encoded import Span
from finesight.encode.positions import rope_positions
from finesight.encode.qwen2_5_vl import Qwen25VL
from finesight.encode.qwen2_vl import Qwen2VL

FPS = (0.1, 0.3, 0.5, 0.7, 1.0, 1.3, 2.0, 2.5, 3.0, 6.0, 7.0, 11.0, 12.0, 23.976, 24.0, 29.97, 60.0)


def span(start: int, grid: tuple[int, int, int], kind: Literal["image", "video"] = "image") -> Span:
    t, h, w = grid
    stop = start + t * h * w // 4
    return Span(kind, start, stop, grid, (Path("a"),), (h, w), (h * 14, w * 14))


def test_text_counts_up() -> None:
    assert rope_positions(4, [], [], 2).tolist() == [[0, 1, 2, 3]] * 3


def test_picture_between_texts() -> None:
    found = rope_positions(10, [span(2, (1, 4, 6))], [np.array([0])], 2)
    assert found.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_two_pictures_side_by_side() -> None:
    spans = [span(0, (1, 2, 4)), span(2, (1, 4, 2))]
    found = rope_positions(5, spans, [np.array([0])] * 2, 2)
    assert found.tolist() == [[0, 0, 2, 2, 4], [0, 0, 2, 3, 4], [0, 1, 2, 2, 4]]


def test_text_after_a_long_video_goes_on_after_its_time() -> None:
    # transformers 5.23 would go on at 1, on a position that the video's third group holds.
    found = rope_positions(4, [span(0, (3, 2, 2), "video")], [np.array([0, 2, 4])], 2)
    assert found.tolist() == [[0, 2, 4, 5], [0, 0, 0, 5], [0, 0, 0, 5]]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("fps", FPS)
def test_time_steps_equal_transformers(family: str, fps: float) -> None:
    groups, side = 400, 1600
    grid = torch.tensor([[groups, 2, 2 * side]])
    # transformers gets the seconds as a tensor, which is in single precision.
    seconds = {"second_per_grid_ts": torch.tensor([2 / fps])} if family == "qwen2_5_vl" else {}
    ids = torch.zeros(1, groups * side, dtype=torch.long)
    model = rope_model(family)
    theirs, _ = model.get_rope_index(ids, torch.full_like(ids, 2), video_grid_thw=grid, **seconds)
    expected = theirs[0, 0].view(groups, side)[:, 0].tolist()
    ours = Qwen2VL() if family == "qwen2_vl" else Qwen25VL(tokens_per_second=2)
    assert ours.time_steps(groups, 2 / fps).tolist() == expected


def test_time_runs_with_the_seconds_in_one_family_only() -> None:
    assert Qwen2VL().time_steps(4, 0.7).tolist() == [0, 1, 2, 3]
    assert Qwen25VL(tokens_per_second=2).time_steps(4, 1.0).tolist() == [0, 2, 4, 6]
    assert Qwen25VL(tokens_per_second=2).time_steps(4, 0.7).tolist() == [0, 1, 2, 4]
    assert Qwen25VL(tokens_per_second=25).time_steps(3, 1.0).tolist() == [0, 25, 50]


def test_wrong_number_of_placeholders_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="2 times for 1 groups"):
        rope_positions(2, [span(0, (1, 2, 2))], [np.array([0, 1])], 2)
    wrong = Span("image", 0, 3, (1, 2, 2), (Path("a"),), (28, 28), (28, 28))
    with pytest.raises(AssertionError, match="has not 1 placeholders"):
        rope_positions(3, [wrong], [np.array([0])], 2)
