"""Matrices that never learn, kept in fewer bits: what the kinds of them (`nf4`, `int4`, `rowwise`)
share.

Shapes: O outputs, I inputs of one layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

STORED = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
"""The types of dense numbers by their name in the header of a safetensors file, and what a user
calls them."""

KERNELS = find_spec("triton") is not None
"""Whether there is what kernels are written in."""

ROWS, TILE_ROWS = 8, 64
"""Most rows that are multiplied one by one, and most that are multiplied by tensor cores, without
making the matrix."""

AT_ONCE = 1 << 22
"""Numbers that are held at once in fp32 while a matrix is quantised, or made without a kernel."""


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
    def fits(self) -> bool:
        """Whether there are kernels for a matrix of this size on this device."""

    @abstractmethod
    def rows(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias [R, O] by a kernel that takes a row at a time."""

    @abstractmethod
    def tiles(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias [R, O] by a kernel that takes all rows at once, of 16 bits each number."""

    def _whole(self, fill: Callable[[Tensor], None]) -> tuple[Piece, ...]:
        """Of a matrix that is quantised here: the dense one."""
        return (Piece("weight", (self.outputs, self.inputs), tuple(STORED), fill),)

    def _check_whole(self, values_OI: Tensor) -> None:
        found = tuple(values_OI.shape)
        assert found == (self.outputs, self.inputs), f"{found}, not {self.outputs, self.inputs}"

    def few(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x W^T + bias without making the matrix, or None where there are too many rows for it."""
        number = x.numel() // self.inputs
        if not (x.is_cuda and self.fits()) or not 0 < number <= TILE_ROWS:
            return None
        tiled = number > 1 and has_tensor_cores(x.dtype, x.device)
        if not tiled and number > ROWS:
            return None
        x_RI = x.reshape(number, self.inputs).contiguous()
        y_RO = self.tiles(x_RI, bias) if tiled else self.rows(x_RI, bias)
        return y_RO.view(*x.shape[:-1], self.outputs)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, [..., I] to [..., O]; what goes back to `x` needs no matrix kept."""
        y: Tensor = _FrozenProduct.apply(x, bias, self)  # type: ignore[no-untyped-call]
        return y

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As `forward`, without a way back."""
        y = self.few(x, bias)
        return F.linear(x, self.dense(x.dtype), bias) if y is None else y


@lru_cache
def has_tensor_cores(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device multiplies such numbers in the units that Triton and flash attention use:
    16-bit numbers on a card of compute capability 8.0 or newer."""
    narrow = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return narrow and torch.cuda.get_device_capability(device) >= (8, 0)


class DenseSource(FrozenMatrix):
    """A matrix that is quantised here, from the dense one that files hold, some outputs at a time.

    Each takes its numbers from its own inputs alone.
    """

    def pieces(self) -> tuple[Piece, ...]:
        """The dense matrix."""
        return self._whole(self.fill)

    @torch.no_grad()
    def fill(self, values_OI: Tensor) -> None:
        """Quantise a matrix, on the device where the bits will lie."""
        self._check_whole(values_OI)
        for some in self._slices():
            self.take(some, values_OI[some].to(self.device).float())

    @abstractmethod
    def take(self, some: slice, values_RI: Tensor) -> None:
        """Quantise these outputs, [R, I] in fp32."""

    @abstractmethod
    def values(self, some: slice) -> Tensor:
        """What the codes of these outputs stand for, [R, I] in fp32."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix [O, I], made anew, each number rounded once."""
        w_OI = torch.empty(self.outputs, self.inputs, dtype=dtype, device=self.device)
        for some in self._slices():
            w_OI[some] = self.values(some).to(dtype)
        return w_OI

    def _slices(self) -> Iterator[slice]:
        step = max(1, AT_ONCE // self.inputs)
        return (slice(at, at + step) for at in range(0, self.outputs, step))


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

    def whole(self) -> Tensor:
        """All layers' matrices, one under the other."""
        dense = [*self.dense()]
        return dense[0] if len(dense) == 1 else torch.cat(dense)

    def dense(self) -> Iterator[Tensor]:
        """Each layer's matrix [O, I], one at a time."""
        for matrix in self.matrices:
            yield matrix.dense(self.dtype)

    def products(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """x W_i^T + bias_i of each layer, [..., I] to [..., O] each, with a way back."""
        pairs = zip(self.matrices, self.split(bias), strict=True)
        return tuple(matrix(x, some) for matrix, some in pairs)

    def add_back(self, dx_TI: Tensor, dys_TO: Sequence[Tensor]) -> None:
        """Add the sum of dy_i W_i, what goes back from each layer, to `dx`."""
        for dy_TO, w_OI in zip(dys_TO, self.dense(), strict=True):
            dx_TI.addmm_(dy_TO, w_OI)

    def joint(self, x_TI: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias of all layers side by side, without a way back."""
        return F.linear(x_TI, self.whole(), bias)

    def joint_back(self, dy_TO: Tensor) -> Tensor:
        """dy W for the gradients of all layers side by side."""
        return dy_TO @ self.whole()

    def split(self, bias: Tensor | None) -> Sequence[Tensor | None]:
        """Each layer's stretch of a bias."""
        widths = [matrix.outputs for matrix in self.matrices]
        return [None] * len(widths) if bias is None else torch.split(bias, widths)


def frozen_weights(model: nn.Module) -> dict[str, FrozenWeight]:
    """The weights in few bits by name: that which a parameter in their place would have."""
    return {path: m for path, m in model.named_modules() if isinstance(m, FrozenWeight)}
