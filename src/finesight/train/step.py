"""One optimiser step: every pack forwards and backwards, then the masters move."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finesight.encode.pack import PackedBatch, nothing
from finesight.errors import Interrupted
from finesight.model.sequence_parallel import wanted
from finesight.train.budget import Budget, FullMemory, too_much
from finesight.train.loader import Step, read_steps
from finesight.train.prepare import Session
from finesight.train.ranks import Ranks, StepTorn, Together
from finesight.train.seen import Seen
from finesight.train.stop import Stop


@dataclass(frozen=True, slots=True)
class Taken:
    """A step that the device may still be working on.

    `coming_2` holds mean loss per learned token and gradient norm, on their way to the CPU until
    `event` has happened: where one of them is no finite number, the device has left everything as
    it was. `moved` is False for a step whose gradients overflowed in fp16, and for one without a
    usable sample. `budget` is that of its packs.
    """

    step: Step
    together: Together
    budget: Budget
    factor: float
    operations: float
    moved: bool
    coming_2: Tensor
    event: torch.cuda.Event | None

    def wait(self) -> tuple[float, float]:
        """Loss and gradient norm, once the device has them."""
        if self.event is not None:
            self.event.synchronize()
        loss, norm = self.coming_2.tolist()
        return loss, norm


def seed_of(seed: int, step: int, micro: int) -> int:
    """Seed of the random numbers of a micro-batch: with it dropout needs no state on disk."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def coming_steps(session: Session, seen: Seen | None) -> Generator[Step, None, None]:
    """This process's shares of the steps that are left, in packs of the budget in force, without
    the pictures that are known. To be closed."""
    machine, progress = session.machine, session.progress
    data = session.data if seen is None else session.data.without_pictures(seen.known)
    data = data.within(progress.budget.pack_tokens)
    return read_steps(data, progress.step, machine.workers, machine.device.type == "cuda")


def take_step(
    session: Session,
    step: Step,
    stop: Stop,
    seen: Seen | None = None,
    together: Together | None = None,
) -> Taken:
    """Run a step, or this process's share of it. Its loss is the mean over the learned tokens of
    all packs `together`, so that it does not matter how the samples were packed, and where: those
    of all processes, or else this one's. `seen` gives the features of its pictures, where they are
    known.

    Raises Interrupted, with nothing moved, when the run was asked to stop on the way, and
    FullMemory, with nothing moved either, when a pack was too much for the GPU's. A step whose loss
    or gradients are no finite numbers moves nothing, in any process: the device sees to that.
    """
    masters, scale = session.masters, session.scale
    by = scale.value
    ranks = session.machine.ranks
    together = together or Together.of(step)
    total = _of_all_packs(session, step, together, stop, seen)
    ranks.add(total)
    norm = session.parallel.joined(masters)
    taken = Taken(
        step=step,
        together=together,
        budget=session.progress.budget,
        factor=session.schedule.factor(step.number),
        operations=sum(_operations(session, batch) for batch in step.packs),
        moved=together.supervised > 0,
        coming_2=(torch.stack([total, norm]) / by).to("cpu", non_blocking=True),
        event=recorded(total.device),
    )
    if not taken.moved:
        return taken
    if scale.active:
        # What the next step's loss is multiplied by depends on the norm.
        loss, found = taken.wait()
        if math.isfinite(loss) and not scale.accept(found):
            session.forget_gradients()
            return replace(taken, moved=False)
    masters.step(taken.factor, norm.masked_fill(~total.isfinite(), math.nan), by)
    session.parallel.moved()
    return taken


def _of_all_packs(
    session: Session, step: Step, together: Together, stop: Stop, seen: Seen | None
) -> Tensor:
    """`_accumulate` of the packs that all processes come to, then of this one's own."""
    ranks, sharded = session.machine.ranks, session.parallel.sharded
    packs = [*enumerate(_micro_batches(session, step, together))]
    both = len(packs) if sharded else step.shares
    total = torch.zeros((), device=session.machine.device)
    try:
        if both:
            with _untorn(ranks):
                total += _accumulate(session, step, together, packs[:both], stop, seen)
        if not sharded:
            # Before anybody waits for what a process that failed will never give.
            with ranks.confirmed():
                total += _accumulate(session, step, together, packs[both:], stop, seen)
    except Exception:
        session.forget_gradients()
        raise
    return total


def _operations(session: Session, batch: PackedBatch) -> float:
    """Those of this process, about as many as of any that shares the sample."""
    share = batch.share
    if share is None:
        return session.arithmetic.of(batch)
    return session.arithmetic.of(share.whole) / share.count


@contextmanager
def _untorn(ranks: Ranks) -> Iterator[None]:
    """The packs of a step whose layers are put together by all processes."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, FullMemory)
        raise StepTorn(
            f"process {ranks.number} of {ranks.count} broke off in the middle of a step: {error}",
            where="training",
            expected="every process with its share of every layer",
            remedy="set a lower train.pack_tokens or train.recompute=true, and start again with"
            " --resume"
            if full
            else "start again with --resume",
        ) from error


def _accumulate(
    session: Session,
    step: Step,
    together: Together,
    packs: Sequence[tuple[int, PackedBatch]],
    stop: Stop,
    seen: Seen | None,
) -> Tensor:
    """Gradients of these packs, with their places in the step, into the masters; returns the mean
    loss times the loss scale."""
    device = session.machine.device
    total = torch.zeros((), device=device)
    share = torch.full((), session.scale.value / max(1, together.supervised), device=device)
    ranks = session.machine.ranks
    for micro, packed in packs:
        # In the middle of a step the others would wait for this process.
        if stop.asked and ranks.alone:
            raise Interrupted(f"in step {step.number + 1}, which will be done again")
        number = micro * ranks.count + ranks.number
        torch.manual_seed(seed_of(session.recipe.train.seed, step.number, number))
        known = None if seen is None else step.known[micro]
        weight = share if packed.sample_ids else torch.zeros_like(share)
        try:
            if micro:
                session.masters.add_up()
            total += _learn(session, packed, weight, seen, known)
        except torch.OutOfMemoryError as error:
            # Another try has as much room as this one, and that of recordings, too.
            freed = session.passes.forget()
            processes = 1 if session.most_alone is None else ranks.count
            budget = session.progress.budget
            raise too_much(
                error, packed, budget, learning=True, processes=processes, freed=freed
            ) from None
    return total


def _micro_batches(session: Session, step: Step, together: Together) -> Sequence[PackedBatch]:
    """The packs of a step. Where layers are put together for each, as many as any process has."""
    if not session.parallel.sharded:
        return step.packs
    return *step.packs, *[nothing()] * (together.packs - len(step.packs))


def _learn(
    session: Session, packed: PackedBatch, share: Tensor, seen: Seen | None, known: Tensor | None
) -> Tensor:
    """A pack forwards and backwards. Its own function: what it holds on the device ends with it."""
    batch = session.placed(packed)
    if known is not None and packed.share is not None:
        known = wanted(known, packed.share)
    features_MKD = None if seen is None or known is None else seen.of(known)
    return session.passes.learn(batch, features_MKD, share)


def recorded(device: torch.device) -> torch.cuda.Event | None:
    """An event that happens when a GPU has done all it was given so far; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
