"""Linear layers that read the same input, computed as one product, with room for an adapter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupedLinear(nn.Module):
    """One or more linear layers of the same input, stacked along their outputs.

    `outputs` maps the last piece of each layer's hub name to its width, in order: a group of
    q_proj, k_proj and v_proj holds one weight of shape [sum(outputs), inputs]. `adapter` is set
    by `model.lora` and adds a low-rank update to each layer it covers.
    """

    def __init__(self, inputs: int, outputs: Mapping[str, int], *, bias: bool) -> None:
        super().__init__()
        self.outputs = dict(outputs)
        self.weight = nn.Parameter(torch.empty(sum(self.outputs.values()), inputs))
        self.bias = nn.Parameter(torch.empty(len(self.weight))) if bias else None
        self.adapter: nn.Module | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[..., inputs] to one [..., width] for each layer of the group."""
        y = F.linear(x, self.weight, self.bias)
        outputs: tuple[Tensor, ...] = torch.split(y, list(self.outputs.values()), dim=-1)
        return outputs if self.adapter is None else tuple(self.adapter(x, outputs))
