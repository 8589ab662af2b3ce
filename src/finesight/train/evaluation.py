"""Evaluation during training: validation loss and task metrics of generated answers.

All evaluations of a run are compared on one common subset of the validation samples. An evaluation
before or after training also has figures of all samples, which are separate.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, starmap
from typing import TYPE_CHECKING, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor

from finesight.errors import UserError, format_count
from finesight.evaluate import custom_metric
from finesight.evaluate.eval_result import EvalResult, select_eval_samples
from finesight.files.storage import write_file
from finesight.progress import ProgressCallback
from finesight.settings.config import EvalSettings
from finesight.train.master_weight_optimizer import resolve_steps
from finesight.train.oom import GpuOutOfMemoryError, MemoryBudget, first_error_line, retry_on_oom
from finesight.train.pack_oom import translate_pack_oom
from finesight.train.parallel.distributed import ProcessGroup
from finesight.train.run_dir import RunDir, Split
from finesight.train.sampler import SequentialSampler
from finesight.train.state import TrainState
from finesight.train.step import run_pack
from finesight.train.step_batch import GlobalStepStats, SkippedSample, StepBatch
from finesight.train.step_dataset import read_steps

if TYPE_CHECKING:
    from finesight.evaluate.generation_eval import GenerationEvalResult, PredictOutput
    from finesight.infer.prediction import Prediction


DEFAULT_EVAL_INTERVAL = 0.2
"""Default interval between two evaluations, as a fraction of the run."""

MIN_DEFAULT_EVAL_STEPS = 10
"""Minimum number of steps of the default interval."""

DEFAULT_INTERIM_SAMPLES = 64
"""Size of the subset on which evaluations at the default interval are compared."""


def resolve_eval_interval(settings: EvalSettings, total_steps: int) -> int:
    """Return the number of steps between two evaluations; 0 for none during training."""
    if settings.every is None:
        return max(MIN_DEFAULT_EVAL_STEPS, resolve_steps(DEFAULT_EVAL_INTERVAL, total_steps))
    return resolve_steps(settings.every, total_steps)


def resolve_interim_limit(settings: EvalSettings | None) -> int | None:
    """Return the size of the subset on which evaluations are compared; None for all samples."""
    if settings is None or settings.every is not None:
        return None
    return DEFAULT_INTERIM_SAMPLES


def load_eval_history(run_dir: RunDir) -> list[EvalResult]:
    """Return all evaluations of a run; the first one precedes the first step."""
    return [*filter(None, map(EvalResult.from_metrics, run_dir.iter_metrics()))]


def run_evaluation(state: TrainState, name: str, is_complete: bool = True) -> EvalResult:
    """Compute the validation loss, and generate and score predictions if a metric is set.

    The result is that of the common subset of the run. A complete evaluation also returns that of
    all samples (`EvalResult.full`); each sample is evaluated once.

    Predictions are written to `predictions/NAME.jsonl`. In a distributed run, each rank evaluates
    its share of the samples, all ranks return the same result, and the main process writes the
    file. Samples that cannot be read are excluded from the result and written to
    `skipped_samples.jsonl`. The model is in training mode on return.

    Args:
        name: Name of the predictions file, such as `before` or `step-100`.
        is_complete: Whether to evaluate all samples, not only the common subset.

    Raises:
        TrainingInterrupted: A stop was requested.
        GpuOutOfMemoryError: A single sample exceeds the GPU memory.
    """
    assert state.data.validation is not None, "no validation data"
    indices = state.data.validation.stats.sample_indices
    settings = state.run.recipe.eval
    process_group = state.run.hardware.process_group
    console = state.run.console
    subset = select_eval_samples(indices, resolve_interim_limit(settings))
    common = frozenset(subset)
    evaluated = indices if is_complete else subset
    rest = [index for index in evaluated if index not in common]
    # The common subset has a loss of its own, and all parts together have that of all samples.
    parts = [subset]
    if rest:
        parts.append(rest)

    def compute_loss(budget: MemoryBudget) -> list[LossSum]:
        num_own = sum(len(process_group.shard(part)) for part in parts)
        with console.progress_stage(f"validation loss {name}", num_own) as on_progress:
            return [compute_validation_loss(state, budget, on_progress, part) for part in parts]

    budget = state.progress.budget
    device = state.run.hardware.device
    with state.engine.parallel.summon_full_params():
        with process_group.sync_errors():
            loss_sums = retry_on_oom(budget, device, console.log, compute_loss)
        losses, skipped = _mean_losses(state, loss_sums)
        limit = None if settings is None else settings.limit
        scored = select_eval_samples(evaluated, limit)
        generation = _evaluate_generation(state, name, scored, common)
    reasons: dict[str, str] = {}
    if generation is not None:
        reasons.update(generation.corrupt_samples)
    reasons.update(skipped)
    if reasons:
        _report_skipped_samples(state, reasons)
    full = None
    if rest:
        full = _build_eval_result(state, losses[1], generation, scored)
        if generation is not None and generation.subset is not None:
            generation = generation.subset
    return _build_eval_result(state, losses[0], generation, scored, full)


def _report_skipped_samples(state: TrainState, reasons: Mapping[str, str]) -> None:
    """Log the first skipped validation sample, and write all of them to the run folder.

    Args:
        reasons: Reason for each skipped sample, by its ID.
    """
    sample_id, reason = next(iter(reasons.items()))
    state.run.console.log(
        f"{format_count(len(reasons), 'validation sample')} skipped, {sample_id}: {reason};"
        " evaluations of other samples are not compared with this one"
    )
    if state.run.hardware.process_group.is_main:
        state.run.run_dir.append_skipped_samples(reasons.items(), state.progress.step, "eval")


def _build_eval_result(
    state: TrainState,
    mean_loss: MeanLoss,
    generation: GenerationEvalResult | None,
    scored: Sequence[int],
    full: EvalResult | None = None,
) -> EvalResult:
    """Build the result of an evaluation of validation samples.

    Args:
        scored: Corpus indices of the samples for which an answer was requested.
    """
    assert state.data.validation is not None, "no validation data"
    fingerprint = state.data.validation.corpus.fingerprint
    (loss, *metrics), read = mean_loss

    def compute_digest(indices: Sequence[int]) -> str:
        samples = json.dumps([fingerprint, *indices])
        return hashlib.sha256(samples.encode()).hexdigest()[:16]

    read_digest = compute_digest(read)
    result = EvalResult(
        step=state.progress.step,
        validation_loss=loss,
        loss_metrics=state.engine.objective.describe_metrics(metrics),
        scores={},
        primary_metric=None,
        num_samples=len(read),
        num_loss_samples=len(read),
        sample_set=read_digest,
        score_set=read_digest,
        full=full,
    )
    if generation is None:
        return result
    answered = [scored[position] for position in generation.positions]
    return replace(
        result,
        scores=generation.scores,
        primary_metric=generation.primary_metric,
        intervals=generation.intervals,
        details=generation.details,
        notes=generation.notes,
        num_samples=len(answered),
        score_set=compute_digest(answered),
    )


def _evaluate_generation(
    state: TrainState, name: str, scored: Sequence[int], common: Set[int]
) -> GenerationEvalResult | None:
    """Generate and score answers to validation samples; return None without a metric.

    Args:
        scored: Corpus indices of the samples.
        common: Corpus indices of the samples that are also scored separately.
    """
    settings = state.run.recipe.eval
    data = state.data.validation
    if settings is None or data is None:
        return None
    # A run without `eval.metric` needs no inference engine.
    from finesight.evaluate.generation_eval import (
        generate_predictions,
        score_predictions,
        select_questions,
    )
    from finesight.infer.prediction import describe_reduced_batch

    metric = custom_metric.resolve_metric_path(settings.metric, state.run.run_dir.path)
    settings = settings.model_copy(update={"metric": metric})
    model = state.engine.model
    renderer = state.data.renderer
    process_group = state.run.hardware.process_group
    console = state.run.console

    def on_batch_reduced(batch: int) -> None:
        state.engine.graph_runner.release_graphs()
        console.log(describe_reduced_batch(batch))

    num_own = len(process_group.shard(scored))
    path = state.run.run_dir.predictions_dir / f"{name}.jsonl"
    write_predictions = None
    if process_group.is_main:
        write_predictions = partial(write_file, path)
    common_positions = [n for n, index in enumerate(scored) if index in common]
    with console.progress_stage(f"generation {name}", num_own) as on_progress:

        def on_generated(count: int) -> None:
            on_progress(count)
            state.run.stop.raise_if_requested()

        samples = [data.corpus[index] for index in scored]
        questions = select_questions(renderer, samples, settings)
        own_samples = process_group.shard(questions.samples)
        output: PredictOutput = ([], {})
        with process_group.sync_errors(), _translate_generation_oom():
            if own_samples:
                output = generate_predictions(
                    model,
                    renderer,
                    own_samples,
                    settings,
                    on_progress=on_generated,
                    on_batch_reduced=on_batch_reduced,
                    episodes=state.run.episodes,
                    run_dir=state.run.run_dir.path,
                )
        if not process_group.is_single_process:
            output = _gather_predictions(process_group, output, len(questions.samples))
        return score_predictions(questions, output, settings, write_predictions, common_positions)


@contextmanager
def _translate_generation_oom() -> Iterator[None]:
    """Convert an out-of-memory error of the generation to one with advice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GpuOutOfMemoryError(
            f"the GPU memory is full: {first_error_line(error)}",
            where="evaluation",
            expected="sufficient memory for one answer at a time",
            remedy="end other programs on this GPU, or lower eval.max_new_tokens, and start"
            " again with --resume; or start a new run with smaller images",
        ) from None


