"""The figures of a run, as they come: to `metrics.jsonl`, to trackers, and to the screen."""

from __future__ import annotations

import platform
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from finesight.evaluate.answered import note_lines
from finesight.model.experts import Experts
from finesight.model.few_bits import left_in_16_bits
from finesight.model.frozen import frozen_weights
from finesight.model.parts import part_of
from finesight.report.histograms import Counts, half_octaves
from finesight.track.tracking import Tracking
from finesight.train.finish import RunResult
from finesight.train.looking import Looked
from finesight.train.measure import Measured, memory_gb
from finesight.train.prepare import Session, versions
from finesight.train.progress import Screen, Steps
from finesight.train.step import Taken, recorded
from finesight.train.survey import Glance
from finesight.train.telling import Telling
from finesight.train.tolerance import Tolerance
from finesight.train.waiting import Wait


class Clock:
    """Time from the end of one step to the end of the next, as the device that computes saw it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        """The next lap starts now."""
        self._wall, self._event = time.perf_counter(), recorded(self._device)

    def lap(self, event: torch.cuda.Event | None) -> float:
        """Seconds from the last lap's end until now or, on a GPU, until `event`, which has
        happened."""
        now = time.perf_counter()
        seconds = now - self._wall
        if event is not None and self._event is not None:
            seconds = self._event.elapsed_time(event) / 1000
        self._wall, self._event = now, event
        return max(seconds, 1e-9)


class Reporter:
    """Takes finished steps one behind: the device works on the next one while the figures of the
    last are read."""

    def __init__(self, session: Session, screen: Screen, tracking: Tracking) -> None:
        self._session, self._screen = session, screen
        self._telling = Telling(session, tracking)
        self._tolerance = Tolerance(session, screen.say)
        self._behind: tuple[Taken, Wait] | None = None
        self._view: Steps | None = None
        self._clock = Clock(session.machine.device)

    def started(self, seconds: float) -> None:
        """Note, for whoever reads the run later, what goes on from here on what and where, and
        that preparing it took so many seconds."""
        session, machine = self._session, self._session.machine
        corpora = {"train": session.train, "eval": session.held_out}
        here = {
            "step": session.progress.step,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "prepared_s": seconds,
            "folder": str(Path.cwd()),
            "spread": spread_of(session.train.survey.glances),
        }
        facts = {
            "steps": len(session.course),
            "device": device_name(machine.device),
            "precision": machine.precision,
            "workers": machine.workers,
            "processes": machine.ranks.count,
            "peak_tflops": machine.peak / 1e12,
            "versions": versions(),
            "data": {
                name: {
                    "samples": len(texts.survey.kept),
                    "tokens": texts.survey.tokens,
                    "fingerprint": texts.corpus.fingerprint,
                }
                for name, texts in corpora.items()
                if texts is not None
            },
        }
        session.run.note(here | facts)
        self._telling.began(facts)

    def looked(self, seconds: float, looked: Looked) -> None:
        """Say and note what is known of all pictures; finding or computing it took so many
        seconds."""
        self._screen.say(looked.why)
        took = {"seen_s": seconds} if looked.seen is not None else {}
        step = self._session.progress.step
        self._session.run.note({"step": step, **took, **looked.as_json()})

    @contextmanager
    def showing(self, total: int) -> Iterator[None]:
        """Within the block, steps are shown on the screen."""
        with self._screen.steps(total, self._session.progress.step) as view:
            self._view = view
            self.restart_clock()
            try:
                yield
            finally:
                self._view = None

    def restart_clock(self) -> None:
        """The next step's time starts now."""
        self._clock.restart()

    def take(self, taken: Taken, wait: Wait) -> None:
        """Report the step before this one, and keep this one, whose data came after `wait`, while
        the device works on it."""
        self.catch_up()
        self._behind = taken, wait
        if taken.event is None:
            self.catch_up()

    def catch_up(self) -> None:
        """Wait for the step that was kept, if any, and report it. Raises UserError when it was one
        void step, or one damaged picture, too many."""
        behind, self._behind = self._behind, None
        if behind is None:
            return
        taken, wait = behind
        figures = self._figures(taken, wait)
        self._session.run.note(figures)
        self._telling.step(figures)
        for dropped in taken.together.dropped:
            self._screen.say(f"dropped {dropped.id}: {dropped.reason}")
        if self._view is not None:
            self._view.show(figures)
        self._tolerance.check()

    def _figures(self, taken: Taken, wait: Wait) -> dict[str, Any]:
        judged = self._tolerance.judge(taken)
        seconds = self._clock.lap(taken.event)
        session, step, whole = self._session, taken.step, taken.together
        position = min((step.number + 1) * session.recipe.train.batch, session.course.samples)
        return {
            "step": step.number + 1,
            "epoch": round(position / session.course.epoch_length, 4),
            "loss": judged.loss,
            "grad_norm": judged.norm,
            "lr": session.masters.rates(taken.factor),
            "samples": whole.samples,
            "tokens": whole.tokens,
            "supervised": whole.supervised,
            "packs": len(step.packs),
            **taken.budget.model_dump(),
            "dropped": [dropped.id for dropped in whole.dropped],
            "skipped": session.scale.skipped + session.progress.void,
            "void": judged.void,
            "jumped": judged.jumped,
            "seconds": seconds,
            "waited_s": wait.seconds,
            "samples_per_s": whole.samples / seconds,
            "tokens_per_s": whole.tokens / seconds,
            # None where transformers computes what nobody counts.
            "utilisation": taken.operations / seconds / session.machine.peak or None,
            "memory_gb": memory_gb(session.machine.device),
        }

    def measured(self, measured: Measured, name: str, seconds: float) -> None:
        """Report a measurement that took so many seconds, its answers in the file of this name."""
        self._session.run.note(measured.as_json() | {"seconds": seconds})
        self._telling.measured(measured, name)
        shown = "  ".join(f"{score} {value:.4f}" for score, value in measured.scores.items())
        interval = measured.intervals.get(measured.headline or "")
        if interval is not None:
            shown += (
                f"  ({measured.headline}: 95 % interval {interval.low:.4f} to {interval.high:.4f})"
            )
        self._screen.say(
            f"after {measured.step} steps: held-out loss {measured.held_out_loss:.4f}  {shown}"
        )
        for line in note_lines(measured.notes) if not measured.step else ():
            self._screen.say(line)

    def finished(self, result: RunResult) -> None:
        """Tell trackers what came of it."""
        self._telling.finished(result)


