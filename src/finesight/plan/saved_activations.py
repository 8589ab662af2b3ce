"""Estimate the activations that layers save for the backward pass, in bytes per row.

A row is a token or a patch. This module, `plan.mlp_memory` and `plan.layer_memory` cover unfused
layers; `plan.fused_layer_memory` covers fused ones. Update them if the saved tensors change.
tests/plan/test_saved_activations.py compares the estimates with the tensors saved by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from finesight.model.attention import MAX_TRITON_SEQLEN
from finesight.model.cpu_attention import MAX_CPU_SEQLEN, bucket_by_length, bucket_with_padding
from finesight.model.fused_linear import FusedLinear
from finesight.model.layers import RmsNorm
from finesight.model.lora.layer import LoraLinear
from finesight.model.quant.fp8 import Fp8Weight
from finesight.plan.cpu_attention_memory import CpuAttentionMemory

FP32_BYTES = 4
"""Bytes of an fp32 element. Norms, softmax and rotary embedding save fp32 values."""

INDEX_BYTES = 8
"""Bytes of an int64 index."""

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class ComputeConfig:
    """Properties of a device that determine which activations are saved.

    Attributes:
        is_cuda: True for a GPU.
        element_size: Bytes of an element of the weights and activations.
        has_varlen_attention: True if one attention kernel handles sequences of different lengths
            (`model.attention.supports_varlen_attention`).
    """

    is_cuda: bool
    element_size: int
    has_varlen_attention: bool

    @property
    def uses_fused_layers(self) -> bool:
        """True if decoder layers run as fused layers (`model.fused_decoder`)."""
        return self.is_cuda and self.has_varlen_attention

    @property
    def uses_elementwise_kernels(self) -> bool:
        """True if elementwise operations run as Triton kernels (`model.fused_ops`)."""
        return self.is_cuda and self.element_size == 2

    def dropout_mask_bytes(self, dropout: float) -> float:
        """Return the bytes per element that dropout saves for the backward pass.

        A GPU saves a mask. A CPU saves the indices of dropped elements. See `model.fused_ops`.
        """
        return 1 if self.is_cuda else INDEX_BYTES * dropout


def is_trainable(module: nn.Module) -> bool:
    """Return whether a module has trainable parameters, including adapters."""
    return any(parameter.requires_grad for parameter in module.parameters())


def saved_linear_bytes(linear: FusedLinear, compute: ComputeConfig) -> int:
    """Return the bytes per row that linear layers with one input save.

    Trainable layers save their input for the backward pass. LoRA also saves its down-projection
    and, with dropout, a mask (`model.lora`).
    """
    input_bytes = linear.in_features * compute.element_size
    if isinstance(linear.adapter, LoraLinear):
        lora_bytes = len(linear.adapter.lora_A) * compute.element_size
        dropout = linear.adapter.dropout
        mask_bytes = linear.in_features * compute.dropout_mask_bytes(dropout) if dropout else 0
        return input_bytes + round(mask_bytes) + lora_bytes
    return input_bytes if is_weight_trainable(linear) else 0


def transposed_fp8_bytes(linear: FusedLinear) -> int:
    """Return the bytes of the transposed copy of an FP8 weight and its scales.

    The first backward pass through the layer creates and caches the copy (`model.quant.fp8`).
    Returns 0 for other weights.
    """
    if not isinstance(linear.weight, Fp8Weight):
        return 0
    return linear.weight.num_elements + linear.in_features * FP32_BYTES


def is_weight_trainable(linear: FusedLinear) -> bool:
    """Return whether the weight itself is trainable, as opposed to its adapter."""
    return isinstance(linear.weight, nn.Parameter) and linear.weight.requires_grad


def saves_original_input(linear: FusedLinear) -> bool:
    """Return whether a linear layer saves its original input instead of a copy with dropout."""
    if isinstance(linear.adapter, LoraLinear):
        return not linear.adapter.dropout
    return is_weight_trainable(linear)


def saved_norm_bytes(
    norm: nn.Module, hidden_size: int, has_input_grad: bool, compute: ComputeConfig
) -> int:
    """Return the bytes per row that a norm saves for the backward pass.

    Counts the input, an fp32 scale and, for LayerNorm, the mean.
    """
    if not (has_input_grad or is_trainable(norm)):
        return 0
    if not isinstance(norm, RmsNorm):
        return hidden_size * compute.element_size + 2 * FP32_BYTES
    # Without a kernel, torch saves the input for the input gradient, and normed rows for the weight
    # gradient.
    is_composed = not compute.is_cuda and compute.element_size == FP32_BYTES
    num_copies = int(has_input_grad) + int(is_trainable(norm)) if is_composed else 1
    return hidden_size * compute.element_size * num_copies + FP32_BYTES


class LayerInputShape(NamedTuple):
    """Input shape of a decoder layer or vision encoder block.

    Attributes:
        context_lengths: Number of tokens that each sequence attends to. With a shared prefix, the
            sum exceeds `num_tokens`.
        num_tokens: Number of tokens of the pack.
        mlp_rows: Number of tokens for which the MLP runs.
    """

    context_lengths: Sequence[int]
    num_tokens: int
    mlp_rows: int

    @property
    def num_duplicates(self) -> int:
        """Number of additional tokens if the shared prefix is repeated for each sequence."""
        return sum(self.context_lengths) - self.num_tokens


@dataclass(frozen=True, slots=True)
class AttentionMemory:
    """Memory of the attention of one layer.

    Attributes:
        query_dim: Number of query elements per token.
        kv_dim: Number of key elements per token, and also of value elements.
        num_heads: Number of query heads.
        saved_dim: Number of query, key and value elements per token that are saved. Values are a
            slice of the QKV product, which is then saved in full, in addition to rotated queries
            and keys.
        is_causal: True in the decoder, False in the vision encoder.
    """

    query_dim: int
    kv_dim: int
    num_heads: int
    saved_dim: int
    is_causal: bool

    def saved_bytes(self, shape: LayerInputShape, compute: ComputeConfig) -> int:
        """Return the bytes that attention saves for the backward pass of a pack.

        With a shared prefix, queries, keys and values repeat it for each sequence if there is no
        varlen kernel. With a varlen kernel, only keys and values do, and only for long sequences
        (`model.attention`).
        """
        lengths, num_context_tokens, element_size = (
            shape.context_lengths,
            sum(shape.context_lengths),
            compute.element_size,
        )
        if uses_cpu_attention(lengths, compute):
            return self._cpu_attention_at(shape).saved_bytes
        lse_bytes = FP32_BYTES * self.num_heads
        row_bytes = element_size * (self.saved_dim + self.query_dim) + lse_bytes
        if compute.has_varlen_attention:
            num_copied = (
                num_context_tokens * (shape.num_duplicates > 0) * (max(lengths) > MAX_TRITON_SEQLEN)
            )
            return shape.num_tokens * row_bytes + num_copied * 2 * element_size * self.kv_dim
        if self.query_dim == self.kv_dim and bucket_by_length(lengths, CPU).order_T is None:
            return num_context_tokens * row_bytes
        # Grouped heads are repeated, or tokens are sorted: both create copies.
        return num_context_tokens * (element_size * 4 * self.query_dim + lse_bytes)

    def forward_workspace(self, shape: LayerInputShape, compute: ComputeConfig) -> int:
        """Return the workspace bytes of the forward pass, including queries, keys and values.

        Kernels that do not store attention scores need less than the MLP and are not counted.
        """
        if not uses_cpu_attention(shape.context_lengths, compute):
            return self._prefix_copy_bytes(shape, compute)
        cpu_attention = self._cpu_attention_at(shape)
        return (
            compute.element_size * self.saved_dim * shape.num_tokens
            + cpu_attention.forward_peak
            - cpu_attention.saved_bytes
        )

    def backward_workspace(self, shape: LayerInputShape, compute: ComputeConfig) -> int:
        """Return the workspace bytes of the backward pass, including the output gradient.

        CPU kernels of torch expand key heads to the number of query heads. GPU kernels are not
        counted.
        """
        if uses_cpu_attention(shape.context_lengths, compute):
            return self._cpu_attention_at(shape).backward_workspace
        head_bytes = 0 if compute.is_cuda else compute.element_size * 4 * self.query_dim
        return self._prefix_copy_bytes(shape, compute) + head_bytes * sum(shape.context_lengths)

    def _prefix_copy_bytes(self, shape: LayerInputShape, compute: ComputeConfig) -> int:
        """Return the bytes of queries, keys and values with the shared prefix repeated.

        Their gradients have the same size.
        """
        is_shared = compute.has_varlen_attention or not shape.num_duplicates
        row_bytes = compute.element_size * (self.query_dim + 2 * self.kv_dim)
        return 0 if is_shared else sum(shape.context_lengths) * row_bytes

    def sort_index_bytes(self, lengths: Sequence[int], compute: ComputeConfig) -> int:
        """Return the bytes of the indices that sort tokens by sequence length.

        All layers share these indices. A varlen kernel does not need them.
        """
        if compute.has_varlen_attention:
            return 0
        if uses_cpu_attention(lengths, compute):
            return self._build_cpu_attention(lengths, sum(lengths)).index_bytes
        return (
            0 if bucket_by_length(lengths, CPU).order_T is None else 2 * INDEX_BYTES * sum(lengths)
        )

    def _cpu_attention_at(self, shape: LayerInputShape) -> CpuAttentionMemory:
        """Return the CPU attention memory of a pack.

        The shared prefix has no batch of its own: it is batched with the other sequences.
        """
        return self._build_cpu_attention(
            shape.context_lengths[shape.num_duplicates > 0 :], shape.num_tokens
        )

    def _build_cpu_attention(self, lengths: Sequence[int], num_tokens: int) -> CpuAttentionMemory:
        buckets = (bucket_with_padding if self.is_causal else bucket_by_length)(lengths, CPU)
        return CpuAttentionMemory(
            self.query_dim, self.kv_dim, self.num_heads, self.is_causal, num_tokens, buckets
        )


def uses_cpu_attention(lengths: Sequence[int], compute: ComputeConfig) -> bool:
    """Return whether training uses the attention kernel of `model.cpu_attention`.

    It supports short sequences in 16 bits.
    """
    return not compute.is_cuda and compute.element_size == 2 and max(lengths) <= MAX_CPU_SEQLEN


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Memory of an unfused decoder layer or vision encoder block, in bytes.

    Attributes:
        compute: Device properties.
        attention_row_bytes: Saved bytes per row of the attention block, including its norm and
            projections.
        o_proj_row_bytes: Saved bytes per row of the output projection.
        attention: Memory of the attention itself. None if it needs no gradient.
        mlp_row_bytes: Saved bytes per row of the MLP and its norm.
        input_row_bytes: Bytes per row of the layer input.
        saves_input: Whether the layer input is saved for the backward pass.
        mlp_backward_row_bytes: Workspace bytes per row of the MLP backward pass.
        mlp_freed_row_bytes: Saved bytes per row that the MLP frees before its activation gradient.
        weight_grad_bytes: Bytes of the largest weight gradient of the MLP and its accumulation.
        has_output_grad: Whether the layer output needs a gradient.
        persistent_bytes: Bytes that the first pack allocates and that remain allocated.
        weight_copy_bytes: Bytes of weight copies that each pack saves.
    """

    compute: ComputeConfig
    attention_row_bytes: int
    o_proj_row_bytes: int
    attention: AttentionMemory | None
    mlp_row_bytes: int
    input_row_bytes: int
    saves_input: bool
    mlp_backward_row_bytes: int
    mlp_freed_row_bytes: int
    weight_grad_bytes: int
    has_output_grad: bool
    persistent_bytes: int
    weight_copy_bytes: int

    @property
    def saves_attention(self) -> bool:
        """True if queries, keys and values are saved for the backward pass."""
        return self.attention is not None

    def saved_bytes(self, shape: LayerInputShape) -> int:
        """Return the bytes that the layer saves for the backward pass of a pack."""
        attention_bytes = (
            0 if self.attention is None else self.attention.saved_bytes(shape, self.compute)
        )
        return (
            self.attention_row_bytes * shape.num_tokens
            + attention_bytes
            + self.mlp_row_bytes * shape.mlp_rows
            + self.weight_copy_bytes
        )

    def forward_workspace(self, shape: LayerInputShape) -> int:
        """Return the workspace bytes of attention in the forward pass.

        Saved tensors that are created after attention are subtracted.
        """
        if self.attention is None:
            return 0
        return self.attention.forward_workspace(shape, self.compute) + self._surrounding_bytes(
            shape
        )

    def backward_workspace(self, shape: LayerInputShape) -> int:
        """Return the workspace bytes of the backward pass, minus saved bytes freed by then.

        The maximum of the MLP and of attention is used.
        """
        num_rows = shape.mlp_rows
        mlp_workspace = (
            max(
                num_rows * self.mlp_backward_row_bytes,
                2 * num_rows * self.input_row_bytes + self.weight_grad_bytes,
            )
            - num_rows * self.mlp_freed_row_bytes
        )
        if self.attention is None:
            return mlp_workspace
        return max(
            mlp_workspace,
            self.attention.backward_workspace(shape, self.compute) + self._surrounding_bytes(shape),
        )

    def _surrounding_bytes(self, shape: LayerInputShape) -> int:
        """Return the bytes that exist around attention, minus saved bytes of later operations.

        In the forward pass, the norm output exists; in the backward pass, the gradient of the
        residual.
        """
        return (
            self.input_row_bytes - self.o_proj_row_bytes
        ) * shape.num_tokens - self.mlp_row_bytes * shape.mlp_rows
