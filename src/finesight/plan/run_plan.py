"""Build the plan of a run from its recipe, image headers and model shapes.

A plan estimates memory and time, and chooses settings that fit the device.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import chain
from statistics import median

import torch
from torch import nn

from finesight.encode.renderer import is_native
from finesight.errors import UserError
from finesight.infer.model_loader import resolve_device, select_cpu_precision
from finesight.model.trainable import MODEL_PARTS, trainable_parameters
from finesight.model.weights_io import build_meta_model
from finesight.optimizer_components import find_smaller_optimizer
from finesight.plan.dry_run import PlannedPack, iter_planned_steps
from finesight.plan.evaluation_estimate import (
    EvaluationEstimate,
    estimate_evaluation,
    estimate_forward_s,
)
from finesight.plan.run_planner import (
    GpuAdvice,
    PlannedData,
    RunPlanner,
    is_better,
    list_overrides,
    list_quantization_choices,
    resolve_num_workers,
)
from finesight.plan.settings_search import (
    PlannedModel,
    PlannedSettings,
    SettingsEstimate,
    SettingsSearch,
)
from finesight.plan.sharded_memory import FP32_BYTES, RankLayout
from finesight.plan.step_time import (
    TargetDevice,
    build_local_target,
    build_named_target,
    estimate_startup_seconds,
    extend_to_gpus,
    extend_to_local_gpus,
    find_min_memory,
    measure_local_target,
)
from finesight.progress import ProgressConsole
from finesight.report.summary import format_duration
from finesight.settings.config import Precision, Recipe, VisionCacheMode
from finesight.train.dataset_stats import DatasetStats, SampleStats
from finesight.train.flops import FlopCounter
from finesight.train.parallel.distributed import count_launched_ranks
from finesight.train.prefetch import MAX_WORKERS, default_num_workers
from finesight.train.recipe_check import (
    check_disk_space,
    check_machine,
    check_recipe,
    describe_limits,
    load_run_data,
)
from finesight.train.sampler import TrainSampler
from finesight.train.setup import check_sharding
from finesight.train.state import Hardware, RunContext, RunData
from finesight.train.vision_cache_choice import find_slow_reason

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
        single_step_s: Seconds of a step on one of several GPUs, regardless of its memory; None for
            a plan of one GPU.
        advice: More GPUs, for a run that does not fit.
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
    single_step_s: float | None
    advice: GpuAdvice | None
    overrides: tuple[str, ...]
    memory_hints: tuple[str, ...]
    warnings: tuple[str, ...]

    def total_seconds(self, estimate: SettingsEstimate) -> float:
        """Return the seconds of all training steps and evaluations, without startup."""
        return self.total_steps * estimate.step_time.total + self.evaluation.total_s


def plan_run(
    recipe: Recipe, gpu: str | None, console: ProgressConsole, num_gpus: int | None = None
) -> RunPlan:
    """Estimate the memory and time of a run, and choose settings that fit, without writing files.

    Args:
        recipe: Recipe of the run.
        gpu: Name of a GPU in `GPU_SPECS`. None measures this machine.
        console: Console for progress.
        num_gpus: Number of GPUs, with one rank on each. None takes that of the launcher which has
            started this process; without a launcher, one GPU of the given name, or all GPUs of this
            machine.

    Raises:
        UserError: The recipe or its data is invalid, the GPU is unknown, there is no GPU, or the
            model has no native implementation.
    """
    # Reject an unknown GPU before reading image headers.
    recipe_target = _select_target(recipe, gpu, num_gpus, recipe.train.precision)
    is_local = gpu is None
    if is_local:
        check_machine(recipe, resolve_device(recipe.train.device))
    # The functions of rewards are executed later, as training does; that of the metric is not.
    checked = check_recipe(recipe, runs_functions=False, needs_weights=is_local)
    base_model = checked.base_model
    if recipe_target.num_gpus > 1:
        check_sharding(recipe.train, "cuda", is_native=is_native(base_model.folder))
    # Other ranks do not use the cores of this machine now.
    device_type = "cuda" if recipe_target.compute.is_cuda else "cpu"
    num_scan_workers = default_num_workers(torch.device(device_type))
    data = load_run_data(checked, num_scan_workers, console)
    train_stats = data.train.stats
    sampler = data.sampler
    planned_data = _plan_data(recipe, data)
    planner = RunPlanner(recipe, base_model, planned_data)
    recipe_settings = PlannedSettings.from_recipe(recipe)
    choices = list_quantization_choices(recipe)
    recipe_search = planner.create_search(recipe_target, recipe_settings.parallel, choices)
    recipe_estimate = recipe_search.estimate(recipe_settings)
    targets = [*dict.fromkeys((recipe_target, _prefer_bf16(recipe, gpu, recipe_target)))]
    target, chosen_estimate = planner.find_best(targets)
    # The recipe changes only for a reason.
    if not is_better(chosen_estimate, recipe_estimate):
        target = recipe_target
        chosen_estimate = recipe_estimate
    chosen_settings = chosen_estimate.settings
    model = planner.build_model(target, chosen_settings.parallel, chosen_settings.nf4_parts)
    single_target = replace(target, num_gpus=1)
    if is_local:
        # A checkpoint has the states of all ranks.
        complete = planner.build_model(single_target, "ddp", chosen_settings.nf4_parts)
        num_trainable = complete.persistent.num_trainable
        checkpoint_bytes = FP32_BYTES * num_trainable + complete.persistent.optimizer_state_bytes
        check_disk_space(recipe, complete.model, num_trainable, checkpoint_bytes, len(sampler))
    evaluation = EvaluationEstimate(0, 0, 0.0, 0)
    validation_stats = planned_data.validation_stats
    if validation_stats:
        evaluation = estimate_evaluation(recipe, model, target, validation_stats, len(sampler))
    startup_s = _estimate_startup_s(
        recipe, planned_data, model, chosen_estimate, target, len(sampler)
    )
    num_workers = _choose_num_workers(recipe, chosen_estimate, target)
    single_step_s = None
    if target.num_gpus > 1:
        single_search = planner.create_search(single_target, "ddp", [chosen_settings.nf4_parts])
        single_step_s = single_search.estimate_step_time(chosen_settings).total
    advice = None if chosen_estimate.fits else planner.advise_gpus(target)
    timed_steps = planner.plan_steps(single_target).timed_steps(chosen_settings.pack_tokens)
    return RunPlan(
        family=base_model.folder.family,
        num_params=model.num_params,
        num_trainable=sum(p.numel() for p in trainable_parameters(model.model).values()),
        target=target,
        token_stats=_compute_token_stats(train_stats),
        flops_per_sample=_compute_flops(model, timed_steps),
        total_steps=len(sampler),
        batch_size=recipe.train.batch_size,
        num_samples=sampler.num_samples,
        num_generations=_count_generations(recipe),
        recipe_estimate=recipe_estimate,
        chosen_estimate=chosen_estimate,
        evaluation=evaluation,
        feature_bytes=_compute_feature_bytes(
            recipe.train.vision_cache, model, train_stats, sampler.num_samples, target
        ),
        is_augmented=recipe.data.augment is not None,
        num_workers=num_workers,
        startup_s=startup_s,
        single_step_s=single_step_s,
        advice=advice,
        overrides=list_overrides(recipe, chosen_settings, target, recipe_target, num_workers),
        memory_hints=tuple(_list_memory_hints(recipe, target, model)),
        warnings=tuple(filter(None, describe_limits(recipe, data))),
    )


def _plan_data(recipe: Recipe, data: RunData) -> PlannedData:
    """Return the samples of evenly spaced steps, and the statistics of the data."""
    sample_stats = data.train.build_sample_stats(data.renderer, recipe.data)
    steps = [*iter_planned_steps(data.sampler, sample_stats)]
    validation_stats: Sequence[SampleStats] = ()
    if data.validation is not None:
        validation_stats = data.validation.stats.sample_stats
    return PlannedData(steps, data.train.stats, validation_stats)


def _count_generations(recipe: Recipe) -> float:
    """Return the mean number of sampled responses to each sample; 0 without sampling."""
    sampling = recipe.needs.sampling
    if sampling is None:
        return 0.0
    return sampling.num_generations * sampling.share


def _select_target(
    recipe: Recipe, gpu: str | None, num_gpus: int | None, precision: Precision
) -> TargetDevice:
    """Return the target of a plan, for the given or the default number of GPUs.

    Raises:
        UserError: Several GPUs are given, and this machine has none.
    """
    if gpu is not None:
        target = build_named_target(gpu, precision)
        return extend_to_gpus(target, num_gpus or count_launched_ranks() or 1)
    target = measure_local_target(recipe.train.device, precision)
    if target.compute.is_cuda:
        count = num_gpus or count_launched_ranks() or torch.cuda.device_count()
        return extend_to_local_gpus(target, count) if count > 1 else target
    reason = "this machine has no GPU"
    if recipe.train.device == "cpu":
        reason = "the recipe selects the CPU (train.device=cpu)"
    refuse_gpus(num_gpus, reason, 'add the name of the GPU, such as --gpu "RTX 4090", or ')
    return target


def refuse_gpus(num_gpus: int | None, reason: str, advice: str = "") -> None:
    """Raise UserError if several GPUs are given for a run on a CPU.

    Args:
        reason: Reason for the CPU.
        advice: First part of the remedy, before "remove --gpus".
    """
    if num_gpus is not None and num_gpus > 1:
        raise UserError(
            f"{num_gpus} GPUs, but {reason}",
            where="--gpus",
            expected="GPUs of this machine, or a GPU by name",
            remedy=f"{advice}remove --gpus",
        )


def _prefer_bf16(recipe: Recipe, gpu: str | None, recipe_target: TargetDevice) -> TargetDevice:
    """Return a bf16 target if CPU and recipe allow it, else that of the recipe."""
    if (
        recipe_target.compute.is_cuda
        or recipe.train.precision != "auto"
        or select_cpu_precision() == "fp32"
    ):
        return recipe_target
    return _select_target(recipe, gpu, None, "bf16")


def _estimate_startup_s(
    recipe: Recipe,
    data: PlannedData,
    model: PlannedModel,
    estimate: SettingsEstimate,
    target: TargetDevice,
    num_steps: int,
) -> float:
    """Estimate the seconds before the first step, with those of a reference model."""
    seconds = estimate_startup_seconds(model.persistent, target)
    if not recipe.needs.reference:
        return seconds
    # The reference model computes log-probabilities of all samples.
    batch_size = recipe.train.batch_size
    num_forward_steps = min(num_steps, math.ceil(len(data.stats.sample_indices) / batch_size))
    seconds += num_forward_steps * estimate.step_time.total / model.step_timer.num_passes
    seconds += estimate_forward_s(model, data.validation_stats, batch_size) / target.num_gpus
    return seconds


def _choose_num_workers(recipe: Recipe, estimate: SettingsEstimate, target: TargetDevice) -> int:
    """Choose the number of data loader workers: on a GPU, loading must keep up with the steps.

    The number is at least that of the recipe or the default, and at most `MAX_WORKERS`.
    """
    current = resolve_num_workers(recipe, target)
    if not target.compute.is_cuda:
        return current
    step_s = replace(estimate.step_time, data_loading_s=0.0).total
    needed = math.ceil(estimate.step_time.data_loading_s * max(1, current) / step_s * WORKER_MARGIN)
    return min(MAX_WORKERS, max(1, needed, current))


def _compute_token_stats(stats: DatasetStats) -> TokenStats:
    sample_stats = stats.sample_stats
    lengths = sorted(sample.num_tokens for sample in sample_stats)
    width = (lengths[-1] - lengths[0]) / NUM_BINS
    power: int = 10 ** max(0, math.floor(math.log10(max(width, 1))))
    bin_width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width)
    bins = Counter(length // bin_width * bin_width for length in lengths)
    bin_starts = range(min(bins), max(bins) + 1, bin_width)
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
        bins=tuple((bin_start, bins[bin_start]) for bin_start in bin_starts),
    )


def _compute_flops(
    model: PlannedModel, packed_steps: Sequence[Sequence[PlannedPack]]
) -> dict[str, float]:
    """Compute the FLOPs of an average sample by part of the model."""
    counter = FlopCounter(model.model)
    num_samples = 0
    flops = Counter[str]()
    for pack in chain.from_iterable(packed_steps):
        num_samples += pack.num_samples
        breakdown = counter.count_by_part(pack)
        for part in MODEL_PARTS:
            flops[part] += breakdown.matmul_by_part[part]
        flops["decoder attention"] += breakdown.decoder_attention
        flops["vision attention"] += breakdown.vision_attention
    return {part: count / num_samples for part, count in flops.items()}


def _compute_feature_bytes(
    setting: VisionCacheMode,
    model: PlannedModel,
    stats: DatasetStats,
    num_samples: int,
    target: TargetDevice,
) -> int | None:
    """Return the vision cache size of all training images; None if it is not used."""
    if not model.allows_vision_cache:
        return None
    gpu_flops = target.peak_flops if target.compute.is_cuda else None
    flop_counter = FlopCounter(model.model)
    slow_reason = find_slow_reason(
        setting, stats, num_samples, flop_counter, gpu_flops, target.num_gpus
    )
    if slow_reason is not None:
        return None
    encoder = model.model.visual
    config = model.model.config.vision
    num_features = stats.num_patches // config.merge_size**2 * encoder.features_per_token
    return num_features * config.out_hidden_size * target.dtype.itemsize


def _list_memory_hints(recipe: Recipe, target: TargetDevice, model: PlannedModel) -> list[str]:
    may_quantize = target.compute.is_cuda and model.model.config.decoder.moe is None
    may_quantize = may_quantize and len(list_quantization_choices(recipe)) > 1
    smaller = find_smaller_optimizer(recipe.train.optimizer)
    hints = {
        "4 bits (pip install 'finesight[quant]')": may_quantize and not find_spec("bitsandbytes"),
        "train.precision=bf16": target.precision == "fp32" and not target.compute.is_cuda,
        "smaller images": True,
        "a smaller model": True,
        f"train.optimizer={smaller}": smaller is not None,
        "lora instead of full": recipe.tune.has_mode("full"),
    }
    if recipe.needs.teacher is not None:
        hints[f"{recipe.needs.teacher.section}.weight_format=int4"] = True
    return [hint for hint, is_possible in hints.items() if is_possible]


MIN_CHECKED_PARAMS = 50_000_000
"""Minimum number of parameters of a model whose run is estimated by `check_fit`."""

MAX_UNCHECKED_FRACTION = 0.5
"""Fraction of the GPU memory up to which packs always fit beside weights and optimizer state."""

LONG_CPU_RUN_S = 3600


def check_fit(run: RunContext, data: RunData, *, force: bool) -> None:
    """Reject a run whose predicted peak memory exceeds that of the device.

    On a GPU, the prediction uses the smallest packs with activation checkpointing, because the
    trainer reduces both by itself when memory runs out. On a CPU, it uses the settings of the
    recipe, and a warning states the estimated time of a run of more than an hour. Small models,
    samples that the ranks share, and several ranks on CPUs are not checked, and an error of the
    estimate is ignored.

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
    """Estimate memory and time of a run; return an error if it does not fit."""
    recipe = run.recipe
    hardware = run.hardware
    is_cuda = hardware.device.type == "cuda"
    num_ranks = hardware.process_group.world_size
    if num_ranks > 1 and not is_cuda:
        return None
    folder = run.base_model.folder
    parameters = [*build_meta_model(folder, hardware.dtype, (), ()).parameters()]
    num_params = sum(parameter.numel() for parameter in parameters)
    if num_params < MIN_CHECKED_PARAMS:
        return None
    target = _build_rank_target(hardware)
    # At most 16 bytes per trained parameter: gradient, fp32 copy and optimizer states.
    num_trainable = num_params
    if not recipe.tune.has_mode("full"):
        num_trainable = _count_max_adapter_params(parameters, recipe.tune.lora.rank)
    persistent_bytes = num_params * hardware.dtype.itemsize + 16 * num_trainable
    # The teacher is not counted, and a sharded run cannot reduce its packs.
    is_sharded = RankLayout(num_ranks, recipe.train.parallel).is_sharded
    is_checked = not is_cuda or recipe.needs.teacher is not None or is_sharded
    if not is_checked and persistent_bytes < MAX_UNCHECKED_FRACTION * target.memory_bytes:
        return None
    planner = RunPlanner(recipe, run.base_model, _plan_data(recipe, data))
    settings = PlannedSettings.from_recipe(recipe)
    search = planner.create_search(target, settings.parallel, list_quantization_choices(recipe))
    if search.has_split_samples(settings):
        return None  # the trainer splits further samples when memory runs out
    checked = search.minimize(settings) if is_cuda else settings
    peak_bytes = search.estimate_peak(checked).total
    if peak_bytes <= target.memory_bytes:
        if not is_cuda:
            _warn_long_run(run, data.sampler, search.estimate(settings))
        elif is_sharded:
            _warn_of_sharded_run(run, search, target)
        return None
    return UserError(
        f"the predicted peak memory is {peak_bytes / 1e9:.1f} GB, and {target.name} has"
        f" {target.memory_bytes / 1e9:.1f} GB",
        where=f"model {recipe.model}",
        expected="a run that fits; its plan shows the memory by part, for any number of GPUs",
        remedy=f"{_suggest_smaller_run(recipe, planner, target)}; start anyway with --force",
    )


