"""Check the training of a run: loss curve, loss spikes, overfitting and data wait."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from finesight.doctor.diagnosis import Diagnosis, format_command, make_error, make_ok, make_warning
from finesight.doctor.rerun_commands import (
    get_learning_rates,
    get_num_workers,
    lower_learning_rates,
    rerun_command,
    resume_command,
    scale_duration,
    scale_learning_rates,
)
from finesight.report.run_reader import JsonObject, RunRecord, is_finite
from finesight.report.summary import MAX_DATA_WAIT_FRACTION

MIN_STEPS = 12
"""Minimum number of steps for the checks of the loss curve."""

NUM_WINDOWS = 10
"""Maximum number of windows into which the loss curve is divided."""

RISE_RATIO = 1.25
"""Ratio of the final loss to the minimum above which the loss has risen."""

SPIKE_RATIO = 1.5
"""Ratio of the maximum loss to the first loss above which the loss has spiked.

Smaller increases may be noise between batches.
"""

FLAT_FRACTION = 0.02
"""Relative decrease of the loss below which the loss is flat."""

VANISHED_GRAD_RATIO = 0.1
"""Ratio of the final to the initial gradient norm below which gradients have vanished."""

CONVERGED_LOSS_RATIO = 0.5
"""Ratio of the final to the initial loss below which training has converged."""

MIN_LEARNABLE_LOSS = 0.05
"""Initial loss in nats per token below which training has little effect."""

LOW_LEARNING_RATE = 5e-5
"""Learning rate below which a flat loss is attributed to the learning rate.

