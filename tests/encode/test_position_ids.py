"""Rows of time, height and width, against transformers where it keeps to the published rule."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from chat_reference import build_rope_model
from each_value import each

from finesight.encode.qwen2_5_vl import Qwen25VL
from finesight.encode.qwen2_vl import Qwen2VL
from finesight.encode.tokenization import VisualSpan

FPS = (0.1, 0.3, 0.5, 0.7, 1.0, 1.3, 2.0, 2.5, 3.0, 6.0, 7.0, 11.0, 12.0, 23.976, 24.0, 29.97, 60.0)


def span(
    start: int, grid: tuple[int, int, int], kind: Literal["image", "video"] = "image"
) -> VisualSpan:
    t, h, w = grid
    stop = start + t * h * w // 4
    return VisualSpan(kind, start, stop, grid, (Path("a"),), (h, w), (h * 14, w * 14))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@each("fps", FPS)
def test_time_steps_match_transformers(family: str, fps: float) -> None:
    groups, side = 400, 1600
    grid = torch.tensor([[groups, 2, 2 * side]])
    # transformers gets the seconds as a tensor, which is in single precision.
    seconds = {"second_per_grid_ts": torch.tensor([2 / fps])} if family == "qwen2_5_vl" else {}
    ids = torch.zeros(1, groups * side, dtype=torch.long)
    model = build_rope_model(family)
    theirs, _ = model.get_rope_index(ids, torch.full_like(ids, 2), video_grid_thw=grid, **seconds)
    expected = theirs[0, 0].view(groups, side)[:, 0].tolist()
    ours = Qwen2VL() if family == "qwen2_vl" else Qwen25VL(tokens_per_second=2)
    assert ours.temporal_position_ids(groups, 2 / fps).tolist() == expected


def test_time_step_of_other_models() -> None:
    assert Qwen25VL(tokens_per_second=25).temporal_position_ids(3, 1.0).tolist() == [0, 25, 50]
