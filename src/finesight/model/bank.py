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
from finesight.model.linear import GroupedLinear, products
from finesight.model.lora import LoraGroup, adapters


class Readers:
    """Which adapter each row of the next pass is read with: `mask_TN` has a 1 there, and nothing
    else where it is read without any. One row stands for all."""

    def __init__(self, number: int, dtype: torch.dtype, device: torch.device) -> None:
        self.number = number
        self.mask_TN = torch.zeros(1, number, dtype=dtype, device=device)

    def mask(self, adapter: int | None) -> Tensor:
        """[1, N] of one adapter."""
        mask_1N = torch.zeros(1, self.number, dtype=self.mask_TN.dtype)
        if adapter is not None:
            mask_1N[0, adapter] = 1
        return mask_1N.to(self.mask_TN.device)


class AdapterBank(nn.Module):
    """Adapters of a `GroupedLinear`, in place of the one that is trained; for answering only.

    `a_SI` stacks the down-projections of all, those of a layer next to each other; `bs_OS` are the
    up-projections of a layer side by side; `scales_NS` is each rank's scale in its adapter's row.
    """

    a_SI: Tensor
    scales_NS: Tensor

    def __init__(
        self, group: GroupedLinear, members: Sequence[LoraGroup | None], readers: Readers
    ) -> None:
        super().__init__()
        self._readers = readers
        self._widths = tuple(group.outputs.values())
        present = [(number, m) for number, m in enumerate(members) if m is not None]
        rows: list[Tensor] = []
        owners: list[tuple[int, float]] = []
        self._slices: list[tuple[int, slice]] = []
        for output, name in enumerate(group.outputs):
            ups, start = [], len(owners)
            for number, member in present:
                if name in member.layers:
                    a_RI, b_OR = member.factors()[name]
                    rows.append(a_RI)
                    ups.append(b_OR)
                    owners += [(number, member.layers[name].scale)] * len(a_RI)
            if ups:
                self.register_buffer(f"b{len(self._slices)}", torch.cat(ups, 1), persistent=False)
                self._slices.append((output, slice(start, len(owners))))
        self.register_buffer("a_SI", torch.cat(rows).detach(), persistent=False)
        scales_NS = torch.zeros(len(members), len(owners), dtype=self.a_SI.dtype)
        for rank, (number, scale) in enumerate(owners):
            scales_NS[number, rank] = scale
        self.register_buffer("scales_NS", scales_NS.to(self.a_SI.device), persistent=False)

    def forward(
        self, x: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        """[..., I] to one [..., O] for each layer of the group, the base product included."""
        x_TI = x.reshape(-1, x.shape[-1])
        ys_TO = products(x_TI, weight, bias, self._widths)
        low_TS = F.linear(x_TI, self.a_SI) * (self._readers.mask_TN @ self.scales_NS)
        for number, (output, ranks) in enumerate(self._slices):
            ys_TO[output].addmm_(low_TS[:, ranks], self.get_buffer(f"b{number}").T)
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
