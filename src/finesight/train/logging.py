"""Logging of steps and evaluations to `metrics.jsonl`, trackers and console, and anomaly checks.

Too many consecutive non-finite steps or too many corrupt images end the run. Loss spikes are only
logged.
"""

from __future__ import annotations

import math
import platform
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch

from finesight.encode.batch import PackedBatch
from finesight.errors import Step, UserError, format_count
from finesight.evaluate.eval_case import note_lines
from finesight.evaluate.eval_result import EvalResult, select_eval_samples
from finesight.evaluate.score_format import format_score, format_score_interval
from finesight.metric_components import get_score
from finesight.model.layers import MoeExperts
from finesight.model.quant.base import find_quantized_weights
from finesight.model.trainable import MODEL_PARTS, get_part
from finesight.model.weights_io import count_unquantized_layers
from finesight.progress import StepProgress
from finesight.report.histogram_counts import count_half_octaves
from finesight.train.callbacks import CallbackList
from finesight.train.dataset_stats import join_names
from finesight.train.device_timing import DataWait, record_event
from finesight.train.evaluation import load_eval_history, peak_memory_gb, resolve_interim_limit
from finesight.train.finalize import RunResult, get_ranking_score
from finesight.train.run_dir import RunDir
from finesight.train.setup import library_versions
from finesight.train.state import StepOutput, TrainState
from finesight.train.tracking import RunTracking
from finesight.train.vision_cache_builder import VisionCacheResult

FULL_PREFIX = "all_samples/"
"""Prefix of the names of tracked metrics of all validation samples instead of the common subset."""


class TrackingEvents:
    """Sender of training events to the experiment trackers of a run, if it has any."""

    def __init__(self, run_dir: RunDir, tracking: RunTracking) -> None:
        self._run_dir = run_dir
        self._tracking = tracking

    def log_step(self, metrics: Mapping[str, Any]) -> None:
        """Send the metrics of a step, and an alert for an anomaly."""
        self._tracking.log_metrics(metrics["step"], _list_step_metrics(metrics))
        if metrics["nonfinite_samples"]:
            text = (
                f"step {metrics['step']} had a non-finite loss or gradient; its update was skipped"
            )
            self._tracking.send_alert("warning", "non-finite step", text)
        if metrics["loss_spike_samples"]:
            text = f"the loss of step {metrics['step']} increased to {metrics['loss']:.4g}"
            self._tracking.send_alert("warning", "loss spike", text)

    def log_evaluation(
        self, eval_result: EvalResult, name: str, sample_ids: Collection[str] | None = None
    ) -> None:
        """Send the scores and example images of an evaluation, and an alert if it regressed.

        Args:
            name: Name of the file in `predictions/` with its predictions.
            sample_ids: IDs of the samples that may be shown; None for all.
        """
        if not self._tracking.is_active:
            return
        self._tracking.log_metrics(eval_result.step, _list_eval_metrics(eval_result, ""))
        if eval_result.full is not None:
            full_metrics = _list_eval_metrics(eval_result.full, FULL_PREFIX)
            self._tracking.log_metrics(eval_result.step, full_metrics)
        predictions_dir = self._run_dir.predictions_dir
        before_file = predictions_dir / "before.jsonl"
        after_file = predictions_dir / f"{name}.jsonl"
        self._tracking.log_examples(eval_result.step, before_file, after_file, sample_ids)
        baseline = load_eval_history(self._run_dir)[0]
        name, old, new, is_comparable = _compare_scores(baseline, eval_result)
        is_worse = new < old
        title = "below the score before training"
        if get_score(name).lower_is_better:
            is_worse = new > old
            title = "above the score before training"
        if is_comparable and is_worse:
            steps = format_count(eval_result.step, "step")
            count = eval_result.num_samples
            scores = format_score(new, count), format_score(old, count)
            text = f"{name} {scores[0]} after {steps}, {scores[1]} before"
            self._tracking.send_alert("warning", title, text)

    def log_result(self, result: RunResult) -> None:
        """Send an alert that the run has finished, with its result."""
        text = format_count(result.steps, "step")
        if result.before is not None and result.after is not None:
            name, before, after, is_comparable = _compare_scores(result.before, result.after)
            text += f", {name} "
            count = result.after.num_samples
            if is_comparable:
                text += f"{format_score(before, count)} before, "
            text += f"{format_score(after, count)} after"
        self._tracking.send_alert("info", "run finished", text)


