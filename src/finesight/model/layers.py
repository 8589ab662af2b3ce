"""Layers of the decoder and the vision encoders, from rotary embeddings to experts.

Rotary position embeddings (Su et al. 2021) pair element i of a head with element i + D/2, and
rotate the pair by an angle proportional to the position.

Shapes: T tokens, N patches, D width or head dimension, H heads, F = D/2 frequencies, M merged patch
squares, R rows of a table. Mixture of experts: E experts, K experts per token, P = T x K
token-expert pairs, I intermediate size of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finesight.model.attention import Segments, varlen_attention
from finesight.model.config import DecoderConfig, MoeConfig, PixelNormalization, VisionConfig
from finesight.model.fused_ops import (
    RmsNormFunction,
    apply,
    apply_rotary,
    has_kernels,
    quick_gelu,
    rms_norm,
    swiglu,
    swiglu_concat,
)
from finesight.model.kernels import gemm_gelu as gemm_gelu_kernels
from finesight.model.kernels import norm as norm_kernels
from finesight.model.kernels import rotary as rotary_kernels
from finesight.model.kernels.runtime import NO_DROPOUT
from finesight.model.linear import FusedLinear, single_output
from finesight.model.lora.fused import fuse_lora_weight, padding_columns
from finesight.model.quant.base import Fp8Rows
from finesight.model.quant.fp8 import quantize_fp8


@dataclass(frozen=True)
class RotaryCosSin:
    """Cosines and signed sines of the rotation angles of each token, shared by all heads."""

    cos_T1D: Tensor
    sin_T1D: Tensor

    @classmethod
    def from_angles(cls, angles_TF: Tensor, dtype: torch.dtype) -> RotaryCosSin:
        cos_TF = angles_TF.cos()
        sin_TF = angles_TF.sin()
        cos_TD = torch.cat([cos_TF, cos_TF], -1)
        sin_TD = torch.cat([-sin_TF, sin_TF], -1)
        return cls(cos_TD.unsqueeze(1).to(dtype), sin_TD.unsqueeze(1).to(dtype))


def apply_rotary_pos_emb(x_THD: Tensor, rotary: RotaryCosSin) -> Tensor:
    """Rotate each head by the angles of its token, in the wider of both dtypes."""
    return apply_rotary(x_THD, rotary.cos_T1D, rotary.sin_T1D)


def apply_partial_rotary_pos_emb(x_THD: Tensor, rotary: RotaryCosSin) -> Tensor:
    """Rotate the leading elements of each head, as many as there are angles."""
    rotary_dim = rotary.cos_T1D.shape[-1]
    rotated_THR = apply_rotary_pos_emb(x_THD[..., :rotary_dim].contiguous(), rotary)
    return torch.cat([rotated_THR, x_THD[..., rotary_dim:]], dim=-1)


@torch.no_grad()
def compute_mrope(
    position_ids_3T: Tensor, config: DecoderConfig, dtype: torch.dtype
) -> RotaryCosSin:
    """Compute multimodal rotary embeddings (M-RoPE; Wang et al. 2024, Qwen2-VL, section 2.1).

    Each frequency uses one of the position axes time, height and width. Cosines and sines are
    rounded to `dtype`, as in the training of the base models.
    """
    device = position_ids_3T.device
    axes_F = _axis_tensor(config.mrope_axes, device)
    position_ids_TF = position_ids_3T.index_select(0, axes_F).T.float()
    inv_freq_F = inverse_frequencies(config.rotary_dim, config.rope_theta, device)
    return RotaryCosSin.from_angles(position_ids_TF * inv_freq_F, dtype)


@torch.no_grad()
def compute_vision_rope(position_ids_N2: Tensor, config: VisionConfig) -> RotaryCosSin:
    """Compute 2-D rotary embeddings of patches in fp32, with half of the frequencies per axis."""
    inv_freq_F = inverse_frequencies(
        config.head_dim // 2, config.rope_theta, position_ids_N2.device
    )
    angles_N2F = position_ids_N2.unsqueeze(-1).float() * inv_freq_F
    return RotaryCosSin.from_angles(angles_N2F.flatten(1), torch.float32)


@lru_cache
def inverse_frequencies(head_dim: int, rope_theta: float, device: torch.device) -> Tensor:
    """Return the rotary frequencies theta^(-2 i / head_dim) of a head in fp32."""
    # Created outside inference mode: a tensor cached during generation may be used in a backward
    # pass.
    with torch.inference_mode(False):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return (1.0 / rope_theta**exponents).to(device)


@lru_cache
def _axis_tensor(axes: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(axes, device=device)


ALIGNMENT = 8
"""Row alignment that tensor cores require, in 16-bit elements."""


def num_checkpointed_layers(fraction: float, num_layers: int) -> int:
    """Return the number of layers with activation checkpointing, counted from the first."""
    # Round first: in floating point, 0.28 x 25 is slightly more than 7.
    return math.ceil(round(fraction * num_layers, 6))


def run_layer(
    layer: nn.Module, checkpointed: bool, *inputs: object, preserve_rng_state: bool = True
) -> Any:
    """Run a layer, with activation checkpointing if `checkpointed`."""
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(
            layer, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )
    return layer(*inputs)


def empty_embedding(num_embeddings: int, embedding_dim: int) -> nn.Embedding:
    """Create an embedding layer without initializing its weight.

    Random initialization on the meta device would import torch's compiler, which takes as long as
    importing torch.
    """
    weight_RD = torch.empty(num_embeddings, embedding_dim)
    embedding: nn.Embedding = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
        weight_RD, freeze=False
    )
    return embedding


class RmsNorm(nn.RMSNorm):
    """RMS norm with a trainable weight."""

    eps: float

    def scale(self, dtype: torch.dtype) -> Tensor:
        """Return the factors of normalized hidden states in `dtype`."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class ZeroCenteredRmsNorm(RmsNorm):
    """RMS norm that scales by 1 + weight, computed in fp32 at least."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def scale(self, dtype: torch.dtype) -> Tensor:
        """Return 1 + weight, in fp32 at least."""
        return 1.0 + self.weight.to(torch.promote_types(dtype, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        if has_kernels(x):
            x_TD = x.reshape(-1, x.shape[-1]).contiguous()
            return apply(_ZeroCenteredNorm, x_TD, self.weight, self.eps).view(x.shape)
        scale = self.scale(x.dtype)
        if x.dtype == torch.promote_types(x.dtype, torch.float32):
            return rms_norm(x, scale, self.eps)
        return apply(RmsNormFunction, x, scale, self.eps)


class _ZeroCenteredNorm(RmsNormFunction):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        n_TD = torch.empty_like(x_TD)
        _, rstd_T = norm_kernels.rms_norm_dropout(x_TD, weight_D, eps, n_TD, NO_DROPOUT, None, 1.0)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x_TD, 1.0 + weight_D.float(), rstd_T[:, None])
        return n_TD


def add_norm(
    x_ND: Tensor, y_ND: Tensor | None, norm: nn.Module, next_linear: FusedLinear
) -> tuple[Tensor, Tensor | Fp8Rows]:
    """Add the output of a block to the residual stream and normalize the sum.

    Without gradients one kernel computes both.
    """
    to_fp8 = next_linear.accepts_fp8_input
    if y_ND is not None:
        uses_kernel = not torch.is_grad_enabled() and has_kernels(x_ND)
        if uses_kernel and isinstance(norm, nn.LayerNorm | RmsNorm):
            return norm_kernels.add_norm(
                x_ND,
                y_ND,
                norm.weight,
                norm.bias if isinstance(norm, nn.LayerNorm) else None,
                norm.eps,
                is_layer_norm=isinstance(norm, nn.LayerNorm),
                to_fp8=to_fp8,
            )
        x_ND = x_ND + y_ND
    n_ND = norm(x_ND)
    if to_fp8:
        return x_ND, quantize_fp8(n_ND)
    return x_ND, n_ND


class LinearBlock(nn.Module):
    """Block of two linear layers; the first determines the format of the preceding norm."""

    @property
    def linears(self) -> tuple[FusedLinear, ...]:
        return tuple(module for module in self.children() if isinstance(module, FusedLinear))


class GatedMlp(LinearBlock):
    """Gated MLP: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        output_sizes = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = FusedLinear(hidden_size, output_sizes, bias=bias)
        self.down_proj = FusedLinear(intermediate_size, {"down_proj": hidden_size}, bias=bias)

    def forward(self, x_TD: Tensor | Fp8Rows) -> Tensor:
        if self.padding_columns and isinstance(x_TD, Tensor) and has_kernels(x_TD):
            return self._forward_padded(x_TD)
        gate, up = self.gate_up_proj(x_TD)
        return single_output(self.down_proj(swiglu(gate, up)))

    @property
    def padding_columns(self) -> int:
        """Number of padding columns that align the rows of `down_proj` for tensor cores."""
        down = self.down_proj
        missing = -down.in_features % ALIGNMENT
        if not missing or not (_is_dense(self.gate_up_proj) and _is_dense(down)):
            return 0
        if _must_copy(down):
            return missing
        return padding_columns(down.in_features, 0)

    def _forward_padded(self, x_TD: Tensor) -> Tensor:
        """Compute the MLP with zero-padded rows of the `down_proj` weight."""
        gate_up = self.gate_up_proj
        down = self.down_proj
        assert isinstance(gate_up.weight, nn.Parameter), "the gate and up weights must be dense"
        assert isinstance(down.weight, nn.Parameter), "the down weight must be dense"
        gate_up_TF2 = F.linear(x_TD, gate_up.weight, gate_up.bias)
        padding = self.padding_columns
        if _must_copy(down):
            down_DJ = F.pad(down.weight, (0, padding))
        else:
            down_DJ = fuse_lora_weight(down).weight_OJ
        return F.linear(swiglu_concat(gate_up_TF2, padding), down_DJ, down.bias)