def _gather_predictions(
    process_group: ProcessGroup, own_output: PredictOutput, num_samples: int
) -> PredictOutput:
    """Return the predictions of all ranks, in the order of the samples.

    Args:
        own_output: Predictions for the samples of this rank (`ProcessGroup.shard`).
        num_samples: Number of samples of all ranks.
    """
    from finesight.evaluate.generation_eval import PredictOutput

    adapter: TypeAdapter[PredictOutput] = TypeAdapter(PredictOutput)
    predictions: dict[int, Prediction] = {}
    unreadable: dict[int, str] = {}
    payloads = process_group.all_gather_object(adapter.dump_json(own_output).decode())
    for rank, payload in enumerate(payloads):
        rank_predictions, missing = adapter.validate_json(payload)
        positions = range(rank, num_samples, process_group.world_size)
        for index, reason in missing.items():
            unreadable[positions[index]] = reason
        readable = [position for n, position in enumerate(positions) if n not in missing]
        predictions |= zip(readable, rank_predictions, strict=True)
    return [predictions[position] for position in sorted(predictions)], unreadable


class LossSum(NamedTuple):
    """Summed validation loss of one rank.

    Attributes:
        sums: Sums of the loss and of the metrics of the objective.
        num_terms: Number of terms of the sums (`Objective.count_terms`).
        skipped: Samples that were skipped because of corrupt images.
        indices: Corpus indices of the other samples.
    """

    sums: tuple[float, ...]
    num_terms: int
    skipped: tuple[SkippedSample, ...]
    indices: tuple[int, ...]