def _list_step_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a step under their names in a tracker."""
    scalars = {name: value for name, value in metrics.items() if isinstance(value, float)}
    for part, learning_rate in metrics["lr"].items():
        scalars[f"learning_rate/{part}"] = learning_rate
    return scalars


def _list_eval_metrics(result: EvalResult, prefix: str) -> dict[str, float]:
    """Return the losses and scores of an evaluation under their names in a tracker."""
    metrics = {f"{prefix}validation_loss": result.validation_loss}
    for name, value in result.loss_metrics.items():
        metrics[f"{prefix}eval_{name}"] = value
    for name, value in result.scores.items():
        metrics[f"{prefix}scores/{name}"] = value
    return metrics


def _compare_scores(before: EvalResult, after: EvalResult) -> tuple[str, float, float, bool]:
    """Return name and values of the primary metric, and whether the values are comparable."""
    is_comparable = after.as_best_eval().is_comparable_to(before.as_best_eval())
    name = before.primary_metric or "validation_loss"
    return name, get_ranking_score(before), get_ranking_score(after), is_comparable


MAX_CONSECUTIVE_NONFINITE = 5
"""Number of consecutive non-finite steps that end a run.

A single non-finite step may be caused by its samples.
"""

MAX_CORRUPT_FRACTION = 0.1
"""Maximum fraction of training samples with corrupt images.

