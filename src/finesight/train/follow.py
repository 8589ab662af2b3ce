"""A process that learns with the first one of its run, and writes nothing."""

from __future__ import annotations

import io
from contextlib import closing, nullcontext

from rich.console import Console

from finesight.config import Recipe
from finesight.errors import Interrupted
from finesight.train.loader import read_steps
from finesight.train.looking import looked_at
from finesight.train.prepare import Session, prepare
from finesight.train.progress import Screen
from finesight.train.ranks import Ranks
from finesight.train.run import Run
from finesight.train.seen import Seen
from finesight.train.step import take_step
from finesight.train.stop import Stop
from finesight.train.tower import OffCard, leaves


def follow(recipe: Recipe, ranks: Ranks, resume: bool) -> None:
    """Take this process's share of every step that the first one takes, from the step where that
    begins. Raises Interrupted where a signal ended the run."""
    screen = Screen(Console(file=io.StringIO()))
    session = prepare(recipe, Run(recipe.output), screen, resume, ranks)
    stop, device = Stop(), session.machine.device
    with stop.listening(), looked_at(session, screen, stop) as looked:
        rests = looked.seen is not None and leaves(device)
        with OffCard(session.model).away() if rests else nullcontext():
            _steps(session, stop, looked.seen)


def _steps(session: Session, stop: Stop, seen: Seen | None) -> None:
    machine, progress = session.machine, session.progress
    data = session.data if seen is None else session.data.without_pictures(seen.known)
    data = data.within(progress.budget.pack_tokens)
    reading = read_steps(data, progress.step, machine.workers, machine.device.type == "cuda")
    with closing(reading) as steps:
        for step in steps:
            together = machine.ranks.agreed(step, stop.number)
            if together.over or together.signal:
                break
            take_step(session, step, stop, seen, together).wait()
            progress.step += 1
        else:
            return
    stop.heed(together.signal)
    if stop.asked:
        raise Interrupted("the first process of the run was asked to stop, or told so")
