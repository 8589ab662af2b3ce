"""Mixture of experts that replaces the MLP of a decoder layer.

Shapes: T tokens, D hidden size, E experts, K experts per token, P = T x K token-expert pairs, I
intermediate size of an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.model.config import MoeConfig
from finesight.model.fused_ops import swiglu


def requires_host_sync(dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if the matmuls of the experts synchronize the host with the device."""
    has_grouped_mm = dtype == torch.bfloat16 and device.type == "cuda"
    return not has_grouped_mm or torch.cuda.get_device_capability(device) < (9, 0)


class MoeExperts(nn.Module):
    """Experts with stacked weights in the published layout, inputs before outputs."""

    def __init__(self, hidden_size: int, moe_config: MoeConfig) -> None:
        super().__init__()
        num_experts, intermediate_size = moe_config.num_experts, moe_config.intermediate_size
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, hidden_size, 2 * intermediate_size)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))

    def forward(self, x_PD: Tensor, expert_offsets_E: Tensor) -> Tensor:
        """Apply the experts to rows [P, D] that are sorted by expert."""
        gate_up_PE = F.grouped_mm(x_PD, self.gate_up_proj, offs=expert_offsets_E)
        gate_PI, up_PI = (half.contiguous() for half in gate_up_PE.chunk(2, dim=-1))
        y_PD: Tensor = F.grouped_mm(swiglu(gate_PI, up_PI), self.down_proj, offs=expert_offsets_E)
        return y_PD


class SparseMoeBlock(nn.Module):
    """Sparse mixture of experts: a router and experts.

    Each token is processed by its top-k experts, whose outputs are weighted by the normalized
    router probabilities. See Yang et al. 2025, Qwen3 Technical Report, section 2.
    """

    def __init__(self, hidden_size: int, moe_config: MoeConfig) -> None:
        super().__init__()
        self.top_k = moe_config.num_experts_per_tok
        self.gate = nn.Linear(hidden_size, moe_config.num_experts, bias=False)
        self.experts = MoeExperts(hidden_size, moe_config)

    def forward(self, x_TD: Tensor) -> Tensor:
        router_probs_TE = self.gate(x_TD).softmax(-1, dtype=torch.float32)
        expert_weights_TK, expert_ids_TK = router_probs_TE.topk(self.top_k, dim=-1)
        expert_weights_TK = (expert_weights_TK / expert_weights_TK.sum(-1, keepdim=True)).to(
            x_TD.dtype
        )
        # Sort the pairs by expert without synchronizing with the device.
        sorted_P, order_P = expert_ids_TK.flatten().sort(stable=True)
        experts_E = torch.arange(router_probs_TE.shape[1], device=x_TD.device)
        expert_offsets_E = torch.searchsorted(sorted_P, experts_E, right=True, out_int32=True)
        y_PD = self.experts(x_TD.index_select(0, order_P // self.top_k), expert_offsets_E)
        y_TKD = y_PD.index_select(0, order_P.argsort()).unflatten(0, (-1, self.top_k))
        y_TD: Tensor = (y_TKD * expert_weights_TK.unsqueeze(-1)).sum(1)
        return y_TD