A run ends when the number of these samples exceeds this limit and `MIN_CORRUPT_LIMIT`.
"""

MIN_CORRUPT_LIMIT = 8
"""Number of samples with corrupt images that every run may have."""

LOSS_WINDOW = 64
"""Maximum number of recent losses that a new loss is compared with."""

MIN_LOSS_WINDOW = 16
"""Minimum number of recent losses that a new loss is compared with."""

SPIKE_DEVIATIONS = 8.0
"""Distance from the median loss, in standard deviations, above which a loss is a spike."""

MAX_LISTED_SAMPLES = 64
"""Maximum number of samples listed in a message; `metrics.jsonl` lists all."""


class AnomalyDetector:
    """Detector of non-finite steps, loss spikes and corrupt images; checks the steps in order.

    A resumed run restores the recent losses and non-finite samples from `metrics.jsonl`, so it
    makes the same decisions as an uninterrupted run. The count of corrupt images starts at zero,
    because the images may have been repaired.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._log = state.run.console.log
        self._losses: deque[float] = deque(maxlen=LOSS_WINDOW)
        self._corrupt_samples: dict[str, str] = {}
        self._nonfinite_samples: list[str] = []
        for line in state.run.run_dir.iter_metrics():
            if line.get("nonfinite_samples"):
                self._nonfinite_samples += line["nonfinite_samples"]
            elif line.get("loss") is not None:
                self._nonfinite_samples = []
                self._losses.append(line["loss"])

    def check_step(self, step_output: StepOutput) -> dict[str, Any]:
        """Wait for a training step, check its loss and gradient norm, and update the counters.

        Non-finite steps and loss spikes are logged.

        Returns:
            Loss and gradient norm: NaN if they are not finite, None if the step had no supervised
            tokens or overflowed in fp16. Locations of all samples of a non-finite step and of a
            step with a loss spike.
        """
        self._corrupt_samples |= step_output.global_stats.skipped
        loss, grad_norm = step_output.wait()
        progress = self._state.progress
        step_index = step_output.step_batch.step_index
        checked: dict[str, Any] = {
            "loss": None,
            "grad_norm": None,
            "nonfinite_samples": (),
            "loss_spike_samples": (),
        }
        if not step_output.is_applied:
            return checked
        checked["loss"] = _finite_or_nan(loss)
        checked["grad_norm"] = _finite_or_nan(grad_norm)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            progress.consecutive_nonfinite_steps = 0
            self._nonfinite_samples = []
            if is_loss_spike(loss, self._losses):
                self._log(
                    f"loss spike in step {step_index + 1}: {loss:.4g}, the median of the previous"
                    f" {len(self._losses)} losses is {median(self._losses):.4g}"
                )
                checked["loss_spike_samples"] = self._sample_locations(step_index)
            self._losses.append(loss)
            return checked
        sample_locations = self._sample_locations(step_index)
        progress.nonfinite_steps += 1
        progress.consecutive_nonfinite_steps += 1
        self._nonfinite_samples += sample_locations
        self._log(
            f"skipped non-finite step {step_index + 1}: loss {loss},"
            f" gradient norm {grad_norm}; {progress.consecutive_nonfinite_steps} in a row, the run"
            f" ends after {MAX_CONSECUTIVE_NONFINITE};"
            f" samples: {join_names(sample_locations, MAX_LISTED_SAMPLES)}"
        )
        return checked | {"nonfinite_samples": sample_locations}

    def raise_if_exceeded(self) -> None:
        """Raise if the run has too many non-finite steps or corrupt images.

        Raises:
            UserError: A limit is exceeded; the error lists the samples.
        """
        progress = self._state.progress
        if progress.consecutive_nonfinite_steps >= MAX_CONSECUTIVE_NONFINITE:
            names = join_names(self._nonfinite_samples, MAX_LISTED_SAMPLES)
            raise UserError(
                f"{progress.consecutive_nonfinite_steps} steps in a row had a non-finite loss or"
                f" gradient; their samples: {names}",
                where="training",
                expected="finite values; the weights are those before these steps",
                remedy="check these samples, lower train.learning_rate,"
                " lengthen train.warmup, or use train.precision=bf16",
            )
        num_samples = len(self._state.data.train.stats.sample_indices)
        max_corrupt = max(MIN_CORRUPT_LIMIT, MAX_CORRUPT_FRACTION * num_samples)
        if len(self._corrupt_samples) > max_corrupt:
            name, reason = next(reversed(self._corrupt_samples.items()))
            purpose = "restore the images and start again with --resume, or remove the samples"
            arguments = {"sources": ["SAMPLES"], "fix": "FIXED"}
            raise UserError(
                f"{len(self._corrupt_samples)} of {num_samples} samples have corrupt images,"
                f" the last one {name}: {reason}",
                where="data.train",
                expected=f"at most {round(max_corrupt)} of them",
                remedy=Step("check", arguments, purpose),
            )

    def _sample_locations(self, step_index: int) -> tuple[str, ...]:
        """Return the file locations of all samples of a step, including those of other ranks."""
        data = self._state.data
        return tuple(map(data.train.corpus.location, data.sampler.batch_indices(step_index)))


def _finite_or_nan(value: float) -> float:
    """Return a value, or NaN if it is not finite."""
    if math.isfinite(value):
        return value
    return math.nan


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


