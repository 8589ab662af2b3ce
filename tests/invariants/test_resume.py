"""Interrupted and resumed equals uninterrupted: whole final checkpoints, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from small_run import final_files, losses, make_task, write_recipe

TESTS = Path(__file__).parents[1]


class Ending(NamedTuple):
    name: str
    how: str
    calls: int


def in_new_process(recipe: Path, output: Path, how: str, points: dict[str, int]) -> list[Ending]:
    """Runs in `output`, each stopped at its point, by a process of their own."""
    pairs = [f"{name}:{point}" for name, point in points.items()]
    done = subprocess.run(
        [sys.executable, str(TESTS / "stopping.py"), str(recipe), str(output), how, *pairs],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return [Ending(name, ending, int(calls)) for name, ending, calls in lines]


class Whole(NamedTuple):
    run: Path
    calls: int


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def whole(task: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """An uninterrupted run without worker processes, and how often it called the model."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder / "recipe.yaml", task)
    (ending,) = in_new_process(recipe, folder, "term", {"run": 0})
    assert ending.how == "done"
    return Whole(folder / "run", ending.calls)


def check_same(run: Path, whole: Path) -> None:
    expected, found = final_files(whole), final_files(run)
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert found[name] == content, f"{name} of {run.name} differs"
    assert losses(run) == losses(whole)


def test_the_run_has_the_shape_that_the_other_tests_rely_on(whole: Whole) -> None:
    names = set(final_files(whole.run))
    assert {"checkpoints/step-6/optimizer.safetensors", "model/model.safetensors"} < names
    assert len(final_files(whole.run)["adapter"]) > 10_000
    assert [step for step, _ in losses(whole.run)] == [1, 2, 3, 4, 5, 6]
    # Six steps of at least two packs but the last, and four measurements.
    assert whole.calls >= 5 * 2 + 1 + 4


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_during_every_call_of_the_model(
    task: dict[str, Any], whole: Whole, tmp_path: Path, workers: int
) -> None:
    """Within every step and after it, at the border of the epochs, and while measuring."""
    recipe = write_recipe(tmp_path / "recipe.yaml", task, workers=workers)
    names = {str(point): point for point in range(1, whole.calls + 1)}
    endings = in_new_process(recipe, tmp_path, "term", names)
    stopped = [ending for ending in endings if ending.how == "stopped"]
    # During the last measurement's two calls there is nothing left to stop.
    assert endings[: len(stopped)] == stopped
    assert len(endings) - len(stopped) <= 2
    finished = [len(losses(tmp_path / name)) for name in names]
    assert finished == sorted(finished)
    assert set(finished) == set(range(7)), "some step was never the last before a stop"
    resumed = in_new_process(recipe, tmp_path, "term", dict.fromkeys(names, 0))
    assert {ending.how for ending in resumed} == {"done"}
    for name in names:
        check_same(tmp_path / name, whole.run)


def test_stopped_again_and_again(task: dict[str, Any], whole: Whole, tmp_path: Path) -> None:
    """A new process for every three calls of the model, several of them within one epoch."""
    recipe = write_recipe(tmp_path / "recipe.yaml", task, workers=2)
    stops = 0
    while in_new_process(recipe, tmp_path, "term", {"run": 5})[0].how == "stopped":
        stops += 1
        assert stops < whole.calls, "the run does not advance"
    assert stops >= 3
    check_same(tmp_path / "run", whole.run)