def _is_dense(linear: FusedLinear) -> bool:
    """Return True for a linear with a dense weight and without an adapter."""
    return isinstance(linear.weight, nn.Parameter) and linear.adapter is None


def _must_copy(linear: FusedLinear) -> bool:
    """Return True if padding must copy the weight in each forward pass."""
    return linear.is_sharded or (
        isinstance(linear.weight, nn.Parameter) and linear.weight.requires_grad
    )


@dataclass(frozen=True)
class FusedGelu:
    """GELU as x sigmoid(linear x + cubic x^3), or exact with `linear` 0."""

    linear: float
    cubic: float
    eager: Callable[[Tensor], Tensor]

    def apply_linear(self, linear: FusedLinear, x_ND: Tensor | Fp8Rows) -> Tensor:
        """Apply a linear layer and the GELU, [N, D] to [N, F]."""
        operands = gemm_gelu_operands(linear, x_ND) if self.linear else None
        if operands is None:
            return self.eager(single_output(linear(x_ND)))
        return gemm_gelu_kernels.gemm_gelu(
            *operands, linear.bias, linear=self.linear, cubic=self.cubic
        )


QUICK_GELU = FusedGelu(1.702, 0.0, quick_gelu)

_TANH_SCALE = 2 * math.sqrt(2 / math.pi)