class MetricsLogger:
    """Logger of finished steps, with a delay of one step.

    A step is logged after the next one has been queued, so that the device stays busy while the
    host waits for the results. All ranks check the steps. Only the main process writes files.
    """

    def __init__(self, state: TrainState, tracking: RunTracking, callbacks: CallbackList) -> None:
        self.callbacks = callbacks
        self._state = state
        self._console = state.run.console
        self._tracking = tracking
        self.tracking_events = TrackingEvents(state.run.run_dir, tracking)
        self._anomaly_detector = AnomalyDetector(state)
        self._pending: tuple[StepOutput, DataWait] | None = None
        self._step_progress: StepProgress | None = None
        self._has_warned = False
        self._is_peak_valid = True
        self.restart_timer()

    def log_start(self, seconds: float) -> None:
        """Log the start or resume of a run, with hardware, data and library versions."""
        state = self._state
        hardware = state.run.hardware
        samples = state.data.train.stats.sample_stats
        sizes = (h * w for sample in samples for _, h, w in sample.grid_thw)
        entry = {
            "step": state.progress.step,
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "setup_s": seconds,
            "working_dir": str(Path.cwd()),
            "size_histograms": {
                "tokens": count_half_octaves(sample.num_tokens for sample in samples),
                "patches": count_half_octaves(sizes),
            },
        }
        data_facts = {}
        for name, data in state.data.splits.items():
            data_facts[name] = {
                "num_samples": len(data.stats.sample_indices),
                "num_tokens": data.stats.num_tokens,
                "fingerprint": data.corpus.fingerprint,
            }
        facts = {
            "total_steps": len(state.data.sampler),
            "device": get_device_name(hardware.device),
            "precision": hardware.precision,
            "num_workers": hardware.num_workers,
            "world_size": hardware.process_group.world_size,
            "peak_tflops": hardware.peak_flops / 1e12,
            "versions": library_versions(),
            "data": data_facts,
        }
        self._append_metrics(entry | facts)
        num_trainable = state.engine.parallel.num_trainable_params
        self._tracking.start_run({**facts, "num_trainable_params": num_trainable})

    def _append_metrics(self, metrics: Mapping[str, Any]) -> None:
        if self._state.run.hardware.process_group.is_main:
            self._state.run.run_dir.append_metrics(metrics)

    def log_vision_cache(self, seconds: float, result: VisionCacheResult) -> None:
        """Log the vision cache, or the reason for training without it.

        Args:
            seconds: Time to build the cache.
            result: Vision cache of the run.
        """
        self._console.log(result.reason)
        metrics: dict[str, Any] = {"step": self._state.progress.step}
        if result.cache is not None:
            metrics["vision_cache_s"] = seconds
        self._append_metrics(metrics | result.as_json())

    @contextmanager
    def show_progress(self, total: int) -> Iterator[None]:
        """Show a progress bar for `total` steps within the context."""
        with self._console.step_progress(total, self._state.progress.step) as step_progress:
            self._step_progress = step_progress
            self.restart_timer()
            try:
                yield
            finally:
                self._step_progress = None

    def restart_timer(self) -> None:
        """Restart the step timer, for example after an evaluation."""
        self._start_s = time.perf_counter()
        self._start_event = record_event(self._state.run.hardware.device, enable_timing=True)

    def _measure_step(self, event: torch.cuda.Event | None) -> float:
        """Return the seconds since the end of the previous step, on the device if possible.

        Args:
            event: CUDA event at the end of the step; None measures the time until now.
        """
        now = time.perf_counter()
        seconds = now - self._start_s
        if event is not None and self._start_event is not None:
            seconds = self._start_event.elapsed_time(event) / 1000
        self._start_s = now
        self._start_event = event
        return max(seconds, 1e-9)

    @property
    def has_pending_step(self) -> bool:
        """Whether the device may still compute a step."""
        return self._pending is not None

    def log_step(self, step_output: StepOutput, data_wait: DataWait) -> None:
        """Log the previous step, and keep this one until the device has finished it."""
        self.flush()
        self._pending = step_output, data_wait
        # A callback gets the metrics of a step before the next one starts, which it may prevent.
        if step_output.event is None or self.callbacks:
            self.flush()

    def flush(self) -> None:
        """Wait for the pending step and log it.

        Raises:
            UserError: The run has too many non-finite steps or corrupt images.
        """
        pending = self._pending
        self._pending = None
        if pending is None:
            return
        metrics = self._build_metrics(*pending)
        self._append_metrics(metrics)
        self.tracking_events.log_step(metrics)
        skipped_samples = pending[0].global_stats.skipped
        for skipped in skipped_samples:
            self._console.log(f"skipped {skipped.id}: {skipped.reason}")
        if skipped_samples and self._state.run.hardware.process_group.is_main:
            self._state.run.run_dir.append_skipped_samples(skipped_samples, metrics["step"])
        if self._step_progress is not None:
            self._step_progress.update(metrics)
        self._anomaly_detector.raise_if_exceeded()
        self.callbacks.call(metrics["step"], _list_step_metrics(metrics))

    def _build_metrics(self, step_output: StepOutput, data_wait: DataWait) -> dict[str, Any]:
        checked = self._anomaly_detector.check_step(step_output)
        seconds = self._measure_step(step_output.event)
        state = self._state
        step_batch = step_output.step_batch
        global_stats = step_output.global_stats
        position = min(
            (step_batch.step_index + 1) * state.run.recipe.train.batch_size,
            state.data.sampler.num_samples,
        )
        flops = sum(count_flops(state, batch) for batch in step_batch.packs)
        # The wait for the data of an online objective includes its rollouts.
        rollout_s = step_batch.metrics.get("rollout_s", 0.0)
        reward_s = step_batch.metrics.get("reward_s", 0.0)
        mfu = flops / seconds / state.run.hardware.peak_flops
        self._is_peak_valid &= mfu <= 1
        return {
            "step": step_batch.step_index + 1,
            "epoch": round(position / state.data.sampler.epoch_length, 4),
            **checked,
            **step_batch.metrics,
            **state.engine.objective.describe_metrics(step_output.results[2:].tolist()),
            "lr": state.engine.optimizer.learning_rates(step_output.lr_factor),
            "num_samples": global_stats.num_samples,
            "num_tokens": global_stats.num_tokens,
            "num_supervised_tokens": global_stats.num_supervised_tokens,
            "num_packs": len(step_batch.packs),
            **step_output.budget.model_dump(),
            "skipped_samples": [skipped.id for skipped in global_stats.skipped],
            "skipped_steps": state.engine.loss_scaler.num_skipped + state.progress.nonfinite_steps,
            "step_s": seconds,
            "data_wait_s": max(0.0, data_wait() - (rollout_s + reward_s)),
            "samples_per_s": global_stats.num_samples / seconds,
            "tokens_per_s": global_stats.num_tokens / seconds,
            # None for unknown FLOPs (transformers backend) and a peak measured on a busy device.
            "mfu": mfu if mfu > 0 and self._is_peak_valid else None,
            "peak_memory_gb": peak_memory_gb(state.run.hardware.device),
        }

    def log_evaluation(self, eval_result: EvalResult, name: str, seconds: float) -> None:
        """Log an evaluation.

        Args:
            name: Name of the file in `predictions/` with its predictions.
            seconds: Duration of the evaluation.
        """
        self._append_metrics(eval_result.as_json() | {"eval_s": seconds})
        self.tracking_events.log_evaluation(eval_result, name, self._common_ids)
        assert self._state.data.validation is not None, "no validation data"
        num_all = len(self._state.data.validation.stats.sample_indices)
        num_common = min(resolve_interim_limit(self._state.run.recipe.eval) or num_all, num_all)
        labels = []
        if num_common < num_all:
            labels.append(f"common subset: {num_common} of {num_all} samples")
        labels += _describe_counts(eval_result, num_common)
        self._log_scores(eval_result, labels)
        if eval_result.full is not None:
            labels = [f"all {num_all} samples", *_describe_counts(eval_result.full, num_all)]
            self._log_scores(eval_result.full, labels)
        if self._state.run.hardware.process_group.is_main and not self._has_warned:
            self._warn_overfitting()
        if not eval_result.step:
            for line in note_lines(eval_result.on_all_samples.notes.items()):
                self._console.log(line)
        self.callbacks.call(eval_result.step, _list_eval_metrics(eval_result, ""))

    @cached_property
    def _common_ids(self) -> frozenset[str] | None:
        """IDs of the samples that all evaluations have in common; None for all samples."""
        data = self._state.data.validation
        limit = resolve_interim_limit(self._state.run.recipe.eval)
        if data is None or limit is None:
            return None
        indices = select_eval_samples(data.stats.sample_indices, limit)
        return frozenset(data.corpus[index].sample.id for index in indices)

    def _log_scores(self, result: EvalResult, labels: Sequence[str]) -> None:
        """Log loss and scores of an evaluation, followed by the labels in parentheses."""
        scores = result.scores
        if "rewards/accuracies" in result.loss_metrics:
            accuracy = result.loss_metrics["rewards/accuracies"]
            scores = {"rewards/accuracies": accuracy} | scores
        count = result.num_samples
        texts = [f"{score} {format_score(value, count)}" for score, value in scores.items()]
        summary = "  ".join(texts)
        if interval := result.intervals.get(result.primary_metric or ""):
            ends = format_score_interval(interval, count)
            summary += f"  ({result.primary_metric}: 95 % interval {ends})"
        label = ""
        if labels:
            label = f"  ({', '.join(labels)})"
        self._console.log(
            f"after {format_count(result.step, 'step')}: validation loss"
            f" {result.validation_loss:.4f}"
            f"  {summary}{label}"
        )

    def _warn_overfitting(self) -> None:
        """Log the first sign of overfitting, and send it as an alert."""
        from finesight.report.summary import describe_overfitting

        run_dir = self._state.run.run_dir
        text = describe_overfitting(run_dir.path, [*run_dir.iter_metrics()])
        if text is not None:
            self._console.log(f"warning: {text}")
            self._tracking.send_alert("warning", "overfitting", text)
            self._has_warned = True


