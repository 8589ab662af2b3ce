"""Mixture of experts that replaces the MLP of a decoder layer.

Shapes: T tokens, D hidden size, E experts, K experts per token, P = T x K token-expert pairs, I
intermediate size of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.model.config import MoeConfig
from finesight.model.fused_linear import FusedLinear, single_output
from finesight.model.fused_ops import swiglu
from finesight.model.layers import GatedMlp


def requires_host_sync(dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if the matmuls of the experts synchronize the host with the device."""
    has_grouped_mm = dtype == torch.bfloat16 and device.type == "cuda"
    return not has_grouped_mm or torch.cuda.get_device_capability(device) < (9, 0)


class MoeExperts(nn.Module):
    """Experts with stacked weights in the published layout.

    Qwen3-VL publishes inputs before outputs, Qwen3.5 outputs before inputs (`outputs_first`).
    """

    def __init__(
        self, hidden_size: int, moe_config: MoeConfig, *, outputs_first: bool = False
    ) -> None:
        super().__init__()
        self.outputs_first = outputs_first
        num_experts, intermediate_size = moe_config.num_experts, moe_config.intermediate_size
        gate_up_shape = (hidden_size, 2 * intermediate_size)
        down_shape = (intermediate_size, hidden_size)
        step = -1 if outputs_first else 1
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, *gate_up_shape[::step]))
        self.down_proj = nn.Parameter(torch.empty(num_experts, *down_shape[::step]))

    def split_experts(self) -> Iterator[dict[str, Tensor]]:
        """Yield views of the weights of each expert, outputs before inputs."""
        for gate_up, down in zip(self.gate_up_proj.detach(), self.down_proj.detach(), strict=True):
            if not self.outputs_first:
                gate_up, down = gate_up.mT, down.mT
            gate, up = gate_up.chunk(2)
            yield {"gate_proj": gate, "up_proj": up, "down_proj": down}

    def forward(self, x_PD: Tensor, expert_offsets_E: Tensor) -> Tensor:
        """Apply the experts to rows [P, D] that are sorted by expert."""
        gate_up, down = (
            weight.mT if self.outputs_first else weight
            for weight in (self.gate_up_proj, self.down_proj)
        )
        gate_up_PE = F.grouped_mm(x_PD, gate_up, offs=expert_offsets_E)
        gate_PI, up_PI = (half.contiguous() for half in gate_up_PE.chunk(2, dim=-1))
        y_PD: Tensor = F.grouped_mm(swiglu(gate_PI, up_PI), down, offs=expert_offsets_E)
        return y_PD


class SparseMoeBlock(nn.Module):
    """Sparse mixture of experts: a router and experts.

    Each token is processed by its top-k experts, whose outputs are weighted by the normalized
    router probabilities. See Yang et al. 2025, Qwen3 Technical Report, section 2.
    """

    def __init__(
        self, hidden_size: int, moe_config: MoeConfig, *, outputs_first: bool = False
    ) -> None:
        super().__init__()
        self.top_k = moe_config.num_experts_per_tok
        self.gate = nn.Linear(hidden_size, moe_config.num_experts, bias=False)
        self.experts = MoeExperts(hidden_size, moe_config, outputs_first=outputs_first)

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


class SharedExpertMoeBlock(SparseMoeBlock):
    """Sparse mixture of experts with a gated shared expert, which processes every token."""

    def __init__(self, hidden_size: int, moe_config: MoeConfig) -> None:
        super().__init__(hidden_size, moe_config, outputs_first=True)
        shared_size = moe_config.shared_intermediate_size
        assert shared_size is not None, "a config without a shared expert"
        self.shared_expert = GatedMlp(hidden_size, shared_size, bias=False)
        self.shared_expert_gate = FusedLinear(hidden_size, {"shared_expert_gate": 1}, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_T1 = single_output(self.shared_expert_gate(x_TD)).sigmoid()
        y_TD: Tensor = super().forward(x_TD) + gate_T1 * self.shared_expert(x_TD)
        return y_TD
