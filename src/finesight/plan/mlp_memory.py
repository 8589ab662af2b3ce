"""Estimate the activations that an MLP saves, and its workspace when frozen, in bytes."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from finesight.model.families.qwen2_vl import Qwen2VisionMlp
from finesight.model.families.qwen_vl import QwenMlp
from finesight.model.fused_linear import FusedLinear
from finesight.model.layers import GatedMlp
from finesight.model.moe import SparseMoeBlock
from finesight.model.quant.fp8 import Fp8Weight
from finesight.plan.saved_activations import (
    FP32_BYTES,
    INDEX_BYTES,
    ComputeConfig,
    is_trainable,
    is_weight_trainable,
    saved_linear_bytes,
    transposed_fp8_bytes,
)


class MlpMemory(NamedTuple):
    """Memory of an MLP.

    Sizes named `row` are bytes per row. See `LayerMemory` for all fields.
    """

    row_bytes: int
    backward_row_bytes: int
    freed_row_bytes: int
    persistent_bytes: int = 0
    weight_copy_bytes: int = 0


def compute_mlp_memory(mlp: nn.Module, has_input_grad: bool, compute: ComputeConfig) -> MlpMemory:
    """Estimate the memory of an MLP: both linear layers and the activation function.

    A gated MLP saves the outputs of its gate and up projections.
    """
    if isinstance(mlp, SparseMoeBlock):
        return _compute_moe_memory(mlp, has_input_grad, compute)
    up, down = _get_linears(mlp)
    up_features, element_size = sum(up.output_sizes.values()), compute.element_size
    has_activation_grad = has_input_grad or is_trainable(up)
    activation_bytes = up_features * element_size if has_activation_grad else 0
    down_bytes = saved_linear_bytes(down, compute)
    backward_bytes = (
        _activation_backward_elements(up_features, up_features > down.in_features) * element_size
    )
    persistent_bytes = (transposed_fp8_bytes(up) if has_input_grad else 0) + (
        transposed_fp8_bytes(down) if has_activation_grad else 0
    )
    padding_bytes, weight_copy_bytes = _padding_bytes(mlp, compute), 0
    if padding_bytes:
        # Saved gate and up products are replaced by their gradients.
        backward_bytes = down.in_features * element_size + padding_bytes
        out_features = sum(down.output_sizes.values())
        if is_weight_trainable(down):
            down_bytes += padding_bytes
            weight_copy_bytes = out_features * backward_bytes * has_activation_grad
        else:
            persistent_bytes += out_features * padding_bytes
    return MlpMemory(
        saved_linear_bytes(up, compute) + activation_bytes + down_bytes,
        backward_bytes,
        down_bytes,
        persistent_bytes,
        weight_copy_bytes,
    )


def _padding_bytes(mlp: nn.Module, compute: ComputeConfig) -> int:
    """Return the bytes of padding columns per row of the down projection's input.

    See `model.layers.GatedMlp`.
    """
    if not (isinstance(mlp, GatedMlp) and compute.uses_elementwise_kernels):
        return 0
    return mlp.padding_columns * compute.element_size


def count_up_features(mlp: nn.Module) -> int:
    """Return the number of output features of an MLP's first linear layer.

    For a gated MLP, these are the features of gate and up together.
    """
    up, _ = _get_linears(mlp)
    return sum(up.output_sizes.values())


def frozen_mlp_row_bytes(mlp: nn.Module, hidden_size: int, compute: ComputeConfig) -> int:
    """Return the peak bytes per row of an MLP that needs no gradients.

    Counts the input and output of the activation function. The gate and up products of a gated MLP
    remain allocated until its end. The fused kernel of Qwen2-VL (`model.kernels.gemm_gelu`) needs
    less.
    """
    up, down = _get_linears(mlp)
    element_size, up_bytes = (
        compute.element_size,
        sum(up.output_sizes.values()) * compute.element_size,
    )
    fp8_bytes, output_bytes = _fp8_row_bytes(down), hidden_size * element_size
    activated_bytes = down.in_features * element_size + _padding_bytes(mlp, compute)
    if isinstance(mlp, Qwen2VisionMlp):
        # The kernel returns FP8 codes.
        return (fp8_bytes or activated_bytes) + max(up_bytes, output_bytes)
    if up_bytes > down.in_features * element_size:
        return up_bytes + activated_bytes + fp8_bytes + output_bytes
    return activated_bytes + max(up_bytes, fp8_bytes + output_bytes)


def frozen_norm_row_bytes(mlp: nn.Module, compute: ComputeConfig) -> int:
    """Return the output bytes per row of the norm before a frozen MLP."""
    up, _ = _get_linears(mlp)
    return _fp8_row_bytes(up) or up.in_features * compute.element_size


def _fp8_row_bytes(linear: FusedLinear) -> int:
    """Return the bytes per row of an FP8 input with its scale.

    Returns 0 for a linear layer whose weight is not FP8.
    """
    return linear.in_features + FP32_BYTES if isinstance(linear.weight, Fp8Weight) else 0


def _activation_backward_elements(up_features: int, is_gated: bool) -> int:
    """Return the elements per row that exist in the backward pass of an activation function.

    For a gated activation, these are the gradients of the output, of gate and of up. Other
    activations have intermediate results, since no kernel fuses their backward pass
    (`model.fused_ops`).
    """
    return up_features // 2 * 3 if is_gated else up_features * 5


def _get_linears(mlp: nn.Module) -> tuple[FusedLinear, FusedLinear]:
    if isinstance(mlp, GatedMlp):
        return mlp.gate_up_proj, mlp.down_proj
    if isinstance(mlp, QwenMlp):
        return mlp.w2_w1, mlp.c_proj
    up, down = (m for m in mlp.children() if isinstance(m, FusedLinear))
    return up, down


def _compute_moe_memory(
    mlp: SparseMoeBlock, has_input_grad: bool, compute: ComputeConfig
) -> MlpMemory:
    """Estimate the memory of a mixture-of-experts block.

    Counts, for each selected expert, its input, gate, up, product, output and routing weight. For
    the router, counts fp32 probabilities and indices.
    """
    if not (has_input_grad or is_trainable(mlp)):
        return MlpMemory(0, 0, 0)
    hidden_size, element_size = mlp.gate.in_features, compute.element_size
    intermediate_size = mlp.experts.down_proj.shape[1]
    are_experts_trainable = is_trainable(mlp.experts)
    expert_bytes = (
        2 * intermediate_size * element_size
        + hidden_size * element_size
        + (hidden_size + intermediate_size) * element_size * are_experts_trainable
    )
    routing_bytes = FP32_BYTES * (mlp.gate.out_features + mlp.top_k + 1) + mlp.top_k * element_size
    index_bytes = 3 * INDEX_BYTES * mlp.top_k
    router_bytes = hidden_size * element_size if is_trainable(mlp.gate) else 0
    expert_features = 2 * mlp.top_k * intermediate_size
    backward_bytes = _activation_backward_elements(expert_features, is_gated=True) * element_size
    return MlpMemory(
        mlp.top_k * expert_bytes + routing_bytes + index_bytes + router_bytes, backward_bytes, 0
    )
