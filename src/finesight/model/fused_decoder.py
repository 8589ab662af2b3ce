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

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finesight.model.attention import supports_varlen_attention
from finesight.model.fused_linear import FusedLinear
from finesight.model.lora.fused import FusedLoraWeight, LoraMatmul, get_fused_weight
from finesight.model.lora.layer import LoraLinear
from finesight.model.quant.base import HAS_TRITON
from finesight.model.quant.fp8 import Fp8Rows, empty_fp8_rows
from finesight.model.rope import RotaryCosSin

if HAS_TRITON:
    from finesight.model.kernels import lora_gemm as lora_gemm_kernels
    from finesight.model.kernels import norm as norm_kernels
    from finesight.model.kernels import rotary as rotary_kernels
    from finesight.model.kernels import swiglu as swiglu_kernels
    from finesight.model.kernels.lora_gemm import RmsNormStats
    from finesight.model.kernels.primitives import SeededDropout
    from finesight.model.kernels.rotary import QkvLayout

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


def fuse_lora_weights(linears: Iterable[FusedLinear]) -> list[FusedLoraWeight]:
    """Return the fused LoRA weights of these linears, and create missing ones.

    Linears that cannot be fused are omitted.
    """
    return [fused for fused in map(get_fused_weight, linears) if fused is not None]


def supports_fused_layers(x_TD: Tensor) -> bool:
    """Return True if the fused kernels support the device and dtype of the hidden states."""
    return HAS_TRITON and len(x_TD) > 0 and supports_varlen_attention(x_TD.unsqueeze(0))


def _lora_parameters(linear: FusedLinear) -> tuple[Tensor | None, ...]:
    """Return lora_A and each lora_B of a linear, or None values without an adapter."""
    if not isinstance(linear.adapter, LoraLinear):
        return (None,) * (1 + len(linear.output_sizes))
    return linear.adapter.lora_A, *linear.adapter.lora_B.values()


def _build_dropout(linear: FusedLinear, dropout_seed_1: Tensor | None, salt: int) -> SeededDropout:
    """Build the dropout of the adapter's input for one forward pass.

    `salt` is distinct for each linear of the decoder.
    """
    adapter = linear.adapter
    if not isinstance(adapter, LoraLinear):
        return SeededDropout(None, salt, 0.0, 1.0)
    p = adapter.dropout if adapter.training else 0.0
    assert p == 0.0 or dropout_seed_1 is not None, "dropout without a seed"
    scale = next(iter(adapter.configs.values())).scale
    return SeededDropout(dropout_seed_1, salt, p, scale / (1.0 - p))


@dataclass(frozen=True, slots=True)
class _NormQkvRopeArgs:
    """Arguments without gradients of the fused norm, QKV projection and rotary embedding."""

    qkv: LoraMatmul
    eps: float
    dropout: SeededDropout
    layout: QkvLayout
    rotary: RotaryCosSin


class LayerDropout(NamedTuple):
    """Seed of the LoRA dropout of one decoder layer in one forward pass.

    `dropout_seed_1` may be None if no adapter uses dropout.
    """

    layer_index: int
    dropout_seed_1: Tensor | None

    def for_linear(self, linear: FusedLinear, linear_index: int) -> SeededDropout:
        """Build the dropout of one linear's adapter.

        `linear_index` is 0 for QKV, 1 for the output projection, 2 for gate and up, 3 for down.
        """
        return _build_dropout(linear, self.dropout_seed_1, 4 * self.layer_index + linear_index)