TANH_GELU = FusedGelu(_TANH_SCALE, _TANH_SCALE * 0.044715, partial(F.gelu, approximate="tanh"))

EXACT_GELU = FusedGelu(0.0, 0.0, F.gelu)


class GeluMlp(LinearBlock):
    """Two linear layers with a GELU between them and the published `names`."""

    def __init__(
        self, sizes: tuple[int, int, int], names: tuple[str, str], gelu: FusedGelu
    ) -> None:
        super().__init__()
        self.gelu = gelu
        for in_size, name, out_size in zip(sizes, names, sizes[1:], strict=False):
            self.add_module(name, FusedLinear(in_size, {name: out_size}, bias=True))

    def forward(self, x_ND: Tensor | Fp8Rows) -> Tensor:
        first, second = self.linears
        if self.gelu is QUICK_GELU and second.accepts_fp8_input:
            return single_output(second(quantize_fp8(single_output(first(x_ND)), gelu=True)))
        return single_output(second(self.gelu.apply_linear(first, x_ND)))


class PatchEmbed(nn.Module):
    """Projection of the pixels of a patch to the hidden size of the vision encoder."""

    def __init__(
        self, config: VisionConfig, normalization: PixelNormalization, *, bias: bool
    ) -> None:
        super().__init__()
        self.normalization = normalization
        self.proj = nn.Linear(config.patch_dim, config.hidden_size, bias=bias)

    def forward(self, patches_ND: Tensor) -> Tensor:
        """Normalize uint8 patches and project them to [N, width]."""
        norm = self.normalization
        dtype = self.proj.weight.dtype
        num_frames = self.proj.in_features // patches_ND.shape[1]
        channels = patches_ND.chunk(len(norm.mean), dim=1)
        columns: list[Tensor] = []
        for channel_NP, mean, std in zip(channels, norm.mean, norm.std, strict=True):
            # With Python scalars torch converts the bytes to fp32 without copying constants to the
            # device.
            normalized_NP = (channel_NP * (norm.rescale_factor / std)).sub_(mean / std).to(dtype)
            # The weight has columns for several frames per channel; an image repeats its own.
            columns += [normalized_NP] * num_frames
        y_ND: Tensor = self.proj(torch.cat(columns, 1))
        return y_ND


