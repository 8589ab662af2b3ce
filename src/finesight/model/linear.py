"""Linear layers that read the same input, with one weight and room for an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.model.fp8 import Fp8Weight, Rows, takes_rows
from finesight.model.frozen import FrozenMatrix, FrozenWeight
from finesight.model.updates import Update, add_update, updated_product


def only(outputs: tuple[Tensor, ...]) -> Tensor:
    """The output of a group of one layer."""
    (y,) = outputs
    return y


class GroupedLinear(nn.Module):
    """One or more linear layers of the same input, stacked along their outputs.

    `outputs` maps the last piece of each layer's hub name to its width, in order: a group of
    q_proj, k_proj and v_proj holds one weight of shape [sum(outputs), inputs]. A layer alone has
    its own name as the module's. `adapter` is set by `model.lora`; it computes the
    group's product together with its low-rank updates. A weight that never learns may be in few
    bits.
    """

    weight: nn.Parameter | FrozenWeight

    def __init__(self, inputs: int, outputs: Mapping[str, int], *, bias: bool) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, dict(outputs)
        width = sum(self.outputs.values())
        self.weight = nn.Parameter(torch.empty(width, inputs))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.adapter: nn.Module | None = None
        self.joined: object = None
        """What `model.joined` has made of the weight."""
        self.apart = False
        """Whether the weight comes and goes, so that nothing may lie beside it."""

    def freeze_as(
        self,
        kind: Callable[[int, int], FrozenMatrix],
        together: type[FrozenWeight] = FrozenWeight,
    ) -> None:
        """Room for matrices of this kind, made of outputs and inputs, in place of the weight, whose
        numbers are lost; its type stays that of the computation. `together` is what they make up.
        """
        matrices = [kind(width, self.inputs) for width in self.outputs.values()]
        self._replace(together(matrices, self.weight.dtype))

    @torch.no_grad()
    def thaw(self) -> None:
        """The dense numbers of a frozen weight in its place."""
        if isinstance(self.weight, FrozenWeight):
            self._replace(nn.Parameter(torch.cat(list(self.weight.dense()))))

    def _replace(self, weight: nn.Parameter | FrozenWeight) -> None:
        # Where a module was made with a parameter, torch refuses another kind of thing.
        del self.weight
        self.weight = weight

    @property
    def takes_rows(self) -> bool:
        """Whether its input may be in FP8 already: no adapter reads it, nothing goes back to it."""
        return self.adapter is None and not torch.is_grad_enabled() and takes_rows(self.weight)

    def forward(self, x: Tensor | Rows) -> tuple[Tensor, ...]:
        """[..., inputs] to one [..., width] for each layer of the group."""
        if self.adapter is not None:
            return tuple(self.adapter(x, self.weight, self.bias))
        return products(x, self.weight, self.bias, tuple(self.outputs.values()))


def products(
    x: Tensor | Rows, weight: Tensor | FrozenWeight, bias: Tensor | None, widths: Sequence[int]
) -> tuple[Tensor, ...]:
    """x W_i^T + bias_i for the layers of a group, [..., inputs] to [..., width] each.

    Layer by layer, so that each output lies in one piece: what follows reads it several times as
    fast as a slice of a joint product, whose gradients would have to be joined on the way back.
    """
    if isinstance(weight, Fp8Weight):
        return weight.products(x, bias)
    x = _not_in_fp8(x)
    if isinstance(weight, FrozenWeight):
        return weight.products(x, bias)
    if len(widths) == 1:
        return (F.linear(x, weight, bias),)
    biases = [None] * len(widths) if bias is None else torch.split(bias, list(widths))
    weights = torch.split(weight, list(widths))
    return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))


def updated_products(
    x_TI: Tensor,
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    widths: Sequence[int],
    updates: Sequence[Update],
) -> tuple[Tensor, ...]:
    """`products` and the updates of some layers, without a way back: on a card product by product,
    on a processor updates first."""
    if x_TI.is_cuda:
        ys_TO = products(x_TI, weight, bias, widths)
        for layer, low_TR, b_OR, scale in updates:
            add_update(ys_TO[layer], low_TR, b_OR, scale)
        return ys_TO
    if isinstance(weight, Fp8Weight) and weight.training:
        return weight.updated(x_TI, bias, updates)
    of = {update.layer: update for update in updates}
    biases = [None] * len(widths) if bias is None else torch.split(bias, list(widths))
    weights = torch.split(weight, list(widths)) if isinstance(weight, Tensor) else weight.dense()
    return tuple(
        updated_product(of[layer], x_TI, w, b) if layer in of else F.linear(x_TI, w, b)
        for layer, (w, b) in enumerate(zip(weights, biases, strict=True))
    )


def add_products_back(
    dx_TI: Tensor, dys_TO: Sequence[Tensor], weight: Tensor | FrozenWeight
) -> None:
    """Add the gradient by `x` of `products`, the sum of dy_i W_i, to `dx`."""
    if isinstance(weight, FrozenWeight):
        weight.add_back(dx_TI, dys_TO)
        return
    weights = torch.split(weight, [dy_TO.shape[1] for dy_TO in dys_TO])
    for dy_TO, w_OI in zip(dys_TO, weights, strict=True):
        dx_TI.addmm_(dy_TO, w_OI)


def _not_in_fp8(x: Tensor | Rows) -> Tensor:
    assert isinstance(x, Tensor), "an input in FP8 for a weight that is not"
    return x


def joint_product(x: Tensor | Rows, weight: Tensor | FrozenWeight, bias: Tensor | None) -> Tensor:
    """x W^T + bias of all layers of a group side by side, [T, inputs] to [T, sum of widths]."""
    if isinstance(weight, Fp8Weight):
        return weight.joint(x, bias)
    x = _not_in_fp8(x)
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else weight.joint(x, bias)


def joint_product_back(dy: Tensor, weight: Tensor | FrozenWeight) -> Tensor:
    """dy W: the gradient by `x` of `joint_product`."""
    return dy @ weight if isinstance(weight, Tensor) else weight.joint_back(dy)
