"""Estimates against what runs on one H200 really took (benchmarks/results)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finesight.config import DataFile, Quantisable, Recipe, Train, Tune
from finesight.encode.encoded import Grid
from finesight.hub import ModelFolder
from finesight.plan.activations import Activations
from finesight.plan.load import Load
from finesight.plan.memory import peak_of
from finesight.plan.model import sized
from finesight.plan.target import named_target

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ADAPTER = {"rank": 64, "alpha": 16, "dropout": 0.05}
LORA = {"language": "lora", "lora": ADAPTER}
TARGETS = {"targets": ["c_attn", "attn.c_proj", "w1", "w2"]}
SCRIPT = {"language": "lora", "lora": ADAPTER | TARGETS}
ALL = {"language": "full", "vision": "full", "merger": "full", "embeddings": "full"}
ALL_BUT_THE_TOWER = {"language": "full", "merger": "full", "embeddings": "full"}


@dataclass(frozen=True)
class Measured:
    """A run: `samples` in each pack of `tokens` and `labels` each with a picture of this grid, and
    how many packs a step had."""

    name: str
    model: str
    tune: dict[str, Any]
    samples: int
    tokens: int
    labels: int
    grid: Grid
    packs: int = 1
    recompute: float = 0.0
    optimizer: str = "adamw"
    nf4: tuple[Quantisable, ...] = ()
    fp8: tuple[Quantisable, ...] = ()
    grown: float = 1.0
    """The largest pack beside the mean one."""
    recorded: bool = True
    """Not where packs of forty steps are of so many sizes that most are launched."""
    seen: bool = False
    """Whether the features of its pictures were kept."""
    beginning: int = 0
    """Tokens that all samples begin with, computed once."""
    calls: str = "beginnings_once"
    """Where the report has runs with a beginning."""


QWEN2, QWEN25 = "Qwen2-VL-2B-Instruct", "Qwen2.5-VL-7B-Instruct"
FIRST = ("Qwen-VL-Chat", SCRIPT, 4, 512, 235, (1, 32, 32), 2, 1.0)
CAPTIONS = (QWEN2, LORA, 64, 140, 14, (1, 20, 20))
NEEDED = (QWEN2, LORA, 64, 138, 14, (1, 20, 20))
ALONE: Any = {"beginning": 15, "calls": "needed_alone"}
WAY_BACK: Any = {"beginning": 15, "calls": "adapters_way_back"}
RUNS = (
    Measured("captions_2b_batch64", QWEN2, LORA, 64, 140, 14, (1, 20, 20)),
    Measured("captions_2b", QWEN2, LORA, 16, 140, 14, (1, 20, 20)),
    Measured("latex_2b", QWEN2, LORA, 16, 172, 77, (1, 8, 36), grown=1.11, recorded=False),
    Measured("7B LoRA", QWEN25, LORA, 16, 802, 21, (1, 46, 46)),
    Measured("7B LoRA FP8", QWEN25, LORA, 16, 802, 21, (1, 46, 46), fp8=("language", "vision")),
    Measured("3B full", "Qwen2.5-VL-3B-Instruct", ALL, 8, 110, 15, (1, 14, 14)),
    Measured("lora", *FIRST, seen=True),
    Measured("lora cached", *FIRST[:2], 8, *FIRST[3:6], seen=True),
    Measured("qlora", *FIRST, "adamw8bit", ("vision", "merger", "language")),
    Measured("full", FIRST[0], ALL_BUT_THE_TOWER, *FIRST[2:], "adamw8bit"),
    Measured("captions_2b", QWEN2, LORA, 16, 140, 14, (1, 20, 20), beginning=15),
    Measured("captions_2b_batch64", *CAPTIONS, beginning=15, fp8=("language", "vision")),
    Measured("captions_2b_batch64", *CAPTIONS, beginning=15, seen=True),
    Measured("captions_2b_batch64", *NEEDED, **ALONE),
    Measured("captions_2b_batch64", *NEEDED, **ALONE, fp8=("language", "vision")),
    Measured("captions_2b_batch64", *NEEDED, **ALONE, seen=True),
    Measured("captions_2b_batch64", *CAPTIONS, beginning=15, seen=True, fp8=("language", "vision")),
    Measured("captions_2b_batch64", *NEEDED, **WAY_BACK),
    Measured("captions_2b_batch64", *NEEDED, **WAY_BACK, fp8=("language", "vision")),
    Measured("captions_2b_batch64", *NEEDED, **WAY_BACK, seen=True),
    Measured("captions_2b_batch64", *NEEDED, **WAY_BACK, seen=True, fp8=("language", "vision")),
)


def measured(run: Measured) -> tuple[float, float]:
    """Peak in 10^9 bytes and seconds of a step; of several calls the quickest, since with few
    samples a step hangs on the host."""
    found = []
    files = ("recipes_h200", "grounding_full_h200", "first_qwen_vl_h200", "one_card_h200")
    for name in files:
        report = json.loads((RESULTS / f"{name}.json").read_text())
        calls = report.get("calls", [report])
        if run.beginning:
            calls = [call for call in report.get(run.calls, []) if _as(run, call)]
        for result in (one for call in calls for one in call["results"]):
            if run.name in (result.get("task"), result.get("variant"), result.get("case")):
                seconds = result.get("step_s") or run.samples / result["samples_per_s"]
                found.append((result.get("peak_gb") or result["gb"], seconds))
    return max(peak for peak, _ in found), min(seconds for _, seconds in found)


def _as(run: Measured, call: dict[str, Any]) -> bool:
    """Whether a call measured runs with these settings."""
    command = call["command"]
    return ("fp8" in command, "never" in command) == (bool(run.fp8), not run.seen)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_memory_within_a_tenth_and_time_within_a_fifth(shared: Path, run: Measured) -> None:
    on = named_target("H200", "bf16")
    recipe = Recipe(
        model=run.model,
        data={"train": (DataFile(path=Path("none")),)},  # type: ignore[arg-type]
        tune=Tune.model_validate(run.tune | {"fp8": run.fp8 or None}),
        train=Train.model_validate({"optimizer": run.optimizer, "workers": 12}),
        output=Path("none"),
    )
    if run.nf4:
        pytest.importorskip("bitsandbytes")
    made = sized(ModelFolder(shared / "qwen_assets" / run.model), recipe, run.nf4, on)
    step = made.clock.step(
        [load(run, 1.0)] * run.packs, run.recompute, recorded=run.recorded, seen=run.seen
    )
    activations = Activations(made.model, made.computing, run.recompute)
    peak = peak_of(
        *(made.stays, activations, [load(run, run.grown)]),
        *(made.computing, made.patch_bytes),
        several=run.packs > 1,
    )
    peak_gb, seconds = measured(run)
    # Where features are kept, the tower leaves before the first step, and the fullest moment may be
    # one of either time.
    tower = sum(p.nbytes for p in made.model.visual.parameters()) * run.seen
    assert (peak.allocated - tower) / 1.1e9 < peak_gb < peak.allocated / 0.9e9
    assert step.in_all == pytest.approx(seconds, rel=0.2)


def load(run: Measured, grown: float) -> Load:
    number, beginning = run.samples, run.beginning
    return Load(
        (beginning,) * (beginning > 0) + (round(run.tokens * grown) - beginning,) * number,
        (run.grid,) * number,
        round(run.labels * grown) * number,
        beginning,
    )
