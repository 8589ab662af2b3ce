"""Which samples of a step each of several processes learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from heapq import heapify, heapreplace
from typing import NamedTuple

from finesight.encode.encoded import Grid
from finesight.train.course import Members
from finesight.train.flops import Arithmetic, Uncounted
from finesight.train.ranks import Ranks
from finesight.train.survey import Glance


class Share:
    """Of every step of `whole`, the samples of one process: the costliest first, each to the
    process that has least to do so far; `cost` is that of a sample by its index."""

    def __init__(self, whole: Members, ranks: Ranks, cost: Callable[[int], float]) -> None:
        self._whole, self._ranks, self._cost = whole, ranks, cost

    def __len__(self) -> int:
        return len(self._whole)

    def of(self, step: int) -> Sequence[int]:
        members = self._whole.of(step)
        costs = [self._cost(index) for index in members]
        loads = [(0.0, 0, rank) for rank in range(self._ranks.count)]
        heapify(loads)
        own: list[int] = []
        for place in sorted(range(len(members)), key=lambda place: -costs[place]):
            load, samples, rank = loads[0]
            heapreplace(loads, (load + costs[place], samples + 1, rank))
            if rank == self._ranks.number:
                own.append(place)
        return [members[place] for place in sorted(own)]


class _Alone(NamedTuple):
    """A sample by itself, as its arithmetic hangs on it."""

    lengths: tuple[int, ...]
    grids: tuple[Grid, ...]
    supervised: int


def shared(
    course: Members,
    ranks: Ranks,
    glances: Mapping[int, Glance] | None,
    arithmetic: Arithmetic | Uncounted,
) -> Members:
    """This process's samples of each step, about as costly as those of any other; as many, where
    not all samples have been looked at: what others see of one by then may differ."""
    if ranks.alone:
        return course

    def cost(index: int) -> float:
        if glances is None:
            return 1.0
        seen = glances[index]
        return arithmetic.of(_Alone((seen.tokens,), seen.grids, seen.supervised)) or seen.tokens

    return Share(course, ranks, cost)