MeanLoss = tuple[list[float], list[int]]
"""Mean validation loss and metrics, and corpus indices of the samples, sorted."""


def _mean_losses(
    state: TrainState, loss_sums: Sequence[LossSum]
) -> tuple[list[MeanLoss], list[SkippedSample]]:
    """Return the mean loss of the first part and of all parts together, and the skipped samples.

    The result is the same on all ranks.

    Args:
        loss_sums: Sums of this rank over each part of the validation samples.

    Raises:
        UserError: All samples of the first part have corrupt images, or a loss is not finite.
    """
    sums_by_rank = state.run.hardware.process_group.all_gather_object(loss_sums)
    losses: list[MeanLoss] = []
    skipped: list[SkippedSample] = []
    for num_parts in range(1, len(loss_sums) + 1):
        # With several ranks, records arrive as lists.
        sums: list[LossSum] = []
        for rank_sums in sums_by_rank:
            sums += starmap(LossSum, rank_sums[:num_parts])
        skipped = []
        indices: list[int] = []
        for part in sums:
            skipped += starmap(SkippedSample, part.skipped)
            indices += part.indices
        num_terms = sum(part.num_terms for part in sums)
        if not num_terms:
            raise UserError(
                f"none of {len(skipped)} samples has decodable images",
                where="data.eval",
                expected="valid images",
                remedy=f"fix the images; the first error is: {skipped[0].reason}",
            )
        values_by_name = zip(*(part.sums for part in sums), strict=True)
        means = [math.fsum(values) / num_terms for values in values_by_name]
        loss = means[0]
        if not math.isfinite(loss):
            raise UserError(
                f"the validation loss of step {state.progress.step} is {loss}",
                where="training",
                expected="a finite value; steps after the last checkpoint are lost",
                remedy="lower train.learning_rate, lengthen train.warmup, or use"
                " train.precision=bf16",
            )
        losses.append((means, sorted(indices)))
    return losses, skipped


