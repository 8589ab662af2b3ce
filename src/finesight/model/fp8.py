"""Products of FP8 by FP8 with weights that never learn, while a model trains: twice the arithmetic
of 16 bits, on cards that have it (e4m3 of Micikevicius et al. 2022, arXiv:2209.05433).

Weights are in FP8 as in `model.rowwise`, a scale for each output. What is multiplied with them is
put into FP8 on the spot, a scale for each row: the layer's input and, on the way back, the
gradient of its outputs. A row hangs on no other row, so that a sample in a pack gives what it gives
alone. Gradients are in e4m3, too: e5m2 reaches farther with a bit less of each number, and a scale
for each row makes that reach idle.

Where nothing is learned (`eval()`), only weights are in FP8: what a run measures is what it answers
with later, and what `model.rowwise` says of prompts holds.

Shapes: T rows, O outputs of a group's layers side by side, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finesight.errors import UserError
from finesight.model.frozen import KERNELS, FrozenMatrix, FrozenWeight
from finesight.model.fused import has_kernels, quick_gelu
from finesight.model.rowwise import Fp8Matrix
from finesight.model.updates import Update

if KERNELS:
    from finesight.model.kernels import fp8 as fp8_kernels

MULTIPLE = 16
"""Of which inputs and each layer's outputs have to be multiples: what tensor cores take."""

KIND, MOST = Fp8Matrix.kind, Fp8Matrix.most
"""The type of codes, and the largest of them."""

LEAST = 1e-30
"""The largest magnitude that a row is taken to have at least: what it is divided by is finite."""


def refuse_device(device: torch.device, setting: str) -> None:
    """Raise UserError, naming the setting, for a card that does not multiply in FP8."""
    if device.type != "cuda":
        return
    able = torch.cuda.get_device_capability(device)
    if able < (8, 9):
        raise UserError(
            f"{torch.cuda.get_device_name(device)} has compute capability {able[0]}.{able[1]},"
            " and does not multiply in FP8",
            where=setting,
            expected="8.9 or newer (Ada, Hopper, Blackwell), or a CPU, which imitates it",
            remedy=f"leave {setting} out",
        )


class Rows(NamedTuple):
    """Numbers in FP8: `codes_TI` times `scales_T1`."""

    codes_TI: Tensor
    scales_T1: Tensor


def room_for(x_TI: Tensor) -> Rows:
    """Where these rows go in FP8."""
    scales_T1 = x_TI.new_empty(len(x_TI), 1, dtype=torch.float32)
    return Rows(x_TI.new_empty(x_TI.shape, dtype=KIND), scales_T1)


def quantised(x_TI: Tensor, by_I: Tensor | None = None) -> Rows:
    """The rows of x by_I in FP8: each number is off by a sixteenth of itself at most, or by 2^-10
    of the row's scale, whichever is more. A row with a number that is not finite has NaN."""
    if KERNELS and x_TI.is_cuda:
        return Rows(*fp8_kernels.quantised(x_TI, by_I, KIND, MOST, LEAST))
    wide_TI = x_TI.float() if by_I is None else x_TI * by_I
    largest_T1 = wide_TI.abs().amax(1, keepdim=True).clamp_min(LEAST)
    return Rows((wide_TI * (MOST / largest_T1)).to(KIND), largest_T1 / MOST)


def quantised_gelu(x_TI: Tensor) -> Rows:
    """The rows of `quick_gelu` of x in FP8, by one kernel where there are kernels."""
    if has_kernels(x_TI):
        return Rows(*fp8_kernels.quantised(x_TI, None, KIND, MOST, LEAST, gelu=True))
    return quantised(quick_gelu(x_TI))


