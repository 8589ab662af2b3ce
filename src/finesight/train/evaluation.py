"""Evaluation during training: validation loss and task metrics of generated answers."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor

from finesight.config import EvalSettings
from finesight.data.sample import LocatedSample
from finesight.encode.packing import PackedBatch
from finesight.errors import UserError
from finesight.evaluate import custom_metric
from finesight.evaluate.bootstrap import ConfidenceInterval
from finesight.train.checkpoint import BestEval
from finesight.train.console import ProgressCallback, TrainingConsole
from finesight.train.dataloader import SkippedSample, read_steps
from finesight.train.loss import fused_linear_cross_entropy
from finesight.train.oom import (
    MemoryBudget,
    build_generation_oom_error,
    build_pack_oom_error,
    retry_on_oom,
)
from finesight.train.optimizer import build_nonfinite_error
from finesight.train.parallel.distributed import ProcessGroup
from finesight.train.run_dir import RunDir

if TYPE_CHECKING:
    from finesight.evaluate.generation_eval import GenerationEvalResult, PredictFn, PredictOutput
    from finesight.infer.prediction import Prediction
    from finesight.train.trainer import TrainState
    from finesight.train.training_run import StopRequest


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Result of one evaluation on the validation split.

    Attributes:
        step: Number of finished steps.
        validation_loss: Mean loss per supervised token in nats.
        scores: Task metrics by name; empty without a metric.
        primary_metric: Name of the metric that ranks evaluations; None without a metric.
        intervals: Confidence interval of each score; None if there is none.
        details: Additional results of the task, such as scores per class.
        notes: Reasons for missing intervals, and warnings.
        num_samples: Number of validation samples of the scores; None if unknown.
        num_loss_samples: Number of validation samples of the loss; None if unknown.
    """

    step: int
    validation_loss: float
    scores: dict[str, float]
    primary_metric: str | None
    intervals: dict[str, ConfidenceInterval | None] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    num_samples: int | None = None
    num_loss_samples: int | None = None

    @property
    def primary_score(self) -> float | None:
        """Score of the primary metric; None without a metric."""
        return None if self.primary_metric is None else self.scores[self.primary_metric]

    def as_json(self) -> dict[str, Any]:
        """Return the content of the `metrics.jsonl` line of this evaluation."""
        return {
            "step": self.step,
            "validation_loss": self.validation_loss,
            "scores": self.scores,
            "primary_metric": self.primary_metric,
            "intervals": self.intervals,
            "details": self.details,
            "notes": self.notes,
            "num_samples": self.num_samples,
            "num_loss_samples": self.num_loss_samples,
        }

    def as_best_eval(self) -> BestEval:
        """Return the fields that rank evaluations."""
        return BestEval(
            step=self.step,
            validation_loss=self.validation_loss,
            primary_metric=self.primary_metric,
            primary_score=self.primary_score,
            num_samples=self.num_samples,
            num_loss_samples=self.num_loss_samples,
        )

    @classmethod
    def from_metrics(cls, line: dict[str, Any]) -> EvalResult | None:
        """Parse the evaluation in a line of `metrics.jsonl`; return None for other lines."""
        if "validation_loss" not in line:
            return None
        intervals = {
            name: ConfidenceInterval(*ends) if ends else None
            for name, ends in line.get("intervals", {}).items()
        }
        metrics = line["step"], line["validation_loss"], line["scores"], line["primary_metric"]
        counts = line.get("num_samples"), line.get("num_loss_samples", line.get("num_samples"))
        return cls(*metrics, intervals, line.get("details", {}), line.get("notes", {}), *counts)


def load_eval_history(run_dir: RunDir) -> list[EvalResult]:
    """Return all evaluations of a run; the first one precedes the first step."""
    return [
        m for line in run_dir.iter_metrics() if (m := EvalResult.from_metrics(line)) is not None
    ]


def find_best_eval(results: Sequence[EvalResult]) -> tuple[EvalResult | None, int]:
    """Find the best evaluation with the metric and number of samples of the last one.

    Evaluations are ranked by the primary metric, then by the validation loss. The evaluation before
    the first step is ignored, because scores may drop at first and recover.

    Args:
        results: Evaluations of the run, in order.

    Returns:
        The first of the best evaluations, and the number of comparable ones after it.
    """
    best: EvalResult | None = None
    num_later = 0
    for result in results:
        last = results[-1].primary_metric, results[-1].num_samples
        if not result.step or (result.primary_metric, result.num_samples) != last:
            continue
        if best is None or result.as_best_eval().is_better_than(best.as_best_eval()):
            best, num_later = result, 0
        else:
            num_later += 1
    return best, num_later


