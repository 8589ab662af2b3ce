"""Static gradient buffers of CUDA graphs: fixed addresses, and direct writes for large weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finesight.model.fused_linear import FusedLinear
from finesight.model.lora import fused
from finesight.model.lora.fused import LoraMatmul
from finesight.train import graph_buffers
from finesight.train.graph_buffers import GraphGradients
from finesight.train.optimizer import LARGE_PARAM_ELEMENTS


def test_static_gradients_keep_their_addresses() -> None:
    large = nn.Parameter(torch.ones(LARGE_PARAM_ELEMENTS))
    small, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    transposed = nn.Parameter(torch.ones(2, 3))
    features, back = torch.ones(4, requires_grad=True), torch.zeros(4)
    own = GraphGradients([large, small, idle, transposed])
    locations = []
    for factor in (2.0, 3.0):
        # The large one is read twice, as a table is that is the head, too.
        # The gradient of what is turned comes turned.
        turned = (transposed.T * torch.arange(6.0).view(3, 2)).sum()
        loss = factor * (large.sum() + (large**2).sum() + small.sum() + features.sum() + turned)
        own.backward(loss, [(features, back)])
        own.assign_grads()
        assert torch.equal(large.grad, torch.full_like(large, 3 * factor))
        assert torch.equal(small.grad, torch.full_like(small, factor))
        assert torch.equal(back, torch.full_like(back, factor))
        assert idle.grad is None
        assert transposed.grad.is_contiguous(), "not as the parameter lies: a step reads it so"
        assert torch.equal(transposed.grad, factor * torch.arange(6.0).view(3, 2).T)
        locations.append((large.grad.data_ptr(), small.grad.data_ptr()))
    assert locations[0] == locations[1]
    loss = large.sum()
    loss.backward()
    assert torch.equal(large.grad, torch.full_like(large, 10.0)), "a hook was left behind"


class _Product(torch.autograd.Function):
    """Product x W^T with the backward pass of fused layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, wide: LoraMatmul) -> Tensor:
        ctx.save_for_backward(x)
        ctx.wide = wide
        return wide.forward(x, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, None]:
        return None, ctx.wide.base_grads(dy, *ctx.saved_tensors)[0], None


def test_large_weight_gradient_is_written_directly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graph_buffers, "LARGE_PARAM_ELEMENTS", 20)
    large, small = (FusedLinear(5, {"up": rows}, bias=False) for rows in (4, 3))
    weights = [group.weight for group in (large, small)]
    came: list[int] = []
    for weight in weights:
        assert isinstance(weight, nn.Parameter)
        torch.nn.init.normal_(weight)
        weight.register_hook(lambda gradient: came.append(gradient.data_ptr()))
    own, x = GraphGradients(weights), torch.randn(6, 5)
    for _ in range(2):
        products = [
            _Product.apply(x, g.weight, LoraMatmul.from_linear(g)).sum() for g in (large, small)
        ]
        own.backward(sum(products), [])
        own.assign_grads()
        for weight in weights:
            torch.testing.assert_close(weight.grad, x.sum(0).expand_as(weight))
    assert large.weight.grad.data_ptr() in came, "made elsewhere, and copied"
    assert small.weight.grad.data_ptr() not in came
    assert fused._GRADIENT_BUFFERS == []