def norm_qkv_rope(
    x_TD: Tensor,
    norm: nn.RMSNorm,
    qkv: FusedLinear,
    head_dim: int,
    rotary: RotaryCosSin,
    layer_dropout: LayerDropout,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply RMS norm, QKV projection and rotary embedding of a decoder layer.

    Returns:
        The layer input for the residual connection, queries [T, H, D], keys and values [T, K, D].
    """
    num_heads, num_kv_heads, _ = (size // head_dim for size in qkv.output_sizes.values())
    layout = QkvLayout(num_heads, num_kv_heads, head_dim)
    args = _NormQkvRopeArgs(
        LoraMatmul.from_linear(qkv), _eps(norm), layer_dropout.for_linear(qkv, 0), layout, rotary
    )
    apply = _NormQkvRope.apply
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = apply(  # type: ignore[no-untyped-call]
        x_TD, norm.weight, args, *args.qkv.trainable_parameters, *_lora_parameters(qkv)
    )
    return outputs


def _eps(norm: nn.RMSNorm) -> float:
    assert norm.eps is not None, "a norm without eps"
    return norm.eps


class _NormQkvRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w_D: Tensor,
        args: _NormQkvRopeArgs,
        _weight: Tensor | None,
        _bias: Tensor | None,
        lora_A_SD: Tensor | None,
        *_lora_Bs_OR: Tensor | None,
    ) -> tuple[Tensor, ...]:
        n_TJ, rstd_T, low_TS = _rms_norm_lora(
            x_TD, w_D, args.eps, args.qkv, lora_A_SD, args.dropout
        )
        qkv_TE = args.qkv.forward(n_TJ, low_TS)
        layout, rotary = args.layout, args.rotary
        rotary_kernels.rotate_qk(qkv_TE, layout, rotary.cos_T1D, rotary.sin_T1D)
        saved_TD = n_TJ if args.qkv.is_trainable else None
        ctx.save_for_backward(x_TD, w_D, rstd_T, saved_TD, low_TS, lora_A_SD)
        ctx.args = args
        heads_TND = qkv_TE.view(len(x_TD), -1, layout.head_dim)
        return x_TD, *torch.split(
            heads_TND, [layout.num_heads, layout.num_kv_heads, layout.num_kv_heads], 1
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, residual_grad_TD: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, w_D, rstd_T, n_TD, low_TS, lora_A_SD = ctx.saved_tensors
        args: _NormQkvRopeArgs = ctx.args
        qkv, rotary = args.qkv, args.rotary
        dqkv_TE = rotary_kernels.rotate_qk_backward(
            (grads[0], grads[1], grads[2]), args.layout, rotary.cos_T1D, rotary.sin_T1D
        )
        norm_stats, dx_TD, dw_D, da_SD = RmsNormStats(w_D, rstd_T), None, None, None
        if any(ctx.needs_input_grad[:2]):
            dn_TD, da_SD = _lora_down_backward(
                x_TD, norm_stats, qkv.backward(dqkv_TE), lora_A_SD, args.dropout
            )
            parameter_grads = ctx.needs_input_grad[1]
            dx_TD, dw_D = norm_kernels.rms_norm_backward(
                x_TD, *norm_stats, dn_TD, residual_grad_TD, needs_weight_grad=parameter_grads
            )
        else:
            dlow_TS = qkv.lora_backward(dqkv_TE)
            if dlow_TS is not None:
                da_SD = lora_gemm_kernels.lora_A_grad(
                    x_TD, norm_stats, dlow_TS, lora_A_SD, args.dropout
                )
        parameter_grads = qkv.parameter_grads(dqkv_TE, n_TD)
        dbs_OR = qkv.lora_B_grads(dqkv_TE, low_TS)
        return dx_TD, dw_D, None, *parameter_grads, da_SD, *dbs_OR


def _rms_norm_lora(
    x_TD: Tensor,
    w_D: Tensor,
    eps: float,
    matmul: LoraMatmul,
    lora_A_SD: Tensor | None,
    dropout: SeededDropout,
) -> tuple[Tensor | Fp8Rows, Tensor, Tensor | None]:
    """Compute the RMS norm, the reciprocal RMS of each row and the LoRA activations.

    With a fused LoRA weight, the norm has padding columns that hold the LoRA activations. The norm
    is quantized to FP8 if the linear accepts FP8 input.
    """
    if matmul.accepts_fp8_input:
        fp8_rows = empty_fp8_rows(x_TD)
        d_TD, rstd_T = norm_kernels.rms_norm_dropout(x_TD, w_D, eps, None, dropout, fp8_rows)
        return (
            fp8_rows,
            rstd_T,
            None if lora_A_SD is None else _lora_down(d_TD, lora_A_SD, dropout, None),
        )
    n_TJ = x_TD.new_empty(len(x_TD), x_TD.shape[1] + matmul.padding)
    n_TD = n_TJ[:, : x_TD.shape[1]]
    d_TD, rstd_T = norm_kernels.rms_norm_dropout(x_TD, w_D, eps, n_TD, dropout)
    return n_TJ, rstd_T, None if lora_A_SD is None else _lora_down(d_TD, lora_A_SD, dropout, n_TJ)


def _lora_down(
    d_TI: Tensor, lora_A_SI: Tensor, dropout: SeededDropout, padded_TJ: Tensor | None
) -> Tensor:
    """Compute LoRA activations; also write them to the padding columns of `padded_TJ`."""
    low_TS = d_TI.new_empty(len(d_TI), len(lora_A_SI))
    torch.addmm(low_TS, d_TI, lora_A_SI.T, beta=0, alpha=dropout.scale, out=low_TS)
    if padded_TJ is not None and padded_TJ.shape[1] > lora_A_SI.shape[1]:
        padding = padded_TJ[:, lora_A_SI.shape[1] :]
        padding[:, : low_TS.shape[1]].copy_(low_TS)
        padding[:, low_TS.shape[1] :].zero_()
    return low_TS


def _lora_down_backward(
    x_TI: Tensor,
    norm_stats: RmsNormStats | None,
    grads: tuple[Tensor, Tensor | None],
    lora_A_SI: Tensor | None,
    dropout: SeededDropout,
) -> tuple[Tensor, Tensor | None]:
    """Compute the backward pass of the LoRA down-projection.

    Adds the LoRA gradient to the input gradient and computes the gradient of lora_A. `grads` are
    the gradients of the input from the base product and of the LoRA activations. Both may be views
    of one tensor, which is freed if there are no other references.
    """
    dn_TI, dlow_TS = grads
    if dlow_TS is None or lora_A_SI is None:
        return dn_TI, None
    return lora_gemm_kernels.lora_down_backward(
        x_TI, norm_stats, dn_TI, dlow_TS, lora_A_SI, dropout
    )


@dataclass(frozen=True, slots=True)
class _OutProjMlpArgs:
    """Arguments without gradients of the fused output projection and MLP."""

    out: LoraMatmul
    out_dropout: SeededDropout
    gate_up: LoraMatmul
    gate_up_dropout: SeededDropout
    down: LoraMatmul
    down_dropout: SeededDropout
    eps: float


def out_proj_mlp(
    x_TD: Tensor,
    o_TI: Tensor,
    out: FusedLinear,
    norm: nn.RMSNorm,
    gate_up: FusedLinear,
    down: FusedLinear,
    layer_dropout: LayerDropout,
) -> Tensor:
    """Compute the output projection, the residual additions and the MLP of a decoder layer.

    With y = x + out(o), returns y plus the gated MLP of the RMS norm of y.
    """
    args = _OutProjMlpArgs(
        LoraMatmul.from_linear(out),
        layer_dropout.for_linear(out, 1),
        LoraMatmul.from_linear(gate_up),
        layer_dropout.for_linear(gate_up, 2),
        LoraMatmul.from_linear(down),
        layer_dropout.for_linear(down, 3),
        _eps(norm),
    )
    y_TD: Tensor = _OutProjMlp.apply(  # type: ignore[no-untyped-call]
        *(x_TD, o_TI, norm.weight, args),
        *(
            *args.out.trainable_parameters,
            *args.gate_up.trainable_parameters,
            *args.down.trainable_parameters,
        ),
        *(*_lora_parameters(out), *_lora_parameters(gate_up), *_lora_parameters(down)),
    )
    return y_TD


class _OutProjMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        o_TI: Tensor,
        w_D: Tensor,
        args: _OutProjMlpArgs,
        *parameters: Tensor | None,
    ) -> Tensor:
        out_a, _, gate_up_a, _, _, down_a, _ = parameters[6:]
        out, gate_up, down = args.out, args.gate_up, args.down
        o_TJ, low_out = o_TI, None
        if out_a is not None:
            o_TJ, low_out = lora_gemm_kernels.lora_down(o_TI, out_a, args.out_dropout, out.padding)
        x_TD = out.forward_add(x_TD, o_TJ, low_out)
        n_TJ, rstd_T, low_gate_up = _rms_norm_lora(
            x_TD, w_D, args.eps, gate_up, gate_up_a, args.gate_up_dropout
        )
        gate_up_TF2 = gate_up.forward(n_TJ, low_gate_up)
        h_TJ, low_down = swiglu_kernels.swiglu_lora(
            gate_up_TF2, down_a, args.down_dropout, down.padding
        )
        y_TD = down.forward_add(x_TD, h_TJ, low_down)
        saved_TD = n_TJ if gate_up.is_trainable else None
        ctx.save_for_backward(
            *(x_TD, o_TI, w_D, rstd_T, saved_TD, gate_up_TF2),
            *(low_out, low_gate_up, low_down, out_a, gate_up_a, down_a),
        )
        ctx.args, ctx.is_consumed = args, False
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, o_TI, w_D, rstd_T, n_TD, gate_up_TF2, *lora_grads = ctx.saved_tensors
        low_out, low_gate_up, low_down, out_a, gate_up_a, down_a = lora_grads
        args: _OutProjMlpArgs = ctx.args
        out, gate_up, down = args.out, args.gate_up, args.down
        # The backward pass overwrites saved tensors.
        assert not ctx.is_consumed, "backward can run only once"
        ctx.is_consumed = True
        dy_TD = dy_TD.contiguous()
        dh_TF, dlow_down = down.backward(dy_TD)
        ddown_b = down.lora_B_grads(dy_TD, low_down)
        _, h_TF, ddown_a = swiglu_kernels.swiglu_lora_backward(
            gate_up_TF2, down_a, dh_TF, dlow_down, args.down_dropout, recompute_h=down.is_trainable
        )
        ddown = down.parameter_grads(dy_TD, h_TF)
        # Free the tensors early: they may be views of larger gradients.
        del dh_TF, dlow_down, h_TF
        dgate_up, norm_stats = gate_up.parameter_grads(gate_up_TF2, n_TD), RmsNormStats(w_D, rstd_T)
        dn_TD, dgate_up_a = _lora_down_backward(
            x_TD, norm_stats, gate_up.backward(gate_up_TF2), gate_up_a, args.gate_up_dropout
        )
        dgate_up_b = gate_up.lora_B_grads(gate_up_TF2, low_gate_up)
        needs_weight_grad = ctx.needs_input_grad[2]
        dx_TD, dw_D = norm_kernels.rms_norm_backward(
            x_TD, *norm_stats, dn_TD, dy_TD, needs_weight_grad=needs_weight_grad
        )
        dout = out.parameter_grads(dx_TD, o_TI)
        do_TI, dout_a = _lora_down_backward(
            o_TI, None, out.backward(dx_TD), out_a, args.out_dropout
        )
        dout_b = out.lora_B_grads(dx_TD, low_out)
        lora_grads = dout_a, *dout_b, dgate_up_a, *dgate_up_b, ddown_a, *ddown_b
        return dx_TD, do_TI, dw_D, None, *dout, *dgate_up, *ddown, *lora_grads
