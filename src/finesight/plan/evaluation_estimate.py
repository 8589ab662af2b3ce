"""Estimate the time and memory of evaluation by generation.

The estimate is rough, since the length of completions is unknown before training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finesight.config import EvalSettings, Recipe
from finesight.infer.engine import KV_CACHE_BYTES
from finesight.infer.kv_cache import get_kv_bytes_per_token, get_linear_state_bytes
from finesight.infer.scheduler import MAX_PREFILL_TOKENS
from finesight.plan.planned_model import PlannedModel
from finesight.plan.planned_pack import build_planned_pack
from finesight.plan.target_device import TargetDevice
from finesight.train.dataset_stats import SampleStats
from finesight.train.optimizer import resolve_steps

MIN_DECODE_STEP_S = 3.0e-3
"""Minimum seconds of a decode step on a GPU for any model.

Kernel launches or the host limit small models.
"""


@dataclass(frozen=True, slots=True)
class EvaluationEstimate:
    """Estimated time and memory of all evaluations of a run.

    Generation runs between training steps, so its memory replaces the activations of a pack.

    Attributes:
        num_evaluations: Number of evaluations before, during and after training.
        num_samples: Number of validation samples per evaluation.
        total_s: Seconds of all evaluations.
        generation_bytes: Peak bytes of generation; 0 if only the validation loss is computed.
    """

    num_evaluations: int
    num_samples: int
    total_s: float
    generation_bytes: int


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
    num_evaluations = 2
    if settings is not None and settings.every is not None:
        eval_interval = resolve_steps(settings.every, total_steps)
        num_evaluations += (total_steps - 1) // eval_interval if eval_interval else 0
    # Validation loss: forward passes only, about a third of the work of a training step.
    batch_size = recipe.train.batch_size
    batches = [
        validation_stats[start : start + batch_size]
        for start in range(0, len(validation_stats), batch_size)
    ]
    step_times = (
        planned.step_timer.estimate_step([build_planned_pack(batch)], 0.0, use_graphs=False)
        for batch in batches
    )
    loss_s = sum(step_time.total for step_time in step_times) / 3
    if settings is None:
        return EvaluationEstimate(
            num_evaluations, len(validation_stats), num_evaluations * loss_s, 0
        )
    eval_stats = validation_stats[: settings.limit]
    seconds = loss_s + _estimate_generation_s(settings, planned, target, eval_stats)
    return EvaluationEstimate(
        num_evaluations,
        len(eval_stats),
        num_evaluations * seconds,
        _estimate_generation_bytes(settings, planned, target, eval_stats),
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
    num_tokens = sum(
        min(sample.num_supervised_tokens, settings.max_new_tokens) for sample in eval_stats
    )
    num_steps = num_tokens / min(settings.batch_size, len(eval_stats))
    step_s = max(
        MIN_DECODE_STEP_S if target.compute.is_cuda else 0.0,
        planned.persistent.weight_bytes / target.memory_bandwidth,
    )
    prefill_s = sum(
        planned.step_timer.estimate_step(
            [build_planned_pack(eval_stats[start : start + settings.batch_size])],
            0.0,
            use_graphs=False,
        ).total
        for start in range(0, len(eval_stats), settings.batch_size)
    )
    return num_steps * step_s + prefill_s / 3


def _estimate_generation_bytes(
    settings: EvalSettings,
    planned: PlannedModel,
    target: TargetDevice,
    eval_stats: Sequence[SampleStats],
) -> int:
    """Return the bytes of the largest KV cache and of the largest prefill."""
    decoder_config = planned.model.config.decoder
    num_seqs = min(settings.batch_size, len(eval_stats))
    max_seq_len = max(sample.num_tokens for sample in eval_stats) + settings.max_new_tokens
    cache_bytes = min(
        KV_CACHE_BYTES,
        num_seqs * max_seq_len * get_kv_bytes_per_token(decoder_config, target.dtype),
    )
    cache_bytes += num_seqs * get_linear_state_bytes(decoder_config, target.dtype)
    num_prefill_tokens = min(MAX_PREFILL_TOKENS, sum(sample.num_tokens for sample in eval_stats))
    elements_per_token = 3 * decoder_config.intermediate_size + 4 * decoder_config.hidden_size
    return cache_bytes + num_prefill_tokens * elements_per_token * target.dtype.itemsize
