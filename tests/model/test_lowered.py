"""What an adapter makes of its input, and back, each in one kernel: beside the same in fp64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from finesight.model.kernels.drop import Drop

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

RANKS = [1, 8, 24, 40, 64, 72, 100, 128, 192, 256, 300, 384]
"""One, few, such as are taken in two parts, whole and not, and the most."""


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to("cuda", dtype)


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def rounding(dtype: torch.dtype) -> float:
    """Of one number, at most."""
    return torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (77, 176), (90, 99), (300, 1536)])
@pytest.mark.parametrize("ranks", [rank for rank in RANKS if rank <= 128])
def test_forth(ranks: int, rows: int, width: int, share: float, dtype: torch.dtype) -> None:
    from finesight.model.joined import room
    from finesight.model.kernels import lora as lora_kernels
    from finesight.model.kernels.drop import Drop

    x_TI, a_RI = numbers((rows, width), 1, dtype), numbers((ranks, width), 2, dtype)
    drop = Drop(torch.tensor([3], dtype=torch.int32, device="cuda"), 4, share, 0.7)
    behind = room(width, ranks)
    x_TJ, low_TR = lora_kernels.lowered(x_TI, a_RI, drop, behind)
    alone, same_TR = lora_kernels.lowered(x_TI, a_RI, drop, 0)
    assert alone is x_TI
    assert off(same_TR, low_TR.double()) < rounding(dtype)
    nothing = low_TR.new_zeros(rows, behind - ranks)
    assert torch.equal(x_TJ, torch.cat([x_TI, low_TR, nothing], 1))
    exact = 0.7 * dropped(x_TI, drop).double() @ a_RI.double().T
    assert off(low_TR, exact) < rounding(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (77, 176), (90, 99), (3000, 1536)])
@pytest.mark.parametrize("ranks", RANKS)
def test_back(
    ranks: int, rows: int, width: int, normed: bool, share: float, dtype: torch.dtype
) -> None:
    """Gradients lie in wider rows, as products leave them."""
    from finesight.model.kernels import lora as lora_kernels
    from finesight.model.kernels import norm as norm_kernels
    from finesight.model.kernels.drop import Drop

    x_TI, a_SI = numbers((rows, width), 1, dtype), numbers((ranks, width), 2, dtype)
    dn_TJ = numbers((rows, width + ranks), 5, dtype)
    dn_TI, dlow_TS = dn_TJ[:, :width], dn_TJ[:, width:]
    drop = Drop(torch.tensor([3], dtype=torch.int32, device="cuda"), 4, share, 0.7)
    n_TI, norm = x_TI, None
    if normed:
        w_I, n_TI = numbers((width,), 6, dtype), torch.empty_like(x_TI)
        _, scale_T = norm_kernels.rms_normed(x_TI, w_I, 1e-6, n_TI, drop)
        norm = lora_kernels.Norm(w_I, scale_T)
    kept_TI = dropped(torch.ones_like(x_TI), drop).double()
    dx_TI, da_SI = lora_kernels.lowered_back(x_TI, norm, dn_TI, dlow_TS, a_SI, drop)
    exact = dn_TI.double() + 0.7 * kept_TI * (dlow_TS.double() @ a_SI.double())
    assert off(dx_TI, exact) < rounding(dtype)
    assert off(da_SI, 0.7 * dlow_TS.double().T @ (kept_TI * n_TI.double())) < rounding(dtype)
    alone_SI = lora_kernels.down_grad(x_TI, norm, dlow_TS, a_SI, drop)
    assert off(alone_SI, da_SI.double()) < rounding(dtype)
    again = lora_kernels.lowered_back(x_TI, norm, dn_TI, dlow_TS, a_SI, drop)
    assert torch.equal(again[1], da_SI)


def dropped(x_TI: Tensor, drop: Drop) -> Tensor:
    """By another kernel, which multiplies nothing."""
    from finesight.model.kernels import norm as norm_kernels

    ones_TI = torch.ones_like(x_TI)
    kept_TI, _ = norm_kernels.rms_normed(ones_TI, ones_TI[0], 0.0, torch.empty_like(x_TI), drop)
    return x_TI * kept_TI