def run_evaluation(
    state: TrainState,
    name: str,
    console: TrainingConsole,
    stop: StopRequest,
    limit: int | None = None,
) -> EvalResult:
    """Compute the validation loss, and generate and score predictions if a metric is set.

    Predictions are written to `predictions/NAME.jsonl`. In a distributed run, each rank evaluates
    its share of the samples, all ranks return the same result, and the main process writes the
    file. The model is in training mode on return.

    Args:
        state: State of the run.
        name: Name of the predictions file, such as `before` or `step-100`.
        console: Console for progress and messages.
        stop: Stop request, checked between batches.
        limit: Maximum number of validation samples; None for all.

    Raises:
        TrainingInterrupted: A stop was requested.
        GpuOutOfMemoryError: A single sample exceeds the GPU memory.
    """
    assert state.validation_data is not None, "no validation data"
    indices, process_group = (
        state.validation_data.stats.sample_indices[:limit],
        state.hardware.process_group,
    )

    def compute_loss(budget: MemoryBudget) -> LossSum:
        with console.progress_stage(
            f"validation loss {name}", len(process_group.shard(indices))
        ) as on_progress:
            return compute_validation_loss(state, budget, on_progress, stop, limit)

    budget, device = state.progress.budget, state.hardware.device
    with state.parallel.summon_full_params():
        with process_group.sync_errors():
            loss_sum = retry_on_oom(budget, device, console.log, compute_loss)
        loss = _mean_loss(state, loss_sum, console)
        step, settings = state.progress.step, state.recipe.eval
        if settings is None:
            num = len(indices)
            return EvalResult(step, loss, {}, None, num_samples=num, num_loss_samples=num)
        samples = [state.validation_data.corpus[index] for index in indices[: settings.limit]]
        result = _evaluate_generation(state, settings, samples, name, console, stop)
    return EvalResult(
        step,
        loss,
        result.scores,
        result.primary_metric,
        result.intervals,
        result.details,
        result.notes,
        len(samples),
        len(indices),
    )


def _evaluate_generation(
    state: TrainState,
    settings: EvalSettings,
    samples: Sequence[LocatedSample],
    name: str,
    console: TrainingConsole,
    stop: StopRequest,
) -> GenerationEvalResult:
    # A run without `eval.metric` needs no inference engine.
    from finesight.evaluate.generation_eval import evaluate

    metric, process_group = (
        custom_metric.resolve_metric_path(settings.metric, state.run_dir.path),
        state.hardware.process_group,
    )

    def on_batch_reduced(batch: int) -> None:
        state.graph_runner.release_graphs()
        console.log(
            f"the GPU memory is full: continuing with a batch of {batch} answers (eval.batch_size)"
        )

    with console.progress_stage(
        f"generation {name}", len(process_group.shard(samples))
    ) as on_progress:

        def on_generated(count: int) -> None:
            on_progress(count)
            stop.raise_if_requested()

        return evaluate(
            state.model,
            state.renderer,
            samples,
            settings.model_copy(update={"metric": metric}),
            predictions_file=state.run_dir.predictions_dir / f"{name}.jsonl"
            if process_group.is_main
            else None,
            on_progress=on_generated,
            on_batch_reduced=on_batch_reduced,
            distribute=partial(_distribute_generation, process_group),
        )


def _distribute_generation(process_group: ProcessGroup, generate: PredictFn) -> PredictFn:
    """Wrap a generation function so that each rank generates for its share of the samples.

    The wrapped function returns the predictions for all samples on every rank.
    """
    from finesight.evaluate.generation_eval import PredictOutput

    adapter: TypeAdapter[PredictOutput] = TypeAdapter(PredictOutput)

    def generate_on_all_ranks(samples: Sequence[LocatedSample]) -> PredictOutput:
        own_samples = process_group.shard(samples)
        with process_group.sync_errors():
            try:
                generations = generate(own_samples) if own_samples else ([], {})
            except torch.OutOfMemoryError as error:
                raise build_generation_oom_error(error) from None
        if process_group.is_single_process:
            return generations
        predictions: dict[int, Prediction] = {}
        unreadable: dict[int, str] = {}
        for rank, payload in enumerate(
            process_group.all_gather_str(adapter.dump_json(generations).decode())
        ):
            rank_predictions, missing = adapter.validate_json(payload)
            sample_positions = range(rank, len(samples), process_group.world_size)
            unreadable |= {sample_positions[index]: reason for index, reason in missing.items()}
            readable = (
                position for index, position in enumerate(sample_positions) if index not in missing
            )
            predictions |= zip(readable, rank_predictions, strict=True)
        return [predictions[position] for position in sorted(predictions)], unreadable

    return generate_on_all_ranks


