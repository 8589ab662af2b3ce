"""A run from its recipe to its results."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress

from rich.console import Console

from finesight.config import Recipe
from finesight.data.lines import Unreadable
from finesight.errors import Interrupted
from finesight.storage import require_room
from finesight.track.kinds import require_packages
from finesight.track.tracking import tracked
from finesight.train.budget import Budget, FullMemory, enough_memory, within_memory
from finesight.train.checkpoint import Checkpoints
from finesight.train.finish import RunResult, best_of, finish, finished, report
from finesight.train.follow import follow
from finesight.train.image_record import save_image_record
from finesight.train.live import LivePage
from finesight.train.looking import looked_at
from finesight.train.measure import history, measure, waited
from finesight.train.prepare import Session, prepare
from finesight.train.process import set_to_learn
from finesight.train.progress import Screen
from finesight.train.ranks import Errand, Ranks, ShareFailed, StepTorn, joined
from finesight.train.rehearse import rehearse
from finesight.train.report import Reporter, plan_of
from finesight.train.room import checkpoint_bytes, require_room_for_run
from finesight.train.run import Run
from finesight.train.saving import saving_of
from finesight.train.schedule import in_steps, saved_every
from finesight.train.seen import Seen
from finesight.train.step import coming_steps, take_step
from finesight.train.stop import Stop
from finesight.train.tower import OffCard, leaves
from finesight.train.waiting import awaited
from finesight.train.workers import WorkerDied


def train(
    recipe: Recipe, *, resume: bool = False, console: Console | None = None
) -> RunResult | None:
    """Train what the recipe says, from the start or from the newest checkpoint of its output.

    Of several processes that a launcher started, the first writes the run; the others follow it
    and come back with nothing.

    Raises UserError for what the user can mend, before anything is written where possible, and
    Interrupted, with a checkpoint of the last finished step, when one of `stop.SIGNALS` arrives.
    """
    with joined() as ranks:
        if ranks.first:
            return _lead(recipe, ranks, resume, Screen(console or Console(stderr=True)))
        follow(recipe, ranks, resume)
        return None


def _lead(recipe: Recipe, ranks: Ranks, resume: bool, screen: Screen) -> RunResult:
    start = time.perf_counter()
    run = Run(recipe.output)
    run.check_free(resume)
    with ExitStack() as stack, enough_memory():
        begun = resume and run.begun
        if begun:
            # Nobody may write into the run while it is read.
            stack.enter_context(run.locked())
        if (result := finished(run)) is not None:
            screen.say(f"{run.folder}: the run has come to its end already")
            if not run.report.exists():
                report(run, screen)
            return result
        require_packages(recipe.track)
        session = prepare(recipe, run, screen, resume=begun, ranks=ranks)
        checkpoints = Checkpoints(run.checkpoints, recipe.train.keep)
        require_room_for_run(session, len(checkpoints.steps()))
        if not begun:
            stack.enter_context(run.locked())
            # Another process may have been quicker.
            run.check_free(resume=False)
        session.agree()
        stop = Stop()
        stack.enter_context(_leading(ranks, stop))
        if not session.progress.step:
            run.begin(recipe, session.manifest())
        save_image_record(run.images, session.images())
        checkpoints.set_aside(session.progress.step)
        run.forget_after(session.progress.step, session.progress.measured)
        run.keep_metric(recipe)
        run.note_dropped(session.train.survey.dropped)
        trackers = tracked(recipe, run.folder, session.progress.step, screen.say)
        reporter = Reporter(session, screen, stack.enter_context(trackers))
        rehearse(session)
        reporter.started(time.perf_counter() - start)
        device = session.machine.device
        with stop.listening(), set_to_learn(device):
            result = Loop(session, screen, reporter, stop).go()
        reporter.finished(result)
        return result


@contextmanager
def _leading(ranks: Ranks, stop: Stop) -> Iterator[None]:
    """Let the processes that follow this one go at the end of the block, however it ends."""
    try:
        yield
    except StepTorn:
        raise
    except BaseException:
        _dismiss(ranks, stop)
        raise
    _dismiss(ranks, stop)


def _dismiss(ranks: Ranks, stop: Stop) -> None:
    # Some may have ended: what went wrong there is theirs to say.
    with suppress(RuntimeError, ShareFailed):
        ranks.called(Errand.OVER, signal=stop.number)


class Loop:
    """What one process does for a run."""

    def __init__(self, session: Session, screen: Screen, reporter: Reporter, stop: Stop) -> None:
        self.session, self.screen, self.reporter, self.stop = session, screen, reporter, stop
        self.total = len(session.course)
        settings, evaluation = session.recipe.train, session.recipe.eval
        self.save_every = saved_every(settings, self.total)
        # Without a metric, the held-out loss costs so little that it is had with every checkpoint.
        every = self.save_every
        if evaluation is not None:
            every = in_steps(evaluation.every or 0, self.total)
        self.measure_every = every if session.held_out else 0
        self.patience = evaluation.patience if evaluation else None
        self.checkpoints = Checkpoints(session.run.checkpoints, settings.keep)
        self.saving = saving_of(session, self.checkpoints)
        self.tower = OffCard(session.model)
        self.ranks = session.machine.ranks
        self.page = LivePage(session.run, screen)

    def go(self) -> RunResult:
        """Measure, train, save, measure again, write the results."""
        progress = self.session.progress
        self.screen.say(plan_of(self.session))
        if progress.step:
            self.screen.say(f"going on after step {progress.step} of {self.total}")
        with self.page.going(progress):
            return self.whole()

    def whole(self) -> RunResult:
        """All that is left of the run; what interrupts it leaves a checkpoint."""
        progress = self.session.progress
        try:
            if self.session.held_out is not None and progress.measured < 0:
                self.measure("before")
            self.steps()
            self.save()
            if self.session.held_out is not None and progress.measured < progress.step:
                self.measure("after" if self.patience is None else f"step-{progress.step}")
            self.saving.wait()
            self.page.rest()
            return finish(self.session, self.screen, self.checkpoints)
        except (Interrupted, WorkerDied, Unreadable, FullMemory, ShareFailed) as cause:
            self.reporter.catch_up()
            self.save()
            self.saving.wait()
            # A scheduler may send the signal to the workers as well.
            if not self.stop.asked:
                raise
            raise self.interruption() from cause
        finally:
            # Nobody else may have the run's folder while it is written to.
            if (failed := self.saving.end()) is not None:
                self.screen.say(f"the last checkpoint was not written: {failed}")

    def steps(self) -> None:
        """Every step that is left, until patience ends, and what falls due between them."""
        if not self.after_step() or self.session.progress.step == self.total:
            return
        budget, device = self.session.progress.budget, self.session.machine.device
        with self.looked() as seen, self.reporter.showing(self.total):
            within_memory(
                budget, device, self.screen.say, lambda some: self.steps_within(some, seen)
            )
            self.reporter.catch_up()

    def steps_within(self, budget: Budget, seen: Seen | None) -> None:
        """Go on from where the run stands, in packs of this budget."""
        session, progress = self.session, self.session.progress
        session.keep_within(budget)
        with closing(coming_steps(session, seen)) as steps:
            for step, wait in awaited(steps, session.machine.device):
                together = self.ranks.agreed(step, self.stop.number)
                self.stop.heed(together.signal)
                if together.signal and not self.ranks.alone:
                    self.stop.check()
                taken = take_step(session, step, self.stop, seen, together)
                progress.step += 1
                self.reporter.take(taken, wait)
                if not self.after_step():
                    break

    @contextmanager
    def looked(self) -> Iterator[Seen | None]:
        """Within the block, what is known of all pictures, where looking at them beforehand pays.
        Then the tower's weights leave a GPU, but for measuring."""
        session, start = self.session, time.perf_counter()
        self.ranks.called(Errand.LOOK)
        with looked_at(session, self.screen, self.stop) as looked:
            self.reporter.looked(time.perf_counter() - start, looked)
            rests = looked.seen is not None and leaves(session.machine.device)
            with self.tower.away() if rests else nullcontext():
                yield looked.seen

    def after_step(self) -> bool:
        """Measure, save and stop where it is time to; otherwise do not wait for the device. False
        when the patience is at its end."""
        measuring, saving = self.due(self.measure_every), self.due(self.save_every)
        if not (measuring or saving or self.stop.asked):
            return True
        self.reporter.catch_up()
        progress = self.session.progress
        if measuring and progress.measured < progress.step:
            self.measure(f"step-{progress.step}")
        if saving:
            self.save()
        self.stop.check()
        self.reporter.restart_clock()
        return not (measuring and self.patience_ends())

    def patience_ends(self) -> bool:
        """Whether as many measurements as the recipe allows have passed without a better headline:
        a function of what the run has noted, so that a resumed run ends where it would have."""
        if self.patience is None or waited(history(self.session.run)) < self.patience:
            return False
        self.screen.say(
            f"stopping after step {self.session.progress.step} of {self.total}:"
            f" {self.patience} measurements without a better score (eval.patience)"
        )
        return True

    def due(self, every: int) -> bool:
        """Whether the step just finished is one of every so many. After the last step everything
        happens anyway."""
        step = self.session.progress.step
        return every > 0 and 0 < step < self.total and step % every == 0

    def measure(self, name: str) -> None:
        """Measure and report; the best measurement between start and end earns a checkpoint."""
        progress = self.session.progress
        start = time.perf_counter()
        self.ranks.called(Errand.MEASURE)
        with self.tower.back():
            measured = measure(self.session, name, self.screen, self.stop)
        self.reporter.measured(measured, name, time.perf_counter() - start)
        progress.measured = progress.step
        found = best_of(measured)
        if found.better_than(progress.best) and 0 < progress.step < self.total:
            progress.best = found
            self.save()
        if progress.step < self.total:
            # Here and not in the page's thread: processes that read data may be forked next, and
            # would inherit the locks of a thread that decodes pictures.
            self.page.write()

    def save(self) -> None:
        """A checkpoint of the steps finished so far, unless it is there already."""
        session = self.session
        if session.progress.step:
            self.require_room()
            # A checkpoint must not know of a measurement that nobody can read any more.
            session.run.flush()
            # What it raises the others must not have begun to wait for.
            self.saving.wait()
            session.together.called(Errand.SAVE)
            tensors = session.masters.values(), session.masters.moments()
            self.saving.save(session.state(), *tensors)

    def require_room(self) -> None:
        """Raises UserError where the disk has no room for another checkpoint."""
        step, folder = self.session.progress.step, self.checkpoints.folder
        if step not in self.checkpoints.steps():
            require_room(
                folder,
                checkpoint_bytes(self.session),
                f"a checkpoint of step {step}",
                "free some space, then start again with --resume",
            )

    def interruption(self) -> Interrupted:
        """Where the run stands and how to go on."""
        step = self.session.progress.step
        saved = f"checkpoint of step {step} written" if step else "no step was finished"
        assert self.stop.signal is not None, "an interruption without a signal"
        return Interrupted(
            f"stopped by {self.stop.signal.name}, {saved} in {self.session.run.folder};"
            " the same command with --resume goes on"
        )
