"""Detection of training anomalies: non-finite steps, loss spikes and corrupt images.

Too many consecutive non-finite steps or too many corrupt images end the run. Loss spikes are only
logged.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from statistics import median
from typing import Any, NamedTuple

from finesight.errors import UserError
from finesight.train.setup import TrainState
from finesight.train.step import StepOutput

MAX_CONSECUTIVE_NONFINITE = 5
"""Number of consecutive non-finite steps that end a run.

A single non-finite step may be caused by its samples.
"""

MAX_CORRUPT_FRACTION, MIN_CORRUPT_LIMIT = 0.1, 8
"""Limits for samples with corrupt images: fraction of the training samples, and minimum count.

A run ends when the number of these samples exceeds both limits.
"""

LOSS_WINDOW, MIN_LOSS_WINDOW = 64, 16
"""Maximum and minimum number of recent losses that a new loss is compared with."""

SPIKE_DEVIATIONS = 8.0
"""Distance from the median loss, in standard deviations, above which a loss is a spike."""

MAX_LISTED_SAMPLES = 64
"""Maximum number of samples listed in a message; `metrics.jsonl` lists all."""


class StepCheck(NamedTuple):
    """Checked loss and gradient norm of a training step, with the samples of an anomaly.

    Attributes:
        loss: Mean loss; NaN if it is not finite, None if the step had no supervised tokens or
            overflowed in fp16.
        grad_norm: Gradient norm, with the same special values.
        nonfinite_samples: Locations of all samples of a non-finite step; otherwise empty.
        spike_samples: Locations of all samples of a step with a loss spike; otherwise empty.
    """

    loss: float | None
    grad_norm: float | None
    nonfinite_samples: tuple[str, ...] = ()
    spike_samples: tuple[str, ...] = ()


class AnomalyDetector:
    """Detector of non-finite steps, loss spikes and corrupt images; checks the steps in order.

    A resumed run restores the recent losses and non-finite samples from `metrics.jsonl`, so it
    makes the same decisions as an uninterrupted run. The count of corrupt images starts at zero,
    because the images may have been repaired.
    """

    def __init__(self, state: TrainState, log: Callable[[str], None]) -> None:
        self._state, self._log = state, log
        self._losses: deque[float] = deque(maxlen=LOSS_WINDOW)
        self._corrupt_samples: dict[str, str] = {}
        self._nonfinite_samples: list[str] = []
        for line in state.run_dir.iter_metrics():
            if "loss" in line:
                self._restore_step(line)

    def check_step(self, step_output: StepOutput) -> StepCheck:
        """Wait for a training step, check its loss and gradient norm, and update the counters.

        Non-finite steps and loss spikes are logged.
        """
        self._corrupt_samples |= step_output.global_stats.skipped
        loss, grad_norm = step_output.wait()
        progress = self._state.progress
        if not step_output.is_applied:
            return StepCheck(None, None)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            progress.consecutive_nonfinite_steps, self._nonfinite_samples = 0, []
            is_spike = is_loss_spike(loss, self._losses)
            if is_spike:
                self._log_loss_spike(step_output.step_batch.step_index, loss)
            self._losses.append(loss)
            return StepCheck(
                loss,
                grad_norm,
                spike_samples=self._sample_locations(step_output.step_batch.step_index)
                if is_spike
                else (),
            )
        sample_locations = self._sample_locations(step_output.step_batch.step_index)
        progress.nonfinite_steps += 1
        progress.consecutive_nonfinite_steps += 1
        self._nonfinite_samples += sample_locations
        self._log(
            f"skipped non-finite step {step_output.step_batch.step_index + 1}: loss {loss},"
            f" gradient norm {grad_norm}; {progress.consecutive_nonfinite_steps} in a row, the run"
            f" ends after {MAX_CONSECUTIVE_NONFINITE};"
            f" samples: {_format_locations(sample_locations)}"
        )
        return StepCheck(_or_nan(loss), _or_nan(grad_norm), nonfinite_samples=sample_locations)

    def _restore_step(self, line: Mapping[str, Any]) -> None:
        """Restore the recent losses and non-finite samples from one line of `metrics.jsonl`."""
        if line.get("nonfinite_samples"):
            self._nonfinite_samples += line["nonfinite_samples"]
        elif line["loss"] is not None:
            self._nonfinite_samples = []
            self._losses.append(line["loss"])

    def raise_if_exceeded(self) -> None:
        """Raise if the run has too many non-finite steps or corrupt images.

        Raises:
            UserError: A limit is exceeded; the error lists the samples.
        """
        progress, dataset_stats = self._state.progress, self._state.train_data.stats
        if progress.consecutive_nonfinite_steps >= MAX_CONSECUTIVE_NONFINITE:
            raise UserError(
                f"{progress.consecutive_nonfinite_steps} steps in a row had a non-finite loss or"
                f" gradient; their samples: {_format_locations(self._nonfinite_samples)}",
                where="training",
                expected="finite values; the weights are those before these steps",
                remedy="check these samples (finesight data check), lower train.learning_rate,"
                " lengthen train.warmup, or use train.precision=bf16",
            )
        num_samples = len(dataset_stats.sample_indices)
        max_corrupt = max(MIN_CORRUPT_LIMIT, MAX_CORRUPT_FRACTION * num_samples)
        if len(self._corrupt_samples) > max_corrupt:
            name, reason = next(reversed(self._corrupt_samples.items()))
            raise UserError(
                f"{len(self._corrupt_samples)} of {num_samples} samples have corrupt images,"
                f" the last one {name}: {reason}",
                where="data.train",
                expected=f"at most {round(max_corrupt)} of them",
                remedy="restore the images and start again with --resume, or remove the samples"
                " with `finesight data check --fix`",
            )

    def _log_loss_spike(self, step_index: int, loss: float) -> None:
        self._log(
            f"loss spike in step {step_index + 1}: {loss:.4g}, the median of the previous"
            f" {len(self._losses)} losses is {median(self._losses):.4g}"
        )

    def _sample_locations(self, step_index: int) -> tuple[str, ...]:
        """Return the file locations of all samples of a step, including those of other ranks."""
        corpus = self._state.train_data.corpus
        return tuple(
            corpus.location(index) for index in self._state.sampler.batch_indices(step_index)
        )


def is_loss_spike(loss: float, recent_losses: Collection[float]) -> bool:
    """Return whether a loss is a spike compared with the recent losses.

    A spike is larger than two times the median and more than `SPIKE_DEVIATIONS` standard deviations
    above it. The standard deviation is estimated from the median absolute deviation, which is
    robust to outliers (Hampel 1974). The result is False for fewer than `MIN_LOSS_WINDOW` recent
    losses.
    """
    if len(recent_losses) < MIN_LOSS_WINDOW:
        return False
    center = median(recent_losses)
    deviation = 1.4826 * median(abs(recent_loss - center) for recent_loss in recent_losses)
    return loss - center > max(SPIKE_DEVIATIONS * deviation, center)


def _or_nan(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _format_locations(locations: Iterable[str]) -> str:
    unique = list(dict.fromkeys(locations))
    more = (
        f" and {len(unique) - MAX_LISTED_SAMPLES} more" if len(unique) > MAX_LISTED_SAMPLES else ""
    )
    return ", ".join(unique[:MAX_LISTED_SAMPLES]) + more
