from __future__ import annotations

import pytest
import torch
from hf_reference import CPU, make_config
from test_config import geometry

from finesight.model.layers import (
    RotaryCosSin,
    apply_rotary_pos_emb,
    compute_mrope,
    compute_vision_rope,
)


def test_frequencies_use_their_mrope_section() -> None:
    language = geometry(make_config("qwen2_vl", rope_theta=10000.0)).decoder
    rotation = compute_mrope(torch.tensor([[1], [10], [100]]), language, torch.float32)
    rows = [1, 1, 10, 10, 100, 100]
    expected = [row / 10000 ** (i / 6) for i, row in enumerate(rows)]
    assert torch.allclose(rotation.cos_T1D[0, 0, :6], torch.tensor(expected).cos(), atol=1e-5)
    assert torch.allclose(rotation.sin_T1D[0, 0, 6:], torch.tensor(expected).sin(), atol=1e-5)
    assert torch.equal(rotation.sin_T1D[..., :6], -rotation.sin_T1D[..., 6:])


def test_vision_rope_uses_row_and_column_positions() -> None:
    vision = geometry(make_config("qwen2_vl")).vision
    rotation = compute_vision_rope(torch.tensor([[3, 8]]), vision)
    expected = [position / 10000 ** (i / 4) for position in (3, 8) for i in range(4)]
    assert torch.allclose(rotation.cos_T1D[0, 0, :8], torch.tensor(expected).cos(), atol=1e-5)


def test_half_precision_is_rotated_in_fp32() -> None:
    x_THD = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    angles_TF = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) * 6
    half = x_THD.bfloat16()
    fine = apply_rotary_pos_emb(half, RotaryCosSin.from_angles(angles_TF, torch.float32))
    exact = apply_rotary_pos_emb(half.float(), RotaryCosSin.from_angles(angles_TF, torch.float32))
    assert fine.dtype == torch.bfloat16
    assert torch.equal(fine, exact.bfloat16())


def test_cached_constants_support_backward() -> None:
    language = geometry(make_config("qwen2_vl", rope_theta=777.0)).decoder
    position_ids_3T = torch.arange(5).expand(3, -1).to(CPU)
    with torch.inference_mode():
        compute_mrope(position_ids_3T, language, torch.float32)
    x_THD = torch.randn(5, 4, 12, requires_grad=True)
    apply_rotary_pos_emb(
        x_THD, compute_mrope(position_ids_3T, language, torch.float32)
    ).sum().backward()
    assert x_THD.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(16, 16, 80), (40, 8, 128), (6, 2, 64), (1, 1, 16)])
@pytest.mark.parametrize("fine", [torch.float32, torch.bfloat16])
def test_rotary_kernel_overwrites_its_input(sizes: tuple[int, int, int], fine: torch.dtype) -> None:
    from finesight.model.kernels.rotary import QkvLayout, rotate_qk

    heads, rows = QkvLayout(*sizes), 37
    fused_TE = torch.randn(rows, heads.num_columns, device="cuda", dtype=torch.bfloat16)
    rotation = RotaryCosSin.from_angles(
        torch.rand(rows, heads.head_dim // 2, device="cuda") * 6, fine
    )
    qk_THD, v_THD = (
        fused_TE.clone()
        .view(rows, -1, heads.head_dim)
        .split([heads.num_heads + heads.num_kv_heads, heads.num_kv_heads], 1)
    )
    expected = apply_rotary_pos_emb(qk_THD, rotation)
    rotate_qk(fused_TE, heads, rotation.cos_T1D, rotation.sin_T1D)
    found_THD, same_THD = fused_TE.view(rows, -1, heads.head_dim).split(
        [heads.num_heads + heads.num_kv_heads, heads.num_kv_heads], 1
    )
    torch.testing.assert_close(found_THD, expected, rtol=1e-2, atol=2e-2)
    assert torch.equal(same_THD, v_THD)