class LossSum(NamedTuple):
    """Summed validation loss of one rank.

    Attributes:
        loss: Sum of the cross entropy in nats.
        num_tokens: Number of supervised tokens.
        skipped: Samples that were skipped because of corrupt images.
    """

    loss: float
    num_tokens: int
    skipped: tuple[SkippedSample, ...]


def _mean_loss(state: TrainState, loss_sum: LossSum, console: TrainingConsole) -> float:
    """Return the mean loss per supervised token over all ranks.

    Raises:
        UserError: All samples have corrupt images, or the loss is not finite.
    """
    payloads = state.hardware.process_group.all_gather_str(json.dumps(loss_sum))
    losses, token_counts, skipped_by_rank = zip(*map(json.loads, payloads), strict=True)
    skipped = [
        SkippedSample(*sample) for rank_skipped in skipped_by_rank for sample in rank_skipped
    ]
    if not sum(token_counts):
        raise UserError(
            f"none of {len(skipped)} samples has decodable images",
            where="data.eval",
            expected="valid images",
            remedy=f"fix the images; the first error is: {skipped[0].reason}",
        )
    loss: float = math.fsum(losses) / sum(token_counts)
    if not math.isfinite(loss):
        raise build_nonfinite_error(loss, "validation loss", state.progress.step)
    if skipped:
        console.log(
            f"{len(skipped)} validation samples skipped, {skipped[0].id}: {skipped[0].reason}"
        )
    return loss


@torch.no_grad()
def compute_validation_loss(
    state: TrainState,
    budget: MemoryBudget,
    on_progress: ProgressCallback,
    stop: StopRequest,
    limit: int | None = None,
) -> LossSum:
    """Sum the cross entropy over the supervised tokens of this rank's validation samples.

    The model is in evaluation mode, so dropout is disabled.

    Args:
        state: State of the run.
        budget: Memory budget, which limits the tokens of a pack.
        on_progress: Callback for the number of newly processed samples.
        stop: Stop request, checked between batches.
        limit: Maximum number of samples over all ranks; None for all.

    Raises:
        TrainingInterrupted: A stop was requested.
        GpuOutOfMemoryError: A pack exceeds the GPU memory.
    """
    data, model = state.build_validation_dataset(budget.pack_tokens, limit), state.model
    hardware = state.hardware
    assert data is not None, "no validation data"
    total = torch.zeros((), device=hardware.device, dtype=torch.float64)
    unit_weight = torch.ones((), device=hardware.device)
    num_tokens = 0
    skipped: list[SkippedSample] = []
    model.eval()
    try:
        step_batches = read_steps(data, 0, hardware.num_workers, hardware.device.type == "cuda")
        with closing(step_batches) as steps:
            for step_batch in steps:
                stop.raise_if_requested()
                for packed_batch in step_batch.packs:
                    try:
                        total += _pack_loss(state, packed_batch, unit_weight)
                    except torch.OutOfMemoryError as error:
                        has_freed_memory = state.graph_runner.release_graphs()
                        raise build_pack_oom_error(
                            error,
                            packed_batch,
                            budget,
                            is_training=False,
                            has_freed_memory=has_freed_memory,
                        ) from None
                    num_tokens += packed_batch.num_supervised_tokens
                skipped += step_batch.skipped
                on_progress(step_batch.num_samples + len(step_batch.skipped))
    finally:
        model.train()
    return LossSum(total.item(), num_tokens, tuple(skipped))


def _pack_loss(state: TrainState, packed_batch: PackedBatch, unit_weight: Tensor) -> Tensor:
    """Return the summed loss of a pack.

    This is a separate function so that the tensors of the pack are freed on return.
    """
    model, batch = state.model, state.to_device(packed_batch)
    return fused_linear_cross_entropy(
        model(batch), model.lm_head_weight, batch.labels_L, unit_weight
    )


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory of the GPU in 10^9 bytes.

    On a CPU, it is the peak memory of this process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Imported here, because Windows does not have this module.
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
