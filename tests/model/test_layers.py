import pytest
import torch

from finesight.model.layers import RotaryCosSin, apply_rotary_pos_emb


def test_half_precision_is_rotated_in_fp32() -> None:
    x_THD = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    angles_TF = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) * 6
    half = x_THD.bfloat16()
    fine = apply_rotary_pos_emb(half, RotaryCosSin.from_angles(angles_TF, torch.float32))
    exact = apply_rotary_pos_emb(half.float(), RotaryCosSin.from_angles(angles_TF, torch.float32))
    assert fine.dtype == torch.bfloat16
    assert torch.equal(fine, exact.bfloat16())


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
