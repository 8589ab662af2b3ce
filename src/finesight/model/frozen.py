"""Matrices that never learn, kept in fewer bits: what the kinds of them (`nf4`, `int4`) share.

Shapes: O outputs, I inputs of one layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

STORED = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
"""The types of dense numbers by their name in the header of a safetensors file, and what a user
calls them."""


@dataclass(frozen=True)
class Piece:
    """A tensor that files hold of a matrix: its name after the layer's, its shape, the types that
    it may have, by their name in the header of a safetensors file, and what takes its values."""

    name: str
    shape: tuple[int, ...]
    types: tuple[str, ...]
    fill: Callable[[Tensor], None]


class FrozenMatrix(nn.Module, ABC):
    """A matrix [O, I] that is multiplied with, and made in full when that is needed."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.outputs, self.inputs = outputs, inputs

    @property
    def numbers(self) -> int:
        """Of the matrix that it stands for."""
        return self.outputs * self.inputs

    @property
    def device(self) -> torch.device:
        """Where the bits lie."""
        return next(self.buffers()).device

    @abstractmethod
    def pieces(self) -> tuple[Piece, ...]:
        """What it is read from."""

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix [O, I], made anew in bf16, fp16 or fp32."""

    @abstractmethod
    def few(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x W^T + bias without making the matrix, or None where that is not quicker."""

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, [..., I] to [..., O]; what goes back to `x` needs no matrix kept."""
        y: Tensor = _FrozenProduct.apply(x, bias, self)  # type: ignore[no-untyped-call]
        return y

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As `forward`, without a way back."""
        y = self.few(x, bias)
        return F.linear(x, self.dense(x.dtype), bias) if y is None else y


class _FrozenProduct(torch.autograd.Function):
    """x W^T + bias, whose backward pass makes W again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, matrix: FrozenMatrix) -> Tensor:
        ctx.matrix = matrix
        return matrix.product(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy @ ctx.matrix.dense(dy.dtype), None, None


class FrozenWeight(nn.Module):
    """The weight of a group of layers, a matrix for each, in place of the one tensor.

    `dtype` is what is computed in: that of the group's bias and adapter.
    """

    def __init__(self, matrices: Sequence[FrozenMatrix], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.layers = nn.ModuleList(matrices)

    @property
    def matrices(self) -> tuple[FrozenMatrix, ...]:
        """Of the group's layers, in order."""
        return tuple(layer for layer in self.layers if isinstance(layer, FrozenMatrix))

    @property
    def device(self) -> torch.device:
        """Where the bits lie."""
        return self.matrices[0].device

    @property
    def numbers(self) -> int:
        """Of all the matrices that it stands for."""
        return sum(matrix.numbers for matrix in self.matrices)

    def dense(self) -> Iterator[Tensor]:
        """Each layer's matrix [O, I], one at a time."""
        for matrix in self.matrices:
            yield matrix.dense(self.dtype)


def frozen_weights(model: nn.Module) -> dict[str, FrozenWeight]:
    """The weights in few bits by name: that which a parameter in their place would have."""
    return {path: m for path, m in model.named_modules() if isinstance(m, FrozenWeight)}
