"""What adapters add to products, and how nothing of it is lost in the sum's last digit.

Added to a product that is rounded to bf16 already, what is smaller than half of the product's last
digit is lost if the sum is rounded to the nearest: of updates of 1/4,000 of it six sevenths. One
product of both (`model.joined`) is summed up in fp32 and rounded once. Elsewhere:

A processor sums up in fp32 what it adds to a tensor, and rounds once: there an update comes first,
and the product is added to it; a bias is added last, and the sum rounded again. A card may round a
product before it adds it (cuBLAS on Hopper does): there the product comes first, and its sum with
an update is rounded up or down by chance, so that on average all of the update is left.

Shapes: T rows, I inputs, O outputs of one layer, R its rank.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from finesight.model.frozen import KERNELS, has_tensor_cores

if KERNELS:
    from finesight.model.kernels import lora as lora_kernels


class Update(NamedTuple):
    """That of one of a group's layers: scale low B^T."""

    layer: int
    low_TR: Tensor
    b_OR: Tensor
    scale: float


def updated_product(update: Update, x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + bias and the update [T, O], as processors add it."""
    _, low_TR, b_OR, scale = update
    y_TO = x_TI.new_empty(len(x_TI), len(w_OI))
    # With beta 0 what is there is not read.
    y_TO.addmm_(low_TR, b_OR.T, beta=0, alpha=scale).addmm_(x_TI, w_OI.T)
    return y_TO if bias_O is None else y_TO.add_(bias_O)


def add_update(y_TO: Tensor, low_TR: Tensor, b_OR: Tensor, scale: float = 1.0) -> Tensor:
    """A product plus scale low B^T, in its place, as cards add it: by chance where the kernel runs,
    else rounded to the nearest."""
    if KERNELS and has_tensor_cores(y_TO.dtype, y_TO.device):
        lora_kernels.raised(y_TO, low_TR, b_OR, scale)
        return y_TO
    return y_TO.addmm_(low_TR, b_OR.T, alpha=scale)
