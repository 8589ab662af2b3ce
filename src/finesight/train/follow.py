"""A process that learns with the first one of its run, and writes nothing."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from rich.console import Console

from finesight.config import Recipe
from finesight.errors import Interrupted
from finesight.train.finish import finished
from finesight.train.looking import looked_at
from finesight.train.prepare import Session, prepare
from finesight.train.progress import Screen
from finesight.train.ranks import Ranks
from finesight.train.run import Run
from finesight.train.seen import Seen
from finesight.train.step import coming_steps, take_step
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
    with stop.listening(), ExitStack() as stack:
        with _or_give_up(ranks):
            seen = stack.enter_context(looked_at(session, screen, stop)).seen
        if seen is not None and leaves(session.machine.device):
            stack.enter_context(OffCard(session.model).away())
        _steps(session, stop, seen)
    if stop.asked:
        raise Interrupted("asked to stop, as the first process of the run was")


@contextmanager
def _or_give_up(ranks: Ranks) -> Iterator[None]:
    """What is raised in the block, while the others wait for this process's share, ends them."""
    try:
        yield
    except Exception:
        ranks.give_up()
        raise


def _steps(session: Session, stop: Stop, seen: Seen | None) -> None:
    ranks, before = session.machine.ranks, None
    with closing(coming_steps(session, seen)) as steps:
        while True:
            with _or_give_up(ranks):
                step = next(steps, None)
            if step is None:
                return
            together = ranks.agreed(step, stop.number)
            stop.heed(together.signal)
            if together.over:
                return
            if together.signal:
                # The first process writes a checkpoint before it lets the others go.
                ranks.dismiss()
                return
            taken = take_step(session, step, stop, seen, together)
            session.progress.step += 1
            # One step behind, as the first process is, which judges the figures.
            if before is not None:
                before.synchronize()
            before = taken.event