def spread_of(glances: Sequence[Glance]) -> dict[str, Counts]:
    """How many tokens the training samples that were looked at have, and their pictures patches."""
    return {
        "tokens": half_octaves(seen.tokens for seen in glances),
        "patches": half_octaves(h * w for seen in glances for _, h, w in seen.grids),
    }


def device_name(device: torch.device) -> str:
    """What computes, as its maker calls it where that can be known."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def plan_of(session: Session) -> str:
    """What is about to happen, in one line."""
    recipe, machine = session.recipe, session.machine
    tune = recipe.tune
    modes = {
        "vision": tune.vision,
        "merger": tune.merger,
        "language": tune.language,
        "embeddings": tune.embeddings,
    }
    learning = ", ".join(f"{part} {mode}" for part, mode in modes.items() if mode != "frozen")
    numbers = session.parallel.numbers
    whole = sum(parameter.numel() for parameter in session.model.parameters())
    few = frozen_weights(session.model)
    whole += sum(weight.numbers for weight in few.values())
    epochs = session.course.samples / session.course.epoch_length
    return (
        f"training {learning}: {numbers:,} of {whole:,} numbers{_kept(session, few)};"
        f" {len(session.course)} steps of {recipe.train.batch} samples ({epochs:.2f} epochs)"
        f" in {machine.precision} on {machine.device}, {machine.workers} reading processes"
    )


def _kept(session: Session, few: Collection[str]) -> str:
    """What is special about weights that stay as they are, by the names of those in few bits."""
    tune, said = session.recipe.tune, []
    if tune.nf4:
        said.append(f"weights of {' and '.join(tune.nf4)} in NF4")
    if tune.fp8:
        left = left_in_16_bits(session.model, tune.fp8)
        but = f", but for {left} layers whose sizes do not allow it" if left else ""
        said.append(f"frozen weights of {' and '.join(tune.fp8)} multiplied in FP8{but}")
    chosen = (*(tune.nf4 or ()), *(tune.fp8 or ()))
    published = dict.fromkeys(part_of(name) for name in few if part_of(name) not in chosen)
    if published:
        said.append(f"weights of {' and '.join(published)} in four bits, as published")
    stacks = any(isinstance(module, Experts) for module in session.model.modules())
    if tune.language == "lora" and stacks:
        said.append("experts carry no adapters: they stay as they are")
    return "".join(f" ({what})" for what in said)