def compute_validation_loss(
    state: TrainState, budget: MemoryBudget, on_progress: ProgressCallback, indices: Sequence[int]
) -> LossSum:
    """Sum the loss and the metrics of the objective over this rank's validation samples.

    The model is in evaluation mode, so dropout is disabled.

    Args:
        budget: Memory budget, which limits the tokens of a pack.
        on_progress: Callback for the number of newly processed samples.
        indices: Corpus indices of the samples of all ranks.

    Raises:
        TrainingInterrupted: A stop was requested.
        GpuOutOfMemoryError: A pack exceeds the GPU memory.
    """
    own_indices = state.run.hardware.process_group.shard(indices)
    objective = state.engine.objective
    device = state.run.hardware.device
    total = torch.zeros(1 + len(objective.metric_names), device=device, dtype=torch.float64)
    num_terms = 0
    skipped: list[SkippedSample] = []
    read: list[int] = []
    for step_batch, values in iter_step_losses(state, "eval", own_indices, budget, on_progress):
        for loss in values:
            total += loss
        num_terms += objective.count_terms(GlobalStepStats.from_step(step_batch))
        skipped += step_batch.skipped
        read += chain.from_iterable(step_batch.sample_indices)
    return LossSum(tuple(total.tolist()), num_terms, tuple(skipped), tuple(read))


@torch.no_grad()
def iter_step_losses(
    state: TrainState,
    split: Split,
    indices: Sequence[int],
    budget: MemoryBudget,
    on_progress: ProgressCallback,
) -> Iterator[tuple[StepBatch, list[Tensor]]]:
    """Yield steps of samples, with summed loss and metrics of each pack on the device.

    The model is in the mode in which the run processes the split.
    """
    hardware = state.run.hardware
    recipe = state.run.recipe
    model = state.engine.model
    sampler = SequentialSampler(indices, recipe.train.batch_size)
    # Without shared prefixes: in evaluation mode, some families compute a token depending on the
    # length of its sample (`depends_on_length` of `FamilyComponent`).
    data = state.data.splits[split].build_step_dataset(
        state.data.renderer, sampler, budget.pack_tokens, recipe.data
    )
    unit_weight = torch.ones((), device=hardware.device)
    step_batches = read_steps(data, 0, hardware.num_workers, hardware.device.type == "cuda")
    model.train(split == "train")
    with closing(step_batches) as steps, ExitStack() as stack:
        stack.callback(model.train)
        for step_batch in steps:
            state.run.stop.raise_if_requested()
            values = []
            packs = zip(step_batch.packs, step_batch.sample_indices, strict=True)
            for packed_batch, sample_indices in packs:
                with translate_pack_oom(state, packed_batch, budget, is_training=False):
                    # The tensors of the pack have no name here, so that they are freed.
                    values.append(
                        run_pack(
                            state.engine,
                            state.engine.device_loader.load(packed_batch),
                            None,
                            unit_weight,
                            (split, sample_indices),
                        )
                    )
            yield step_batch, values
            on_progress(step_batch.num_samples + len(step_batch.skipped))


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory of the GPU in 10^9 bytes.

    On a CPU, it is the peak memory of this process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Imported here, because Windows does not have this module.
    import resource

    # Bytes on macOS, kilobytes on Linux.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
