"""A mixture of experts in place of a decoder's MLP: each token goes through a few of many.

Shapes: T tokens, D width, E experts, K of them chosen for a token, P = T x K pairs of a token and
an expert, I an expert's inner width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.model.fused import gated
from finesight.model.geometry import ExpertGeometry


def waits(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies expert by expert, asking the device how many rows each has."""
    fast = dtype == torch.bfloat16 and device.type == "cuda"
    return not fast or torch.cuda.get_device_capability(device) < (9, 0)


class Experts(nn.Module):
    """The weights of all experts, stacked as they are published: inputs before outputs."""

    def __init__(self, width: int, geometry: ExpertGeometry) -> None:
        super().__init__()
        number, inner = geometry.number, geometry.width
        self.gate_up_proj = nn.Parameter(torch.empty(number, width, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(number, inner, width))

    def forward(self, x_PD: Tensor, ends_E: Tensor) -> Tensor:
        """[P, D] to [P, D]: the rows of an expert end before its entry of `ends_E` (int32)."""
        both = F.grouped_mm(x_PD, self.gate_up_proj, offs=ends_E)
        gate_PI, up_PI = (half.contiguous() for half in both.chunk(2, dim=-1))
        y_PD: Tensor = F.grouped_mm(gated(gate_PI, up_PI), self.down_proj, offs=ends_E)
        return y_PD


class SparseMlp(nn.Module):
    """The experts that a token's router (`gate`) gives the largest shares, weighted by these shares
    (Yang et al. 2025, Qwen3 Technical Report, section 2)."""

    def __init__(self, width: int, geometry: ExpertGeometry) -> None:
        super().__init__()
        self.chosen = geometry.chosen
        self.gate = nn.Linear(width, geometry.number, bias=False)
        self.experts = Experts(width, geometry)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        share_TE = self.gate(x_TD).softmax(-1, dtype=torch.float32)
        share_TK, expert_TK = share_TE.topk(self.chosen, dim=-1)
        share_TK = (share_TK / share_TK.sum(-1, keepdim=True)).to(x_TD.dtype)
        # Pairs of one expert next to each other; nothing here waits for the device.
        sorted_P, order_P = expert_TK.flatten().sort(stable=True)
        experts_E = torch.arange(share_TE.shape[1], device=x_TD.device)
        ends_E = torch.searchsorted(sorted_P, experts_E, right=True, out_int32=True)
        y_PD = self.experts(x_TD.index_select(0, order_P // self.chosen), ends_E)
        y_TKD = y_PD.index_select(0, order_P.argsort()).unflatten(0, (-1, self.chosen))
        y_TD: Tensor = (y_TKD * share_TK.unsqueeze(-1)).sum(1)
        return y_TD
