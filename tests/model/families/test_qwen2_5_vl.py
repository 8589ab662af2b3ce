from __future__ import annotations

import numpy as np
import pytest
import torch
from each_value import each

from finesight.model.families.qwen2_5_vl import window_order
from finesight.model.vision_encoder import patch_coordinates

GRIDS = [(1, 2, 2), (1, 8, 8), (1, 10, 14), (3, 6, 4), (2, 16, 24), (1, 18, 2), (5, 34, 22)]


@each("grid", GRIDS)
@each("window", [1, 2, 4])
def test_windows_match_reference(grid: tuple[int, int, int], window: int) -> None:
    from transformers.vision_utils import get_vision_window_index

    order, cu_seqlens = get_vision_window_index(
        torch.tensor([grid]), spatial_merge_size=2, window_size=window * 28, patch_size=14
    )
    ours, squares = window_order(grid, 2, window)
    assert ours.tolist() == order.tolist()
    assert np.cumsum(squares * 4).tolist() == cu_seqlens[1:].tolist()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_position_ids_match_reference(grid: tuple[int, int, int]) -> None:
    from transformers.vision_utils import get_vision_position_ids

    expected = get_vision_position_ids(torch.tensor([grid]), 2)
    assert patch_coordinates(grid, 2).reshape(-1, 2).tolist() == expected.tolist()
