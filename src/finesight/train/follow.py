"""A process that learns with the first one of its run, and writes nothing."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from rich.console import Console

from finesight.config import Recipe
from finesight.errors import Interrupted, UserError
from finesight.train.budget import Budget, enough_memory, within_memory
from finesight.train.checkpoint import Checkpoints
from finesight.train.finish import finished, settled
from finesight.train.loader import Step
from finesight.train.looking import looked_at
from finesight.train.measure import measure
from finesight.train.moved import check_moved
from finesight.train.prepare import Session, prepare
from finesight.train.process import set_to_learn
from finesight.train.progress import Screen
from finesight.train.ranks import Deserted, Errand, Ranks, ShareFailed, StepTorn, Together
from finesight.train.run import Run
from finesight.train.saving import saving_of
from finesight.train.seen import Seen
from finesight.train.step import coming_steps, take_step
from finesight.train.stop import Stop
from finesight.train.tower import OffCard, leaves


def follow(recipe: Recipe, ranks: Ranks, resume: bool) -> None:
    """Take this process's share of everything that the first one does. Raises Interrupted where a
    signal ended the run."""
    run, screen, stop = Run(recipe.output), Screen(Console(file=io.StringIO())), Stop()
    if resume and finished(run) is not None:
        return
    with enough_memory():
        session = prepare(recipe, run, screen, resume, ranks)
        session.agree()
        with stop.listening(), set_to_learn(session.machine.device):
            _Follower(session, screen, stop).go()
    if stop.asked:
        raise Interrupted("asked to stop, as the first process of the run was")


class _Follower:
    """What a process does for a run that another one leads."""

    def __init__(self, session: Session, screen: Screen, stop: Stop) -> None:
        self.session, self.screen, self.stop = session, screen, stop
        self.ranks = session.machine.ranks
        self.checkpoints = Checkpoints(session.run.checkpoints, session.recipe.train.keep)
        self.saving = saving_of(session, self.checkpoints)
        self.tower = OffCard(session.model)
        self.over = False

    def go(self) -> None:
        """Until the first process says that the run is over, whatever goes wrong here."""
        try:
            self.wait()
            self.saving.wait()
        except StepTorn:
            raise
        except Exception as error:
            self.outlast()
            # That another one was asked to stop is no fault.
            if not (isinstance(error, ShareFailed) and self.stop.asked):
                raise

    def steps(self) -> None:
        """Learn, until there are no more steps or a signal has come."""
        session = self.session
        budget, device = session.progress.budget, session.machine.device
        with ExitStack() as stack:
            with self.or_failed():
                looking = looked_at(session, self.screen, self.stop)
                seen = stack.enter_context(looking).seen
            if seen is not None and leaves(device):
                stack.enter_context(self.tower.away())
            within_memory(
                budget, device, self.screen.say, lambda some: self.steps_within(some, seen)
            )

    def steps_within(self, budget: Budget, seen: Seen | None) -> None:
        """Go on from where the run stands, in packs of this budget, as the first process does."""
        session, before = self.session, None
        session.keep_within(budget)
        with closing(coming_steps(session, seen)) as steps:
            while (step := self.next_of(steps)) is not None:
                together = self.agreed(step)
                if self.over or together.signal:
                    return
                taken = take_step(session, step, self.stop, seen, together)
                session.progress.step += 1
                # One step behind, as the first process is, which judges the figures.
                if before is not None:
                    before.synchronize()
                before = taken.event

    @contextmanager
    def or_failed(self) -> Iterator[None]:
        """What is raised in the block, while the others wait for this process, they hear of."""
        try:
            yield
        except Interrupted:
            # All have raised it.
            raise
        except Exception:
            together = self.ranks.called(Errand.FAILED, signal=self.stop.number)
            self.over = together.errand is Errand.OVER
            raise

    def next_of(self, steps: Iterator[Step]) -> Step | None:
        """The next one, if there is one."""
        with self.or_failed():
            return next(steps, None)

    def agreed(self, step: Step) -> Together:
        """What all processes have of a step, after what comes before it."""
        while True:
            together = self.ranks.agreed(step, self.stop.number)
            self.stop.heed(together.signal)
            if together.errand is Errand.STEP or self.has_done(together):
                return together

    def outlast(self) -> None:
        """Come to all meetings until the run is over, whatever goes wrong in what is asked for:
        the others would wait."""
        while not self.over:
            try:
                self.wait()
            except (Deserted, RuntimeError):
                return
            except UserError:
                continue

    def wait(self) -> None:
        """Do what is asked for, until the run is over."""
        while not self.over:
            together = self.ranks.called(Errand.WAIT, signal=self.stop.number)
            self.stop.heed(together.signal)
            self.has_done(together)

    def has_done(self, asked: Together) -> bool:
        """Take a share of an errand other than a step. Whether it was the last one."""
        session = self.session
        match asked.errand:
            case Errand.SAVE:
                tensors = session.masters.values(), session.masters.moments()
                self.saving.save(session.state(), *tensors)
            case Errand.MEASURE:
                with self.tower.back():
                    # A signal is heeded before the next step, where the others hear of it.
                    measure(session, "", self.screen, Stop())
            case Errand.LOOK:
                self.steps()
            case Errand.SETTLE:
                with settled(session, self.checkpoints, asked.argument) as rows:
                    check_moved(rows)
            case Errand.OVER:
                self.over = True
            case _:
                # The first process waits for nothing.
                pass
        return self.over
