"""A recipe's plan against the recipe's run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_run import Task, write_recipe

from finesight.errors import UserError
from finesight.plan.plan import Plan, make_plan
from finesight.plan.told import as_lines, as_record
from finesight.recipe import load_recipe
from finesight.train.progress import Screen


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(tmp_path)


def plan(task: Task, *words: str, gpu: str | None = "A10", **groups: Any) -> Plan:
    recipe = task.recipe | groups | {"output": str(task.folder / "run")}
    path = write_recipe(task.folder / "recipe.yaml", recipe)
    return make_plan(load_recipe(path, words), gpu, Screen(Console(file=io.StringIO())))


def test_counts_are_those_of_the_run(task: Task) -> None:
    found = plan(task)
    assert not (task.folder / "run").exists()
    task.run()
    (started, *_) = task.history()
    steps = [line for line in task.history() if "loss" in line]
    assert (found.steps, found.samples) == (len(steps), 22)
    assert found.tokens.samples == started["data"]["train"]["samples"]
    assert found.tokens.tokens == started["data"]["train"]["tokens"]
    assert sum(count for _, count in found.tokens.bars) == 11
    last = found.tokens.bars[-1][0]
    assert last <= found.tokens.longest < last + found.tokens.width
    assert found.learning < found.numbers


def test_operations_are_those_that_a_run_counts(task: Task) -> None:
    task.recipe["train"] |= {"epochs": 1, "batch": 11, "pack_tokens": 10_000}
    found = plan(task)
    task.run()
    (step,) = [line for line in task.history() if "loss" in line]
    (started, *_) = task.history()
    counted = step["utilisation"] * started["peak_tflops"] * 1e12 * step["seconds"]
    assert 11 * sum(found.operations.values()) == pytest.approx(counted, rel=0.02)


def test_the_words_are_a_recipe_s(task: Task) -> None:
    found = plan(task, "train.recompute=true", "train.pack_tokens=50")
    assert [word.split("=")[0] for word in found.words] == [
        "train.pack_tokens",
        "train.recompute",
        "train.workers",
    ]
    again = plan(task, *found.words)
    assert again.words == ()
    assert again.written.setting == found.chosen.setting
    assert again.chosen == again.written
    assert found.chosen.step.in_all < found.written.step.in_all


def test_held_out_data_is_measured_twice_and_on_the_way(task: Task) -> None:
    bare = plan(task)
    assert (bare.answering.times, bare.answering.samples) == (2, 3)
    settings = {"metric": "qa", "every": 2, "max_new_tokens": 20, "limit": 2}
    asked = plan(task, eval=settings)
    # Six steps: before, after, and after the second and the fourth.
    assert (asked.answering.times, asked.answering.samples) == (4, 2)
    assert asked.answering.seconds > bare.answering.seconds
    assert asked.answering.bytes > 0


def test_features_of_a_frozen_tower_are_counted(task: Task) -> None:
    assert plan(task).features is None
    lora = {"language": "lora"}
    found = plan(task, tune=lora)
    geometry_width, number = 64, 2
    assert found.features == found.tokens.patches // 4 * geometry_width * number
    assert found.chosen.seen_s is not None
    assert found.chosen.seen_s < found.chosen.step.in_all


def test_this_machine_s_plan_takes_its_own_memory(task: Task) -> None:
    found = plan(task, gpu=None)
    assert found.target.measured
    assert found.written.fits
    assert found.written.peak.outside == 0


def test_lines_and_record_say_the_same(task: Task) -> None:
    found = plan(task, "train.pack_tokens=50", tune={"language": "lora"})
    text, record = "\n".join(as_lines(found)), json.loads(json.dumps(as_record(found)))
    assert "A10, by its data sheet: 24 GB" in text
    assert f"the longest is {found.tokens.longest_id}" in text
    assert "as written" in text
    assert text.endswith(f"to take what was chosen: {' '.join(record['words'])}")
    assert record["chosen"]["pack_tokens"] == found.chosen.setting.pack_tokens
    memory = record["written"]["memory"]
    assert sum(memory.values()) == record["written"]["memory_in_all"]
    assert record["written"]["fits"] is True


def test_a_card_that_is_not_known_is_told_before_anything_is_read(task: Task) -> None:
    (task.folder / "train.jsonl").unlink()
    with pytest.raises(UserError, match="no card 'H20000'"):
        plan(task, gpu="H20000")


def test_what_a_run_would_refuse_is_refused(task: Task) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl"):
        plan(task, "data.train=none.jsonl")
    with pytest.raises(UserError, match=r"tune\.lora\.targets"):
        plan(task, "tune.lora.targets=[nose]")
