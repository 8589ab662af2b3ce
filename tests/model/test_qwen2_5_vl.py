from __future__ import annotations

import numpy as np
import pytest
import torch

from finesight.model.qwen2_5_vl import windows
from finesight.model.tower import positions_by_square

GRIDS = [(1, 2, 2), (1, 8, 8), (1, 10, 14), (3, 6, 4), (2, 16, 24), (1, 18, 2), (5, 34, 22)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("window", [1, 2, 4])
def test_windows_are_those_of_the_reference(grid: tuple[int, int, int], window: int) -> None:
    from transformers.vision_utils import get_vision_window_index

    order, bounds = get_vision_window_index(
        torch.tensor([grid]), spatial_merge_size=2, window_size=window * 28, patch_size=14
    )
    ours, squares = windows(grid, 2, window)
    assert ours.tolist() == order.tolist()
    assert np.cumsum(squares * 4).tolist() == bounds[1:].tolist()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_positions_are_those_of_the_reference(grid: tuple[int, int, int]) -> None:
    from transformers.vision_utils import get_vision_position_ids

    expected = get_vision_position_ids(torch.tensor([grid]), 2)
    assert positions_by_square(grid, 2).reshape(-1, 2).tolist() == expected.tolist()
