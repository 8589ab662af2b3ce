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

from finesight.encode.batch import copy_to_device
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
    num_blocks = -(-(in_features + num_ranks) // _COLUMN_ALIGNMENT)
    return num_blocks * _COLUMN_ALIGNMENT - in_features


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
        num_columns = in_features + padding_columns(in_features, num_ranks)
        self.weight_OJ = weight.new_zeros(out_features, num_columns)
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
        current: list[int] = []
        if adapter is not None:
            current += map(id, adapter.lora_B.values())
        return copied == current and self.weight_OJ.data_ptr() == weight.data_ptr()


def fuse_lora_weight(linear: FusedLinear) -> FusedLoraWeight:
    """Fuse the frozen weight of a linear with its up-projections, on the first call."""
    weight = linear.weight
    assert isinstance(weight, nn.Parameter), f"cannot fuse a {type(weight).__name__}"
    adapter = linear.adapter if isinstance(linear.adapter, LoraLinear) else None
    fused = linear.fused_lora_weight
    if isinstance(fused, FusedLoraWeight) and fused.matches(weight, adapter):
        return fused
    new_fused = FusedLoraWeight(weight, adapter)
    linear.fused_lora_weight = new_fused
    return new_fused


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
        copies: list[tuple[Tensor, Tensor]] = []
        for linear in filter(is_lora_fusible, linears):
            copies += fuse_lora_weight(linear).copies
        if not copies:
            return
        key: list[int] = []
        for source, target in copies:
            key += [source.data_ptr(), target.data_ptr()]
        if key != self._key:
            self._key = key
            self._build_table(copies)
        lora_gemm_kernels.copy_matrices(self._table_P5, *self._max_shape, copies[0][0])

    def _build_table(self, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Build the operands of `copy_matrices` for pairs of a source and a target."""
        table: list[tuple[int, ...]] = []
        max_rows = max_ranks = 0
        for source, target in copies:
            num_rows, num_ranks = source.shape
            max_rows = max(max_rows, num_rows)
            max_ranks = max(max_ranks, num_ranks)
            addresses = source.data_ptr(), target.data_ptr()
            table.append((*addresses, num_rows, num_ranks, target.stride(0)))
        self._max_shape = max_rows, max_ranks
        self._table_P5 = copy_to_device(np.array(table, dtype=np.int64), copies[0][0].device)


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
        adapter = linear.adapter
        fused_weight_OJ: Tensor | None = None
        lora_A_SI: Tensor | None = None
        lora_Bs_OR: tuple[Tensor, ...] = ()
        dropout = SeededDropout(None, salt, p=0.0, scale=1.0)
        if isinstance(adapter, LoraLinear):
            p = adapter.dropout if adapter.training else 0.0
            assert p == 0.0 or dropout_seed_1 is not None, "dropout without a seed"
            scale = next(iter(adapter.slices.values())).scale
            if is_lora_fusible(linear):
                fused_weight_OJ = fuse_lora_weight(linear).weight_OJ
            lora_A_SI = adapter.lora_A
            lora_Bs_OR = tuple(adapter.lora_B.values())
            dropout = SeededDropout(dropout_seed_1, salt, p, scale / (1.0 - p))
        return cls(
            in_features=linear.in_features,
            num_layers=len(linear.output_sizes),
            weight=linear.weight,
            bias=linear.bias,
            fused_weight_OJ=fused_weight_OJ,
            lora_A_SI=lora_A_SI,
            lora_Bs_OR=lora_Bs_OR,
            dropout=dropout,
            row_range=linear.row_range,
        )

    @property
    def is_trainable(self) -> bool:
        return isinstance(self.weight, Tensor) and self.weight.requires_grad

    @property
    def padding(self) -> int:
        if self.fused_weight_OJ is None:
            return 0
        return self.fused_weight_OJ.shape[1] - self.in_features

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """Inputs of the autograd function: weight, bias, lora_A and lora_B of each layer."""
        weight: Tensor | None = None
        if isinstance(self.weight, Tensor) and self.weight.requires_grad:
            weight = self.weight
        bias: Tensor | None = None
        if self.bias is not None and self.bias.requires_grad:
            bias = self.bias
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
        low_TS = x_TI.new_empty(len(x_TI), len(self.lora_A_SI))
        scale = self.dropout.scale
        # With beta 0 the content of the buffer is not read.
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
        stop = self.in_features + num_ranks
        dx_TJ = dy_TO @ self.fused_weight_OJ
        return dx_TJ[:, : self.in_features], dx_TJ[:, self.in_features : stop]

    def lora_backward(self, dy_TO: Tensor) -> Tensor | None:
        grads = [dy @ lora_B_OR for dy, _, lora_B_OR in self._split_layers(dy_TO, None)]
        if not grads:
            return None
        return torch.cat(grads, 1)

    def _split_layers(
        self, y_TO: Tensor, low_TS: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield output columns, LoRA activations and up-projection of each layer with LoRA."""
        if not self.lora_Bs_OR:
            return
        output_sizes = list(map(len, self.lora_Bs_OR))
        ys = torch.split(y_TO, output_sizes, 1)
        lows = ys if low_TS is None else low_TS.chunk(len(self.lora_Bs_OR), 1)
        yield from zip(ys, lows, self.lora_Bs_OR, strict=True)

    def base_grads(self, dy_TO: Tensor, x_TI: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Compute the gradients of weight, dy^T x, and bias, the sum of dy."""
        weight, bias, *_ = self.parameters
        dw_OI: Tensor | None = None
        if weight is not None:
            assert x_TI is not None, "a trainable weight requires its saved input"
            # With a buffer, no second tensor of the size of the weight is allocated.
            buffer_OI = _GRADIENT_BUFFERS[-1](weight) if _GRADIENT_BUFFERS else None
            dw_OI = torch.mm(dy_TO.T, x_TI, out=buffer_OI)
        if bias is None:
            return dw_OI, None
        # Use a matmul: torch's sum over many rows needs more memory than the rows.
        ones_1T = dy_TO.new_ones(1, len(dy_TO))
        return dw_OI, (ones_1T @ dy_TO)[0]

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
        x = pad_rows(x_TJ[block], row_range.start)
        y = y_TO[block]
        added = bias
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
        matmul = LoraMatmul.from_linear(linear)
        is_added = index % 2 == 1
        weight_OJ = matmul._single_weight
        assert weight_OJ is not None, "cannot test quantized weights"
        key = weight_OJ.shape, matmul.bias is None, is_added
        if key not in known:
            known[key] = _find_row_range(weight_OJ, matmul.bias, is_added)
        linear.row_range = known[key]


def _find_row_range(weight_OJ: Tensor, bias: Tensor | None, is_added: bool) -> RowRange:
    step, max_rows = TESTED_ROWS
    num_outputs, num_columns = weight_OJ.shape
    x_TO = weight_OJ.new_empty(max_rows, num_outputs).normal_()
    x_TJ = weight_OJ.new_empty(max_rows, num_columns).normal_()

    def compute(count: int) -> Tensor:
        residual_TO = x_TO[:count] if is_added else None
        return multiply(x_TJ[:count], weight_OJ, bias, residual_TO, TESTED_ROWS)[:step]

    expected = compute(max_rows)
    min_rows = step
    for count in range(step, max_rows, step):
        if not torch.equal(compute(count), expected):
            min_rows = count + step
    if min_rows > MAX_PADDING:
        return FIXED_ROWS
    return RowRange(min_rows, max_rows)