It applies to adapters and to full fine-tuning.
"""

MIN_WEIGHT_CHANGE = 0.05
"""Relative weight change below which a flat loss is attributed to small updates."""

MAX_USEFUL_WORKERS = 12
"""Maximum number of data loader workers that a diagnosis suggests."""

MIN_LOSS_SPIKES = 3
"""Minimum number of loss spikes for a warning."""

OVERFIT_RATIO = 1.05
"""Ratio of the last to the best validation loss above which a run has overfitted."""


@dataclass(frozen=True, slots=True)
class LossCurve:
    """Training loss of a run, as medians of windows of consecutive steps.

    Attributes:
        first_loss: Loss of the first step.
        window_medians: Median loss of each window.
        noise: Standard deviation of the loss within windows, estimated from the median deviation.
        initial_grad_norm: Median gradient norm at the start of training.
        final_grad_norm: Median gradient norm at the end of training.
    """

    first_loss: float
    window_medians: tuple[float, ...]
    noise: float
    initial_grad_norm: float
    final_grad_norm: float

    @classmethod
    def from_steps(cls, steps: Sequence[JsonObject]) -> LossCurve | None:
        """Build the loss curve from steps with finite values.

        Returns None if there are fewer than `MIN_STEPS`.
        """
        losses = [line["loss"] for line in steps if is_finite(line.get("loss"))]
        norms = [line["grad_norm"] for line in steps if is_finite(line.get("grad_norm"))]
        if len(losses) < MIN_STEPS or len(norms) < MIN_STEPS:
            return None
        windows = [window for window in _split_windows(losses) if window]
        medians = tuple(median(window) for window in windows)
        deviations = [
            abs(loss - window_median)
            for window, window_median in zip(windows, medians, strict=True)
            for loss in window
        ]
        edge_length = max(2, len(norms) // NUM_WINDOWS)
        return cls(
            losses[0],
            medians,
            1.4826 * median(deviations),
            median(norms[:edge_length]),
            median(norms[-edge_length:]),
        )

    @property
    def initial(self) -> float:
        return self.window_medians[0]

    @property
    def final(self) -> float:
        return self.window_medians[-1]

    @property
    def min_loss(self) -> float:
        return min(self.window_medians)

    @property
    def has_risen(self) -> bool:
        """True if the final loss is clearly above the minimum loss."""
        return (
            self.final > RISE_RATIO * self.min_loss and self.final - self.min_loss > 4 * self.noise
        )

    @property
    def max_loss(self) -> float:
        return max(self.window_medians)

    @property
    def has_spiked(self) -> bool:
        """True if the loss was far above the first loss during training."""
        return (
            self.max_loss > SPIKE_RATIO * self.first_loss
            and self.max_loss - self.first_loss > 6 * self.noise
        )

    @property
    def has_vanished_gradients(self) -> bool:
        """True if the gradients vanished while the loss stayed high."""
        is_flat = (
            abs(self.window_medians[len(self.window_medians) // 2] - self.final)
            < FLAT_FRACTION * self.initial
        )
        has_vanished = self.final_grad_norm < VANISHED_GRAD_RATIO * self.initial_grad_norm
        return has_vanished and is_flat and self.final > CONVERGED_LOSS_RATIO * self.initial

    @property
    def is_flat(self) -> bool:
        """True if the loss decreased by less than its noise."""
        return self.initial - self.final < max(FLAT_FRACTION * self.initial, self.noise)


def _split_windows(values: Sequence[float]) -> list[Sequence[float]]:
    count = min(NUM_WINDOWS, len(values) // 3)
    ends = [round(len(values) * index / count) for index in range(count + 1)]
    return [values[start:end] for start, end in pairwise(ends)]


def check_training(run_record: RunRecord) -> list[Diagnosis]:
    """Check the recorded metrics of training steps and evaluations."""
    curve = LossCurve.from_steps(run_record.steps)
    diagnoses = [
        *_check_loss(run_record, curve),
        *_check_loss_spikes(run_record),
        *_check_overfitting(run_record),
        *_check_data_wait(run_record),
    ]
    if curve is not None and not any(diagnosis.severity == "error" for diagnosis in diagnoses):
        description = f"the loss fell from {curve.first_loss:.3g} to {curve.final:.3g}"
        diagnoses.insert(
            0,
            make_ok("loss", description)
            if not curve.is_flat
            else make_ok("loss", "the initial loss is already low"),
        )
    return diagnoses


def _check_loss(run_record: RunRecord, curve: LossCurve | None) -> Iterator[Diagnosis]:
    if curve is None:
        count = len(run_record.steps)
        yield make_warning(
            "too-short",
            f"{count} steps: too few for the loss checks",
            why=f"the loss checks need at least {MIN_STEPS} steps",
            remedy=rerun_command(
                run_record, *scale_duration(run_record, MIN_STEPS / max(1, count))
            ),
        )
        return
    rates_text = ", ".join(f"{value:g}" for value in get_learning_rates(run_record).values())
    if curve.has_risen:
        yield make_error(
            "learning-rate-too-high",
            f"the loss rose from {curve.min_loss:.3g} to {curve.final:.3g}"
            f" (learning rate {rates_text})",
            why="the steps are too large and destroy what the model has learned",
            remedy=rerun_command(run_record, *lower_learning_rates(run_record)),
        )
    elif curve.has_spiked:
        make_diagnosis = (
            make_warning if curve.final < CONVERGED_LOSS_RATIO * curve.first_loss else make_error
        )
        yield make_diagnosis(
            "learning-rate-too-high",
            f"the loss rose from {curve.first_loss:.3g} to {curve.max_loss:.3g} before it fell to"
            f" {curve.final:.3g} (learning rate {rates_text})",
            why="the first steps were too large and destroyed pretrained knowledge",
            remedy=rerun_command(run_record, *lower_learning_rates(run_record)),
        )
    elif curve.has_vanished_gradients:
        yield make_error(
            "learning-rate-too-high",
            f"the loss is constant at {curve.final:.3g}, and gradients vanished: their"
            f" norm fell from {curve.initial_grad_norm:.2g} to {curve.final_grad_norm:.2g}"
            f" (learning rate {rates_text})",
            why="the first steps were so large that the model generates the same output for"
            " all inputs",
            remedy=rerun_command(run_record, *lower_learning_rates(run_record)),
        )
    elif curve.is_flat:
        yield _diagnose_flat_loss(run_record, curve, rates_text)


def _diagnose_flat_loss(run_record: RunRecord, curve: LossCurve, rates_text: str) -> Diagnosis:
    description = f"the loss is flat: {curve.initial:.4g} initially, {curve.final:.4g} finally"
    if curve.initial < MIN_LEARNABLE_LOSS:
        return make_warning(
            "low-initial-loss",
            description,
            why="the loss was low before the first step",
            remedy=format_command(
                "finesight", "data", "show", str(run_record.folder / "recipe.yaml")
            ),
        )
    learning_rate, weight_change = (
        max(get_learning_rates(run_record).values()),
        _max_weight_change(run_record),
    )
    if learning_rate < LOW_LEARNING_RATE or weight_change < MIN_WEIGHT_CHANGE:
        change_note = (
            f"; the trained weights changed by {weight_change:.1%}"
            if weight_change < MIN_WEIGHT_CHANGE
            else ""
        )
        return make_error(
            "loss-flat",
            f"{description} (learning rate {rates_text})",
            why=f"the learning rate is too low{change_note}",
            remedy=rerun_command(
                run_record,
                *scale_learning_rates(
                    run_record, 1e-4 / learning_rate if learning_rate < LOW_LEARNING_RATE else 10.0
                ),
            ),
        )
    return make_error(
        "loss-flat",
        f"{description} (learning rate {rates_text})",
        why="the learning rate is not too low: the answers may be unrelated to the images, or"
        " the loss mask may exclude all tokens",
        remedy=format_command("finesight", "data", "show", str(run_record.folder / "recipe.yaml")),
    )


def _max_weight_change(run_record: RunRecord) -> float:
    """Return the largest relative weight change of a trained part; infinity if unknown."""
    rows = [row for row in run_record.param_changes or () if row.get("is_trained")]
    changes = [row["relative_change"] for row in rows if is_finite(row.get("relative_change"))]
    return max(changes, default=math.inf)


def _check_loss_spikes(run_record: RunRecord) -> Iterator[Diagnosis]:
    spikes = [line for line in run_record.steps if line.get("loss_spike_samples")]
    if len(spikes) < MIN_LOSS_SPIKES:
        return
    sample_ids = [str(sample_id) for line in spikes for sample_id in line["loss_spike_samples"]][:4]
    steps = ", ".join(str(line["step"]) for line in spikes[:6])
    yield make_warning(
        "loss-spikes",
        f"the loss has {len(spikes)} spikes (steps {steps})",
        why="the learning rate is almost too high, or single samples are wrong:"
        f" {', '.join(sample_ids)}",
        remedy=rerun_command(
            run_record, *scale_learning_rates(run_record, 1 / 3), "train.warmup=0.1"
        ),
    )


def _check_overfitting(run_record: RunRecord) -> Iterator[Diagnosis]:
    """Detect overfitting: the validation loss rises while the training loss falls."""
    evaluations = [
        line for line in run_record.evaluations if is_finite(line.get("validation_loss"))
    ]
    if len(evaluations) < 2:
        return
    best = min(evaluations, key=lambda line: float(line["validation_loss"]))
    last = evaluations[-1]
    best_loss, last_loss = float(best["validation_loss"]), float(last["validation_loss"])
    losses_since = [line["loss"] for line in run_record.steps if line["step"] > best["step"]]
    losses_since = [loss for loss in losses_since if is_finite(loss)]
    is_falling = len(losses_since) >= 6 and median(losses_since[-3:]) < median(losses_since[:3])
    if last_loss <= OVERFIT_RATIO * best_loss or not is_falling:
        return
    if run_record.recipe.get("eval"):
        overrides = ["eval.every=0.1", "eval.patience=2"]
    elif best["step"]:
        overrides = scale_duration(
            run_record, int(best["step"]) / int(run_record.steps[-1]["step"])
        )
    else:
        overrides = scale_learning_rates(run_record, 0.3)
    yield make_error(
        "overfitted",
        f"the validation loss rose from {best_loss:.3g} after step {best['step']} to"
        f" {last_loss:.3g}, while the training loss fell to"
        f" {median(losses_since[-3:]):.3g}",
        why="the model memorizes the samples: stop earlier, or add samples",
        remedy=rerun_command(run_record, *overrides),
    )


def _check_data_wait(run_record: RunRecord) -> Iterator[Diagnosis]:
    timed_steps = [line for line in run_record.steps if line.get("data_wait_s") is not None]
    seconds = sum(float(line["step_s"]) for line in timed_steps)
    wait_fraction = (
        sum(float(line["data_wait_s"]) for line in timed_steps) / seconds if seconds else 0.0
    )
    if wait_fraction <= MAX_DATA_WAIT_FRACTION:
        return
    num_workers = get_num_workers(run_record)
    suggested_workers = max(
        (num_workers or 0) + 1, min(MAX_USEFUL_WORKERS, (os.cpu_count() or 4) - 2)
    )
    overrides = [f"train.num_workers={suggested_workers}"]
    yield make_warning(
        "data-wait",
        f"{wait_fraction:.0%} of the step time is data wait",
        why=f"{num_workers if num_workers is not None else 'the'} data loader workers are too"
        " few, or the images are too large: a smaller image size (image) also loads"
        " faster",
        remedy=rerun_command(run_record, *overrides)
        if run_record.result is not None
        else resume_command(run_record, *overrides),
    )
