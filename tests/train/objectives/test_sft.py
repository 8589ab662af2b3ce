"""Chunked loss compared with the cross entropy of torch: values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finesight.train.objectives.objective import fused_linear_cross_entropy

L, D, V = 37, 16, 101


def make_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    h_LD, head_VD = (torch.randn(rows, D).to(dtype).requires_grad_() for rows in (L, V))
    return h_LD, head_VD, torch.randint(V, (L,))


def sum_cross_entropy(h_LD: Tensor, head_VD: Tensor, target_L: Tensor, scale: float) -> Tensor:
    return F.cross_entropy(h_LD @ head_VD.T, target_L, reduction="sum") * scale


@pytest.mark.parametrize("num_labels", [L, 20])
@pytest.mark.parametrize("rows", [1, 5, 20, L, 1000, None])
def test_value_and_gradients_match_cross_entropy(rows, num_labels):
    """Rows after the labels are padding; the gradient of the loss is applied."""
    h_LD, head_VD, target_L = make_inputs(torch.float64)
    target_L, weight = target_L[:num_labels], torch.tensor(0.125)
    expected = sum_cross_entropy(h_LD[:num_labels], head_VD, target_L, 0.125)
    expected_grads = torch.autograd.grad(3 * expected, [h_LD, head_VD])
    loss = fused_linear_cross_entropy(h_LD, head_VD, target_L, weight, rows)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    grads = torch.autograd.grad(3 * loss, [h_LD, head_VD])
    torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert fused_linear_cross_entropy(h_LD, head_VD, target_L, weight, rows) == loss
        assert fused_linear_cross_entropy(h_LD[:0], head_VD, target_L[:0], weight, rows) == 0


@pytest.mark.parametrize("rows", [1, 5, None])
def test_rows_without_label_have_no_loss(rows):
    h_LD, head_VD, target_L = make_inputs(torch.float64)
    target_L[::3] = -1
    has_label_L = target_L >= 0
    expected = sum_cross_entropy(h_LD[has_label_L], head_VD, target_L[has_label_L], 1.0)
    expected_grads = torch.autograd.grad(expected, [h_LD, head_VD])
    loss = fused_linear_cross_entropy(h_LD, head_VD, target_L, torch.tensor(1.0), rows)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    grads = torch.autograd.grad(loss, [h_LD, head_VD])
    torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-6)


def test_large_logits_stay_finite_and_frozen_lm_head_gets_no_gradient():
    h_LD, head_VD, target_L = make_inputs(torch.float32)
    head_VD.requires_grad_(False)
    loss = fused_linear_cross_entropy(1000 * h_LD, head_VD, target_L, torch.tensor(1.0))
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, sum_cross_entropy(1000 * h_LD, head_VD, target_L, 1.0))
    loss.backward()
    assert h_LD.grad is not None
    assert head_VD.grad is None


def test_loss_scale_preserves_small_fp16_probabilities():
    """With 100,000 words a probability is about 1e-5, near the smallest fp16 number."""
    h_LD = torch.zeros(1, 2, dtype=torch.float16, requires_grad=True)
    head_VD = torch.full((100_000, 2), 2**-8, dtype=torch.float16)
    head_VD[0] = 0
    scale = torch.tensor(2.0**10)
    fused_linear_cross_entropy(h_LD, head_VD, torch.zeros(1, dtype=torch.long), scale).backward()
    # The gradient is scale * sum over the other words of probability * 2^-8, about scale * 2^-8.
    expected = torch.full((1, 2), 2.0**10 * 2**-8)
    torch.testing.assert_close(h_LD.grad.float(), expected, rtol=0.01, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("words", "rows"), [(101, None), (151_936, 7), (5000, 16)])
def test_kernel_error_is_not_larger_than_torch(words, rows, dtype):
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

    def summed(h: Tensor, head: Tensor) -> Tensor:
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
