"""A process that learns with the first one of its run, and writes nothing."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext

from rich.console import Console

from finesight.config import Recipe
from finesight.errors import Interrupted
from finesight.train.finish import finished
from finesight.train.loader import read_steps
from finesight.train.looking import looked_at
from finesight.train.prepare import Session, prepare
from finesight.train.progress import Screen
from finesight.train.ranks import Ranks, ShareFailed
from finesight.train.run import Run
from finesight.train.seen import Seen
from finesight.train.step import take_step
from finesight.train.stop import Stop
from finesight.train.tower import OffCard, leaves


def follow(recipe: Recipe, ranks: Ranks, resume: bool) -> None:
    """Take this process's share of every step that the first one takes, from the step where that
    begins. Raises Interrupted where a signal ended the run."""
    run, screen, stop = Run(recipe.output), Screen(Console(file=io.StringIO())), Stop()
    if resume and finished(run) is not None:
        return
    session = prepare(recipe, run, screen, resume, ranks)
    ranks.same(session.identity)
    device = session.machine.device
    with stop.listening(), _or_give_up(ranks), looked_at(session, screen, stop) as looked:
        rests = looked.seen is not None and leaves(device)
        with OffCard(session.model).away() if rests else nullcontext():
            _steps(session, stop, looked.seen)
    if stop.asked:
        raise Interrupted("asked to stop, as the first process of the run was")


@contextmanager
def _or_give_up(ranks: Ranks) -> Iterator[None]:
    """What is raised in the block, other than in the middle of a step, ends all processes."""
    try:
        yield
    except _InStep as error:
        raise error.cause from error
    except ShareFailed:
        raise
    except Exception:
        ranks.give_up()
        raise


class _InStep(Exception):
    """Something was raised by a step: all processes know that it was not taken."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _steps(session: Session, stop: Stop, seen: Seen | None) -> None:
    machine, progress = session.machine, session.progress
    data = session.data if seen is None else session.data.without_pictures(seen.known)
    data = data.within(progress.budget.pack_tokens)
    reading = read_steps(data, progress.step, machine.workers, machine.device.type == "cuda")
    before = None
    with closing(reading) as steps:
        for step in steps:
            together = machine.ranks.agreed(step, stop.number)
            stop.heed(together.signal)
            if together.over:
                return
            if together.signal:
                # The first process writes a checkpoint before it lets the others go.
                machine.ranks.dismiss()
                return
            try:
                taken = take_step(session, step, stop, seen, together)
            except Exception as error:
                raise _InStep(error) from error
            progress.step += 1
            # One step behind, as the first process is, which judges the figures.
            if before is not None:
                before.synchronize()
            before = taken.event
