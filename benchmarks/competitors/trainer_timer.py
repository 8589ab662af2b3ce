"""Measure steps of a transformers Trainer with a callback."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from transformers import TrainerCallback

from competitors.job import CompetitorJob, write_results


class TrainerTimer(TrainerCallback):  # type: ignore[misc]
    """Records time and samples of each optimizer step without synchronization.

    On a GPU, CUDA events mark the ends of steps and are read after training.
    """

    def __init__(self, job: CompetitorJob) -> None:
        self._job = job
        self._is_cuda = torch.cuda.is_available()
        self._events: list[Any] = []
        self._samples: list[int] = []
        self._step_samples, self._num_tokens, self._num_patches = 0, 0, 0
        self._first_s = self._last_s = 0.0

    def on_train_begin(self, *_: object, model: torch.nn.Module, **__: object) -> None:
        """Count model inputs with a hook, and start the timer."""
        # Registered first: one peer replaces images by features in a hook of its own.
        model.register_forward_pre_hook(self._count_inputs, with_kwargs=True, prepend=True)
        self._start_time = time.time()
        self._record_event()

    def _count_inputs(self, _: object, __: object, kwargs: dict[str, Any]) -> None:
        # Only shapes: reading values would synchronize. One image is one sample.
        self._step_samples += len(kwargs["image_grid_thw"])
        self._num_patches += len(kwargs["pixel_values"])
        self._num_tokens += kwargs["input_ids"].numel()

    def _record_event(self) -> None:
        if not self._is_cuda:
            self._events.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def on_step_end(self, _: object, state: Any, control: Any, **__: object) -> None:
        """Record the end of a step, or on a GPU the end of its launches."""
        self._record_event()
        self._samples.append(self._step_samples)
        self._step_samples = 0
        if len(self._samples) == 1:
            self._synchronize()
            self._first_s = time.time() - self._job.started_at
        if time.time() - self._start_time > self._job.time_limit_s:
            control.should_training_stop = True

    def on_train_end(self, _: object, state: Any, __: object, **___: object) -> None:
        """Read the events and write the results, before the model is saved."""
        self._synchronize()
        self._last_s = time.time() - self._job.started_at
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        samples = max(1, sum(self._samples))
        figures = {
            "setting": dict(self._job.settings),
            "first_step_s": self._first_s,
            "last_step_s": self._last_s,
            "seconds": self._step_seconds(),
            "samples": self._samples,
            "num_tokens": self._num_tokens / samples,
            "patches": self._num_patches / samples,
            "peak_gb": peak_memory_gb(),
            "loss": [float(losses[0]), float(losses[-1])] if losses else None,
        }
        write_results(self._job, figures)

    def _synchronize(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()

    def _step_seconds(self) -> list[float]:
        pairs = zip(self._events[:-1], self._events[1:], strict=True)
        if self._is_cuda:
            return [before.elapsed_time(after) / 1000 for before, after in pairs]
        return [after - before for before, after in pairs]


def peak_memory_gb() -> float:
    """Return the peak memory in GB of the GPU, or of the process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