def _describe_counts(result: EvalResult, num_expected: int) -> list[str]:
    """Describe the numbers of losses and scores that are not as expected."""
    notes = []
    num_losses = result.num_loss_samples
    if num_losses is not None and num_losses != num_expected:
        notes.append(f"loss of {format_count(num_losses, 'sample')}")
    num_scores = result.num_samples if result.scores else None
    if num_scores is not None and num_scores != num_expected:
        notes.append(f"scores of {format_count(num_scores, 'sample')}")
    return notes


def count_flops(state: TrainState, batch: PackedBatch) -> float:
    """Count the FLOPs of a pack on this rank; 0 if they are unknown.

    The shards of a split sample count equally.
    """
    flop_counter = state.engine.flop_counter
    context_shard = batch.context_shard
    if flop_counter is None:
        return 0.0
    if context_shard is None:
        return flop_counter.count(batch)
    return flop_counter.count(context_shard.sample_shape) / context_shard.world_size


def get_device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def describe_run(state: TrainState) -> str:
    """Describe trainable parameters, number of steps, precision and device in one line."""
    recipe = state.run.recipe
    hardware = state.run.hardware
    trained = []
    for part, mode in recipe.tune:
        if part in MODEL_PARTS and mode != "frozen":
            trained.append(f"{part} {mode}")
    num_trainable = state.engine.parallel.num_trainable_params
    num_params = sum(parameter.numel() for parameter in state.engine.model.parameters())
    quantized = find_quantized_weights(state.engine.model)
    num_params += sum(weight.num_elements for weight in quantized.values())
    epochs = state.data.sampler.num_samples / state.data.sampler.epoch_length
    return (
        f"training {', '.join(trained)}: {num_trainable:,} of {num_params:,} parameters"
        f"{_describe_frozen_weights(state, quantized)};"
        f" {format_count(len(state.data.sampler), 'step')} of"
        f" {format_count(recipe.train.batch_size, 'sample')} ({epochs:.2f} epochs)"
        f" in {hardware.precision} on {hardware.device}, {hardware.num_workers} data loader workers"
    )


def _describe_frozen_weights(state: TrainState, quantized: Collection[str]) -> str:
    """Describe the quantized and FP8 weights of the model; empty if there are none."""
    tune = state.run.recipe.tune
    notes = []
    if tune.quantize.nf4:
        notes.append(f"frozen weights of {' and '.join(tune.quantize.nf4)} in NF4")
    if tune.quantize.fp8:
        count = count_unquantized_layers(state.engine.model, tune.quantize.fp8)
        note = f"frozen weights of {' and '.join(tune.quantize.fp8)} in FP8"
        if count:
            note += f", except {count} layers with unsupported sizes"
        notes.append(note)
    requested = {*(tune.quantize.nf4 or ()), *(tune.quantize.fp8 or ())}
    parts = dict.fromkeys(map(get_part, quantized))
    prequantized = [part for part in parts if part not in requested]
    if prequantized:
        notes.append(f"weights of {' and '.join(prequantized)} in 4 bits, as published")
    has_experts = any(isinstance(module, MoeExperts) for module in state.engine.model.modules())
    if tune.language == "lora" and has_experts:
        notes.append("experts have no adapters and are frozen")
    return "".join(f" ({note})" for note in notes)
