"""Linear layers that read the same input, with one weight and room for an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def only(outputs: tuple[Tensor, ...]) -> Tensor:
    """The output of a group of one layer."""
    (y,) = outputs
    return y


class GroupedLinear(nn.Module):
    """One or more linear layers of the same input, stacked along their outputs.

    `outputs` maps the last piece of each layer's hub name to its width, in order: a group of
    q_proj, k_proj and v_proj holds one weight of shape [sum(outputs), inputs]. A layer alone has
    its own name as the module's. `adapter` is set by `model.lora`; it computes the
    group's product together with its low-rank updates.
    """

    def __init__(self, inputs: int, outputs: Mapping[str, int], *, bias: bool) -> None:
        super().__init__()
        self.outputs = dict(outputs)
        self.weight = nn.Parameter(torch.empty(sum(self.outputs.values()), inputs))
        self.bias = nn.Parameter(torch.empty(len(self.weight))) if bias else None
        self.adapter: nn.Module | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[..., inputs] to one [..., width] for each layer of the group."""
        if self.adapter is not None:
            return tuple(self.adapter(x, self.weight, self.bias))
        return products(x, self.weight, self.bias, tuple(self.outputs.values()))


def products(
    x: Tensor, weight: Tensor, bias: Tensor | None, widths: Sequence[int]
) -> tuple[Tensor, ...]:
    """x W_i^T + bias_i for the layers of a group, [..., inputs] to [..., width] each.

    Layer by layer, so that each output lies in one piece: what follows reads it several times as
    fast as a slice of a joint product, whose gradients would have to be joined on the way back.
    """
    if len(widths) == 1:
        return (F.linear(x, weight, bias),)
    weights = torch.split(weight, list(widths))
    biases = [None] * len(widths) if bias is None else torch.split(bias, list(widths))
    return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
