"""A recipe's plan against the recipe's run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_task import TinyTask, write_recipe

from finesight.errors import UserError
from finesight.plan.plan_format import format_plan, plan_to_dict
from finesight.plan.run_plan import RunPlan, plan_run
from finesight.recipe import load_recipe
from finesight.train.console import TrainingConsole


@pytest.fixture
def task(tmp_path: Path) -> TinyTask:
    return TinyTask(tmp_path)


def plan(task: TinyTask, *words: str, gpu: str | None = "A10", **groups: Any) -> RunPlan:
    recipe = task.recipe | groups | {"output_dir": str(task.folder / "run")}
    path = write_recipe(task.folder / "recipe.yaml", recipe)
    return plan_run(load_recipe(path, words), gpu, TrainingConsole(Console(file=io.StringIO())))


def test_counts_match_the_run(task: TinyTask) -> None:
    found = plan(task)
    assert not (task.folder / "run").exists()
    task.run()
    (started, *_) = task.read_metrics()
    steps = [line for line in task.read_metrics() if "loss" in line]
    assert (found.total_steps, found.num_samples) == (len(steps), 22)
    assert found.token_stats.num_samples == started["data"]["train"]["num_samples"]
    assert found.token_stats.num_tokens == started["data"]["train"]["num_tokens"]
    assert sum(count for _, count in found.token_stats.bins) == 11
    last = found.token_stats.bins[-1][0]
    assert last <= found.token_stats.max_tokens < last + found.token_stats.bin_width
    assert found.num_trainable < found.num_params


def test_operation_counts_match_the_run(task: TinyTask) -> None:
    task.recipe["train"] |= {"epochs": 1, "batch_size": 11, "pack_tokens": 10_000}
    found = plan(task)
    task.run()
    (step,) = [line for line in task.read_metrics() if "loss" in line]
    (started, *_) = task.read_metrics()
    counted = step["mfu"] * started["peak_tflops"] * 1e12 * step["step_s"]
    assert 11 * sum(found.flops_per_sample.values()) == pytest.approx(counted, rel=0.02)


def test_suggested_overrides_are_valid(task: TinyTask) -> None:
    found = plan(task, "train.activation_checkpointing=true", "train.pack_tokens=50")
    assert [word.split("=")[0] for word in found.overrides] == [
        "train.pack_tokens",
        "train.activation_checkpointing",
        "train.num_workers",
    ]
    again = plan(task, *found.overrides)
    assert again.overrides == ()
    assert again.recipe_estimate.settings == found.chosen_estimate.settings
    assert again.chosen_estimate == again.recipe_estimate
    assert found.chosen_estimate.step_time.total < found.recipe_estimate.step_time.total


def test_evaluation_count_follows_the_recipe(task: TinyTask) -> None:
    bare = plan(task)
    assert (bare.evaluation.num_evaluations, bare.evaluation.num_samples) == (2, 3)
    settings = {"metric": "qa", "every": 2, "max_new_tokens": 20, "limit": 2}
    requested = plan(task, eval=settings)
    # Six steps: before, after, and after the second and the fourth.
    assert (requested.evaluation.num_evaluations, requested.evaluation.num_samples) == (4, 2)
    assert requested.evaluation.total_s > bare.evaluation.total_s
    assert requested.evaluation.generation_bytes > 0


def test_vision_cache_size_is_estimated(task: TinyTask) -> None:
    assert plan(task).feature_bytes is None
    lora = {"language": "lora"}
    found = plan(task, tune=lora)
    geometry_width, number = 64, 2
    assert found.feature_bytes == found.token_stats.num_patches // 4 * geometry_width * number
    assert found.chosen_estimate.cached_step_s is not None
    assert found.chosen_estimate.cached_step_s < found.chosen_estimate.step_time.total


def test_own_gpu_plan_uses_measured_memory(task: TinyTask) -> None:
    found = plan(task, gpu=None)
    assert found.target.is_measured
    assert found.recipe_estimate.fits
    assert found.recipe_estimate.peak.cuda_context == 0


def test_lines_and_record_are_consistent(task: TinyTask) -> None:
    found = plan(task, "train.pack_tokens=50", tune={"language": "lora"})
    text, record = "\n".join(format_plan(found)), json.loads(json.dumps(plan_to_dict(found)))
    assert "A10 (data sheet): 24 GB" in text
    assert f"the longest is {found.token_stats.longest_sample_id}" in text
    assert "          recipe          chosen" in text
    assert text.endswith(f"to use the chosen settings: {' '.join(record['overrides'])}")
    assert record["chosen"]["pack_tokens"] == found.chosen_estimate.settings.pack_tokens
    memory = record["recipe"]["memory"]
    assert sum(memory.values()) == record["recipe"]["total_bytes"]
    assert record["recipe"]["fits"] is True


def test_unknown_gpu_is_rejected_before_reading_data(task: TinyTask) -> None:
    (task.folder / "train.jsonl").unlink()
    with pytest.raises(UserError, match="unknown GPU 'H20000'"):
        plan(task, gpu="H20000")


def test_invalid_recipe_is_rejected(task: TinyTask) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl"):
        plan(task, "data.train=none.jsonl")
    with pytest.raises(UserError, match=r"tune\.lora\.target_modules"):
        plan(task, "tune.lora.target_modules=[nose]")
