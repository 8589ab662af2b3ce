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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from finesight.errors import UserError
from finesight.train.budget import Budget, FullMemory
from finesight.train.loader import Dropped, Step

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""How long processes wait for the first one, which measures and writes meanwhile."""

AWAITED = timedelta(minutes=30)
"""How long the first one waits for the others, which have nothing but their share to compute, and
any for what all have begun."""

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class ShareFailed(UserError):
    """A process could not take its share of a step; all know it, and nobody has taken the step."""


class Errand(IntEnum):
    """What a process is about to do. The first one says what all of them do; the others are ready
    for a step, wait, or have failed."""

    STEP = 0
    SAVE = 1
    MEASURE = 2
    SETTLE = 3
    """The end of a run."""
    OVER = 4
    WAIT = 5
    FAILED = 6
    LOOK = 7
    """At pictures, and then to learn."""


class Deserted(ShareFailed):
    """A process has not come to a meeting: it is gone, or hangs."""


class StepTorn(UserError):
    """This process could not take its share of a step in the middle of which the others wait for
    it: there is nobody left to speak to."""


class Together(NamedTuple):
    """What all processes have of a step: learned tokens, samples, tokens, the most packs of one,
    samples dropped late; and `signal`, the number of one that asked any of them to stop, or 0.
    Where the first process is not about to take a step, its errand and what it says of it."""

    supervised: int = 0
    samples: int = 0
    tokens: int = 0
    packs: int = 0
    dropped: tuple[Dropped, ...] = ()
    signal: int = 0
    errand: Errand = Errand.STEP
    argument: int = 0

    @classmethod
    def of(cls, step: Step, signal: int = 0) -> Together:
        """That of one process."""
        figures = step.supervised, step.samples, step.tokens, len(step.packs)
        return cls(*figures, step.dropped, signal)


class Roll:
    """Meetings of all processes, to which each brings something, where all can see it: who does not
    come has a number."""

    def __init__(self, store: Any, number: int, count: int, name: str = "finesight") -> None:
        """`store` is one of torch's, whose types say less than they do."""
        self._store, self._number, self._count, self._name = store, number, count, name
        self._meeting = 0
        self.stepped = False
        """Whether the processes have taken a step together."""
        self._missed = ""

    def aside(self) -> Roll:
        """Other meetings of the same processes, that another thread may go to."""
        return Roll(self._store.clone(), self._number, self._count, f"{self._name}/aside")

    def gathered(self, own: str, patience: timedelta) -> list[bytes]:
        """What every process has brought, in order. Raises ShareFailed when one has not come by
        then, and from then on at once."""
        if self._missed:
            raise self._deserted(patience)
        self._meeting += 1
        keys = [f"{self._name}/{self._meeting}/{number}" for number in range(self._count)]
        self._store.set(keys[self._number], own)
        # All have left the meeting before the last one: who came to the last had left it.
        self._store.delete_key(f"{self._name}/{self._meeting - 2}/{self._number}")
        try:
            self._store.wait(keys, patience)
        except RuntimeError as error:
            self._missed = self._missing(keys) or "one"
            raise self._deserted(patience) from error
        brought: list[bytes] = self._store.multi_get(keys)
        return brought

    def _deserted(self, patience: timedelta) -> Deserted:
        return Deserted(
            f"process {self._missed} of {self._count} has not answered for {patience}",
            where="training",
            expected="every process with its share of a step",
            remedy="see what that process said, and start again with --resume",
        )

    def _missing(self, keys: Sequence[str]) -> str:
        try:
            came = [self._store.check([key]) for key in keys]
        except RuntimeError:
            # Who kept the roll is gone.
            return "0"
        return ", ".join(str(number) for number, here in enumerate(came) if not here)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Process `number` of `count`; on its machine it is number `local` of `beside`."""

    number: int = 0
    count: int = 1
    local: int = 0
    beside: int = 1
    roll: Roll | None = None

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

    def aside(self) -> Ranks:
        """The same processes, for what another thread of each does meanwhile."""
        return self if self.roll is None else replace(self, roll=self.roll.aside())

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of what may be done in any order: every so manieth."""
        return items[self.number :: self.count]

    def agreed(self, step: Step, signal: int = 0) -> Together:
        """The step of all processes, or what the first one does before it. All of them have to ask,
        and wait for each other. Raises ShareFailed where one of them cannot go on."""
        own = Together.of(step, signal)
        if self.alone:
            return own
        figures = step.number, step.shared, *own[:4], len(step.dropped)
        everybodys = self._errands((*figures, signal, Errand.STEP))
        return self._summed(everybodys, step.dropped)

    def called(self, errand: Errand, argument: int = 0, signal: int = 0) -> Together:
        """In the place of `agreed`. Of the first process: what it is about to do. Of the others:
        WAIT, to hear what the first one does, and FAILED, of one that cannot go on: they hear
        WAIT where it is about to do nothing, and of others' failures nothing."""
        if self.alone:
            return Together(errand=errand, argument=argument)
        try:
            return self._summed(self._errands((argument, 0, 0, 0, 0, 0, 0, signal, errand)))
        except Deserted:
            raise
        except ShareFailed:
            if errand not in (Errand.WAIT, Errand.FAILED):
                raise
            return Together(errand=Errand.WAIT)

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
        found = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        if len({*self.everybodys(found)}) > 1:
            raise UserError(
                "the processes see different models, data or settings",
                where="training",
                expected="the same files for every process",
                remedy="put model, data and recipe on a disk that all machines share",
            )

    def _errands(self, numbers: Sequence[int]) -> list[list[int]]:
        return [json.loads(told) for told in self._told(json.dumps(numbers), "errand")]

    def _told(self, own: str, kind: str = "word") -> list[bytes]:
        """What every process brings to a meeting of this kind, in order. Raises ShareFailed with
        the numbers of those that come to another kind, and Deserted with those that do not."""
        assert self.roll is not None, f"process {self.number} of {self.count} is on no roll"
        # Before the first step, others may look at all pictures.
        patience = AWAITED if self.first and self.roll.stepped else PATIENCE
        brought = self.roll.gathered(f"{kind} {own}", patience)
        kinds, words = zip(*(one.split(b" ", 1) for one in brought), strict=True)
        self._refuse([number for number, one in enumerate(kinds) if one != kind.encode()])
        return list(words)

    def _summed(self, everybodys: list[list[int]], own: Sequence[Dropped] = ()) -> Together:
        *figures, packs, dropped, signals, said = zip(*everybodys, strict=True)
        steps, shared, supervised, samples, tokens = figures
        own_errand, first = said[self.number], Errand(said[0])
        stays = (Errand.FAILED, Errand.WAIT) if first is Errand.STEP else (Errand.FAILED,)
        failed = [number for number, one in enumerate(said) if one in stays]
        if failed and max(signals) and first is Errand.STEP:
            # That one was asked to stop, and did not come to its step.
            return Together(signal=max(signals), errand=first, argument=steps[0])
        if own_errand != Errand.FAILED:
            self._refuse(failed)
        if first is not Errand.STEP or own_errand != Errand.STEP:
            return Together(signal=max(signals), errand=first, argument=steps[0])
        if len({*steps}) > 1:
            raise ShareFailed(
                f"the processes stand before different steps: {', '.join(map(str, steps))}",
                where="training",
                expected="one output that all processes see",
                remedy="put the run on a disk that all machines share",
            )
        if len({*shared}) > 1:
            raise ShareFailed(
                "a sample that all processes share is not the same for all of them",
                where="training",
                expected="the same files for every process, as long as a run goes on",
                remedy="see that the sample's pictures can be read everywhere, and start again with"
                " --resume",
            )
        left_out = self._all_of(own) if any(dropped) else ()
        if self.roll is not None:
            self.roll.stepped = True
        whole = sum(supervised), sum(samples), sum(tokens), max(packs)
        return Together(*whole, left_out, max(signals))

    def _all_of(self, dropped: Sequence[Dropped]) -> tuple[Dropped, ...]:
        told = self.everybodys(json.dumps(dropped))
        return tuple(Dropped(*one) for found in map(json.loads, told) for one in found)

    def _blocks(self, told: Any) -> list[Any]:
        return [json.loads(one) for one in self._told(json.dumps(told), "block")]

    def everybodys(self, told: str) -> list[bytes]:
        """What every process tells, in order. All of them have to."""
        return [told.encode()] if self.alone else self._told(told)

    @contextmanager
    def confirmed(self) -> Iterator[None]:
        """A block that all processes go through. Raises ShareFailed where it came to its end here,
        and not in another one; and FullMemory in all of them where another try would do."""
        full, well = None, False
        try:
            yield
            well = True
        except FullMemory as error:
            full = error
        finally:
            below = full and full.below
            told = [well, below.model_dump() if below else None]
            everybodys = [told] if self.alone else self._blocks(told)
        self._refuse_budgets(everybodys, full)

    def _refuse_budgets(self, everybodys: list[Any], full: FullMemory | None) -> None:
        """Of what all have said of a block that did not fail here otherwise."""
        if full is not None and full.below is None:
            raise full
        self._refuse([n for n, (well, below) in enumerate(everybodys) if not well and not below])
        less = {n: Budget(**below) for n, (_, below) in enumerate(everybodys) if below}
        if not less:
            return
        full = full or FullMemory(
            f"the memory of the GPU of process {', '.join(map(str, less))} is full"
        )
        full.below = Budget(
            pack_tokens=min(budget.pack_tokens for budget in less.values()),
            recompute=max(budget.recompute for budget in less.values()),
        )
        raise full

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, in its place. On a CPU, raises ShareFailed as meetings
        do; what a GPU waits for, torch ends after `AWAITED`."""
        if self.alone:
            return tensor
        try:
            dist.all_reduce(tensor)
        except RuntimeError:
            # All whom it failed come to say so.
            self._told("")
            raise
        return tensor


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Within the block, the processes that a launcher has started can speak to each other; one that
    was started by itself is alone. Raises UserError where the launcher has said too little."""
    found = {name: os.environ[name] for name in NEEDED if name in os.environ}
    if found.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    missing = [name for name in NEEDED if name not in found]
    numbers = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    odd = [name for name in numbers if not found.get(name, "0").isdecimal()]
    if missing or odd:
        wrong = f"{', '.join(missing)} is not set" if missing else f"{', '.join(odd)} is no number"
        raise UserError(
            f"WORLD_SIZE is {found['WORLD_SIZE']}, and {wrong}",
            where="the environment",
            expected=f"what torchrun sets: {', '.join(NEEDED)}",
            remedy="start with torchrun --nproc-per-node N -m finesight train RECIPE",
        )
    local = int(found["LOCAL_RANK"])
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=AWAITED)
    number, count = int(found["RANK"]), int(found["WORLD_SIZE"])
    # The one that the processes have found each other by.
    roll = Roll(dist.distributed_c10d._get_default_store(), number, count)
    yield Ranks(number, count, local, beside, roll)
    # Where something was raised, others may be far from here: they would be waited for.
    dist.destroy_process_group()
