"""Several adapters over one base, each row of a pass read with its own or with none.

All of them are computed for every row, and what is not the row's own is multiplied by zero: nothing
waits for the device, so that a step of generation can be recorded, and for a few adapters it costs
little beside the base.

Shapes: T rows, N adapters, I inputs, O outputs of one layer, S ranks of a group end to end, layer
after layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.model.frozen import FrozenWeight
from finesight.model.linear import GroupedLinear, updated_products
from finesight.model.lora import LoraGroup, adapters
from finesight.model.updates import Update


class Readers:
    """Which adapter each row of the next pass is read with.

    `shares_TX` has the scale of each rank of each bank in the rows that are read with its adapter,
    and zeros elsewhere; one row may stand for all. X counts the ranks of all banks end to end.
    """

    def __init__(self, number: int, dtype: torch.dtype, device: torch.device) -> None:
        self.number, self._dtype, self._device = number, dtype, device
        self._scales: list[Tensor] = []
        self._scales_NX = torch.empty(number, 0, dtype=dtype, device=device)
        self.shares_TX = self._scales_NX[:1]

    def join(self, scales_NS: Tensor) -> slice:
        """Where the ranks of one more bank lie; each has its scale in its adapter's row."""
        start = sum(scales.shape[1] for scales in self._scales)
        self._scales.append(scales_NS)
        self._scales_NX = torch.cat(self._scales, 1)
        self.shares_TX = torch.zeros_like(self._scales_NX[:1])
        return slice(start, start + scales_NS.shape[1])

    def mask(self, adapter: int | None) -> Tensor:
        """[1, N], a 1 for the adapter."""
        mask_1N = torch.zeros(1, self.number, dtype=self._dtype)
        if adapter is not None:
            mask_1N[0, adapter] = 1
        return mask_1N.to(self._device)

    def choose(self, mask_TN: Tensor) -> None:
        """Read the rows of the next pass by these masks."""
        self.shares_TX = mask_TN @ self._scales_NX


class AdapterBank(nn.Module):
    """Adapters of a `GroupedLinear`, in place of the one that is trained; for answering only.

    `a_SI` stacks the down-projections of all, those of a layer next to each other; `b_OS` has the
    up-projections of a layer in its outputs' rows and its ranks' columns, and zeros elsewhere.
    """

    a_SI: Tensor
    b_OS: Tensor

    def __init__(
        self, group: GroupedLinear, members: Sequence[LoraGroup | None], readers: Readers
    ) -> None:
        super().__init__()
        self._readers = readers
        self._widths = tuple(group.outputs.values())
        like = next(member.a for member in members if member is not None)
        downs: list[Tensor] = []
        ups: list[Tensor] = []
        scales: list[Tensor] = []
        self._ranks: list[slice | None] = []
        """Those of each layer."""
        for name, width in group.outputs.items():
            layers = [(n, m) for n, m in enumerate(members) if m is not None and name in m.layers]
            start = sum(len(a_RI) for a_RI in downs)
            factors = [(n, m.layers[name].scale, m.factors()[name]) for n, m in layers]
            own = [b_OR for _, _, (_, b_OR) in factors]
            for number, scale, (a_RI, _) in factors:
                downs.append(a_RI)
                scale_NR = a_RI.new_zeros(len(members), len(a_RI))
                scale_NR[number] = scale
                scales.append(scale_NR)
            stop = sum(len(a_RI) for a_RI in downs)
            self._ranks.append(slice(start, stop) if own else None)
            ups.append(torch.cat(own, 1) if own else like.new_zeros(width, 0))
        b_OS: Tensor = torch.block_diag(*ups)  # type: ignore[no-untyped-call]
        self.register_buffer("a_SI", torch.cat(downs).detach(), persistent=False)
        self.register_buffer("b_OS", b_OS.detach(), persistent=False)
        self._columns = readers.join(torch.cat(scales, 1))

    @property
    def shares_TS(self) -> Tensor:
        """What each rank's number is multiplied by, for each row of the next pass."""
        return self._readers.shares_TX[:, self._columns]

    def forward(
        self, x: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        """[..., I] to one [..., O] for each layer of the group, the base product included."""
        x_TI = x.reshape(-1, x.shape[-1])
        low_TS = F.linear(x_TI, self.a_SI) * self.shares_TS
        bs_OS = torch.split(self.b_OS, list(self._widths))
        updates = [
            Update(layer, low_TS[:, ranks], b_OS[:, ranks], 1.0)
            for layer, (b_OS, ranks) in enumerate(zip(bs_OS, self._ranks, strict=True))
            if ranks is not None
        ]
        ys_TO = updated_products(x_TI, weight, bias, self._widths, updates)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys_TO)


class Bank:
    """Adapters on their way into a model: each is installed as if to be trained, taken, and at the
    end all are put into the model together."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._taken: list[dict[str, LoraGroup]] = []

    def take(self) -> None:
        """Take off the adapter that the model carries."""
        found: dict[str, LoraGroup] = {}
        for path, group, adapter in list(adapters(self._model)):
            found[path] = adapter
            group.adapter = None
        self._taken.append(found)

    def install(self) -> Readers | None:
        """Put all of them into the model; None where there are none."""
        some = next((m for members in self._taken for m in members.values()), None)
        if some is None:
            return None
        readers = Readers(len(self._taken), some.a.dtype, some.a.device)
        for path, group in list(self._model.named_modules()):
            members = [members.get(path) for members in self._taken]
            if isinstance(group, GroupedLinear) and any(member is not None for member in members):
                group.adapter = AdapterBank(group, members, readers)
        return readers
