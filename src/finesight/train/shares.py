"""Which samples of a step each of several processes learns, and which all learn together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace

from finesight.encode.encoded import Outline
from finesight.encode.slice import Alone, Slice
from finesight.train.budget import packs_alone
from finesight.train.course import Members
from finesight.train.flops import Arithmetic, Uncounted
from finesight.train.loader import Split
from finesight.train.ranks import Ranks
from finesight.train.survey import Glances


@dataclass(frozen=True)
class Share(Split):
    """Of every step of `whole`, the samples of one process, but for those that are split: the
    costliest first, each to the process that has least to do so far. `cost` and `tokens` are those
    of a sample by its index; without `tokens` none is split."""

    whole: Members
    ranks: Ranks
    cost: Callable[[int], float]
    tokens: Callable[[int], int] | None
    pack_tokens: int

    def __len__(self) -> int:
        return len(self.whole)

    def within(self, pack_tokens: int) -> Share:
        """Where less has room, more is split."""
        return replace(self, pack_tokens=pack_tokens)

    def of(self, step: int) -> Sequence[int]:
        members = [index for index in self.whole.of(step) if not self._is_split(index)]
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

    def split(self, step: int) -> Sequence[int]:
        """In the order of the step."""
        return [index for index in self.whole.of(step) if self._is_split(index)]

    def share(self, outline: Outline) -> Slice:
        """This process's."""
        return Slice.of(outline, self.ranks.number, self.ranks.count)

    @property
    def counts(self) -> bool:
        """The first process does."""
        return self.ranks.first

    @property
    def most_alone(self) -> int | None:
        """Needed tokens of the longest sample that one process learns alone; None where none is
        split. Each share has tokens, however small a pack is."""
        if self.tokens is None:
            return None
        return packs_alone(self.ranks.count) * max(2, self.pack_tokens)

    def _is_split(self, index: int) -> bool:
        most = self.most_alone
        return self.tokens is not None and most is not None and self.tokens(index) > most


def shared(
    course: Members,
    ranks: Ranks,
    glances: Glances | None,
    arithmetic: Arithmetic | Uncounted,
    pack_tokens: int,
) -> Members:
    """This process's samples of each step, about as costly as those of any other, and its share of
    very long ones. As many, where not all samples have been looked at: what others see of one by
    then may differ. What all of them begin with costs next to nothing."""
    if ranks.alone:
        return course
    if glances is None:
        return Share(course, ranks, lambda index: 1.0, None, pack_tokens)
    seen = glances

    def cost(index: int) -> float:
        one = seen[index]
        own = max(0, one.needed - seen.beginning)
        return arithmetic.of(Alone((own,), one.grids, one.supervised)) or one.needed

    def tokens(index: int) -> int:
        return seen[index].needed

    # What transformers computes cannot be split.
    splits = not isinstance(arithmetic, Uncounted)
    return Share(course, ranks, cost, tokens if splits else None, pack_tokens)
