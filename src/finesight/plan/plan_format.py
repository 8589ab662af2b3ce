"""Format a plan as console lines and as a JSON object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from finesight.errors import format_count
from finesight.plan.peak_memory import USABLE_MEMORY_FRACTION
from finesight.plan.run_plan import RunPlan
from finesight.plan.run_planner import ADVISED_GPUS
from finesight.plan.settings_search import Phase, SettingsEstimate
from finesight.plan.step_time import StepTime, TargetDevice
from finesight.report.summary import format_duration

MAX_BAR_WIDTH = 30
"""Maximum width of a histogram bar in characters."""

TEXT_ROWS = ("highest during", "host memory, offloaded")
"""Rows with empty cells, unlike those of memory in a GPU."""

MEMORY_TITLES = {
    "master_weights": "master weights (fp32)",
    "optimizer_states": "optimizer state",
    "activations": "saved activations",
    "gathered_weights": "gathered weights",
    "nccl": "NCCL buffers",
    "cuda_graphs": "CUDA graphs",
    "cuda_context": "CUDA context",
}
"""Row titles by field of `PeakMemory`, if they differ from its name."""

PHASE_TITLES: Mapping[Phase, str] = {
    "step": "training",
    "evaluation": "eval and export",
    "loading": "loading",
}


def format_plan(plan: RunPlan) -> list[str]:
    """Format the plan of a run as lines for the console."""
    return [
        *_format_summary(plan),
        *_format_histogram(plan),
        *_format_flops(plan),
        *_format_estimates(plan),
        *_format_overheads(plan),
        *_format_verdict(plan),
    ]


def format_short_plan(plan: RunPlan) -> list[str]:
    """Format duration and memory of a run as one line, followed by its warnings."""
    estimate = plan.chosen_estimate
    seconds = plan.startup_s + plan.total_steps * estimate.step_time.total
    duration = format_duration(seconds + plan.evaluation.total_s)
    memory = f"{estimate.peak.total / 1e9:.1f} of {plan.target.memory_bytes / 1e9:.0f} GB"
    gpus = ""
    if plan.target.num_gpus > 1:
        gpus = f" on each of {plan.target.num_gpus} GPUs"
    lines = [f"run     {_format_steps(plan)}: about {duration}, {memory} of memory{gpus}"]
    if plan.token_stats.num_skipped:
        lines.append(f"warning: {format_count(plan.token_stats.num_skipped, 'sample')} skipped")
    lines += [line for line in _format_overheads(plan) if line.startswith("warning")]
    if not estimate.fits:
        lines += _format_verdict(plan)
    return lines


def _format_summary(plan: RunPlan) -> Iterator[str]:
    stats = plan.token_stats
    target = plan.target
    origin = "measured" if target.is_measured else "data sheet"
    yield (
        f"model   {plan.family}, {plan.num_trainable:,} of {plan.num_params:,} parameters are"
        " trainable"
    )
    each = link = ""
    if target.num_gpus > 1:
        each = " each"
        link = f", {target.link_bandwidth / 1e9:.0f} GB/s between GPUs"
    yield (
        f"target  {_format_target(target)} ({origin}): {target.memory_bytes / 1e9:.0f} GB{each},"
        f" {target.peak_flops / 1e12:.3g} TFLOP/s in {plan.target.precision},"
        f" {target.memory_bandwidth / 1e9:.0f} GB/s{link}"
    )
    yield (
        f"data    {format_count(stats.num_samples, 'sample')}, {stats.num_tokens:,} tokens,"
        f" {stats.num_patches:,} patches; {stats.num_skipped} skipped"
    )
    yield (
        f"run     {_format_steps(plan)},"
        f" packs (forward passes) per step: {plan.chosen_estimate.packs_per_step:.3g}"
    )


def _format_target(target: TargetDevice) -> str:
    if target.num_gpus == 1:
        return target.name
    return f"{target.num_gpus} x {target.name}"


def _format_histogram(plan: RunPlan) -> Iterator[str]:
    stats = plan.token_stats
    yield ""
    yield (
        f"tokens per sample: {stats.min_tokens} to {stats.max_tokens}, median"
        f" {stats.median_tokens:g}; the longest is {stats.longest_sample_id}"
    )
    max_count = max(count for _, count in stats.bins)
    labels = [f"{start} to {start + stats.bin_width - 1}" for start, _ in stats.bins]
    width = max(map(len, labels))
    for label, (_, count) in zip(labels, stats.bins, strict=True):
        bar = "#" * -(-count * MAX_BAR_WIDTH // max_count)
        yield f"  {label:>{width}}  {bar:<{MAX_BAR_WIDTH}}  {count}"


def _format_flops(plan: RunPlan) -> Iterator[str]:
    total = sum(plan.flops_per_sample.values())
    yield ""
    yield f"FLOPs per sample: {total / 1e9:,.1f} billion"
    for part, count in plan.flops_per_sample.items():
        if count:
            title = {"embeddings": "head", "language": "language model"}.get(part, part)
            yield f"  {title:<22}{count / 1e9:>12,.1f}  {count / total:4.0%}"


def _format_estimates(plan: RunPlan) -> Iterator[str]:
    """Yield a table of memory and time: the recipe next to the chosen settings."""
    recipe_precision = ""
    chosen_precision = ""
    if any(one.startswith("train.precision=") for one in plan.overrides):
        recipe_precision = "auto (fp32)"
        chosen_precision = plan.target.precision
    columns = {"recipe": _describe_estimate(plan, plan.recipe_estimate, recipe_precision)}
    if plan.recipe_estimate.settings != plan.chosen_estimate.settings or plan.overrides:
        columns["chosen"] = _describe_estimate(plan, plan.chosen_estimate, chosen_precision)
    yield ""
    yield _format_row("", list(columns))
    for title in columns["recipe"]:
        empty = _format_gb(0)
        if title in TEXT_ROWS:
            empty = ""
        cells = [column[title] or empty for column in columns.values()]
        if any(column[title] for column in columns.values()):
            yield _format_row(title, cells)


def _describe_estimate(plan: RunPlan, estimate: SettingsEstimate, precision: str) -> dict[str, str]:
    """Return the cells of an estimate by title; empty for memory of 0 bytes."""
    settings = estimate.settings
    peak = estimate.peak
    step_s = estimate.step_time.total
    is_distributed = plan.target.num_gpus > 1
    cells: dict[str, str] = {}
    if is_distributed:
        cells["train.parallel"] = settings.parallel
    cells["train.pack_tokens"] = str(settings.pack_tokens)
    cells["train.activation_checkpointing"] = f"{settings.activation_checkpointing:g}"
    cells["tune.quantize.nf4"] = ",".join(settings.nf4_parts) or "none"
    cells["train.precision"] = precision
    for name, num_bytes in asdict(peak).items():
        cells[MEMORY_TITLES.get(name, name)] = _format_gb(num_bytes) if num_bytes else ""
    cells["allocated by tensors"] = _format_gb(peak.allocated)
    cells["total memory"] = _format_gb(peak.total)
    cells["highest during"] = ""
    if is_distributed and settings.parallel != "ddp":
        cells["highest during"] = PHASE_TITLES[estimate.phase]
    cells["host memory, offloaded"] = ""
    if estimate.host_bytes:
        cells["host memory, offloaded"] = f"{estimate.host_bytes / 1e9:.0f} GB"
    limit = f"{USABLE_MEMORY_FRACTION:.0%} of memory, {plan.chosen_estimate.memory_limit / 1e9:.1f}"
    cells[f"fits in {limit} GB"] = "yes" if estimate.fits else "no"
    cells["step time"] = format_duration(step_s)
    cells["samples/s"] = f"{plan.batch_size / step_s:.4g}"
    if is_distributed:
        communication_s = estimate.step_time.communication_s
        cells["communication of a step"] = format_duration(communication_s)
    cells["bottleneck"] = _find_bottleneck(estimate.step_time)
    cells["all steps"] = format_duration(plan.total_steps * step_s)
    return cells


def _format_gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def _format_steps(plan: RunPlan) -> str:
    steps = format_count(plan.total_steps, "step")
    text = f"{steps} of {format_count(plan.batch_size, 'sample')}"
    if plan.num_generations > 0:
        text += f" with {plan.num_generations:g} responses each, times without their sampling"
    return text


def _format_row(name: str, cells: list[str]) -> str:
    return f"  {name:<32}" + "".join(f" {cell:>15}" for cell in cells)


def _find_bottleneck(step_time: StepTime) -> str:
    seconds_by_part = {
        "matmul": step_time.matmul_s,
        "memory": step_time.memory_s,
        "communication": step_time.communication_s,
        "optimizer": step_time.optimizer_s,
    }
    device_s = step_time.matmul_s + step_time.memory_s + step_time.communication_s
    if step_time.host_s > device_s:
        seconds_by_part = {"host": step_time.host_s, "optimizer": step_time.optimizer_s}
    if step_time.data_loading_s > sum(seconds_by_part.values()):
        return "data loading"
    return max(seconds_by_part, key=lambda name: seconds_by_part[name])


def _format_overheads(plan: RunPlan) -> Iterator[str]:
    evaluation = plan.evaluation
    yield ""
    yield from _format_gpus(plan)
    yield f"startup: about {format_duration(plan.startup_s)} before the first step"
    if evaluation.num_evaluations:
        description = (
            f"{evaluation.num_evaluations} evaluations of {evaluation.num_samples} validation"
            " samples"
        )
        yield f"{description}: about {format_duration(evaluation.total_s)} (rough estimate)"
        if evaluation.generation_bytes:
            yield (
                f"  generation uses about {evaluation.generation_bytes / 1e9:.2f} GB instead"
                " of a pack"
            )
    yield from plan.warnings
    if plan.feature_bytes is not None:
        cached_step_s = plan.chosen_estimate.cached_step_s
        assert cached_step_s is not None, "missing step time with cached features"
        state = f"has {plan.feature_bytes / 1e9:.3g} GB"
        verb = "takes"
        if plan.is_augmented:
            state = "is not used, because data.augment changes the images of every step"
            verb = "would take"
        yield (
            f"frozen vision encoder: the vision cache of all images {state}; with cached features,"
            f" a step {verb} {format_duration(cached_step_s)},"
            f" {plan.batch_size / cached_step_s:.4g} samples/s"
        )
    yield f"precision {plan.target.precision}, data loader workers: {plan.num_workers}"


def _format_gpus(plan: RunPlan) -> Iterator[str]:
    """Yield the effect of several GPUs, and warnings about GPUs or settings without effect."""
    num_gpus = plan.target.num_gpus
    mode = plan.recipe_estimate.settings.parallel
    if num_gpus == 1:
        if mode != "ddp":
            yield f"train.parallel={mode} has no effect on a single GPU"
        return
    step_s = plan.chosen_estimate.step_time.total
    assert plan.single_step_s is not None, f"no step time of one of {num_gpus} GPUs"
    yield (
        "speed-up over one such GPU with enough memory:"
        f" {plan.single_step_s / step_s:.3g} ({format_duration(step_s)} instead of"
        f" {format_duration(plan.single_step_s)} per step)"
    )
    if num_gpus > plan.batch_size:
        yield (
            f"warning: a step has {format_count(plan.batch_size, 'sample')} (train.batch_size) for"
            f" {num_gpus} GPUs, so {num_gpus - plan.batch_size} GPUs have nothing to do"
        )


def _format_verdict(plan: RunPlan) -> Iterator[str]:
    estimate = plan.chosen_estimate
    target = plan.target
    yield ""
    if not estimate.fits:
        required_gb = estimate.peak.total / USABLE_MEMORY_FRACTION / 1e9
        memory = f"{_format_target(target)} has {target.memory_bytes / 1e9:.0f} GB"
        if target.num_gpus > 1:
            memory = f"{_format_target(target)} have {target.memory_bytes / 1e9:.0f} GB each"
        if estimate.exceeds_host_memory:
            assert estimate.host_memory_bytes is not None, "unknown memory of the machine"
            required_gb = estimate.host_bytes / 1e9
            memory = f"this machine has {estimate.host_memory_bytes / 1e9:.0f} GB of host memory"
        advice = ""
        if plan.advice is not None:
            advice = f"{plan.advice.describe()}, or "
        elif target.compute.is_cuda and target.num_gpus < ADVISED_GPUS[-1]:
            advice = f"up to {ADVISED_GPUS[-1]} such GPUs are not sufficient either; "
        yield (
            f"does not fit: needs at least {required_gb:.0f} GB, {memory};"
            f" {advice}try {', '.join(plan.memory_hints)}"
        )
    elif plan.overrides:
        yield f"to use the chosen settings: {' '.join(plan.overrides)}"
    else:
        yield "the recipe needs no changes"


def plan_to_dict(plan: RunPlan) -> dict[str, Any]:
    """Convert the plan of a run to JSON data, in bytes, FLOPs and seconds."""
    target = plan.target
    data = asdict(plan)
    for name in ("recipe_estimate", "chosen_estimate", "num_samples", "advice"):
        del data[name]
    advice = None
    if plan.advice is not None:
        advice = {
            "num_gpus": plan.advice.num_gpus,
            "overrides": plan.advice.overrides,
            **_estimate_to_dict(plan, plan.advice.estimate),
        }
    return data | {
        "precision": target.precision,
        "target": {
            "name": target.name,
            "is_measured": target.is_measured,
            "memory_bytes": target.memory_bytes,
            "flops_per_s": target.peak_flops,
            "bytes_per_s": target.memory_bandwidth,
            "num_gpus": target.num_gpus,
            "link_bytes_per_s": target.link_bandwidth,
        },
        "advice": advice,
        "recipe": _estimate_to_dict(plan, plan.recipe_estimate),
        "chosen": _estimate_to_dict(plan, plan.chosen_estimate),
    }


def _estimate_to_dict(plan: RunPlan, estimate: SettingsEstimate) -> dict[str, Any]:
    step_s = estimate.step_time.total
    return {
        **asdict(estimate.settings),
        "fits": estimate.fits,
        "phase": estimate.phase,
        "usable_bytes": estimate.memory_limit,
        "host_bytes": estimate.host_bytes,
        "host_memory_bytes": estimate.host_memory_bytes,
        "exceeds_host_memory": estimate.exceeds_host_memory,
        "memory": asdict(estimate.peak),
        "allocated_gb": estimate.peak.allocated / 1e9,
        "total_bytes": estimate.peak.total,
        "packs_per_step": estimate.packs_per_step,
        "step_s": step_s,
        "step_time": asdict(estimate.step_time),
        "cached_step_s": estimate.cached_step_s,
        "samples_per_s": plan.batch_size / step_s,
        "steps_s": plan.total_steps * step_s,
        "run_s": plan.total_seconds(estimate),
    }
