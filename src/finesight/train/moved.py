"""What a run really changed, part by part: looked at, not assumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import fsum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finesight.errors import UserError
from finesight.model.frozen import frozen_weights
from finesight.model.parts import PARTS, Part, part_of
from finesight.train.ranks import ALONE, Ranks

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
            name: parameter
            for name, parameter in model.named_parameters()
            if name not in masters and not _learns_elsewhere(parameter)
        }
        self._few = frozen_weights(model)
        self._masters = masters
        frozen = {name: _here(tensor).numel() for name, tensor in self._frozen.items()}
        frozen |= {name: weight.numbers for name, weight in self._few.items()}
        trained = {name: tensor.numel() for name, tensor in masters.items()}
        self._numbers = {True: trained, False: frozen}
        self._sums = self._checksums()
        self._start = {name: _sampled(tensor).clone() for name, tensor in masters.items()}

    def _checksums(self) -> dict[str, int]:
        frozen = {name: _here(parameter.detach()) for name, parameter in self._frozen.items()}
        sums = checksums(frozen) | checksums(self._masters)
        for name, weight in self._few.items():
            sums[name] = sum(checksums(dict(weight.named_buffers())).values())
        return sums

    def changes(self, reached: Collection[str], ranks: Ranks = ALONE) -> list[PartChange]:
        """How every part differs from what it was, trained and frozen parameters apart. `reached`
        names the parameters that gradients came to. Where each of `ranks` has rows of every
        parameter, all of them have to ask."""
        told = ranks.everybodys(json.dumps(self._looked(reached, ranks)))
        found: dict[str, _Look] = {}
        for looks in map(json.loads, told):
            for name, look in looks.items():
                found[name] = found.get(name, _Look()).beside(_Look(*look))
        rows = []
        for part in PARTS:
            for trained in self._numbers:
                ours = [
                    look
                    for name, look in found.items()
                    if part_of(name) == part and look.trained == trained
                ]
                if ours:
                    rows.append(_row(part, trained, ours))
        return rows

    def _looked(self, reached: Collection[str], ranks: Ranks) -> dict[str, _Look]:
        now, found = self._checksums(), {}
        for trained, numbers in self._numbers.items():
            for name, count in numbers.items():
                moved, start = self._far(name) if trained else (0.0, 0.0)
                if name in self._few and not ranks.first:
                    # These lie whole in every process.
                    count = 0
                changed = now[name] != self._sums[name]
                found[name] = _Look(trained, count, changed, name in reached, moved, start)
        return found

    def _far(self, name: str) -> tuple[float, float]:
        start = self._start[name]
        moved = _sampled(self._masters[name]) - start
        return float(moved.square().sum()), float(start.square().sum())


class _Look(NamedTuple):
    """A parameter, or some rows of it: squares of how far its sample moved, and of its start."""

    trained: bool = False
    numbers: int = 0
    changed: bool = False
    reached: bool = False
    moved: float = 0.0
    start: float = 0.0

    def beside(self, other: _Look) -> _Look:
        """Both together."""
        return _Look(
            self.trained or other.trained,
            self.numbers + other.numbers,
            self.changed or other.changed,
            self.reached or other.reached,
            self.moved + other.moved,
            self.start + other.start,
        )


def _row(part: Part, trained: bool, looks: Sequence[_Look]) -> PartChange:
    moved, start = (
        fsum(squares) ** 0.5 for squares in zip(*(look[-2:] for look in looks), strict=True)
    )
    return PartChange(
        part=part,
        trained=trained,
        tensors=len(looks),
        numbers=sum(look.numbers for look in looks),
        changed=sum(look.changed for look in looks),
        reached=sum(look.reached for look in looks),
        relative=moved / start if start else float("inf") if moved else 0.0,
    )


def _here(tensor: Tensor) -> Tensor:
    """A tensor, or of one that lies in parts (a DTensor, whose type takes torch a second to import)
    what this process has of it."""
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _learns_elsewhere(parameter: nn.Parameter) -> bool:
    """Whether it lies in parts and learns, if none of its rows is here."""
    return hasattr(parameter, "to_local") and parameter.requires_grad


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
