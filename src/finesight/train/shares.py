"""Which samples of a step each of several processes learns, and which all learn together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

from finesight.encode.encoded import Outline
from finesight.encode.slice import Alone, Slice
from finesight.train.course import Members
from finesight.train.flops import Arithmetic, Uncounted
from finesight.train.loader import Split
from finesight.train.ranks import Ranks
from finesight.train.survey import Glances


@dataclass(frozen=True)
class Share:
    """Of every step of `whole`, the samples of one process, but for those that all learn together:
    the costliest first, each to the process that has least to do so far; `cost` is that of a sample
    by its index."""

    whole: Members
    ranks: Ranks
    cost: Callable[[int], float]
    together: Callable[[int], bool]

    def __len__(self) -> int:
        return len(self.whole)

    def of(self, step: int) -> Sequence[int]:
        members = [index for index in self.whole.of(step) if not self.together(index)]
        costs = [self.cost(index) for index in members]
        loads = [(0.0, 0, rank) for rank in range(self.ranks.count)]
        heapify(loads)
        own: list[int] = []
        for place in sorted(range(len(members)), key=lambda place: -costs[place]):
            load, samples, rank = loads[0]
            heapreplace(loads, (load + costs[place], samples + 1, rank))
            if rank == self.ranks.number:
                own.append(place)
        return [members[place] for place in sorted(own)]


@dataclass(frozen=True)
class Long(Split):
    """Of every step of `whole`, the samples that are too `long` for one process."""

    whole: Members
    ranks: Ranks
    long: Callable[[int], bool]

    def of(self, step: int) -> Sequence[int]:
        """In the order of the step."""
        return [index for index in self.whole.of(step) if self.long(index)]

    def share(self, outline: Outline) -> Slice:
        """This process's."""
        return Slice.of(outline, self.ranks.number, self.ranks.count)

    @property
    def counts(self) -> bool:
        """The first one does."""
        return self.ranks.first


def shared(
    course: Members,
    ranks: Ranks,
    glances: Glances | None,
    arithmetic: Arithmetic | Uncounted,
    split_tokens: int | None,
) -> tuple[Members, Split | None]:
    """This process's samples of each step, about as costly as those of any other; as many, where
    not all samples have been looked at: what others see of one by then may differ. And those of
    more than `split_tokens` tokens, which all learn together."""
    if ranks.alone:
        return course, None
    if glances is None:
        return Share(course, ranks, lambda index: 1.0, lambda index: False), None
    seen = glances

    def cost(index: int) -> float:
        one = seen[index]
        return arithmetic.of(Alone((one.tokens,), one.grids, one.supervised)) or one.tokens

    def long(index: int) -> bool:
        return split_tokens is not None and seen[index].tokens > split_tokens

    return Share(course, ranks, cost, long), Long(course, ranks, long)
