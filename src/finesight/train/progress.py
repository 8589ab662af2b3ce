"""What a person sees while a run goes on: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from finesight.report.facts import WAITING

Advance = Callable[[int], None]
"""To be called with the number of samples that are through with a stage."""

LINES = 20
"""Lines in a log for each stage, at most and about."""


class Screen:
    """Stages of a run, shown on `console`."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """A line for people, not interpreted in any way."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        """A stage of `total` samples; yields what to call with each number of finished ones."""
        with self._bar() as bar:
            task = bar.add_task(title, total=total, figures="")

            def advance(count: int) -> None:
                bar.advance(task, count)

            yield advance

    @contextmanager
    def steps(self, total: int, done: int) -> Iterator[Steps]:
        """The optimiser steps of a run that has finished `done` of `total`."""
        with self._bar() as bar:
            task = bar.add_task("training", total=total, completed=done, figures="")
            yield Steps(self, bar, task, total)

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )


class Steps:
    """Takes the figures of each step, as `metrics.jsonl` has them."""

    def __init__(self, screen: Screen, bar: Progress, task: TaskID, total: int) -> None:
        self._screen, self._bar, self._task, self._total = screen, bar, task, total
        self._start, self._first = time.perf_counter(), -1
        self._seconds = self._waited = 0.0

    def show(self, figures: Mapping[str, Any]) -> None:
        """Move the bar on, or write a line where there is no terminal."""
        step = int(figures["step"])
        # The wait for the first step is that for the readers to start.
        if self._first >= 0:
            self._seconds += figures["seconds"]
            self._waited += figures["waited_s"]
        self._first = step - 1 if self._first < 0 else self._first
        text = in_short(figures) + self._idle()
        if self._screen.console.is_terminal:
            self._bar.update(self._task, completed=step, figures=text)
        elif step % max(1, self._total // LINES) == 0 or step == self._total:
            seconds = time.perf_counter() - self._start
            left = seconds / (step - self._first) * (self._total - step)
            self._screen.say(f"step {step}/{self._total}  {text}  {left:.0f} s left")

    def _idle(self) -> str:
        """The share of all steps' time in which the device waited for data, where it matters."""
        if self._waited <= WAITING * self._seconds:
            return ""
        return f"  {100 * self._waited / self._seconds:.0f} % waiting for data"


def in_short(figures: Mapping[str, Any]) -> str:
    """The figures of a step on a line."""
    loss = figures["loss"]
    pieces = [
        "no loss" if loss is None else f"loss {loss:.4f}",
        f"{figures['samples_per_s']:.1f} samples/s",
        f"{figures['tokens_per_s']:.0f} tokens/s",
        *([f"{100 * figures['utilisation']:.0f} % of peak"] if figures["utilisation"] else []),
        f"{figures['memory_gb']:.1f} GB",
    ]
    return "  ".join(pieces)
