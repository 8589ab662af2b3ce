"""Gradient accumulation over the micro-batches of a step.

A single micro-batch uses `parameter.grad` directly. Several micro-batches are accumulated in fp32.

Shapes: E flat elements of a parameter group, N elements of a slice.
"""

from __future__ import annotations

import math
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from finesight.model.quant.base import HAS_TRITON
from finesight.train import kernels

LARGE_PARAM_ELEMENTS = 1 << 20
"""Number of elements from which a parameter's gradient is accumulated by an autograd hook.

CUDA graphs write the gradients of these parameters to static buffers (`train.graph_buffers`).
"""


class MatrixSlice(NamedTuple):
    """Elements of a matrix in the flat buffer of its parameter group, and its shape."""

    flat_slice: slice
    num_rows: int
    num_columns: int


@dataclass(frozen=True)
class ParamSlice:
    """Parameter and its location in the flat buffer of its parameter group."""

    name: str
    parameter: nn.Parameter
    flat_slice: slice

    def view(self, flat_E: Tensor) -> Tensor:
        """Return the view of a flat group tensor [E] that belongs to this parameter."""
        return flat_E[self.flat_slice].view(self.parameter.shape)

    @property
    def matrix_rows(self) -> Sequence[int]:
        """Number of rows of each matrix in the parameter.

        Stacked MoE experts are several matrices.
        """
        *batch_shape, rows, _ = self.parameter.shape
        return (rows,) * math.prod(batch_shape)

    def split_matrices(self, row_counts: Sequence[int]) -> Iterator[MatrixSlice]:
        """Split the parameter into matrices with the given row counts."""
        columns, start = self.parameter.shape[-1], self.flat_slice.start
        message = f"{row_counts} rows of {columns} in {self.parameter.shape}"
        assert sum(row_counts) * columns == self.parameter.numel(), message
        for num_rows in row_counts:
            yield MatrixSlice(slice(start, start + num_rows * columns), num_rows, columns)
            start += num_rows * columns


