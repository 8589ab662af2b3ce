"""Gradients where recordings leave them: always in the same places, those of large weights from the
start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finesight.model import wide
from finesight.model.linear import GroupedLinear
from finesight.model.wide import Wide
from finesight.train import left
from finesight.train.gradients import LARGE
from finesight.train.left import Left


def test_gradients_are_left_where_the_next_recording_leaves_its_own() -> None:
    large = nn.Parameter(torch.ones(LARGE))
    small, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    wide = nn.Parameter(torch.ones(2, 3))
    features, back = torch.ones(4, requires_grad=True), torch.zeros(4)
    own = Left([large, small, idle, wide])
    places = []
    for factor in (2.0, 3.0):
        # The large one is read twice, as a table is that is the head, too.
        # The gradient of what is turned comes turned.
        turned = (wide.T * torch.arange(6.0).view(3, 2)).sum()
        loss = factor * (large.sum() + (large**2).sum() + small.sum() + features.sum() + turned)
        own.go_back(loss, [(features, back)])
        own.hand_over()
        assert large.grad is not None
        assert small.grad is not None
        assert torch.equal(large.grad, torch.full_like(large, 3 * factor))
        assert torch.equal(small.grad, torch.full_like(small, factor))
        assert torch.equal(back, torch.full_like(back, factor))
        assert idle.grad is None
        assert wide.grad is not None
        assert wide.grad.is_contiguous(), "not as the parameter lies: a step reads it so"
        assert torch.equal(wide.grad, factor * torch.arange(6.0).view(3, 2).T)
        places.append((large.grad.data_ptr(), small.grad.data_ptr()))
    assert places[0] == places[1]
    loss = large.sum()
    loss.backward()
    assert torch.equal(large.grad, torch.full_like(large, 10.0)), "a hook was left behind"


class _Product(torch.autograd.Function):
    """x W^T, whose way back is that of layers in few kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, wide: Wide) -> Tensor:
        ctx.save_for_backward(x)
        ctx.wide = wide
        return wide.forth(x, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, None]:
        return None, ctx.wide.gradients(dy, *ctx.saved_tensors)[0], None


def test_the_gradient_of_a_large_weight_is_made_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(left, "LARGE", 20)
    large, small = (GroupedLinear(5, {"up": rows}, bias=False) for rows in (4, 3))
    weights = [group.weight for group in (large, small)]
    came: list[int] = []
    for weight in weights:
        assert isinstance(weight, nn.Parameter)
        torch.nn.init.normal_(weight)
        weight.register_hook(lambda gradient: came.append(gradient.data_ptr()))
    own, x = Left(weights), torch.randn(6, 5)
    for _ in range(2):
        products = [_Product.apply(x, g.weight, Wide.of(g)).sum() for g in (large, small)]
        own.go_back(sum(products), [])
        own.hand_over()
        for weight in weights:
            torch.testing.assert_close(weight.grad, x.sum(0).expand_as(weight))
    assert large.weight.grad.data_ptr() in came, "made elsewhere, and copied"
    assert small.weight.grad.data_ptr() not in came
    assert wide._PLACES == []