class VisionAttention(nn.Module):
    """Full attention between the patches of a segment, such as a frame or a window."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = FusedLinear(hidden_size, {"qkv": 3 * hidden_size}, bias=True)
        self.proj = FusedLinear(hidden_size, {"proj": hidden_size}, bias=True)

    def forward(self, x_ND: Tensor | Fp8Rows, rotary: RotaryCosSin, segments: Segments) -> Tensor:
        num_heads = self.num_heads
        qkv_NE = single_output(self.qkv(x_ND))
        qk_NHD, v_NHD = torch.split(
            qkv_NE.view(len(qkv_NE), 3 * num_heads, -1), [2 * num_heads, num_heads], dim=1
        )
        if has_kernels(qkv_NE) and not torch.is_grad_enabled():
            layout = rotary_kernels.QkvLayout(num_heads, num_heads, qk_NHD.shape[-1])
            rotary_kernels.rotate_qk(qkv_NE, layout, rotary.cos_T1D, rotary.sin_T1D)
        else:
            qk_NHD = apply_rotary_pos_emb(qk_NHD, rotary)
        q_NHD, k_NHD = qk_NHD.chunk(2, dim=1)
        o_NHD = varlen_attention(q_NHD, k_NHD, v_NHD, segments, causal=False)
        return single_output(self.proj(o_NHD.flatten(1)))


class VisionBlock(nn.Module):
    """Pre-norm vision transformer block: attention within a segment, then the MLP."""

    def __init__(
        self,
        config: VisionConfig,
        norm: Callable[[int], nn.Module],
        build_mlp: Callable[[], LinearBlock],
    ) -> None:
        super().__init__()
        self.norm1 = norm(config.hidden_size)
        self.norm2 = norm(config.hidden_size)
        self.attn = VisionAttention(config.hidden_size, config.num_heads)
        self.mlp = build_mlp()

    def forward(
        self, x_ND: Tensor, y_ND: Tensor | None, rotary: RotaryCosSin, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        """Compute the block with deferred residual additions.

        Returns:
            Residual stream and MLP output. The next block adds them, fused with its first norm.
        """
        x_ND, n_ND = add_norm(x_ND, y_ND, self.norm1, self.attn.qkv)
        o_ND = self.attn(n_ND, rotary, segments)
        x_ND, n_ND = add_norm(x_ND, o_ND, self.norm2, self.mlp.linears[0])
        return x_ND, self.mlp(n_ND)


class PatchMerger(nn.Module):
    """Merger of `merge_size` x `merge_size` adjacent patches into one feature."""

    def __init__(self, config: VisionConfig, norm: nn.Module) -> None:
        super().__init__()
        self.ln_q = norm
        self.merged_size = config.hidden_size * config.merge_size**2
        sizes = (self.merged_size, self.merged_size, config.out_hidden_size)
        self.mlp = GeluMlp(sizes, ("0", "2"), EXACT_GELU)

    def forward(self, x_ND: Tensor) -> Tensor:
        y_MD: Tensor = self.mlp(self.ln_q(x_ND).view(-1, self.merged_size))
        return y_MD


def gemm_gelu_operands(linear: FusedLinear, x_ND: Tensor | Fp8Rows) -> tuple[Tensor, Tensor] | None:
    """Return the operands of the fused kernel, or None if it cannot be used."""
    w_FD = linear.weight
    if linear.adapter is not None or torch.is_grad_enabled():
        return None
    if not (isinstance(x_ND, Tensor) and isinstance(w_FD, Tensor) and has_kernels(x_ND)):
        return None
    is_aligned = _is_tma_aligned(x_ND) and _is_tma_aligned(w_FD) and len(w_FD) % ALIGNMENT == 0
    if not (is_aligned and is_hopper(x_ND.device)):
        return None
    if not gemm_gelu_kernels.saturates_device(len(x_ND), len(w_FD), x_ND.device):
        return None
    return x_ND, w_FD


def _is_tma_aligned(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(0) % ALIGNMENT == 0 and x.data_ptr() % 16 == 0


@lru_cache
def is_hopper(device: torch.device) -> bool:
    """Return True for Hopper GPUs; the fused kernel is untested on newer tensor cores."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) == (9, 0)


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
        num_experts = moe_config.num_experts
        intermediate_size = moe_config.intermediate_size
        if outputs_first:
            gate_up_shape = (2 * intermediate_size, hidden_size)
            down_shape = (hidden_size, intermediate_size)
        else:
            gate_up_shape = (hidden_size, 2 * intermediate_size)
            down_shape = (intermediate_size, hidden_size)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, *gate_up_shape))
        self.down_proj = nn.Parameter(torch.empty(num_experts, *down_shape))

    def split_experts(self) -> Iterator[dict[str, Tensor]]:
        """Yield views of the weights of each expert, outputs before inputs."""
        for gate_up, down in zip(self.gate_up_proj.detach(), self.down_proj.detach(), strict=True):
            if not self.outputs_first:
                gate_up = gate_up.mT
                down = down.mT
            gate, up = gate_up.chunk(2)
            yield {"gate_proj": gate, "up_proj": up, "down_proj": down}

    def forward(self, x_PD: Tensor, expert_offsets_E: Tensor) -> Tensor:
        """Apply the experts to rows [P, D] that are sorted by expert."""
        gate_up: Tensor = self.gate_up_proj
        down: Tensor = self.down_proj
        if self.outputs_first:
            gate_up = gate_up.mT
            down = down.mT
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
        expert_weights_TK = expert_weights_TK / expert_weights_TK.sum(-1, keepdim=True)
        expert_weights_TK = expert_weights_TK.to(x_TD.dtype)
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


def build_mlp(config: DecoderConfig) -> GatedMlp | SparseMoeBlock:
    """Build the MLP or the mixture of experts of a decoder layer."""
    if config.moe is None:
        return GatedMlp(config.hidden_size, config.intermediate_size, bias=False)
    has_shared = config.moe.shared_intermediate_size is not None
    moe_class = SharedExpertMoeBlock if has_shared else SparseMoeBlock
    return moe_class(config.hidden_size, config.moe)
