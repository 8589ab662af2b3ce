"""Estimate the time and memory of the evaluations of a run."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from finesight.infer.engine import KV_CACHE_BYTES
from finesight.infer.kv_cache import get_kv_bytes_per_token, get_linear_state_bytes
from finesight.infer.scheduler import MAX_PREFILL_TOKENS
from finesight.plan.dry_run import plan_step_packs
from finesight.plan.settings_search import PlannedModel
from finesight.plan.step_time import TargetDevice
from finesight.settings.config import EVAL_BATCH_SIZE, EvalSettings, Recipe
from finesight.train.dataset_stats import SampleStats
from finesight.train.evaluation import resolve_eval_interval, resolve_interim_limit

MIN_DECODE_STEP_S = 3.0e-3
"""Minimum seconds of a decode step on a GPU: kernel launches or the host limit small models."""


@dataclass(frozen=True, slots=True)
class EvaluationEstimate:
    """Estimated time and memory of all evaluations of a run.

    Generation runs between training steps, so its memory replaces the activations of a pack.

    Attributes:
        num_evaluations: Number of evaluations before, during and after training.
        num_samples: Number of validation samples per evaluation before and after training.
        total_s: Seconds of all evaluations.
        generation_bytes: Peak bytes of generation; 0 if only the validation loss is computed.
        max_answer_tokens: Tokens of the longest validation answer.
        num_cut_answers: Number of answers of more tokens than `eval.max_new_tokens`.
    """

    num_evaluations: int
    num_samples: int
    total_s: float
    generation_bytes: int
    max_answer_tokens: int = 0
    num_cut_answers: int = 0


def estimate_evaluation(
    recipe: Recipe,
    planned: PlannedModel,
    target: TargetDevice,
    validation_stats: Sequence[SampleStats],
    total_steps: int,
) -> EvaluationEstimate:
    """Estimate all evaluations of a run: before, during and after training.

    Without an `eval` section in the recipe, an evaluation only computes the validation loss.
    """
    settings = recipe.eval
    num_interim = 0
    if settings is not None:
        eval_interval = resolve_eval_interval(settings, total_steps)
        if eval_interval:
            num_interim = (total_steps - 1) // eval_interval

    def estimate_s(all_stats: Sequence[SampleStats]) -> float:
        # The ranks evaluate equal shares.
        stats = all_stats[:: target.num_gpus]
        loss_s = estimate_forward_s(planned, stats, recipe.train.batch_size)
        if settings is None:
            return loss_s
        scored = all_stats[: settings.limit][:: target.num_gpus]
        return loss_s + _estimate_generation_s(settings, planned, target, scored)

    total_s = 2 * estimate_s(validation_stats)
    if num_interim:
        total_s += num_interim * estimate_s(validation_stats[: resolve_interim_limit(settings)])
    if settings is None:
        return EvaluationEstimate(2 + num_interim, len(validation_stats), total_s, 0)
    eval_stats = validation_stats[: settings.limit]
    lengths = sorted(stats.num_answer_tokens for stats in eval_stats)
    num_complete = bisect_right(lengths, settings.max_new_tokens)
    return EvaluationEstimate(
        2 + num_interim,
        len(eval_stats),
        total_s,
        generation_bytes=estimate_generation_bytes(settings, planned, target, eval_stats),
        max_answer_tokens=lengths[-1],
        num_cut_answers=len(lengths) - num_complete,
    )


def _estimate_generation_s(
    settings: EvalSettings,
    planned: PlannedModel,
    target: TargetDevice,
    eval_stats: Sequence[SampleStats],
) -> float:
    """Estimate the seconds of generation in one evaluation.

    Each decode step reads the weights once per batch. Completions are assumed to be as long as
    their references, and prefill to cost as much as the validation loss.
    """
    num_tokens = 0
    for one in eval_stats:
        num_tokens += min(one.num_answer_tokens, settings.max_new_tokens)
    num_steps = num_tokens / min(EVAL_BATCH_SIZE, len(eval_stats))
    tensors = (*planned.model.parameters(), *planned.model.buffers())  # without a teacher
    read_s = sum(one.nbytes for one in tensors) / target.memory_bandwidth
    step_s = read_s
    if target.compute.is_cuda:
        step_s = max(MIN_DECODE_STEP_S, read_s)
    return num_steps * step_s + estimate_forward_s(planned, eval_stats, EVAL_BATCH_SIZE)


def estimate_forward_s(
    planned: PlannedModel, stats: Sequence[SampleStats], batch_size: int
) -> float:
    """Estimate the seconds of forward passes, about a third of the work of training steps."""
    step_s = 0.0
    for start in range(0, len(stats), batch_size):
        packs = plan_step_packs(stats[start : start + batch_size], sys.maxsize)
        step_s += planned.step_timer.estimate_step(packs, 0.0, use_graphs=False).total
    return step_s / planned.step_timer.num_passes


def estimate_generation_bytes(
    settings: EvalSettings,
    planned: PlannedModel,
    target: TargetDevice,
    eval_stats: Sequence[SampleStats],
) -> int:
    """Return the bytes of the largest KV cache and of the largest prefill."""
    decoder_config = planned.model.config.decoder
    num_seqs = min(EVAL_BATCH_SIZE, len(eval_stats))
    max_seq_len = max(sample.num_tokens for sample in eval_stats) + settings.max_new_tokens
    cache_bytes = min(
        KV_CACHE_BYTES,
        num_seqs * max_seq_len * get_kv_bytes_per_token(decoder_config, target.dtype),
    )
    cache_bytes += get_linear_state_bytes(decoder_config, target.dtype, num_seqs)
    num_prefill_tokens = min(MAX_PREFILL_TOKENS, sum(sample.num_tokens for sample in eval_stats))
    elements_per_token = 3 * decoder_config.intermediate_size + 4 * decoder_config.hidden_size
    return cache_bytes + num_prefill_tokens * elements_per_token * target.dtype.itemsize
