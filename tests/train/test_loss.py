"""The chunked loss against torch's own cross entropy, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from finesight.train.loss import fused_linear_cross_entropy

L, D, V = 37, 16, 101


def pieces(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    h_LD = torch.randn(L, D).to(dtype).requires_grad_()
    head_VD = torch.randn(V, D).to(dtype).requires_grad_()
    return h_LD, head_VD, torch.randint(V, (L,))


@pytest.mark.parametrize("rows", [1, 5, L, 1000, None])
def test_value_and_gradients_match_cross_entropy(rows: int | None) -> None:
    h_LD, head_VD, target_L = pieces(torch.float64)
    F.cross_entropy(h_LD @ head_VD.T, target_L, reduction="sum").mul(0.125).backward()
    expected_h, expected_head = h_LD.grad.clone(), head_VD.grad.clone()
    expected = F.cross_entropy(h_LD @ head_VD.T, target_L, reduction="sum").item() * 0.125
    h_LD.grad = head_VD.grad = None
    loss = fused_linear_cross_entropy(h_LD, head_VD, target_L, torch.tensor(0.125), rows)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(h_LD.grad, expected_h, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head_VD.grad, expected_head, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 5, 20, None])
def test_rows_after_labels_are_padding(rows: int | None) -> None:
    h_LD, head_VD, target_L = pieces(torch.float64)
    supervised = 20
    one = torch.tensor(1.0)
    short_LD = h_LD.detach()[:supervised].requires_grad_()
    expected = fused_linear_cross_entropy(short_LD, head_VD, target_L[:supervised], one, rows)
    expected.backward()
    assert head_VD.grad is not None
    expected_head, head_VD.grad = head_VD.grad, None
    loss = fused_linear_cross_entropy(h_LD, head_VD, target_L[:supervised], one, rows)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(h_LD.grad[:supervised], short_LD.grad)
    assert not h_LD.grad[supervised:].any()
    torch.testing.assert_close(head_VD.grad, expected_head)
    with torch.no_grad():
        torch.testing.assert_close(
            fused_linear_cross_entropy(h_LD, head_VD, target_L[:supervised], one, rows), loss
        )


def test_upstream_gradient_is_applied() -> None:
    h_LD, head_VD, target_L = pieces(torch.float32)
    fused_linear_cross_entropy(h_LD, head_VD, target_L, torch.tensor(1.0)).backward()
    once = h_LD.grad.clone()
    h_LD.grad = None
    (3 * fused_linear_cross_entropy(h_LD, head_VD, target_L, torch.tensor(1.0))).backward()
    torch.testing.assert_close(h_LD.grad, 3 * once)


def test_frozen_lm_head_gets_no_gradient() -> None:
    h_LD, head_VD, target_L = pieces(torch.float32)
    head_VD.requires_grad_(False)
    fused_linear_cross_entropy(h_LD, head_VD, target_L, torch.tensor(1.0)).backward()
    assert h_LD.grad is not None
    assert head_VD.grad is None


def test_value_without_gradients_matches() -> None:
    h_LD, head_VD, target_L = pieces(torch.float32)
    loss = fused_linear_cross_entropy(h_LD, head_VD, target_L, torch.tensor(0.5), chunk_size=7)
    with torch.no_grad():
        assert (
            fused_linear_cross_entropy(h_LD, head_VD, target_L, torch.tensor(0.5), chunk_size=7)
            == loss.detach()
        )
        empty = fused_linear_cross_entropy(h_LD[:0], head_VD, target_L[:0], torch.tensor(0.5))
    assert empty == 0


def test_large_logits_stay_finite() -> None:
    h_LD, head_VD, target_L = pieces(torch.float32)
    loss = fused_linear_cross_entropy(1000 * h_LD, head_VD, target_L, torch.tensor(1.0))
    expected = F.cross_entropy(1000 * h_LD @ head_VD.T, target_L, reduction="sum")
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, expected)


def test_loss_scale_preserves_small_fp16_probabilities() -> None:
    """With 100,000 words a probability is about 1e-5, near the smallest fp16 number."""
    words = 100_000
    h_LD = torch.zeros(1, 2, dtype=torch.float16, requires_grad=True)
    head_VD = torch.full((words, 2), 2**-8, dtype=torch.float16)
    head_VD[0] = 0
    target_L = torch.zeros(1, dtype=torch.long)
    scale = torch.tensor(2.0**10)
    fused_linear_cross_entropy(h_LD, head_VD, target_L, scale).backward()
    # The gradient is scale * sum over the other words of probability * 2^-8, about scale * 2^-8.
    torch.testing.assert_close(
        h_LD.grad.float(), torch.full((1, 2), 2.0**10 * 2**-8), rtol=0.01, atol=0
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("words", "rows"), [(101, None), (151_936, 7), (5000, 16)])
def test_kernel_error_is_not_larger_than_torch(
    words: int, rows: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    h_LD = torch.randn(L, 64, device="cuda").to(dtype).requires_grad_()
    head_VD = torch.randn(words, 64, device="cuda").to(dtype).requires_grad_()
    target_L = torch.randint(words, (L - 5,), device="cuda")
    scale = torch.tensor(0.125, device="cuda")
    loss = fused_linear_cross_entropy(h_LD, head_VD, target_L, scale, rows)
    found = torch.autograd.grad(loss, [h_LD, head_VD])
    with torch.no_grad():
        torch.testing.assert_close(
            fused_linear_cross_entropy(h_LD, head_VD, target_L, scale, rows), loss
        )

    def summed(h: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy((h @ head.T)[: L - 5].float(), target_L, reduction="sum") * 0.125

    baseline = torch.autograd.grad(summed(h_LD, head_VD), [h_LD, head_VD])
    wide = [x.detach().float().requires_grad_() for x in (h_LD, head_VD)]
    exact_loss = summed(*wide)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=2e-3)
    for mine, theirs, exact in zip(
        found, baseline, torch.autograd.grad(exact_loss, wide), strict=True
    ):
        off = [float((x.float() - exact).norm() / exact.norm()) for x in (mine, theirs)]
        assert off[0] <= 1.2 * off[1] + 1e-4
    assert not found[0][L - 5 :].any()
