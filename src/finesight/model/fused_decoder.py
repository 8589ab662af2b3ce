"""Fused forward and backward pass of a decoder layer over a packed batch.

`model.decoder` defines the computation; this module performs it with Triton kernels that read each
large tensor once. Linear layers are trainable, frozen, or frozen with a LoRA adapter. The layer
input, the fused projections, the attention output and the LoRA activations are saved for the
backward pass; norms, SwiGLU outputs and dropout masks are recomputed.

Shapes: T tokens, D hidden size, E columns of the fused QKV projection, F intermediate size, I
inputs of a linear, S LoRA ranks of all layers of a fused linear, R LoRA rank of one layer, J input
columns including the LoRA padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finesight.model.attention import supports_varlen_attention
from finesight.model.fused_ops import apply
from finesight.model.kernels import lora_gemm as lora_gemm_kernels
from finesight.model.kernels import norm as norm_kernels
from finesight.model.kernels import rotary as rotary_kernels
from finesight.model.kernels import swiglu as swiglu_kernels
from finesight.model.kernels.lora_gemm import RmsNormStats
from finesight.model.kernels.rotary import QkvLayout
from finesight.model.kernels.runtime import HAS_TRITON
from finesight.model.layers import RotaryCosSin
from finesight.model.linear import FusedLinear, LoraLinear, accepts_fp8_input
from finesight.model.lora.fused import LoraMatmul
from finesight.model.quant.base import Fp8Rows
from finesight.model.quant.fp8 import empty_fp8_rows

MAX_RANK = 128
"""Maximum LoRA rank of a layer that the accumulators of the kernels support."""


def is_fusible(linear: FusedLinear) -> bool:
    """Return True if the fused kernels support the adapter of a linear.

    Supported are linears without an adapter, and LoRA adapters of all layers of the linear with
    equal rank and alpha.
    """
    if linear.adapter is None:
        return True
    if not isinstance(linear.adapter, LoraLinear):
        return False
    layers = linear.adapter.configs
    config = next(iter(layers.values()))
    same_config = all(other == config for other in layers.values())
    return same_config and len(layers) == len(linear.output_sizes) and config.rank <= MAX_RANK


def supports_fused_layers(x_TD: Tensor) -> bool:
    return HAS_TRITON and len(x_TD) > 0 and supports_varlen_attention(x_TD.unsqueeze(0))


class LayerDropout(NamedTuple):
    """Seed of the LoRA dropout of one decoder layer in one forward pass."""

    layer_index: int
    dropout_seed_1: Tensor | None

    def prepare_matmul(self, linear: FusedLinear, linear_index: int) -> LoraMatmul:
        """Collect the operands of one linear and the dropout of its adapter.

        `linear_index` is 0 for QKV, 1 for the output projection, 2 for gate and up, 3 for down.
        """
        salt = 4 * self.layer_index + linear_index
        return LoraMatmul.from_linear(linear, self.dropout_seed_1, salt)


def norm_linear(
    x_TD: Tensor,
    w_D: Tensor,
    eps: float,
    linear: FusedLinear,
    layer_dropout: LayerDropout,
    head_dim: int | None,
    rotary: RotaryCosSin,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Apply RMS norm with weight `w_D` and a linear.

    Returns:
        The layer input, for the residual addition, and the outputs of the linear. With `head_dim`
        they are queries, keys and values of heads, after the rotary embedding.
    """
    matmul = layer_dropout.prepare_matmul(linear, 0)
    sizes = list(linear.output_sizes.values())
    layout = None
    if head_dim:
        layout = QkvLayout(sizes[0] // head_dim, sizes[1] // head_dim, head_dim)
    x_TD, *outputs = _NormLinear.apply(  # type: ignore[no-untyped-call]
        x_TD, w_D, eps, matmul, layout, rotary, *matmul.parameters
    )
    if layout is None:
        return x_TD, torch.split(outputs[0], sizes, dim=1)
    return x_TD, tuple(outputs)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w_D: Tensor,
        eps: float,
        linear: LoraMatmul,
        layout: QkvLayout | None,
        rotary: RotaryCosSin,
        *_parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        n_TJ, rstd_T, low_TS = _rms_norm_lora(x_TD, w_D, eps, linear)
        y_TE = linear.forward(n_TJ, low_TS)
        saved_TD = n_TJ if linear.is_trainable else None
        ctx.save_for_backward(x_TD, w_D, rstd_T, saved_TD, low_TS)
        ctx.linear = linear
        ctx.layout = layout
        ctx.rotary = rotary
        if layout is None:
            return x_TD, y_TE
        rotary_kernels.rotate_qk(y_TE, layout, rotary.cos_T1D, rotary.sin_T1D)
        heads_TND = y_TE.view(len(x_TD), -1, layout.head_dim)
        num_heads_qkv = [layout.num_heads, layout.num_kv_heads, layout.num_kv_heads]
        return x_TD, *torch.split(heads_TND, num_heads_qkv, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, residual_grad_TD: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, w_D, rstd_T, n_TD, low_TS = ctx.saved_tensors
        linear = ctx.linear
        if ctx.layout is None:
            dy_TE = grads[0].contiguous()
        else:
            dq_THD, dk_TKD, dv_TKD = grads
            dy_TE = rotary_kernels.rotate_qk_backward(
                (dq_THD, dk_TKD, dv_TKD), ctx.layout, ctx.rotary.cos_T1D, ctx.rotary.sin_T1D
            )
        norm_stats = RmsNormStats(w_D, rstd_T)
        dx_TD = dw_D = da_SD = None
        if any(ctx.needs_input_grad[:2]):
            dn_TD, da_SD = _lora_down_backward(x_TD, norm_stats, linear.backward(dy_TE), linear)
            dx_TD, dw_D = norm_kernels.rms_norm_backward(
                x_TD,
                *norm_stats,
                dn_TD,
                residual_grad_TD,
                needs_weight_grad=ctx.needs_input_grad[1],
            )
        else:
            dlow_TS = linear.lora_backward(dy_TE)
            if dlow_TS is not None:
                da_SD = lora_gemm_kernels.lora_A_grad(
                    x_TD, norm_stats, dlow_TS, linear.lora_A_SI, linear.dropout
                )
        base_grads = linear.base_grads(dy_TE, n_TD)
        dbs_OR = linear.lora_B_grads(dy_TE, low_TS)
        return dx_TD, dw_D, None, None, None, None, *base_grads, da_SD, *dbs_OR


def _rms_norm_lora(
    x_TD: Tensor, w_D: Tensor, eps: float, matmul: LoraMatmul
) -> tuple[Tensor | Fp8Rows, Tensor, Tensor | None]:
    """Compute the RMS norm, the reciprocal RMS of each row and the LoRA activations."""
    if accepts_fp8_input(matmul.weight):
        fp8_rows = empty_fp8_rows(x_TD)
        d_TD, rstd_T = norm_kernels.rms_norm_dropout(x_TD, w_D, eps, None, matmul.dropout, fp8_rows)
        return fp8_rows, rstd_T, _lora_down(d_TD, matmul, None)
    n_TJ = x_TD.new_empty(len(x_TD), x_TD.shape[1] + matmul.padding)
    n_TD = n_TJ[:, : x_TD.shape[1]]
    d_TD, rstd_T = norm_kernels.rms_norm_dropout(x_TD, w_D, eps, n_TD, matmul.dropout)
    return n_TJ, rstd_T, _lora_down(d_TD, matmul, n_TJ)


def _lora_down(d_TI: Tensor, matmul: LoraMatmul, padded_TJ: Tensor | None) -> Tensor | None:
    """Compute LoRA activations; also write them to the padding columns of `padded_TJ`."""
    low_TS = matmul.compute_low(d_TI)
    if low_TS is not None and padded_TJ is not None and padded_TJ.shape[1] > d_TI.shape[1]:
        padding = padded_TJ[:, d_TI.shape[1] :]
        padding[:, : low_TS.shape[1]].copy_(low_TS)
        padding[:, low_TS.shape[1] :].zero_()
    return low_TS


def _lora_down_backward(
    x_TI: Tensor,
    norm_stats: RmsNormStats | None,
    grads: tuple[Tensor, Tensor | None],
    matmul: LoraMatmul,
) -> tuple[Tensor, Tensor | None]:
    """Compute the backward pass of the LoRA down-projection."""
    dn_TI, dlow_TS = grads
    if dlow_TS is None or matmul.lora_A_SI is None:
        return dn_TI, None
    return lora_gemm_kernels.lora_down_backward(
        x_TI, norm_stats, dn_TI, dlow_TS, matmul.lora_A_SI, matmul.dropout
    )


def out_proj_mlp(
    x_TD: Tensor,
    o_TI: Tensor,
    out: FusedLinear,
    w_D: Tensor,
    eps: float,
    gate_up: FusedLinear,
    down: FusedLinear,
    layer_dropout: LayerDropout,
) -> Tensor:
    """Compute the output projection, the residual additions and the MLP of a decoder layer.

    The MLP's RMS norm has weight `w_D`.
    """
    out_matmul = layer_dropout.prepare_matmul(out, 1)
    gate_up_matmul = layer_dropout.prepare_matmul(gate_up, 2)
    down_matmul = layer_dropout.prepare_matmul(down, 3)
    return apply(
        _OutProjMlp,
        x_TD,
        o_TI,
        w_D,
        eps,
        out_matmul,
        gate_up_matmul,
        down_matmul,
        *out_matmul.parameters,
        *gate_up_matmul.parameters,
        *down_matmul.parameters,
    )


class _OutProjMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        o_TI: Tensor,
        w_D: Tensor,
        eps: float,
        out: LoraMatmul,
        gate_up: LoraMatmul,
        down: LoraMatmul,
        *_parameters: Tensor | None,
    ) -> Tensor:
        o_TJ = o_TI
        low_out = None
        if out.lora_A_SI is not None:
            o_TJ, low_out = lora_gemm_kernels.lora_down(
                o_TI, out.lora_A_SI, out.dropout, out.padding
            )
        x_TD = out.forward_add(x_TD, o_TJ, low_out)
        n_TJ, rstd_T, low_gate_up = _rms_norm_lora(x_TD, w_D, eps, gate_up)
        gate_up_TF2 = gate_up.forward(n_TJ, low_gate_up)
        h_TJ, low_down = swiglu_kernels.swiglu_lora(
            gate_up_TF2, down.lora_A_SI, down.dropout, down.padding, down.row_range is not None
        )
        y_TD = down.forward_add(x_TD, h_TJ, low_down)
        saved_TD = n_TJ if gate_up.is_trainable else None
        ctx.save_for_backward(
            x_TD, o_TI, w_D, rstd_T, saved_TD, gate_up_TF2, low_out, low_gate_up, low_down
        )
        ctx.out = out
        ctx.gate_up = gate_up
        ctx.down = down
        ctx.is_consumed = False
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, o_TI, w_D, rstd_T, n_TD, gate_up_TF2, *low = ctx.saved_tensors
        low_out, low_gate_up, low_down = low
        out = ctx.out
        gate_up = ctx.gate_up
        down = ctx.down
        # The backward pass overwrites saved tensors.
        assert not ctx.is_consumed, "backward can run only once"
        ctx.is_consumed = True
        dy_TD = dy_TD.contiguous()
        dh_TF, dlow_down = down.backward(dy_TD)
        ddown_b = down.lora_B_grads(dy_TD, low_down)
        _, h_TF, ddown_a = swiglu_kernels.swiglu_lora_backward(
            gate_up_TF2,
            down.lora_A_SI,
            dh_TF,
            dlow_down,
            down.dropout,
            recompute_h=down.is_trainable,
        )
        ddown = *down.base_grads(dy_TD, h_TF), ddown_a, *ddown_b
        # Free the tensors early: they may be views of larger gradients.
        del dh_TF, dlow_down, h_TF
        dgate_up = gate_up.base_grads(gate_up_TF2, n_TD)
        norm_stats = RmsNormStats(w_D, rstd_T)
        dn_TD, dgate_up_a = _lora_down_backward(
            x_TD, norm_stats, gate_up.backward(gate_up_TF2), gate_up
        )
        dgate_up = *dgate_up, dgate_up_a, *gate_up.lora_B_grads(gate_up_TF2, low_gate_up)
        dx_TD, dw_D = norm_kernels.rms_norm_backward(
            x_TD, *norm_stats, dn_TD, dy_TD, needs_weight_grad=ctx.needs_input_grad[2]
        )
        dout = out.base_grads(dx_TD, o_TI)
        do_TI, dout_a = _lora_down_backward(o_TI, None, out.backward(dx_TD), out)
        dout = *dout, dout_a, *out.lora_B_grads(dx_TD, low_out)
        return dx_TD, do_TI, dw_D, None, None, None, None, *dout, *dgate_up, *ddown
