"""Build the plan of a run from its recipe, image headers and model shapes.

A plan estimates memory and time, and chooses settings that fit the device.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from statistics import median
from typing import get_args

from finesight.config import EVAL_BATCH_SIZE, EvalSettings, Precision, QuantizablePart, Recipe
from finesight.errors import UserError
from finesight.infer.engine import KV_CACHE_BYTES
from finesight.infer.kv_cache import get_kv_bytes_per_token, get_linear_state_bytes
from finesight.infer.model_loader import resolve_device, select_cpu_precision
from finesight.infer.scheduler import MAX_PREFILL_TOKENS
from finesight.model.trainable import MODEL_PARTS, trainable_parameters
from finesight.model.weights_io import build_meta_model
from finesight.plan.dry_run import PlannedPack, iter_planned_steps, plan_step_packs
from finesight.plan.peak_memory import FP32_BYTES
from finesight.plan.settings_search import (
    PlannedModel,
    PlannedSettings,
    PlannedSteps,
    SettingsEstimate,
    SettingsSearch,
    build_planned_model,
)
from finesight.plan.step_time import (
    TargetDevice,
    build_local_target,
    build_named_target,
    estimate_startup_seconds,
    measure_local_target,
)
from finesight.progress import ProgressConsole
from finesight.report.summary import format_duration
from finesight.train.dataloader import MAX_WORKERS
from finesight.train.dataset_stats import DatasetStats, SampleStats
from finesight.train.evaluation import resolve_eval_interval, resolve_interim_limit
from finesight.train.flops import FlopCounter
from finesight.train.recipe_check import (
    check_disk_space,
    check_machine,
    check_recipe,
    describe_limits,
    load_run_data,
)
from finesight.train.sampler import TrainSampler
from finesight.train.state import RunContext, RunData
from finesight.train.vision_cache import MIN_IMAGE_USES

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
        num_interim = (total_steps - 1) // eval_interval if eval_interval else 0

    def estimate_s(stats: Sequence[SampleStats]) -> float:
        loss_s = _estimate_forward_s(planned, stats, recipe.train.batch_size)
        if settings is None:
            return loss_s
        return loss_s + _estimate_generation_s(settings, planned, target, stats[: settings.limit])

    total_s = 2 * estimate_s(validation_stats)
    if num_interim:
        total_s += num_interim * estimate_s(validation_stats[: resolve_interim_limit(settings)])
    eval_stats = validation_stats[: settings.limit if settings else None]
    estimate = EvaluationEstimate(2 + num_interim, len(eval_stats), total_s, 0)
    if settings is None:
        return estimate
    lengths = [stats.num_answer_tokens for stats in eval_stats]
    return replace(
        estimate,
        generation_bytes=_estimate_generation_bytes(settings, planned, target, eval_stats),
        max_answer_tokens=max(lengths),
        num_cut_answers=sum(length > settings.max_new_tokens for length in lengths),
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
    num_tokens = sum(min(one.num_answer_tokens, settings.max_new_tokens) for one in eval_stats)
    num_steps = num_tokens / min(EVAL_BATCH_SIZE, len(eval_stats))
    tensors = (*planned.model.parameters(), *planned.model.buffers())  # without a teacher
    read_s = sum(one.nbytes for one in tensors) / target.memory_bandwidth
    step_s = max(MIN_DECODE_STEP_S if target.compute.is_cuda else 0.0, read_s)
    return num_steps * step_s + _estimate_forward_s(planned, eval_stats, EVAL_BATCH_SIZE)


def _estimate_forward_s(
    planned: PlannedModel, stats: Sequence[SampleStats], batch_size: int
) -> float:
    """Estimate the seconds of forward passes, about a third of the work of training steps."""
    batches = (stats[start : start + batch_size] for start in range(0, len(stats), batch_size))
    steps = (plan_step_packs(batch, sys.maxsize) for batch in batches)
    estimate_step = partial(planned.step_timer.estimate_step, use_graphs=False)
    return sum(estimate_step(packs, 0.0).total for packs in steps) / planned.step_timer.num_passes


def _estimate_generation_bytes(
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


WORKER_MARGIN = 1.3
"""Safety factor for the number of data loader workers, since images differ in size."""

NUM_BINS = 10
"""Approximate number of bins of the token histogram."""


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Statistics of the tokens per training sample, with a histogram.

    `bins` contains pairs of the first token count of a bin and its number of samples. Each bin
    covers `bin_width` token counts.
    """

    num_samples: int
    num_skipped: int
    num_tokens: int
    num_patches: int
    min_tokens: int
    median_tokens: float
    max_tokens: int
    longest_sample_id: str
    bin_width: int
    bins: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Estimated memory and time of a run, for its recipe and for the chosen settings.

    Attributes:
        flops_per_sample: FLOPs of an average sample by part of the model.
        num_generations: Mean number of sampled responses to each sample; 0 without sampling.
        recipe_estimate: Estimate for the settings of the recipe.
        chosen_estimate: Estimate for the settings that the search has chosen.
        feature_bytes: Size of the vision cache of all training images. None if the vision encoder
            is trainable, or if the images are used too rarely.
        is_augmented: Whether `data.augment` rules the vision cache out.
        overrides: Command-line overrides that change the recipe to the chosen settings.
        memory_hints: Other ways to reduce memory, for a run that does not fit.
        warnings: Limits of generated tokens below the lengths of the answers.
    """

    family: str
    num_params: int
    num_trainable: int
    target: TargetDevice
    token_stats: TokenStats
    flops_per_sample: Mapping[str, float]
    total_steps: int
    batch_size: int
    num_samples: int
    num_generations: float
    recipe_estimate: SettingsEstimate
    chosen_estimate: SettingsEstimate
    evaluation: EvaluationEstimate
    feature_bytes: int | None
    is_augmented: bool
    num_workers: int
    startup_s: float
    overrides: tuple[str, ...]
    memory_hints: tuple[str, ...]
    warnings: tuple[str, ...]

    def total_seconds(self, estimate: SettingsEstimate) -> float:
        """Return the seconds of all training steps and evaluations, without startup."""
        return self.total_steps * estimate.step_time.total + self.evaluation.total_s


def plan_run(recipe: Recipe, gpu: str | None, console: ProgressConsole) -> RunPlan:
    """Estimate the memory and time of a run, and choose settings that fit, without writing files.

    Args:
        recipe: Recipe of the run.
        gpu: Name of a GPU in `GPU_SPECS`. None measures this machine.
        console: Console for progress.

    Raises:
        UserError: The recipe or its data is invalid, the GPU is unknown, or the model has no native
            implementation.
    """
    # Reject an unknown GPU before reading image headers.
    recipe_target = _select_target(recipe, gpu, recipe.train.precision)
    is_local = gpu is None
    if is_local:
        check_machine(recipe, resolve_device(recipe.train.device))
    # A plan does not execute a custom metric.
    checked = check_recipe(recipe, runs_functions=False, needs_weights=is_local)
    base_model = checked.base_model
    data = load_run_data(checked, recipe_target.num_workers, console)
    train_data = data.train
    sampler = data.sampler
    planned_steps = PlannedSteps(
        [*iter_planned_steps(sampler, train_data.build_sample_stats(data.renderer, recipe.data))],
        train_data.stats.prefix_length,
    )
    recipe_settings = PlannedSettings.from_recipe(recipe)

    @lru_cache
    def build_model(target: TargetDevice, nf4_parts: tuple[QuantizablePart, ...]) -> PlannedModel:
        return build_planned_model(base_model.folder, recipe, nf4_parts, target)

    choices = _list_quantization_choices(recipe)
    searches: dict[TargetDevice, SettingsSearch] = {}
    for target in (recipe_target, _prefer_bf16(recipe, gpu, recipe_target)):
        build, is_cuda = partial(build_model, target), target.compute.is_cuda
        searches[target] = SettingsSearch(
            build, planned_steps, target.memory_bytes, choices, prefer_large_packs=is_cuda
        )
    recipe_estimate = searches[recipe_target].estimate(recipe_settings)
    # The first of equal estimates is chosen, so the recipe changes only for a reason.
    estimates = [(recipe_target, recipe_estimate)]
    for target, search in searches.items():
        estimates.append((target, search.estimate(search.find_best(recipe_settings))))
    target, chosen_estimate = min(estimates, key=lambda item: item[1].rank)
    model = build_model(target, chosen_estimate.settings.nf4_parts)
    if is_local:
        persistent = model.persistent
        checkpoint_bytes = FP32_BYTES * persistent.num_trainable + persistent.optimizer_state_bytes
        check_disk_space(
            recipe, model.model, persistent.num_trainable, checkpoint_bytes, len(sampler)
        )
    validation_stats = () if data.validation is None else data.validation.stats.sample_stats
    evaluation = EvaluationEstimate(0, 0, 0.0, 0)
    if validation_stats:
        evaluation = estimate_evaluation(recipe, model, target, validation_stats, len(sampler))
    startup_s = estimate_startup_seconds(model.persistent, target)
    batch_size = recipe.train.batch_size
    if recipe.train.objective in ("dpo", "kto"):  # log-probabilities of the reference model
        num_steps = min(len(sampler), math.ceil(len(train_data.stats.sample_indices) / batch_size))
        startup_s += num_steps * chosen_estimate.step_time.total / model.step_timer.num_passes
        startup_s += _estimate_forward_s(model, validation_stats, batch_size)
    num_workers = _choose_num_workers(recipe, chosen_estimate, target)
    num_generations = recipe.train.grpo.num_generations * float(bool(recipe.rewards))
    if recipe.train.objective == "distill":
        num_generations = recipe.train.distill.lmbda
    return RunPlan(
        family=base_model.folder.family,
        num_params=model.num_params,
        num_trainable=sum(p.numel() for p in trainable_parameters(model.model).values()),
        target=target,
        token_stats=_compute_token_stats(train_data.stats),
        flops_per_sample=_compute_flops(
            model, planned_steps.timed_steps(chosen_estimate.settings.pack_tokens)
        ),
        total_steps=len(sampler),
        batch_size=batch_size,
        num_samples=sampler.num_samples,
        num_generations=num_generations,
        recipe_estimate=recipe_estimate,
        chosen_estimate=chosen_estimate,
        evaluation=evaluation,
        feature_bytes=_compute_feature_bytes(model, train_data.stats, sampler.num_samples, target),
        is_augmented=recipe.data.augment is not None,
        num_workers=num_workers,
        startup_s=startup_s,
        overrides=_list_overrides(
            recipe, recipe_settings, chosen_estimate.settings, target, recipe_target, num_workers
        ),
        memory_hints=tuple(_list_memory_hints(recipe, target, model)),
        warnings=tuple(filter(None, describe_limits(recipe, data))),
    )


def _select_target(recipe: Recipe, gpu: str | None, precision: Precision) -> TargetDevice:
    if gpu is not None:
        return build_named_target(gpu, precision)
    return measure_local_target(recipe.train.device, precision)


def _prefer_bf16(recipe: Recipe, gpu: str | None, recipe_target: TargetDevice) -> TargetDevice:
    """Return a bf16 target if a CPU supports it and the recipe leaves it open, else its own."""
    if (
        recipe_target.compute.is_cuda
        or recipe.train.precision != "auto"
        or select_cpu_precision() == "fp32"
    ):
        return recipe_target
    return _select_target(recipe, gpu, "bf16")


def _list_quantization_choices(recipe: Recipe) -> list[tuple[QuantizablePart, ...]]:
    """List the sets of model parts that may be quantized to NF4.

    The first set is that of the recipe. Others add the decoder, then all other frozen parts.
    """
    recipe_nf4, tuning_modes = recipe.tune.quantize.nf4 or (), dict(recipe.tune)
    sets = [
        tuple(p for p in get_args(QuantizablePart) if p in recipe_nf4 or p in parts)
        for parts in (("language",), ("vision", "merger", "language"))
    ]
    frozen = [one for one in sets if not any(tuning_modes.get(part) == "full" for part in one)]
    return [*dict.fromkeys([recipe_nf4, *frozen])]


def _choose_num_workers(recipe: Recipe, estimate: SettingsEstimate, target: TargetDevice) -> int:
    """Choose the number of data loader workers: on a GPU, loading must keep up with the steps.

    The number is at least that of the recipe or the default, and at most `MAX_WORKERS`.
    """
    current = _resolve_num_workers(recipe, target)
    if not target.compute.is_cuda:
        return current
    step_s = replace(estimate.step_time, data_loading_s=0.0).total
    needed = math.ceil(estimate.step_time.data_loading_s * max(1, current) / step_s * WORKER_MARGIN)
    return min(MAX_WORKERS, max(1, needed, current))


def _resolve_num_workers(recipe: Recipe, target: TargetDevice) -> int:
    return target.num_workers if recipe.train.num_workers is None else recipe.train.num_workers


def _compute_token_stats(stats: DatasetStats) -> TokenStats:
    sample_stats = stats.sample_stats
    lengths = sorted(sample.num_tokens for sample in sample_stats)
    width = (lengths[-1] - lengths[0]) / NUM_BINS
    power: int = 10 ** max(0, math.floor(math.log10(max(width, 1))))
    bin_width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width)
    bins = Counter(length // bin_width * bin_width for length in lengths)
    first, last = min(bins), max(bins)
    longest = max(sample_stats, key=lambda sample: sample.num_tokens)
    return TokenStats(
        num_samples=len(stats.sample_indices),
        num_skipped=len(stats.skipped),
        num_tokens=stats.num_tokens,
        num_patches=stats.num_patches,
        min_tokens=lengths[0],
        median_tokens=median(lengths),
        max_tokens=lengths[-1],
        longest_sample_id=longest.id,
        bin_width=bin_width,
        bins=tuple((bin_start, bins[bin_start]) for bin_start in range(first, last + 1, bin_width)),
    )


def _compute_flops(
    model: PlannedModel, packed_steps: Sequence[Sequence[PlannedPack]]
) -> dict[str, float]:
    """Compute the FLOPs of an average sample by part of the model."""
    packs = [pack for packed_step in packed_steps for pack in packed_step]
    num_samples, flops = sum(pack.num_samples for pack in packs), Counter[str]()
    for breakdown in map(FlopCounter(model.model).count_by_part, packs):
        flops.update({part: breakdown.matmul_by_part[part] for part in MODEL_PARTS})
        flops["decoder attention"] += breakdown.decoder_attention
        flops["vision attention"] += breakdown.vision_attention
    return {part: count / num_samples for part, count in flops.items()}


def _compute_feature_bytes(
    model: PlannedModel, stats: DatasetStats, num_samples: int, target: TargetDevice
) -> int | None:
    """Return the vision cache size of all training images; None if it is not used."""
    if not model.allows_vision_cache or stats.count_image_uses(num_samples) < MIN_IMAGE_USES:
        return None
    encoder, config = model.model.visual, model.model.config.vision
    num_features = stats.num_patches // config.merge_size**2 * encoder.features_per_token
    return num_features * config.out_hidden_size * target.dtype.itemsize


def _list_memory_hints(recipe: Recipe, target: TargetDevice, model: PlannedModel) -> list[str]:
    may_quantize = target.compute.is_cuda and model.model.config.decoder.moe is None
    may_quantize = may_quantize and len(_list_quantization_choices(recipe)) > 1
    hints = {
        "4 bits (pip install 'finesight[quant]')": may_quantize and not find_spec("bitsandbytes"),
        "train.precision=bf16": target.precision == "fp32" and not target.compute.is_cuda,
        "smaller images": True,
        "a smaller model": True,
        "train.optimizer=adamw_8bit": recipe.train.optimizer == "adamw",
        "lora instead of full": recipe.tune.has_mode("full"),
        "train.distill.weight_format=int4": recipe.train.objective == "distill",
    }
    return [hint for hint, is_possible in hints.items() if is_possible]


def _list_overrides(
    recipe: Recipe,
    recipe_settings: PlannedSettings,
    chosen_settings: PlannedSettings,
    target: TargetDevice,
    recipe_target: TargetDevice,
    num_workers: int,
) -> tuple[str, ...]:
    """List the command-line overrides that change the recipe to the chosen settings."""
    overrides = []
    if chosen_settings.pack_tokens != recipe_settings.pack_tokens:
        overrides.append(f"train.pack_tokens={chosen_settings.pack_tokens}")
    if chosen_settings.activation_checkpointing != recipe_settings.activation_checkpointing:
        value = chosen_settings.activation_checkpointing
        fraction = {0.0: "false", 1.0: "true"}.get(value, f"{value:g}")
        overrides.append(f"train.activation_checkpointing={fraction}")
    if chosen_settings.nf4_parts != recipe_settings.nf4_parts:
        overrides.append(f"tune.quantize.nf4=[{','.join(chosen_settings.nf4_parts)}]")
    if target.dtype != recipe_target.dtype:
        overrides.append(f"train.precision={target.precision}")
    if num_workers != _resolve_num_workers(recipe, target):
        overrides.append(f"train.num_workers={num_workers}")
    return tuple(overrides)


MIN_CHECKED_PARAMS = 50_000_000
"""Minimum number of parameters of a model whose run is estimated by `check_fit`."""

MAX_UNCHECKED_FRACTION = 0.5
"""Fraction of the GPU memory up to which packs always fit beside weights and optimizer state."""

LONG_CPU_RUN_S = 3600


def check_fit(run: RunContext, data: RunData, *, force: bool) -> None:
    """Reject a run whose predicted peak memory exceeds that of the device.

    On a GPU, the prediction uses the smallest packs with activation checkpointing, because the
    trainer reduces both by itself when memory runs out. On a CPU, it uses the settings of the
    recipe, and a warning states the estimated time of a run of more than an hour. Small models and
    runs of several ranks are not checked, and an error of the estimate is ignored.

    Args:
        run: Settings of the run, and the console for warnings.
        force: Only warn if the run does not fit.

    Raises:
        UserError: The run does not fit.
    """
    try:
        error = _estimate_fit(run, data)
    except Exception:
        logging.getLogger(__name__).debug("the run was not estimated", exc_info=True)
        return
    if error is not None and not force:
        raise error
    if error is not None:
        run.console.log(f"warning: {error.what}; started because of --force")


def _estimate_fit(run: RunContext, data: RunData) -> UserError | None:
    """Estimate memory and time of a run; return the error of one that does not fit."""
    recipe, hardware = run.recipe, run.hardware
    is_cuda = hardware.device.type == "cuda"
    if not hardware.process_group.is_single_process:
        return None  # several ranks shard the weights, or split long samples
    folder = run.base_model.folder
    parameters = [*build_meta_model(folder, hardware.dtype, (), ()).parameters()]
    num_params = num_trainable = sum(parameter.numel() for parameter in parameters)
    if num_params < MIN_CHECKED_PARAMS:
        return None
    # Only the time of a CPU run is estimated, which depends on the bandwidth.
    speeds = hardware.peak_flops, 1.0 if is_cuda else None
    target = build_local_target(hardware.device, hardware.dtype, *speeds)

    @lru_cache
    def build_model(nf4_parts: tuple[QuantizablePart, ...]) -> PlannedModel:
        return build_planned_model(folder, recipe, nf4_parts, target)

    settings = PlannedSettings.from_recipe(recipe)
    # At most 16 bytes per trained parameter, and three adapters (query, key, value) per matrix.
    if not recipe.tune.has_mode("full"):
        sides = (sum(one.shape[-2:]) * one.shape[:-2].numel() for one in parameters if one.ndim > 1)
        num_trainable = 3 * recipe.tune.lora.rank * sum(sides)
    persistent_bytes = num_params * hardware.dtype.itemsize + 16 * num_trainable
    is_checked = not is_cuda or recipe.train.objective == "distill"  # the teacher is not counted
    if not is_checked and persistent_bytes < MAX_UNCHECKED_FRACTION * target.memory_bytes:
        return None
    stats = data.train.build_sample_stats(data.renderer, recipe.data)
    steps = PlannedSteps([*iter_planned_steps(data.sampler, stats)], data.train.stats.prefix_length)
    smallest = PlannedSettings(steps.max_sample_tokens, 1.0, settings.nf4_parts)
    choices = _list_quantization_choices(recipe)
    search = SettingsSearch(build_model, steps, target.memory_bytes, choices, is_cuda)
    peak_bytes = search.estimate_peak(smallest if is_cuda else settings).total
    if peak_bytes <= target.memory_bytes:
        if not is_cuda:
            _warn_long_run(run, data.sampler, search.estimate(settings))
        return None
    best = search.find_best(settings)
    best_bytes = search.estimate_peak(best).total
    remedy = f"try {', '.join(_list_memory_hints(recipe, target, build_model(best.nf4_parts)))}"
    if best_bytes <= target.memory_bytes:
        workers = _resolve_num_workers(recipe, target)
        overrides = _list_overrides(recipe, settings, best, target, target, workers)
        remedy = f"add {' '.join(overrides)} ({best_bytes / 1e9:.1f} GB), or {remedy}"
    return UserError(
        f"the predicted peak memory is {peak_bytes / 1e9:.1f} GB, and {target.name} has"
        f" {target.memory_bytes / 1e9:.1f} GB",
        where=f"model {recipe.model}",
        expected="a run that fits; its plan shows the memory by part",
        remedy=f"{remedy}; start anyway with --force",
    )


def _warn_long_run(run: RunContext, sampler: TrainSampler, estimate: SettingsEstimate) -> None:
    """Log the estimated time of a run on a CPU if it is long."""
    num_steps, step_s = len(sampler), estimate.step_time.total
    num_uncached = min(num_steps, math.ceil(sampler.epoch_length / run.recipe.train.batch_size))
    cached_step_s = estimate.cached_step_s or step_s
    seconds = num_uncached * step_s + (num_steps - num_uncached) * cached_step_s
    if seconds > LONG_CPU_RUN_S:
        run.console.log(
            f"warning: {num_steps} training steps on this CPU take about"
            f" {format_duration(seconds)} (estimate). Use a GPU, a smaller model, smaller images"
            " (image.max_pixels) or fewer steps (train.steps)."
        )
