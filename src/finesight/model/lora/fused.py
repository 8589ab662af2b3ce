"""Frozen weights fused with LoRA up-projections, for `model.fused_decoder`.

One matmul computes base product and LoRA delta:
[x | low] [W | B]^T = x W^T + low B^T and dy [W | B] = [dx | dlow], where `low` are the LoRA
activations of `x`. Without an adapter this is a weight with aligned rows.

Shapes: T tokens, I inputs, O concatenated outputs of a fused linear, S ranks of all its layers, R
rank of one layer, J input columns including the LoRA ranks and padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.encode.packing import copy_to_device
from finesight.model.attention import pad_rows
from finesight.model.kernels import lora_gemm as lora_gemm_kernels
from finesight.model.kernels.runtime import NO_DROPOUT, SeededDropout
from finesight.model.linear import (
    FusedLinear,
    LoraLinear,
    RowRange,
    add_lora_delta,
    linear_concat,
    linear_concat_backward,
)
from finesight.model.quant.base import Fp8Rows, QuantizedWeight

_COLUMN_ALIGNMENT = 64
"""Column alignment: tensor cores require rows aligned to 16 bytes and are fastest at 128 bytes."""


def padding_columns(in_features: int, num_ranks: int) -> int:
    """Return the number of columns added to a weight for LoRA ranks and alignment."""
    return -(-(in_features + num_ranks) // _COLUMN_ALIGNMENT) * _COLUMN_ALIGNMENT - in_features


class FusedLoraWeight:
    """Frozen weight W with LoRA up-projections B as additional columns, [W | B].

    Each layer's B is in the output rows and rank columns of this layer; other entries are zero. The
    frozen weight becomes a view of this matrix. The up-projections are trained in their own
    parameters and copied by `FusedWeightSync`.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, weight: nn.Parameter, adapter: LoraLinear | None) -> None:
        out_features, in_features = weight.shape
        num_ranks = 0 if adapter is None else len(adapter.lora_A)
        self.weight_OJ = weight.new_zeros(
            out_features, in_features + padding_columns(in_features, num_ranks)
        )
        self.weight_OJ[:, :in_features] = weight
        weight.data = self.weight_OJ[:, :in_features]
        self.copies: list[tuple[Tensor, Tensor]] = []
        """Up-projections, each with the view that holds its copy."""
        if adapter is None:
            return
        for name, lora_slice in adapter.slices.items():
            lora_B_OR = adapter.lora_B[name]
            assert lora_B_OR.dtype == weight.dtype, f"an adapter in {lora_B_OR.dtype}"
            ranks_OS = self.weight_OJ[lora_slice.output_slice, in_features:]
            target_OR = ranks_OS[:, lora_slice.rank_slice]
            target_OR.copy_(lora_B_OR)
            self.copies.append((lora_B_OR, target_OR))

    def matches(self, weight: Tensor, adapter: LoraLinear | None) -> bool:
        copied = [id(lora_B_OR) for lora_B_OR, _ in self.copies]
        current = (
            [] if adapter is None else [id(lora_B_OR) for lora_B_OR in adapter.lora_B.values()]
        )
        return copied == current and self.weight_OJ.data_ptr() == weight.data_ptr()


def fuse_lora_weight(linear: FusedLinear) -> FusedLoraWeight:
    """Fuse the frozen weight of a linear with its up-projections, on the first call."""
    weight, fused = linear.weight, linear.fused_lora_weight
    assert isinstance(weight, nn.Parameter), f"cannot fuse a {type(weight).__name__}"
    adapter = linear.adapter if isinstance(linear.adapter, LoraLinear) else None
    if not (isinstance(fused, FusedLoraWeight) and fused.matches(weight, adapter)):
        fused = linear.fused_lora_weight = FusedLoraWeight(weight, adapter)
    return fused


def is_lora_fusible(linear: FusedLinear) -> bool:
    """Return True if a linear has an adapter that can be fused with its weight."""
    is_dense = isinstance(linear.weight, nn.Parameter) and not linear.is_sharded
    return is_dense and isinstance(linear.adapter, LoraLinear)