def multiplied(
    x: Rows, w_OI: Tensor, scales_O: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x W^T + bias [T, O] for W of codes and a scale for each output, summed in fp32."""
    if not len(x.codes_TI):
        return w_OI.new_empty(0, len(w_OI), dtype=dtype)
    # With a scale for each row, not all cards give more than bf16.
    given = torch.bfloat16 if w_OI.is_cuda or dtype == torch.bfloat16 else torch.float32
    y_TO = torch._scaled_mm(
        x.codes_TI,
        w_OI.t(),
        scale_a=x.scales_T1,
        scale_b=scales_O.unsqueeze(0),
        bias=None if bias_O is None else bias_O.to(given),
        out_dtype=given,
        use_fast_accum=w_OI.is_cuda,
    )
    return y_TO.to(dtype)


class _Side(NamedTuple):
    """A matrix as one of the two products reads it, and a scale for each of its rows."""

    codes: Tensor
    scales: Tensor


class Fp8Weight(FrozenWeight):
    """The weight of a group that is multiplied in FP8 while the model trains.

    The way back is dy W = (dy s) C for W = s C with the scales s of the outputs: the very codes of
    the way forth, which cards want laid out the other way. That second copy is made by the first
    way back, so that a layer without one, as of a frozen tower, never holds it.
    """

    def __init__(self, matrices: Sequence[FrozenMatrix], dtype: torch.dtype) -> None:
        super().__init__(matrices, dtype)
        self._forth: _Side | None = None
        self._back: _Side | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Weight:
        # Wherever the codes go, what was made of them stays behind.
        self._forth = self._back = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def _layers(self) -> list[Fp8Matrix]:
        return [layer for layer in self.layers if isinstance(layer, Fp8Matrix)]

    def _joined(self) -> _Side:
        """All layers' codes and scales, of which each layer's become a stretch."""
        if self._forth is None:
            layers = self._layers
            whole = _Side(
                _end_to_end([layer.codes_OI for layer in layers], 0),
                _end_to_end([layer.scales_O for layer in layers], 0),
            )
            widths = [layer.outputs for layer in layers]
            stretches = (torch.split(side, widths) for side in whole)
            for layer, codes_OI, scales_O in zip(layers, *stretches, strict=True):
                layer.codes_OI, layer.scales_O = codes_OI, scales_O
            self._forth = whole
        return self._forth

    def _turned(self) -> _Side:
        """The codes [I, O], scaled by nothing any more."""
        if self._back is None:
            codes_IO = self._joined().codes.t().contiguous()
            self._back = _Side(codes_IO, codes_IO.new_ones(len(codes_IO), dtype=torch.float32))
        return self._back

    def products(self, x: Tensor | Rows, bias: Tensor | None) -> tuple[Tensor, ...]:
        """x W_i^T + bias_i of each layer, [..., I] to [..., O] each, with a way back where `x` is
        not in FP8 yet."""
        if isinstance(x, Rows):
            return self.each(x, bias)
        if not self.training:
            return super().products(x, bias)
        x_TI = x.reshape(-1, x.shape[-1])
        ys_TO = _Products.apply(x_TI, bias, self)  # type: ignore[no-untyped-call]
        return tuple(y_TO.view(*x.shape[:-1], y_TO.shape[1]) for y_TO in ys_TO)

    def each(self, x_TI: Tensor | Rows, bias: Tensor | None) -> tuple[Tensor, ...]:
        """x W_i^T + bias_i of each layer in FP8, without a way back."""
        return self._each(*self._read(x_TI), bias)

    def _each(self, rows: Rows, dtype: torch.dtype, bias: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(
            multiplied(rows, layer.codes_OI, layer.scales_O, some, dtype)
            for layer, some in zip(self._layers, self.split(bias), strict=True)
        )

    def updated(
        self, x_TI: Tensor, bias: Tensor | None, updates: Sequence[Update]
    ) -> tuple[Tensor, ...]:
        """x W_i^T + bias_i of each layer in FP8 with its update, summed in fp32 by a processor;
        without a way back."""
        ys_TO = self._each(quantised(x_TI), torch.float32, bias)
        for number, low_TR, b_OR, scale in updates:
            ys_TO[number].addmm_(low_TR.float(), b_OR.float().T, alpha=scale)
        return tuple(y_TO.to(x_TI.dtype) for y_TO in ys_TO)

    def joint(self, x_TI: Tensor | Rows, bias: Tensor | None) -> Tensor:
        """x W^T + bias of all layers side by side, without a way back."""
        if not (self.training or isinstance(x_TI, Rows)):
            return super().joint(x_TI, bias)
        rows, dtype = self._read(x_TI)
        return multiplied(rows, *self._joined(), bias, dtype)

    def _read(self, x_TI: Tensor | Rows) -> tuple[Rows, torch.dtype]:
        """An input in FP8, and the type of what is made of it."""
        if isinstance(x_TI, Rows):
            return x_TI, self.dtype
        return quantised(x_TI), x_TI.dtype

    def joint_back(self, dy_TO: Tensor) -> Tensor:
        """dy W for the gradients of all layers side by side."""
        if not self.training:
            return super().joint_back(dy_TO)
        rows = quantised(dy_TO, self._joined().scales)
        return multiplied(rows, *self._turned(), None, dy_TO.dtype)

    def add_back(self, dx_TI: Tensor, dys_TO: Sequence[Tensor]) -> None:
        """Add the sum of dy_i W_i, what goes back from each layer, to `dx`."""
        if not self.training:
            super().add_back(dx_TI, dys_TO)
            return
        dx_TI.add_(self.joint_back(_end_to_end(dys_TO, 1)))


def takes_rows(weight: Tensor | FrozenWeight) -> bool:
    """Whether an input of this weight may be in FP8 already: it would be put into it anyway."""
    return isinstance(weight, Fp8Weight) and weight.training


def _end_to_end(tensors: Sequence[Tensor], along: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), along)


class _Products(torch.autograd.Function):
    """x W_i^T + bias_i for the layers of a group, of which nothing has to be kept."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, bias_O: Tensor | None, weight: Fp8Weight
    ) -> tuple[Tensor, ...]:
        ctx.weight = weight
        return weight.each(x_TI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys_TO: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.weight.joint_back(_end_to_end(dys_TO, 1)), None, None