def _build_rank_target(hardware: Hardware) -> TargetDevice:
    """Return the target of a run on the devices of its ranks."""
    # Only the time of a CPU run is estimated, which depends on the bandwidth.
    bandwidth = None
    if hardware.device.type == "cuda":
        bandwidth = 1.0
    target = build_local_target(hardware.device, hardware.dtype, hardware.peak_flops, bandwidth)
    num_ranks = hardware.process_group.world_size
    if num_ranks == 1:
        return target
    memory_bytes = find_min_memory(target, hardware.process_group.local_world_size)
    return replace(extend_to_gpus(target, num_ranks), memory_bytes=memory_bytes)


def _count_max_adapter_params(parameters: Iterable[nn.Parameter], rank: int) -> int:
    """Return the number of parameters of three adapters (query, key, value) per matrix."""
    num_sides = 0
    for parameter in parameters:
        if parameter.ndim > 1:
            num_sides += sum(parameter.shape[-2:]) * parameter.shape[:-2].numel()
    return 3 * rank * num_sides


def _suggest_smaller_run(recipe: Recipe, planner: RunPlanner, target: TargetDevice) -> str:
    """Return the remedy for a run that does not fit: other settings, or more GPUs."""
    best_target, best = planner.find_best([target])
    best_model = planner.build_model(target, best.settings.parallel, best.settings.nf4_parts)
    hints = f"try {', '.join(_list_memory_hints(recipe, target, best_model))}"
    if best.peak.total <= target.memory_bytes and not best.exceeds_host_memory:
        overrides = list_overrides(recipe, best.settings, best_target, target)
        return f"add {' '.join(overrides)} ({best.peak.total / 1e9:.1f} GB), or {hints}"
    advice = planner.advise_gpus(target)
    if advice is not None:
        return f"{advice.describe()}, or {hints}"
    return hints