class FusedWeightSync:
    """Synchronization of fused weights with updated LoRA up-projections, in one kernel."""

    def __init__(self) -> None:
        self._key: list[int] = []
        self._table_P5 = torch.empty(0)
        self._max_shape = 0, 0

    @torch.no_grad()
    def copy_up_projections(self, linears: Iterable[FusedLinear]) -> None:
        """Copy the current up-projections of these linears into their fused weights."""
        fusible = filter(is_lora_fusible, linears)
        copies = [pair for linear in fusible for pair in fuse_lora_weight(linear).copies]
        if not copies:
            return
        key = [tensor.data_ptr() for pair in copies for tensor in pair]
        if key != self._key:
            self._key = key
            shapes = [lora_B_OR.shape for lora_B_OR, _ in copies]
            self._max_shape = max(rows for rows, _ in shapes), max(ranks for _, ranks in shapes)
            table = [
                (source.data_ptr(), target.data_ptr(), *source.shape, target.stride(0))
                for source, target in copies
            ]
            self._table_P5 = copy_to_device(np.array(table, dtype=np.int64), copies[0][0].device)
        lora_gemm_kernels.copy_matrices(self._table_P5, *self._max_shape, copies[0][0])


_GRADIENT_BUFFERS: list[Callable[[Tensor], Tensor | None]] = []
"""Functions that find gradient buffers, set by `write_gradients_to`. They are global to all
threads: autograd runs the backward pass in its own thread."""


