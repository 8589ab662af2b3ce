"""Estimates compared with measured runs on one or two H200s (benchmarks/results)."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from case_files import load_cases

from finesight.model_folder import ModelFolder
from finesight.plan.dry_run import PlannedPack
from finesight.plan.peak_memory import compute_peak_memory
from finesight.plan.settings_search import build_planned_model
from finesight.plan.step_time import build_named_target, extend_to_gpus
from finesight.settings.config import Recipe

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


DEFAULTS: dict[str, Any] = load_cases("measured_runs")["defaults"]
SEVERAL_GPUS = load_cases("measured_runs")["several_gpus"]
LABELS_PER_SAMPLE = 24
RUNS = [SimpleNamespace(**DEFAULTS | run) for run in load_cases("measured_runs")["runs"]]


def measured_run(run: SimpleNamespace) -> tuple[float, float]:
    """Return the peak memory in 10^9 bytes and the seconds of a step.

    The time is the minimum of several calls, because small steps are bound by the host.
    """
    measurements = []
    files = ("recipes_h200", "grounding_full_h200", "first_qwen_vl_h200", "one_card_h200")
    for name in files:
        report = json.loads((RESULTS / f"{name}.json").read_text())
        calls = report.get("calls", [report])
        if run.prefix_length:
            calls = [call for call in report.get(run.calls, []) if _has_settings(run, call)]
        for result in (result for call in calls for result in call["results"]):
            if run.name in (result.get("task"), result.get("variant"), result.get("case")):
                seconds = result.get("step_s") or run.samples / result["samples_per_s"]
                measurements.append((result.get("peak_gb") or result["gb"], seconds))
    return max(peak for peak, _ in measurements), min(seconds for _, seconds in measurements)


def _has_settings(run: SimpleNamespace, call: dict[str, Any]) -> bool:
    """Return whether a call measured runs with these settings."""
    command = call["command"]
    return ("fp8" in command, "never" in command) == (bool(run.fp8), not run.uses_vision_cache)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_memory_within_10_and_time_within_15_percent(shared: Path, run: SimpleNamespace) -> None:
    target = build_named_target("H200", "bf16")
    recipe = Recipe.model_validate(
        {
            "model": run.model,
            "data": {"train": "none"},
            "tune": run.tune | {"quantize": {"fp8": run.fp8 or None}},
            "train": {"optimizer": run.optimizer, "num_workers": 12},
            "output_dir": "none",
        }
    )
    if run.nf4:
        pytest.importorskip("bitsandbytes")
    planned = build_planned_model(
        ModelFolder(shared / "qwen_assets" / run.model), recipe, tuple(run.nf4), target
    )
    step = planned.step_timer.estimate_step(
        [make_pack(run, 1.0)] * run.packs,
        run.checkpointed_fraction,
        use_graphs=run.uses_cuda_graphs,
        has_cached_features=run.uses_vision_cache,
    )
    peak_memory = compute_peak_memory(
        planned.persistent,
        planned.tracer,
        [make_pack(run, run.largest_pack_ratio)],
        run.checkpointed_fraction,
        has_multiple_packs=run.packs > 1,
    )
    peak_gb, seconds = measured_run(run)
    # With cached features, the vision encoder is freed before the first step. The peak can be
    # before or after that.
    encoder_bytes = sum(p.nbytes for p in planned.model.visual.parameters()) * run.uses_vision_cache
    assert (peak_memory.allocated - encoder_bytes) / 1.1e9 < peak_gb < peak_memory.allocated / 0.9e9
    assert step.total == pytest.approx(seconds, rel=0.15)


@pytest.mark.parametrize("run", SEVERAL_GPUS, ids=lambda run: run["case"])
def test_memory_of_several_gpus_within_10_percent(shared: Path, run: dict[str, Any]) -> None:
    """Of one of two GPUs, for each mode of sharding."""
    report = json.loads((RESULTS / "scaling_h200_x2.json").read_text())
    (measured,) = [
        one for one in report["results"] if (one["case"], one["gpus"]) == (run["case"], 2)
    ]
    target = extend_to_gpus(build_named_target("H200", "bf16"), 2)
    recipe = Recipe.model_validate(
        {
            "model": run["model"],
            "data": {"train": "none"},
            "tune": run["tune"],
            "train": {"num_workers": 12},
            "output_dir": "none",
        }
    )
    folder = ModelFolder(shared / "qwen_assets" / run["model"])
    planned = build_planned_model(folder, recipe, (), target, run["mode"])
    num_samples = measured["samples_a_step"] // 2
    length = round(measured["tokens_a_step"] / measured["samples_a_step"])
    grids = ((1, run["side"], run["side"]),) * num_samples
    lengths = run["prefix"], *((length - run["prefix"],) * num_samples)
    pack = PlannedPack(lengths, grids, LABELS_PER_SAMPLE * num_samples, run["prefix"])
    peak = compute_peak_memory(
        planned.persistent,
        planned.tracer,
        [pack],
        0.0,
        has_multiple_packs=False,
        use_graphs=planned.persistent.sharded is None,
    )
    assert peak.allocated / 1e9 == pytest.approx(measured["gb"], rel=0.1)


def make_pack(run: SimpleNamespace, token_ratio: float) -> PlannedPack:
    prefix = (run.prefix_length,) if run.prefix_length else ()
    length = round(run.tokens * token_ratio) - run.prefix_length
    num_labels = round(run.labels * token_ratio) * run.samples
    lengths, grids = prefix + (length,) * run.samples, (tuple(run.grid),) * run.samples
    return PlannedPack(lengths, grids, num_labels, run.prefix_length)
