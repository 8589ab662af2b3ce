"""Console output of commands: progress bars on a terminal, occasional lines otherwise."""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finesight.errors import escape_unprintable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

ProgressCallback = Callable[[int], None]
"""Callback that receives the number of newly processed samples or images."""

MAX_LOG_LINES = 20
"""Approximate maximum number of step lines printed when the output is not a terminal."""

LOG_INTERVAL_S = 10.0
"""Minimum seconds between two lines of a stage when the output is not a terminal."""


_STAGE_LINE = re.compile(r"^[^\n]*: (\d{1,12})/(\d{1,12})(?:, (\d{1,12}) s left)?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class StageProgress:
    """Progress of a stage, as a line of the console states it.

    Attributes:
        remaining_s: Estimated remaining seconds; None if unknown.
    """

    num_done: int
    total: int
    remaining_s: float | None


def find_progress(log: str) -> StageProgress | None:
    """Return the progress of the last stage in an output; None without an unfinished one."""
    lines = _STAGE_LINE.findall(log)
    if not lines:
        return None
    num_done, total, remaining = lines[-1]
    if num_done == total:
        return None
    return StageProgress(int(num_done), int(total), float(remaining) if remaining else None)


class ProgressConsole:
    """Console for messages and progress bars, by default on standard error."""

    def __init__(self, rich_console: Console | None = None) -> None:
        from rich.console import Console  # slow to import, and not needed for the help

        self.rich_console = rich_console or Console(stderr=True)

    def log(self, text: str) -> None:
        """Print a line of plain text, without rich markup and control characters."""
        plain = escape_unprintable(text)
        self.rich_console.print(plain, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def progress_stage(self, title: str, total: float) -> Iterator[Callable[[float], None]]:
        """Show the progress of a stage of `total` samples within the context.

        On a terminal, this is a bar with the remaining time, otherwise a line every
        `LOG_INTERVAL_S` seconds, and one at the end if there were others.

        Yields:
            Callback to call with the number of newly processed samples.
        """
        done = num_first = 0.0
        num_lines = 0
        first_s = logged_s = time.perf_counter()
        with self._create_bar() as bar:
            task = bar.add_task(title, total=total, figures="")

            def on_progress(count: float) -> None:
                nonlocal done, num_first, first_s, logged_s, num_lines
                done += count
                bar.advance(task, count)
                now = time.perf_counter()
                if not num_first:
                    # The first samples include the warm-up.
                    num_first = done
                    first_s = now
                is_due = now - logged_s >= LOG_INTERVAL_S
                if done == total:
                    is_due = num_lines > 0
                if bar.disable and count and done <= total and is_due:
                    logged_s = now
                    num_lines += 1
                    text = f"{title}: {done:.0f}/{total:.0f}"
                    if num_first < done < total:
                        remaining_s = (now - first_s) / (done - num_first) * (total - done)
                        text += f", {remaining_s:.0f} s left"
                    self.log(text)

            yield on_progress

    @contextmanager
    def activity(self, title: str) -> Iterator[None]:
        """Show the elapsed time of a stage, within the context, for stages without a sample count.

        If the output is not a terminal, a line is printed after `LOG_INTERVAL_S` seconds, and
        another one at the end.
        """
        start_s = time.perf_counter()
        timer = threading.Timer(LOG_INTERVAL_S, self.log, [f"{title} ..."])
        with self._create_bar(has_count=False) as bar:
            bar.add_task(title, total=None)
            if bar.disable:
                timer.start()
            try:
                yield
            finally:
                timer.cancel()
        if bar.disable and (seconds := time.perf_counter() - start_s) >= LOG_INTERVAL_S:
            self.log(f"{title}: {seconds:.0f} s")

    @contextmanager
    def step_progress(self, total: int, done: int) -> Iterator[StepProgress]:
        """Show a progress bar for the optimizer steps of a run within the context.

        Args:
            total: Number of steps of the run.
            done: Number of steps finished before the start or resume.
        """
        with self._create_bar() as bar:
            task = bar.add_task("training", total=total, completed=done, figures="")
            yield StepProgress(self, bar, task, total)

    def _create_bar(self, *, has_count: bool = True) -> Progress:
        """Create a bar of steps or samples, or of the elapsed time."""
        from rich import progress

        columns: list[progress.ProgressColumn] = [
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=20),
        ]
        if has_count:
            columns += [
                progress.TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
                progress.TextColumn("{task.fields[figures]}", markup=False),
                progress.TimeRemainingColumn(),
            ]
        else:
            columns.append(progress.TimeElapsedColumn())
        return progress.Progress(
            *columns,
            console=self.rich_console,
            transient=True,
            disable=not self.rich_console.is_terminal,
        )


MAX_DATA_WAIT_FRACTION = 0.03
"""Fraction of the step time spent waiting for data above which it is reported."""

WAITS = {"data_wait_s": "waiting for data", "rollout_s": "sampling", "reward_s": "scoring"}
"""Titles of the parts of the step time before the update, by metric."""


class StepProgress:
    """Progress bar that shows the metrics of the last optimizer step."""

    def __init__(self, console: ProgressConsole, bar: Progress, task: TaskID, total: int) -> None:
        self._console = console
        self._bar = bar
        self._task = task
        self._total_steps = total
        self._start_s = time.perf_counter()
        self._start_step: int | None = None
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished step.

        On a terminal, this updates the progress bar. Otherwise, it prints a line for about
        `MAX_LOG_LINES` steps of the run.
        """
        step = int(metrics["step"])
        if self._start_step is None:
            # Waits of the first step are left out: they include the start of the workers.
            self._start_step = step - 1
        else:
            for key in ("step_s", *WAITS):
                self._seconds[key] += metrics.get(key, 0.0)
        text = format_metrics(metrics)
        for key, title in WAITS.items():
            if self._seconds[key] > MAX_DATA_WAIT_FRACTION * self._seconds["step_s"]:
                text += f"  {100 * self._seconds[key] / self._seconds['step_s']:.0f} % {title}"
        if self._console.rich_console.is_terminal:
            self._bar.update(self._task, completed=step, figures=text)
        elif step % max(1, self._total_steps // MAX_LOG_LINES) == 0 or step == self._total_steps:
            seconds = time.perf_counter() - self._start_s
            remaining_s = seconds / (step - self._start_step) * (self._total_steps - step)
            self._console.log(f"step {step}/{self._total_steps}  {text}  {remaining_s:.0f} s left")


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Format loss or rewards, throughput, MFU and peak memory of a step as one line."""
    loss = metrics["loss"]
    fields = ["no loss" if loss is None else f"loss {loss:.4f}"]
    if metrics.get("completions/clipped_ratio") is not None:
        # The loss of a policy does not measure its quality.
        fields = _format_rewards(metrics)
    fields.append(f"{metrics['samples_per_s']:.1f} samples/s")
    fields.append(f"{metrics['tokens_per_s']:.0f} tokens/s")
    if metrics["mfu"]:
        fields.append(f"{100 * metrics['mfu']:.0f} % MFU")
    fields.append(f"peak {metrics['peak_memory_gb']:.1f} GB")
    return "  ".join(fields)


def _format_rewards(metrics: Mapping[str, Any]) -> list[str]:
    """Format mean and deviation of the rewards, and fractions of responses without a signal."""
    reward = metrics.get("reward")
    std = metrics.get("reward_std", 0.0)
    equal = metrics.get("frac_reward_zero_std", 1.0)
    truncated = metrics["completions/clipped_ratio"]
    return [
        "no reward" if reward is None else f"reward {reward:.4g} ± {std:.2g}",
        f"equal groups {100 * equal:.0f} %",
        f"truncated {100 * truncated:.0f} %",
    ]