def _warn_of_sharded_run(run: RunContext, search: SettingsSearch, target: TargetDevice) -> None:
    """Warn about a sharded run whose packs or offloaded shards may exceed the memory."""
    settings = PlannedSettings.from_recipe(run.recipe)
    estimate = search.estimate(settings)
    if estimate.exceeds_host_memory:
        assert estimate.host_memory_bytes is not None, "unknown memory of the machine"
        run.console.log(
            f"warning: the offloaded shards need {estimate.host_bytes / 1e9:.0f} GB of host memory,"
            f" and this machine has {estimate.host_memory_bytes / 1e9:.0f} GB; use"
            " train.parallel=fsdp with more GPUs, or lora instead of full"
        )
    peak_bytes = estimate.peak.total
    if peak_bytes <= target.memory_bytes:
        return
    best = search.find_best(settings)
    overrides = " ".join(list_overrides(run.recipe, best, target, target))
    run.console.log(
        f"warning: the predicted peak memory is {peak_bytes / 1e9:.1f} GB, and {target.name} has"
        f" {target.memory_bytes / 1e9:.1f} GB; a sharded run cannot reduce its packs: add"
        f" {overrides}"
    )


def _warn_long_run(run: RunContext, sampler: TrainSampler, estimate: SettingsEstimate) -> None:
    """Log the estimated time of a run on a CPU if it is long."""
    num_steps = len(sampler)
    step_s = estimate.step_time.total
    num_uncached = min(num_steps, math.ceil(sampler.epoch_length / run.recipe.train.batch_size))
    cached_step_s = estimate.cached_step_s or step_s
    seconds = num_uncached * step_s + (num_steps - num_uncached) * cached_step_s
    if seconds > LONG_CPU_RUN_S:
        run.console.log(
            f"warning: {num_steps} training steps on this CPU take about"
            f" {format_duration(seconds)} (estimate). Use a GPU, a smaller model, smaller images"
            " (image.max_pixels) or fewer steps (train.steps)."
        )
