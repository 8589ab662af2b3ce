"""Forwarding of training events to experiment trackers: metrics, example images and alerts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finesight.evaluate.task_metrics import LOWER_IS_BETTER
from finesight.track.tracked_images import render_example_images
from finesight.track.tracker_manager import TrackerManager
from finesight.train.evaluation import EvalResult, load_eval_history
from finesight.train.finalize import RunResult
from finesight.train.setup import TrainState


class TrackingEvents:
    """Sender of training events to the experiment trackers of a run, if it has any."""

    def __init__(self, state: TrainState, tracking: TrackerManager) -> None:
        self._state, self._tracking = state, tracking

    def log_start(self, facts: Mapping[str, Any]) -> None:
        """Send the start of a run, with hardware and data."""
        parallel = self._state.parallel
        self._tracking.start_run({**facts, "num_trainable_params": parallel.num_trainable_params})

    def log_step(self, metrics: Mapping[str, Any]) -> None:
        """Send the metrics of a step, and an alert for an anomaly."""
        scalars = {name: value for name, value in metrics.items() if isinstance(value, float)}
        learning_rates = {f"learning_rate/{part}": lr for part, lr in metrics["lr"].items()}
        self._tracking.log_metrics(metrics["step"], scalars | learning_rates)
        if metrics["nonfinite_samples"]:
            text = (
                f"step {metrics['step']} had a non-finite loss or gradient; its update was skipped"
            )
            self._tracking.send_alert("warning", "non-finite step", text)
        if metrics["loss_spike_samples"]:
            text = f"the loss of step {metrics['step']} increased to {metrics['loss']:.4g}"
            self._tracking.send_alert("warning", "loss spike", text)

    def log_evaluation(self, eval_result: EvalResult, name: str) -> None:
        """Send the scores and example images of an evaluation, and an alert if it regressed.

        Args:
            eval_result: Result of the evaluation.
            name: Name of the file in `predictions/` with its predictions.
        """
        if not self._tracking.is_active:
            return
        scores = {f"scores/{score}": value for score, value in eval_result.scores.items()}
        loss = {"validation_loss": eval_result.validation_loss}
        self._tracking.log_metrics(eval_result.step, loss | scores)
        predictions_dir = self._state.run_dir.predictions_dir
        images = render_example_images(
            predictions_dir / "before.jsonl", predictions_dir / f"{name}.jsonl"
        )
        self._tracking.log_images(eval_result.step, images)
        baseline = load_eval_history(self._state.run_dir)[0]
        if (text := _describe_regression(baseline, eval_result)) is not None:
            self._tracking.send_alert("warning", "worse than before training", text)

    def log_result(self, result: RunResult) -> None:
        """Send an alert that the run has finished, with its result."""
        text = f"{result.steps} steps"
        if result.before is not None and result.after is not None:
            name, before = _primary_score(result.before)
            _, after = _primary_score(result.after)
            text += f", {name} {before:.4f} before, {after:.4f} after"
        self._tracking.send_alert("info", "run finished", text)


def _primary_score(eval_result: EvalResult) -> tuple[str, float]:
    """Return name and value of the primary metric, by default the validation loss."""
    if eval_result.primary_metric is None:
        return "validation_loss", eval_result.validation_loss
    return eval_result.primary_metric, eval_result.scores[eval_result.primary_metric]


def _describe_regression(baseline: EvalResult, current: EvalResult) -> str | None:
    """Describe the regression if an evaluation is worse than before training; otherwise None."""
    (name, old), (current_name, new) = _primary_score(baseline), _primary_score(current)
    if name != current_name or not (new > old if name in LOWER_IS_BETTER else new < old):
        return None
    return f"{name} {new:.4f} after {current.step} steps, {old:.4f} before"
