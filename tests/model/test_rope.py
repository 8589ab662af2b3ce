from __future__ import annotations

import math

import pytest
import torch
from oracle import CPU, config
from test_geometry import geometry

from finesight.model.rope import Rotation, language_rotation, rotate, vision_rotation


def test_number_i_turns_with_number_i_plus_half() -> None:
    rotation = Rotation.by(torch.tensor([[math.pi / 2, 0.0]]), torch.float32)
    x_THD = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    assert torch.allclose(rotate(x_THD, rotation), torch.tensor([[[-3.0, 2.0, 1.0, 4.0]]]))


def test_scores_depend_on_the_difference_of_positions_alone() -> None:
    angles_TF = torch.tensor([[0.3, 0.7], [0.3 + 1.1, 0.7 + 0.2]])
    moved_TF = angles_TF + torch.tensor([5.0, -2.0])
    q, k = torch.randn(2, 1, 1, 4, generator=torch.Generator().manual_seed(0)).unbind()

    def score(angles: torch.Tensor) -> torch.Tensor:
        turned = [
            rotate(x, Rotation.by(a[None], x.dtype)) for x, a in zip((q, k), angles, strict=True)
        ]
        return (turned[0] * turned[1]).sum()

    assert torch.allclose(score(angles_TF), score(moved_TF), atol=1e-6)
    assert not torch.allclose(score(angles_TF), score(moved_TF * 2), atol=1e-3)


def test_frequencies_read_their_row_of_the_positions() -> None:
    language = geometry(config("qwen2_vl", rope_theta=10000.0)).language
    rotation = language_rotation(torch.tensor([[1], [10], [100]]), language, torch.float32)
    rows = [1, 1, 10, 10, 100, 100]
    expected = [row / 10000 ** (i / 6) for i, row in enumerate(rows)]
    assert torch.allclose(rotation.cos_T1D[0, 0, :6], torch.tensor(expected).cos(), atol=1e-5)
    assert torch.allclose(rotation.sin_T1D[0, 0, 6:], torch.tensor(expected).sin(), atol=1e-5)
    assert torch.equal(rotation.sin_T1D[..., :6], -rotation.sin_T1D[..., 6:])


def test_half_of_the_frequencies_read_rows_and_half_columns() -> None:
    vision = geometry(config("qwen2_vl")).vision
    rotation = vision_rotation(torch.tensor([[3, 8]]), vision)
    expected = [place / 10000 ** (i / 4) for place in (3, 8) for i in range(4)]
    assert torch.allclose(rotation.cos_T1D[0, 0, :8], torch.tensor(expected).cos(), atol=1e-5)


def test_16_bit_numbers_turn_in_fp32_where_the_angles_are() -> None:
    x_THD = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    angles_TF = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) * 6
    half = x_THD.bfloat16()
    fine = rotate(half, Rotation.by(angles_TF, torch.float32))
    exact = rotate(half.float(), Rotation.by(angles_TF, torch.float32))
    assert fine.dtype == torch.bfloat16
    assert torch.equal(fine, exact.bfloat16())


def test_constants_made_while_generating_serve_a_later_backward_pass() -> None:
    language = geometry(config("qwen2_vl", rope_theta=777.0)).language
    positions_3T = torch.arange(5).expand(3, -1).to(CPU)
    with torch.inference_mode():
        language_rotation(positions_3T, language, torch.float32)
    x_THD = torch.randn(5, 4, 12, requires_grad=True)
    rotate(x_THD, language_rotation(positions_3T, language, torch.float32)).sum().backward()
    assert x_THD.grad is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sizes", [(16, 16, 80), (40, 8, 128), (6, 2, 64), (1, 1, 16)])
@pytest.mark.parametrize("fine", [torch.float32, torch.bfloat16])
def test_queries_and_keys_turn_where_they_lie(
    sizes: tuple[int, int, int], fine: torch.dtype
) -> None:
    from finesight.model.kernels.turn import Heads, turn_heads

    heads, rows = Heads(*sizes), 37
    joint_TE = torch.randn(rows, heads.columns, device="cuda", dtype=torch.bfloat16)
    rotation = Rotation.by(torch.rand(rows, heads.width // 2, device="cuda") * 6, fine)
    qk_THD, v_THD = (
        joint_TE.clone()
        .view(rows, -1, heads.width)
        .split([heads.queries + heads.keys, heads.keys], 1)
    )
    expected = rotate(qk_THD, rotation)
    turn_heads(joint_TE, heads, rotation.cos_T1D, rotation.sin_T1D)
    found_THD, same_THD = joint_TE.view(rows, -1, heads.width).split(
        [heads.queries + heads.keys, heads.keys], 1
    )
    torch.testing.assert_close(found_THD, expected, rtol=1e-2, atol=2e-2)
    assert torch.equal(same_THD, v_THD)