@contextmanager
def write_gradients_to(find_buffer: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Write weight gradients into preallocated buffers within the block.

    `find_buffer` returns the buffer of a weight, or None to allocate a new tensor. No weight may be
    used by two matmuls of a forward pass, since the second gradient would overwrite the first.
    """
    _GRADIENT_BUFFERS.append(find_buffer)
    try:
        yield
    finally:
        _GRADIENT_BUFFERS.pop()


@dataclass(frozen=True, slots=True)
class LoraMatmul:
    """Forward and backward matmuls of a fused linear, with the parameters of its `LoraLinear`.

    It computes the same as `LoraLinear.forward` for concatenated outputs, given LoRA activations
    `low` that include dropout and scale. All layers must be adapted, with equal ranks.
    """

    in_features: int
    num_layers: int
    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    fused_weight_OJ: Tensor | None
    lora_A_SI: Tensor | None
    lora_Bs_OR: tuple[Tensor, ...]
    dropout: SeededDropout
    row_range: RowRange | None = None

    @classmethod
    def from_linear(
        cls, linear: FusedLinear, dropout_seed_1: Tensor | None = None, salt: int = 0
    ) -> LoraMatmul:
        """Collect the operands of a fused linear for one forward pass."""
        common = linear.in_features, len(linear.output_sizes), linear.weight, linear.bias
        adapter = linear.adapter
        if not isinstance(adapter, LoraLinear):
            no_dropout = SeededDropout(None, salt, 0.0, 1.0)
            return cls(*common, None, None, (), no_dropout, linear.row_range)
        p = adapter.dropout if adapter.training else 0.0
        assert p == 0.0 or dropout_seed_1 is not None, "dropout without a seed"
        scale = next(iter(adapter.slices.values())).scale
        return cls(
            *common,
            fuse_lora_weight(linear).weight_OJ if is_lora_fusible(linear) else None,
            adapter.lora_A,
            tuple(adapter.lora_B.values()),
            SeededDropout(dropout_seed_1, salt, p, scale / (1.0 - p)),
            linear.row_range,
        )

    @property
    def is_trainable(self) -> bool:
        return isinstance(self.weight, Tensor) and self.weight.requires_grad

    @property
    def padding(self) -> int:
        return (
            0 if self.fused_weight_OJ is None else self.fused_weight_OJ.shape[1] - self.in_features
        )

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """Inputs of the autograd function: weight, bias, lora_A and lora_B of each layer."""
        weight = self.weight if isinstance(self.weight, Tensor) and self.is_trainable else None
        bias = self.bias if self.bias is not None and self.bias.requires_grad else None
        lora_Bs_OR = self.lora_Bs_OR or (None,) * self.num_layers
        return weight, bias, self.lora_A_SI, *lora_Bs_OR

    def compute_low(self, x_TI: Tensor) -> Tensor | None:
        """Compute the LoRA activations of inputs after dropout."""
        if self.lora_A_SI is None:
            return None
        if self.row_range is not None:
            # Libraries change the order of sums for few columns, too.
            scale_only = NO_DROPOUT._replace(scale=self.dropout.scale)
            return lora_gemm_kernels.lora_down(x_TI, self.lora_A_SI, scale_only, 0)[1]
        low_TS, scale = x_TI.new_empty(len(x_TI), len(self.lora_A_SI)), self.dropout.scale
        return torch.addmm(low_TS, x_TI, self.lora_A_SI.T, beta=0, alpha=scale, out=low_TS)

    @property
    def _single_weight(self) -> Tensor | None:
        """Weight of the only matmul of the forward pass; None if it needs several."""
        if self.fused_weight_OJ is not None or self.lora_Bs_OR:
            return self.fused_weight_OJ
        return self.weight if isinstance(self.weight, Tensor) else None

    def forward(self, x_TJ: Tensor | Fp8Rows, low_TS: Tensor | None) -> Tensor:
        """Compute x W^T + bias plus the LoRA delta of all layers, concatenated."""
        weight = self._single_weight
        if weight is not None and isinstance(x_TJ, Tensor):
            return multiply(x_TJ, weight, self.bias, None, self.row_range)
        y_TO = linear_concat(x_TJ, self.weight, self.bias)
        for y, low_TR, lora_B_OR in self._split_layers(y_TO, low_TS):
            add_lora_delta(y, low_TR, lora_B_OR)
        return y_TO

    def forward_add(self, x_TO: Tensor, h_TJ: Tensor, low_TS: Tensor | None) -> Tensor:
        """Compute `x_TO` plus the output of `forward` for `h_TJ`."""
        weight = self._single_weight
        if weight is not None and self.bias is None:
            return multiply(h_TJ, weight, None, x_TO, self.row_range)
        return self.forward(h_TJ, low_TS).add_(x_TO)

    def backward(self, dy_TO: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the gradients of the input and of the LoRA activations."""
        if self.fused_weight_OJ is None:
            return linear_concat_backward(dy_TO, self.weight), self.lora_backward(dy_TO)
        num_ranks = sum(lora_B_OR.shape[1] for lora_B_OR in self.lora_Bs_OR)
        dx_TJ = dy_TO @ self.fused_weight_OJ
        return dx_TJ[:, : self.in_features], dx_TJ[
            :, self.in_features : self.in_features + num_ranks
        ]

    def lora_backward(self, dy_TO: Tensor) -> Tensor | None:
        grads = [dy @ lora_B_OR for dy, _, lora_B_OR in self._split_layers(dy_TO, None)]
        return torch.cat(grads, 1) if grads else None

    def _split_layers(
        self, y_TO: Tensor, low_TS: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield output columns, LoRA activations and up-projection of each layer with LoRA."""
        if not self.lora_Bs_OR:
            return
        ys = torch.split(y_TO, [len(lora_B_OR) for lora_B_OR in self.lora_Bs_OR], 1)
        lows = ys if low_TS is None else low_TS.chunk(len(self.lora_Bs_OR), 1)
        yield from zip(ys, lows, self.lora_Bs_OR, strict=True)

    def base_grads(self, dy_TO: Tensor, x_TI: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Compute the gradients of weight, dy^T x, and bias, the sum of dy."""
        weight, bias, *_ = self.parameters
        dw_OI = None
        if weight is not None:
            assert x_TI is not None, "a trainable weight requires its saved input"
            # Write to the preallocated buffer if there is one.
            buffer_OI = _GRADIENT_BUFFERS[-1](weight) if _GRADIENT_BUFFERS else None
            dw_OI = torch.mm(dy_TO.T, x_TI, out=buffer_OI)
        # Use a matmul: torch's sum over many rows needs more memory than the rows.
        return dw_OI, None if bias is None else (dy_TO.new_ones(1, len(dy_TO)) @ dy_TO)[0]

    def lora_B_grads(self, dy_TO: Tensor, low_TS: Tensor | None) -> list[Tensor] | list[None]:
        """Compute the gradients of the up-projections; return None values without an adapter."""
        if not self.lora_Bs_OR:
            return [None] * self.num_layers
        return [dy.T @ low_TR for dy, low_TR, _ in self._split_layers(dy_TO, low_TS)]


def multiply(
    x_TJ: Tensor,
    weight_OJ: Tensor,
    bias: Tensor | None,
    residual_TO: Tensor | None,
    row_range: RowRange | None,
) -> Tensor:
    """Compute x W^T plus a bias or a residual.

    With `row_range`, the product is computed in blocks with these numbers of rows.
    """
    if row_range is None:
        if residual_TO is not None:
            return torch.addmm(residual_TO, x_TJ, weight_OJ.T)
        return F.linear(x_TJ, weight_OJ, bias)
    y_TO = x_TJ.new_empty(len(x_TJ), len(weight_OJ))
    for start in range(0, len(x_TJ), row_range.stop):
        block = slice(start, start + row_range.stop)
        x, y, added = pad_rows(x_TJ[block], row_range.start), y_TO[block], bias
        if residual_TO is not None:
            added = pad_rows(residual_TO[block], row_range.start)
        out = y if len(y) == len(x) else y.new_empty(len(x), y.shape[1])
        if added is None:
            torch.mm(x, weight_OJ.T, out=out)
        else:
            torch.addmm(added, x, weight_OJ.T, out=out)
        if out is not y:
            y.copy_(out[: len(y)])
    return y_TO


TESTED_ROWS = RowRange(8, 1024)
"""Numbers of rows among which `set_row_ranges` looks for products with one order of sums."""

FIXED_ROWS = RowRange(256, 256)
"""Rows of each block of a product whose order of sums changes above `MAX_PADDING` rows."""

MAX_PADDING = 64


@torch.no_grad()
def set_row_ranges(linears: Sequence[FusedLinear]) -> None:
    """Let fused layers compute each row of a product independently of the other rows.

    Libraries choose the order of sums (split-K) by the number of rows. Within the row range of a
    linear, it is the same.

    Args:
        linears: Linears of fused layers; the outputs of every second one are added to a residual.
    """
    known: dict[tuple[object, ...], RowRange] = {}
    for index, linear in enumerate(linears):
        matmul, is_added = LoraMatmul.from_linear(linear), index % 2 == 1
        weight_OJ = matmul._single_weight
        assert weight_OJ is not None, "cannot test quantized weights"
        key = weight_OJ.shape, matmul.bias is None, is_added
        if key not in known:
            known[key] = _find_row_range(weight_OJ, matmul.bias, is_added)
        linear.row_range = known[key]


def _find_row_range(weight_OJ: Tensor, bias: Tensor | None, is_added: bool) -> RowRange:
    step, max_rows = TESTED_ROWS
    x_TO, x_TJ = (weight_OJ.new_empty(max_rows, size).normal_() for size in weight_OJ.shape)

    def compute(count: int) -> Tensor:
        residual_TO = x_TO[:count] if is_added else None
        return multiply(x_TJ[:count], weight_OJ, bias, residual_TO, TESTED_ROWS)[:step]

    expected, counts = compute(max_rows), range(step, max_rows, step)
    min_rows = step + max((n for n in counts if not torch.equal(compute(n), expected)), default=0)
    return FIXED_ROWS if min_rows > MAX_PADDING else RowRange(min_rows, max_rows)