def test_muon_goes_on_as_adamw_does(task: dict[str, Any], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", task, optimizer="muon")
    (ending,) = in_new_process(recipe, tmp_path, "term", {"whole": 0})
    assert ending.how == "done"
    assert in_new_process(recipe, tmp_path, "term", {"run": 7})[0].how == "stopped"
    assert 0 < len(losses(tmp_path / "run")) < 6
    assert in_new_process(recipe, tmp_path, "term", {"run": 0})[0].how == "done"
    check_same(tmp_path / "run", tmp_path / "whole")


def test_four_bit_weights_and_eight_bit_moments_go_on_as_others_do(
    task: dict[str, Any], tmp_path: Path
) -> None:
    quantised = task | {"tune": task["tune"] | {"nf4": ["vision", "language"]}}
    recipe = write_recipe(tmp_path / "recipe.yaml", quantised, optimizer="adamw8bit")
    (ending,) = in_new_process(recipe, tmp_path, "term", {"whole": 0})
    assert ending.how == "done"
    names = {str(point): point for point in range(1, ending.calls, 4)}
    endings = in_new_process(recipe, tmp_path, "term", names)
    assert sum(ending.how == "stopped" for ending in endings) > len(names) / 2
    in_new_process(recipe, tmp_path, "term", dict.fromkeys(names, 0))
    for name in names:
        check_same(tmp_path / name, tmp_path / "whole")


def test_products_in_fp8_go_on_as_others_do(task: dict[str, Any], tmp_path: Path) -> None:
    """What is made of the codes on the way is not part of a checkpoint."""
    multiplied = task | {"tune": task["tune"] | {"vision": "lora", "fp8": ["vision", "language"]}}
    recipe = write_recipe(tmp_path / "recipe.yaml", multiplied)
    (ending,) = in_new_process(recipe, tmp_path, "term", {"whole": 0})
    assert ending.how == "done"
    names = {str(point): point for point in range(1, ending.calls, 5)}
    endings = in_new_process(recipe, tmp_path, "term", names)
    assert sum(ending.how == "stopped" for ending in endings) > len(names) / 2
    in_new_process(recipe, tmp_path, "term", dict.fromkeys(names, 0))
    for name in names:
        check_same(tmp_path / name, tmp_path / "whole")


def test_killed_before_file_operations(task: dict[str, Any], whole: Whole, tmp_path: Path) -> None:
    """SIGKILL before every seventh operation, and what is left goes on to the same end."""
    recipe = write_recipe(tmp_path / "recipe.yaml", task)
    points = {str(point): point for point in range(1, 176, 7)}
    killed = in_new_process(recipe, tmp_path, "kill", points)
    survivors = [ending.name for ending in killed if ending.how != "killed"]
    assert survivors, "the run has more operations than were tried"
    assert {ending.how for ending in killed} == {"killed", "exit-0"}
    assert sum(ending.how == "killed" for ending in killed) > 10
    names = [ending.name for ending in killed if ending.how == "killed"]
    resumed = in_new_process(recipe, tmp_path, "term", dict.fromkeys(names, 0))
    assert {ending.how for ending in resumed} == {"done"}
    for name in [*names, survivors[0]]:
        check_same(tmp_path / name, whole.run)


def test_patience_ends_a_resumed_run_where_it_ends_an_uninterrupted_one(
    task: dict[str, Any], tmp_path: Path
) -> None:
    """Stopped during every third call, the run goes on to the same last step and back to the same
    best one: of equal scores that of the lower loss, which is after the first step."""
    (tmp_path / "mine.py").write_text("def same(case):\n    return 0.0\n")
    measuring = {"metric": f"{tmp_path / 'mine.py'}:same", "every": 1, "patience": 1}
    changed = task | {"eval": measuring | {"max_new_tokens": 2}}
    settings = {"learning_rate": 0.3, "schedule": "constant"}
    recipe = write_recipe(tmp_path / "recipe.yaml", changed, **settings)
    (ending,) = in_new_process(recipe, tmp_path, "term", {"whole": 0})
    results = _results(tmp_path / "whole")
    assert (results["steps"], results["weights_of"], results["stopped_early"]) == (2, 1, True)
    names = {str(point): point for point in range(1, ending.calls + 1, 3)}
    endings = in_new_process(recipe, tmp_path, "term", names)
    assert sum(ending.how == "stopped" for ending in endings) > len(names) / 2
    in_new_process(recipe, tmp_path, "term", dict.fromkeys(names, 0))
    for name in names:
        assert _tensors(tmp_path / name) == _tensors(tmp_path / "whole")
        assert losses(tmp_path / name) == losses(tmp_path / "whole")
        assert _results(tmp_path / name) == results
        assert _answers(tmp_path / name) == _answers(tmp_path / "whole")


def _tensors(run: Path) -> dict[str, bytes]:
    # Not the last state: one that a stop wrote before measuring knows of no measurement yet.
    state = ("state.json", "sha256.json")
    return {name: data for name, data in final_files(run).items() if not name.endswith(state)}


def _results(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found | {"run": None}


def _answers(run: Path) -> bytes:
    return (run / "predictions" / "after.jsonl").read_bytes()
