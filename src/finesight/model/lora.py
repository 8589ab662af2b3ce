"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) of groups of linear layers.

Legend of the shape suffixes: T rows (tokens or patches), I inputs, O outputs of one layer,
R rank of one layer, S ranks of a whole group end to end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finesight.model.frozen import FrozenWeight
from finesight.model.fused import drop, dropped_product
from finesight.model.joined import Beside
from finesight.model.linear import GroupedLinear, add_products_back, updated_products
from finesight.model.updates import Update


@dataclass(frozen=True)
class LowRank:
    """The update of one layer is `scale * B A`, with `scale = alpha / rank`."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """The factor of the update."""
        return self.alpha / self.rank


class Band(NamedTuple):
    """Where one adapted layer lies: columns of the group's output, rows of the stacked A."""

    output: int
    columns: slice
    rows: slice
    scale: float


class Factors(NamedTuple):
    """The two matrices of one layer's update: A [rank, inputs] and B [outputs, rank]."""

    a: Tensor
    b: Tensor


class Layout(NamedTuple):
    """The widths of all layers of a group, and the bands of those that are adapted."""

    widths: tuple[int, ...]
    bands: tuple[Band, ...]


class LoraGroup(nn.Module):
    """The adapter of a `GroupedLinear`, of all its layers or some of them.

    `a` stacks the down-projections of the adapted layers, [sum of ranks, inputs], so that the
    group's input is read once; `b` holds one up-projection [outputs, rank] for each. In training
    the input is dropped out once for the group: q_proj, k_proj and v_proj share their mask,
    where peft draws one each. The base weight has to be frozen.
    """

    def __init__(
        self,
        group: GroupedLinear,
        layers: Mapping[str, LowRank],
        dropout: float,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert layers, "an adapter without layers"
        unknown = [name for name in layers if name not in group.outputs]
        assert not unknown, f"no layer {unknown} in the group {list(group.outputs)}"
        # The group's own order, whatever order the layers were named in.
        self.layers = {name: layers[name] for name in group.outputs if name in layers}
        self.dropout = dropout
        kind, device = dtype or group.weight.dtype, group.weight.device
        rank_sum = sum(low.rank for low in self.layers.values())
        self.a = nn.Parameter(torch.zeros(rank_sum, group.inputs, dtype=kind, device=device))
        # One by one: given a dict, ParameterDict sorts the names.
        self.b = nn.ParameterDict()
        for name, low in self.layers.items():
            shape = group.outputs[name], low.rank
            self.b[name] = nn.Parameter(torch.zeros(shape, dtype=kind, device=device))
        self.bands = self._lay_out(group.outputs)
        self._layout = Layout(tuple(group.outputs.values()), tuple(self.bands.values()))

    def _lay_out(self, outputs: Mapping[str, int]) -> dict[str, Band]:
        bands, column, row = {}, 0, 0
        for index, (name, width) in enumerate(outputs.items()):
            if name in self.layers:
                low = self.layers[name]
                columns, rows = slice(column, column + width), slice(row, row + low.rank)
                bands[name] = Band(index, columns, rows, low.scale)
                row += low.rank
            column += width
        return bands

    def forward(
        self, x: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        """[..., I] to one [..., O] for each layer of the group, the base product included."""
        trained = isinstance(weight, Tensor) and weight.requires_grad
        assert not trained, "the base of an adapter is trained as well"
        dropout = self.dropout if self.training else 0.0
        outputs = _AdaptedProduct.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.shape[-1]),
            weight,
            bias,
            self.a,
            self._layout,
            dropout,
            *(self.b[name] for name in self.bands),
        )
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    def beside(self) -> list[Beside]:
        """The up-projections as `model.joined` takes them."""
        bands = self.bands.items()
        return [Beside(self.b[name], band.columns, band.rows) for name, band in bands]

    def factors(self) -> dict[str, Factors]:
        """A (a view of the stacked one) and B of each adapted layer."""
        return {name: Factors(self.a[band.rows], self.b[name]) for name, band in self.bands.items()}

    @torch.no_grad()
    def start(self, seed: int, path: str) -> None:
        """A from the uniform distribution on +-1/sqrt(I), B zero, as LoRA and peft start.

        The draw depends on the seed and on the layer's hub name alone (the group is at `path`),
        and is made in fp32 on the CPU: it is the same for any dtype and device, and whatever
        else is adapted.
        """
        for name, (a_RI, b_OR) in self.factors().items():
            generator = torch.Generator().manual_seed(_seed_of(seed, hub_name(path, name)))
            bound = a_RI.shape[1] ** -0.5
            drawn = torch.empty(a_RI.shape).uniform_(-bound, bound, generator=generator)
            a_RI.copy_(drawn)
            b_OR.zero_()


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class _AdaptedProduct(torch.autograd.Function):
    """y_i = x W_i^T + bias_i + scale_i drop(x) A_i^T B_i^T for the layers i of a group.

    One node for base and update: one is added into the other in place, forwards and
    backwards, so that neither the outputs nor the gradient of the input are copied; and the
    outputs' gradients come in one by one, so that they need not be joined first. W in few bits is
    made anew for the way back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight: Tensor | FrozenWeight,
        bias_O: Tensor | None,
        a_SI: Tensor,
        layout: Layout,
        dropout: float,
        *bs_OR: Tensor,
    ) -> tuple[Tensor, ...]:
        whole_TI, dropped = x_TI, None
        if dropout > 0.0:
            x_TI, dropped = drop(x_TI.contiguous(), dropout)
        low_TS = F.linear(x_TI, a_SI)
        updates = [
            Update(band.output, low_TS[:, band.rows], b_OR, band.scale)
            for band, b_OR in zip(layout.bands, bs_OR, strict=True)
        ]
        ys_TO = updated_products(whole_TI, weight, bias_O, layout.widths, updates)
        ctx.save_for_backward(x_TI, dropped, low_TS, a_SI, *bs_OR)
        # The weight is frozen: nothing changes it until the way back.
        ctx.weight, ctx.layout, ctx.dropout = weight, layout, dropout
        return ys_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, dropped, low_TS, a_SI, *bs_OR = ctx.saved_tensors
        needs_x, _, _, needs_a, _, _, *needs_b = ctx.needs_input_grad
        dlow_TS = torch.empty_like(low_TS)
        dbs_OR: list[Tensor | None] = []
        for band, b_OR, needed in zip(ctx.layout.bands, bs_OR, needs_b, strict=True):
            dy_TO = dys_TO[band.output]
            # With beta 0 the first operand only gives the place, its content is not read.
            dlow_TS[:, band.rows].addmm_(dy_TO, b_OR, beta=0, alpha=band.scale)
            low_TR = low_TS[:, band.rows]
            db_OR = torch.addmm(b_OR, dy_TO.T, low_TR, beta=0, alpha=band.scale) if needed else None
            dbs_OR.append(db_OR)
        da_SI = dlow_TS.T @ x_TI if needs_a else None
        dx_TI: Tensor | None = None
        if needs_x:
            if dropped is None:
                dx_TI = dlow_TS @ a_SI
            else:
                dx_TI = dropped_product(dlow_TS, a_SI, dropped, ctx.dropout)
            add_products_back(dx_TI, dys_TO, ctx.weight)
        return dx_TI, None, None, da_SI, None, None, *dbs_OR


class Place(NamedTuple):
    """Where a linear layer of the hub's names lives: its group, the group's path, its piece."""

    group: GroupedLinear
    path: str
    output: str


def stacked(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of each weight of a group, and of the A's of its adapter, the rows of each layer, by the
    parameter's name: what is published as one matrix (a tower's qkv) is one here."""
    rows: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        if isinstance(module, GroupedLinear):
            rows[f"{path}.weight"] = tuple(module.outputs.values())
            if isinstance(module.adapter, LoraGroup):
                ranks = (low.rank for low in module.adapter.layers.values())
                rows[f"{path}.adapter.a"] = tuple(ranks)
    return rows


def adaptable_layers(model: nn.Module) -> dict[str, Place]:
    """The linear layers that may carry an adapter, by their hub name without `.weight`.

    The head and the patch embedding (published as a convolution) are none of them: the first is
    trained whole or not at all (`tune.embeddings`), the second is as small as an adapter.
    """
    layers: dict[str, Place] = {}
    for path, module in model.named_modules():
        if isinstance(module, GroupedLinear) and not path.startswith(("lm_head", "visual.patch_")):
            for output in module.outputs:
                layers[hub_name(path, output)] = Place(module, path, output)
    return layers


def adapters(model: nn.Module) -> Iterator[tuple[str, GroupedLinear, LoraGroup]]:
    """(path of the group, group, adapter) of each group that carries an adapter."""
    for path, module in model.named_modules():
        if isinstance(module, GroupedLinear) and isinstance(module.adapter, LoraGroup):
            yield path, module, module.adapter


def hub_name(path: str, output: str) -> str:
    """The hub's name of one layer of the group at `path`, without `.weight`."""
    parent, dot, _ = path.rpartition(".")
    return f"{parent}{dot}{output}"
