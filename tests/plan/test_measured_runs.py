"""Estimates compared with measured runs on one H200 (benchmarks/results)."""

import json
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from finesight.config import QuantizablePart, Recipe
from finesight.model_folder import ModelFolder
from finesight.plan.dry_run import PlannedPack
from finesight.plan.peak_memory import compute_peak_memory
from finesight.plan.settings_search import build_planned_model
from finesight.plan.step_time import build_named_target
from finesight.vision.image_processing import GridTHW

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ADAPTER = {"rank": 64, "alpha": 16, "dropout": 0.05}
LORA = {"language": "lora", "lora": ADAPTER}
TARGETS = {"target_modules": ["c_attn", "attn.c_proj", "w1", "w2"]}
SCRIPT = {"language": "lora", "lora": ADAPTER | TARGETS}
ALL = {"language": "full", "vision": "full", "merger": "full", "embeddings": "full"}
ALL_BUT_VISION = {"language": "full", "merger": "full", "embeddings": "full"}
NOT_MEASURED = {("shared_prefix", False, False), ("needed_alone", True, True)}


@dataclass(frozen=True)
class MeasuredRun:
    """A measured run.

    Each step has `packs` packs of `samples` samples. A sample has `tokens` tokens, `labels` labels
    and an image with this grid.
    """

    name: str
    model: str
    tune: dict[str, Any]
    samples: int
    tokens: int
    labels: int
    grid: GridTHW
    packs: int = 1
    checkpointed_fraction: float = 0.0
    optimizer: str = "adamw"
    nf4: tuple[QuantizablePart, ...] = ()
    fp8: tuple[QuantizablePart, ...] = ()
    largest_pack_ratio: float = 1.0
    """Tokens of the largest pack relative to the mean pack."""
    uses_cuda_graphs: bool = True
    """False if the shapes of 40 steps differ so much that most packs run eagerly."""
    uses_vision_cache: bool = False
    """Whether the image features were cached."""
    prefix_length: int = 0
    """Tokens of the shared prefix."""
    calls: str = "shared_prefix"
    """Key of the runs with a shared prefix in the report."""


QWEN2, QWEN25 = "Qwen2-VL-2B-Instruct", "Qwen2.5-VL-7B-Instruct"
QWEN_VL = ("Qwen-VL-Chat", SCRIPT, 4, 512, 235, (1, 32, 32), 2, 1.0)
LATEX = MeasuredRun("latex_2b", QWEN2, LORA, 16, 172, 77, (1, 8, 36))
CAPTIONS = MeasuredRun("captions_2b_batch64", QWEN2, LORA, 64, 140, 14, (1, 20, 20))
SMALL_CAPTIONS = replace(CAPTIONS, name="captions_2b", samples=16)
FP8: tuple[QuantizablePart, ...] = ("language", "vision")
RUNS = (
    CAPTIONS,
    SMALL_CAPTIONS,
    replace(LATEX, largest_pack_ratio=1.11, uses_cuda_graphs=False),
    MeasuredRun("7B LoRA", QWEN25, LORA, 16, 802, 21, (1, 46, 46)),
    MeasuredRun("7B LoRA FP8", QWEN25, LORA, 16, 802, 21, (1, 46, 46), fp8=FP8),
    MeasuredRun("3B full", "Qwen2.5-VL-3B-Instruct", ALL, 8, 110, 15, (1, 14, 14)),
    MeasuredRun("lora", *QWEN_VL, uses_vision_cache=True),
    MeasuredRun("lora cached", *QWEN_VL[:2], 8, *QWEN_VL[3:6], uses_vision_cache=True),
    MeasuredRun("qlora", *QWEN_VL, "adamw_8bit", ("vision", "merger", "language")),
    MeasuredRun("full", QWEN_VL[0], ALL_BUT_VISION, *QWEN_VL[2:], "adamw_8bit"),
    replace(SMALL_CAPTIONS, prefix_length=15),
    *(
        replace(
            CAPTIONS,
            prefix_length=15,
            calls=calls,
            tokens=140 if calls == "shared_prefix" else 138,
            fp8=fp8,
            uses_vision_cache=uses_vision_cache,
        )
        for calls, fp8, uses_vision_cache in product(
            ("shared_prefix", "needed_alone", "lora_backward"), ((), FP8), (False, True)
        )
        if (calls, bool(fp8), uses_vision_cache) not in NOT_MEASURED
    ),
)


def measured_run(run: MeasuredRun) -> tuple[float, float]:
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


def _has_settings(run: MeasuredRun, call: dict[str, Any]) -> bool:
    """Return whether a call measured runs with these settings."""
    command = call["command"]
    return ("fp8" in command, "never" in command) == (bool(run.fp8), not run.uses_vision_cache)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_memory_within_10_and_time_within_15_percent(shared: Path, run: MeasuredRun) -> None:
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
        ModelFolder(shared / "qwen_assets" / run.model), recipe, run.nf4, target
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


def make_pack(run: MeasuredRun, token_ratio: float) -> PlannedPack:
    prefix = (run.prefix_length,) if run.prefix_length else ()
    length = round(run.tokens * token_ratio) - run.prefix_length
    num_labels = round(run.labels * token_ratio) * run.samples
    lengths, grids = prefix + (length,) * run.samples, (run.grid,) * run.samples
    return PlannedPack(lengths, grids, num_labels, run.prefix_length)
