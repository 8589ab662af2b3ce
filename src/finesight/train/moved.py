"""What a run really changed, part by part: looked at, not assumed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finesight.errors import UserError
from finesight.model.frozen import frozen_weights
from finesight.model.parts import PARTS, Part, part_of

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Whole numbers by their size in bytes."""

AT_ONCE = 1 << 24
"""Numbers that are summed at once."""

SAMPLE = 16384
"""Numbers of a tensor, evenly spread, of which the starting values are kept."""


@dataclass(frozen=True, slots=True)
class PartChange:
    """One part, its frozen or its trained parameters.

    `changed` of `tensors` differ in at least one bit from what they were, and a gradient came to
    `reached` of them (weight decay moves the others too). `relative` is the Euclidean norm of the
    change over that of the starting values, over a sample of the numbers.
    """

    part: Part
    trained: bool
    tensors: int
    numbers: int
    changed: int
    reached: int
    relative: float

    def as_json(self) -> dict[str, Any]:
        """For `moved.json`."""
        return asdict(self)


class Watch:
    """Remembers the parameters as they are now: frozen ones, and fp32 masters of those that learn.

    Keeps a checksum of every tensor, and of the trained ones a sample of values.
    """

    def __init__(self, model: nn.Module, masters: Mapping[str, Tensor]) -> None:
        # Themselves, not what they are now: a weight may come to lie elsewhere.
        self._frozen = {
            name: parameter for name, parameter in model.named_parameters() if name not in masters
        }
        self._few = frozen_weights(model)
        self._masters = masters
        frozen = {name: tensor.numel() for name, tensor in self._frozen.items()}
        frozen |= {name: weight.numbers for name, weight in self._few.items()}
        trained = {name: tensor.numel() for name, tensor in masters.items()}
        self._numbers = {True: trained, False: frozen}
        self._sums = self._checksums()
        self._start = {name: _sampled(tensor).clone() for name, tensor in masters.items()}

    def _checksums(self) -> dict[str, int]:
        frozen = {name: parameter.detach() for name, parameter in self._frozen.items()}
        sums = checksums(frozen) | checksums(self._masters)
        for name, weight in self._few.items():
            sums[name] = sum(checksums(dict(weight.named_buffers())).values())
        return sums

    def changes(self, reached: Collection[str]) -> list[PartChange]:
        """How every part differs from what it was, trained and frozen parameters apart. `reached`
        names the parameters that gradients came to."""
        now = self._checksums()
        rows = []
        for part in PARTS:
            for trained, numbers in self._numbers.items():
                own = {name: count for name, count in numbers.items() if part_of(name) == part}
                if own:
                    row = PartChange(
                        part=part,
                        trained=trained,
                        tensors=len(own),
                        numbers=sum(own.values()),
                        changed=sum(now[name] != self._sums[name] for name in own),
                        reached=sum(name in reached for name in own),
                        relative=self._relative(own) if trained else 0.0,
                    )
                    rows.append(row)
        return rows

    def _relative(self, names: Iterable[str]) -> float:
        moved, start = 0.0, 0.0
        for name in names:
            moved += float((_sampled(self._masters[name]) - self._start[name]).square().sum())
            start += float(self._start[name].square().sum())
        return float(moved**0.5 / start**0.5) if start else float("inf") if moved else 0.0


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The sum of each tensor's bits, read as whole numbers: any single change shows."""
    sums = [_sum(tensor.reshape(-1).view(_WHOLE[tensor.itemsize])) for tensor in tensors.values()]
    return dict(zip(tensors, torch.stack(sums).tolist(), strict=True)) if sums else {}


def _sum(bits_E: Tensor) -> Tensor:
    # Piece by piece: torch makes a copy of 8 bytes a number first.
    pieces = torch.split(bits_E, AT_ONCE)
    return torch.stack([piece.sum(dtype=torch.int64) for piece in pieces]).sum()


def _sampled(tensor: Tensor) -> Tensor:
    flat_E = tensor.reshape(-1)
    return flat_E[:: max(1, len(flat_E) // SAMPLE)]


def check_moved(rows: Iterable[PartChange]) -> None:
    """Raises RuntimeError when a frozen part changed: our fault. Raises UserError when a part that
    should have learned is what it was: no sample reached it, or its learning rate is too low."""
    for row in rows:
        if not row.trained and row.changed:
            raise RuntimeError(
                f"{row.changed} of {row.tensors} frozen tensors of {row.part} changed"
            )
        if row.trained and not (row.changed and row.reached):
            why = "no gradient came to" if row.changed else "nothing has changed in"
            raise UserError(
                f"{why} the {row.tensors} tensors of {row.part} that should learn",
                where=f"tune.{row.part}",
                expected="a part that learns to move",
                remedy=f"give samples that use it (pictures, for vision and merger), raise"
                f" train.learning_rate.{row.part}, or set tune.{row.part}=frozen",
            )
