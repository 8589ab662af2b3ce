"""Frozen weight and LoRA up-projections fused into one matrix, so that one matmul computes both.

[x | low] [W | B]^T = x W^T + low B^T and dy [W | B] = [dx | dlow], where `low` are the LoRA
activations of `x`. Without an adapter this is a weight with aligned rows.

Shapes: O outputs, I inputs, S ranks of all layers of the weight, R rank of one layer, J inputs,
ranks and padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from finesight.model.fused_linear import FusedLinear
from finesight.model.length_buckets import copy_to_device
from finesight.model.quant.base import HAS_TRITON

if HAS_TRITON:
    from finesight.model.kernels import lora_gemm as lora_gemm_kernels

_COLUMN_ALIGNMENT = 64
"""Column alignment: tensor cores require rows aligned to 16 bytes and are fastest at 128 bytes."""


def padding_columns(in_features: int, num_ranks: int) -> int:
    """Return the number of columns added to a weight for LoRA ranks and alignment."""
    return -(-(in_features + num_ranks) // _COLUMN_ALIGNMENT) * _COLUMN_ALIGNMENT - in_features


class UpProjection(NamedTuple):
    """LoRA up-projection [O, R], with its output rows and rank columns."""

    lora_B_OR: Tensor
    output_slice: slice
    rank_slice: slice


class UpProjectionCopy(NamedTuple):
    """LoRA up-projection, and the view of a fused weight that holds its copy."""

    lora_B_OR: Tensor
    target_OR: Tensor


class FusedLoraWeight:
    """Frozen weight W with LoRA up-projections B as additional columns, [W | B].

    Each layer's B is in the output rows and rank columns of this layer; other entries are zero. The
    frozen weight becomes a view of this matrix. The up-projections are trained in their own
    parameters and copied by `FusedWeightSync`.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self, weight: nn.Parameter, num_ranks: int, up_projections: Sequence[UpProjection]
    ) -> None:
        out_features, in_features = weight.shape
        self.weight_OJ = weight.new_zeros(
            out_features, in_features + padding_columns(in_features, num_ranks)
        )
        self.weight_OJ[:, :in_features] = weight
        weight.data = self.weight_OJ[:, :in_features]
        self.copies: list[UpProjectionCopy] = []
        for lora_B_OR, output_slice, rank_slice in up_projections:
            target_OR = self.weight_OJ[output_slice, in_features:][:, rank_slice]
            target_OR.copy_(lora_B_OR)
            assert lora_B_OR.dtype == weight.dtype, f"an adapter in {lora_B_OR.dtype}"
            self.copies.append(UpProjectionCopy(lora_B_OR, target_OR))

    def matches(self, weight: Tensor, up_projections: Sequence[UpProjection]) -> bool:
        """Return True if this is the fused weight of `weight` and these up-projections."""
        copied = [pair.lora_B_OR for pair in self.copies]
        same = len(copied) == len(up_projections) and all(
            copied_B_OR is other.lora_B_OR
            for copied_B_OR, other in zip(copied, up_projections, strict=True)
        )
        return same and self.weight_OJ.data_ptr() == weight.data_ptr()


def fuse_lora_weight(
    linear: FusedLinear, num_ranks: int = 0, up_projections: Sequence[UpProjection] = ()
) -> FusedLoraWeight:
    """Fuse the frozen weight of a linear with its up-projections, on the first call.

    Callers that change the up-projections must copy them again with `FusedWeightSync`.
    """
    weight = linear.weight
    assert isinstance(weight, nn.Parameter), f"cannot fuse a {type(weight).__name__}"
    fused = linear.fused_lora_weight
    if not (isinstance(fused, FusedLoraWeight) and fused.matches(weight, up_projections)):
        fused = linear.fused_lora_weight = FusedLoraWeight(weight, num_ranks, up_projections)
    return fused


class FusedWeightSync:
    """Synchronization of fused weights with updated LoRA up-projections, in one kernel."""

    def __init__(self) -> None:
        self._key: list[int] = []
        self._table_P5 = torch.empty(0)
        self._max_shape = 0, 0

    @torch.no_grad()
    def copy_up_projections(self, fused_weights: Sequence[FusedLoraWeight]) -> None:
        """Copy the current up-projections into these fused weights."""
        copies = [projection for fused in fused_weights for projection in fused.copies]
        if not copies:
            return
        key = [tensor.data_ptr() for pair in copies for tensor in pair]
        if key != self._key:
            self._key = key
            self._max_shape = tuple(
                max(sizes) for sizes in zip(*(pair.lora_B_OR.shape for pair in copies), strict=True)
            )
            address_pairs = zip(key[::2], key[1::2], strict=True)
            rows = [
                (*pointers, *pair.lora_B_OR.shape, pair.target_OR.stride(0))
                for pointers, pair in zip(address_pairs, copies, strict=True)
            ]
            self._table_P5 = copy_to_device(
                np.array(rows, dtype=np.int64), copies[0].lora_B_OR.device
            )
        lora_gemm_kernels.copy_matrices(self._table_P5, *self._max_shape, copies[0].lora_B_OR)
