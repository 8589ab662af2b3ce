"""Counts and times what a transformers Trainer does, whoever set it up."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from transformers import TrainerCallback

from contestants.job import Job, tell


class Clock(TrainerCallback):  # type: ignore[misc]
    """Time and samples of every optimiser step, without making the device wait for it: on a GPU
    steps end with events, which are read when all is over."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._cuda = torch.cuda.is_available()
        self._marks: list[Any] = []
        self._samples: list[int] = []
        self._now, self._places, self._patches = 0, 0, 0
        self._first_s = self._last_s = 0.0

    def on_train_begin(self, *_: object, model: torch.nn.Module, **__: object) -> None:
        """Watch what the model is given, and start."""
        # First: one of the peers puts features in the place of pictures by such a hook of its own.
        model.register_forward_pre_hook(self._count, with_kwargs=True, prepend=True)
        self._begun = time.time()
        self._mark()

    def _count(self, _: object, __: object, given: dict[str, Any]) -> None:
        # Shapes only: a number of them would have to be waited for. One picture is one sample.
        self._now += len(given["image_grid_thw"])
        self._patches += len(given["pixel_values"])
        self._places += given["input_ids"].numel()

    def _mark(self) -> None:
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def on_step_end(self, _: object, state: Any, control: Any, **__: object) -> None:
        """A step is over, or on a GPU all of it has been asked for."""
        self._mark()
        self._samples.append(self._now)
        self._now = 0
        if len(self._samples) == 1:
            self._wait()
            self._first_s = time.time() - self._job.began
        if time.time() - self._begun > self._job.seconds:
            control.should_training_stop = True

    def on_train_end(self, _: object, state: Any, __: object, **___: object) -> None:
        """Read the events and tell everything; saving comes after this."""
        self._wait()
        self._last_s = time.time() - self._job.began
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        samples = max(1, sum(self._samples))
        figures = {
            "setting": dict(self._job.setting),
            "first_step_s": self._first_s,
            "last_step_s": self._last_s,
            "seconds": self._seconds(),
            "samples": self._samples,
            "places": self._places / samples,
            "patches": self._patches / samples,
            "peak_gb": peak_gb(),
            "loss": [float(losses[0]), float(losses[-1])] if losses else None,
        }
        tell(self._job, figures)

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _seconds(self) -> list[float]:
        pairs = zip(self._marks[:-1], self._marks[1:], strict=True)
        if self._cuda:
            return [before.elapsed_time(after) / 1000 for before, after in pairs]
        return [after - before for before, after in pairs]


def peak_gb() -> float:
    """Most memory that this process had in use, in 10^9 bytes: of the GPU, or else its own."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