class GradientAccumulator:
    """Gradient accumulator of one parameter group.

    The gradients of the first micro-batch stay in `parameter.grad` in the dtype of the parameter.
    `accumulate` adds them to fp32 sums before each further micro-batch. The sum of a parameter is
    allocated on first use and then retained. Once it exists, an autograd hook adds the gradient of
    a large parameter as soon as it is computed, so the gradients of all large parameters never
    exist in addition to their sums.

    Args:
        param_slices: Parameters of the group.
        length: Number of elements of the flat buffers of the group, including padding.
    """

    def __init__(self, param_slices: Sequence[ParamSlice], length: int) -> None:
        self.param_slices, self.device = param_slices, param_slices[0].parameter.device
        self._length, self._starts = (
            length,
            [param_slice.flat_slice.start for param_slice in param_slices],
        )
        self._flat_E: Tensor | None = None
        self.sums: list[Tensor | None] = [None] * len(param_slices)
        # Whether the sum contains a gradient of this step.
        self._has_sum = [False] * len(param_slices)
        self._large_indices = [
            n for n, p in enumerate(param_slices) if p.parameter.numel() >= LARGE_PARAM_ELEMENTS
        ]
        self._small_indices = [
            n for n, p in enumerate(param_slices) if p.parameter.numel() < LARGE_PARAM_ELEMENTS
        ]
        use_kernels = HAS_TRITON and self.device.type == "cuda"
        flat_slices = [param_slice.flat_slice for param_slice in param_slices]
        self.tiles = kernels.ParamTiles(flat_slices, self.device) if use_kernels else None
        small_slices = [flat_slices[n] for n in self._small_indices]
        self._small_tiles = (
            kernels.ParamTiles(small_slices, self.device) if use_kernels and small_slices else None
        )
        for index in self._large_indices:
            self._register_hook(index)

    def _register_hook(self, index: int) -> None:
        parameter = self.param_slices[index].parameter
        register: Callable[..., object] = parameter.register_post_accumulate_grad_hook
        # A weak reference: the garbage collector cannot see hooks of a parameter.
        accumulator_ref = weakref.ref(self)

        def accumulate_hook(parameter: Tensor) -> None:
            accumulator = accumulator_ref()
            if accumulator is not None and accumulator.sums[index] is not None:
                accumulator._accumulate_one(index)

        register(accumulate_hook)

    def _accumulate_one(self, index: int) -> None:
        parameter, sum_ = self.param_slices[index].parameter, self._get_sum(index)
        assert parameter.grad is not None, f"no gradient for {self.param_slices[index].name}"
        if self._has_sum[index]:
            sum_.add_(parameter.grad)
        else:
            sum_.copy_(parameter.grad)
        self._has_sum[index], parameter.grad = True, None

    def _get_sum(self, index: int) -> Tensor:
        sum_ = self.sums[index]
        if sum_ is None:
            parameter = self.param_slices[index].parameter
            sum_ = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
            self.sums[index] = sum_
        return sum_

    def use_flat_buffer(self) -> None:
        """Store the fp32 gradient sums in one flat tensor, even for one micro-batch.

        `flat_gradient` and `all_reduce` require it.
        """
        if self._flat_E is not None:
            return
        self._flat_E = torch.zeros(self._length, dtype=torch.float32, device=self.device)
        self.sums = [param_slice.view(self._flat_E) for param_slice in self.param_slices]

    @torch.no_grad()
    def flat_gradient(self) -> Tensor:
        """Return the accumulated gradients of the group as a flat fp32 tensor [E].

        Parameters without a gradient contain zeros. Every call returns the same tensor, and the
        caller may overwrite it.
        """
        assert self._flat_E is not None, f"{len(self.param_slices)} sums are not in a flat buffer"
        self.accumulate()
        for sum_, has_sum in zip(self.sums, self._has_sum, strict=True):
            if sum_ is not None and not has_sum:
                sum_.zero_()
        return self._flat_E

    @torch.no_grad()
    def all_reduce(self, reduce_fn: Callable[[Tensor], object]) -> None:
        """Reduce the flat gradient of the group over all ranks; requires `use_flat_buffer`.

        Args:
            reduce_fn: Function that reduces a tensor over all ranks in-place.
        """
        reduce_fn(self.flat_gradient())
        self._has_sum = [True] * len(self.param_slices)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients in `parameter.grad` to the fp32 sums, and clear them.

        Call this between two micro-batches. Otherwise, autograd adds the next gradient in 16 bits.
        """
        for index in self._large_indices:
            if self.param_slices[index].parameter.grad is not None:
                self._accumulate_one(index)
        small = [n for n in self._small_indices if self.param_slices[n].parameter.grad is not None]
        if self._small_tiles is not None and small:
            kernels.accumulate_gradients(
                self._small_tiles,
                [self.param_slices[n].parameter.grad for n in self._small_indices],
                [self._get_sum(n) for n in self._small_indices],
                [self._has_sum[n] for n in self._small_indices],
            )
            for index in small:
                self._has_sum[index], self.param_slices[index].parameter.grad = True, None
        else:
            for index in small:
                self._accumulate_one(index)

    def per_parameter(self) -> Sequence[Tensor | None]:
        """Return the gradient of each parameter; None for a parameter without a gradient."""
        if self._flat_E is not None or any(self._has_sum):
            self.accumulate()
            return [
                s if has_sum else None for s, has_sum in zip(self.sums, self._has_sum, strict=True)
            ]
        return [param_slice.parameter.grad for param_slice in self.param_slices]

    def squared_norm(self) -> Tensor:
        """Return the sum of squares of all gradients.

        The result is a scalar on the device, in fp32 or wider.
        """
        all_gradients = self.per_parameter()
        present = [gradient for gradient in all_gradients if gradient is not None]
        if not present:
            return torch.zeros((), device=self.device)
        if self.tiles is not None:
            return kernels.squared_norm(self.tiles, all_gradients)
        norms = torch._foreach_norm(
            present, 2, torch.promote_types(present[0].dtype, torch.float32)
        )
        return torch.stack(norms).square_().sum()

    def read_slice(self, flat_slice: slice) -> Tensor:
        """Copy a slice of the group's flattened gradients to fp32.

        Parameters without a gradient contribute zeros. Returns a tensor of shape [N].
        """
        flat_N = torch.zeros(
            flat_slice.stop - flat_slice.start, dtype=torch.float32, device=self.device
        )
        targets, sources = [], []
        first = max(0, bisect_right(self._starts, flat_slice.start) - 1)
        for index in range(first, bisect_left(self._starts, flat_slice.stop)):
            param_range = self.param_slices[index].flat_slice
            start, stop = (
                max(param_range.start, flat_slice.start),
                min(param_range.stop, flat_slice.stop),
            )
            param_grad = self.param_slices[index].parameter.grad
            gradient = self.sums[index] if self._has_sum[index] else param_grad
            if start < stop and gradient is not None:
                targets.append(flat_N[start - flat_slice.start : stop - flat_slice.start])
                sources.append(
                    gradient.view(-1)[start - param_range.start : stop - param_range.start]
                )
        if targets:
            torch._foreach_copy_(targets, sources)
        return flat_N

    def zero_grad(self) -> None:
        """Clear the gradients after an optimizer step; the allocated sums are retained."""
        self._has_sum = [False] * len(self.param_slices)
        for param_slice in self.param_slices:
            param_slice.parameter.grad = None

    def release(self) -> None:
        """Clear the gradients of an aborted step and free the fp32 sums.

        A retry of the step then has the same memory available as the first attempt.
        """
        self.zero_grad()
        if self._flat_E is None:
            self.sums = [None] * len(self.param_slices)
