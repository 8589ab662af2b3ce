"""Several processes that learn one model together: each has all of it and a share of every step.

A launcher such as torchrun starts them, and says in their environment who they are. What a step
computes does not depend on how many there are: its samples are the same, their gradients are added
up in fp32 before every process takes the same step (Li et al. 2020, arXiv:2006.15704, without
overlap), and a run may go on with another number of them. The first process writes the run; the
others follow it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from heapq import heapify, heapreplace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from finesight.encode.encoded import Grid
from finesight.errors import UserError
from finesight.train.course import Members
from finesight.train.flops import Arithmetic, Uncounted
from finesight.train.loader import Dropped, Step
from finesight.train.survey import Glance

PATIENCE = timedelta(hours=2)
"""How long processes wait for the first one, which measures and writes meanwhile."""

OVER, FAILED = 1, 2
"""What a process says in the place of its numbers of a step."""

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class ShareFailed(UserError):
    """A process could not take its share of a step; all know it, and nobody has taken the step."""


class Together(NamedTuple):
    """What all processes have of a step: learned tokens, samples, tokens, samples dropped late; and
    `signal`, the number of one that asked any of them to stop, or 0."""

    supervised: int
    samples: int
    tokens: int
    dropped: tuple[Dropped, ...] = ()
    signal: int = 0
    over: bool = False
    """Whether the first process takes no more steps."""

    @classmethod
    def of(cls, step: Step, signal: int = 0) -> Together:
        """That of one process."""
        return cls(step.supervised, step.samples, step.tokens, step.dropped, signal)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Process `number` of `count`; on its machine it is number `local` of `beside`."""

    number: int = 0
    count: int = 1
    local: int = 0
    beside: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run."""
        return self.number == 0

    @property
    def alone(self) -> bool:
        return self.count == 1

    def placed(self, device: torch.device) -> torch.device:
        """The device of this process, where each has one of its own."""
        if self.alone or device.type != "cuda":
            return device
        cards = torch.cuda.device_count()
        # Some launchers show each process its own GPU alone.
        own = cards == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
        index = 0 if own else self.local
        if self.beside > cards and not own:
            raise UserError(
                f"{self.beside} processes were started on this machine, which has {cards} GPUs",
                where="LOCAL_RANK",
                expected="a GPU for each process",
                remedy=f"start {cards} processes: torchrun --nproc-per-node {cards}",
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)

    def agreed(self, step: Step, signal: int = 0) -> Together:
        """The step of all processes. All of them have to ask, and wait for each other."""
        own = Together.of(step, signal)
        if self.alone:
            return own
        numbers = (step.number, *own[:3], len(step.dropped), signal, 0)
        return self._summed(self._gathered(numbers), step)

    def dismiss(self, signal: int = 0) -> None:
        """No more steps are taken: of the first process, in the place of `agreed`; of the others,
        to wait for that."""
        if not self.alone:
            self._gathered((0, 0, 0, 0, 0, signal, OVER))

    def give_up(self) -> None:
        """Of a process that cannot go on, in the place of `agreed`: others raise ShareFailed."""
        if not self.alone:
            self._gathered((0, 0, 0, 0, 0, 0, FAILED))

    def confirm(self, *, well: bool) -> None:
        """All processes say whether they could take their share; raises ShareFailed where this one
        could and another could not."""
        failed = [] if self.alone else self._gathered((int(not well),))
        if well:
            self._refuse([number for number, (bad,) in enumerate(failed) if bad])

    def _refuse(self, failed: Sequence[int]) -> None:
        if failed:
            raise ShareFailed(
                f"process {', '.join(map(str, failed))} of {self.count} could not go on",
                where="training",
                expected="every process with its share of a step",
                remedy="see what that process said, and start again with --resume",
            )

    def same(self, identity: Mapping[str, Any]) -> None:
        """All processes tell what they are about to learn. Raises UserError where it differs."""
        if self.alone:
            return
        found = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()
        told = self._gathered((int.from_bytes(found[:7], "little"),))
        if len({one for (one,) in told}) > 1:
            raise UserError(
                "the processes see different models, data or settings",
                where="training",
                expected="the same files for every process",
                remedy="put model, data and recipe on a disk that all machines share",
            )

    def _gathered(self, numbers: Sequence[int]) -> list[list[int]]:
        """These of every process, in order."""
        own = torch.tensor(numbers)
        everybodys = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(everybodys, own)
        return [one.tolist() for one in everybodys]

    def _summed(self, everybodys: list[list[int]], step: Step) -> Together:
        steps, supervised, samples, tokens, dropped, signals, over = zip(*everybodys, strict=True)
        self._refuse([number for number, end in enumerate(over) if end == FAILED])
        if OVER in over:
            return Together(0, 0, 0, (), max(signals), over=True)
        if len(set(steps)) > 1:
            raise ShareFailed(
                f"the processes stand before different steps: {', '.join(map(str, steps))}",
                where="training",
                expected="one output that all processes see",
                remedy="put the run on a disk that all machines share",
            )
        left_out = self._all_of(step.dropped) if any(dropped) else ()
        return Together(sum(supervised), sum(samples), sum(tokens), left_out, max(signals))

    def _all_of(self, dropped: Sequence[Dropped]) -> tuple[Dropped, ...]:
        told = json.dumps(dropped).encode()
        ((longest,), *_) = sorted(self._gathered((len(told),)), reverse=True)
        room = torch.tensor(list(told.ljust(longest)), dtype=torch.uint8)
        everybodys = [torch.empty_like(room) for _ in range(self.count)]
        dist.all_gather(everybodys, room)
        lists = [json.loads(bytes(one.tolist())) for one in everybodys]
        return tuple(Dropped(*one) for found in lists for one in found)

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, in its place."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Within the block, the processes that a launcher has started can speak to each other; one that
    was started by itself is alone. Raises UserError where the launcher has said too little."""
    found = {name: os.environ[name] for name in NEEDED if name in os.environ}
    if int(found.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {found['WORLD_SIZE']}, and {', '.join(missing)} is not set",
            where="the environment",
            expected=f"what torchrun sets: {', '.join(NEEDED)}",
            remedy="start with torchrun --nproc-per-node N -m finesight train RECIPE",
        )
    local = int(found["LOCAL_RANK"])
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    yield Ranks(int(found["RANK"]), int(found["WORLD_SIZE"]), local, beside)
    # Where something was raised, others may be far from here: they would be waited for.
    dist.destroy_process_group()


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
    course: Members, ranks: Ranks, glances: Mapping[int, Glance], arithmetic: Arithmetic | Uncounted
) -> Members:
    """This process's samples of each step, about as costly as those of any other."""
    if ranks.alone:
        return course

    def cost(index: int) -> float:
        seen = glances[index]
        return arithmetic.of(_Alone((seen.tokens,), seen.grids, seen.supervised)) or seen.tokens

    return Share(course, ranks, cost)
