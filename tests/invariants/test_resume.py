"""Interrupted and resumed equals uninterrupted: whole final checkpoints, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import resume_worker
from multi_process_run import fork_process
from tiny_task import make_task, read_final_files, read_losses, write_recipe

TESTS = Path(__file__).parents[1]


class RunEnd(NamedTuple):
    name: str
    how: str
    calls: int


def in_new_interpreter(
    recipe: Path, output: Path, how: str, points: dict[str, int]
) -> list[RunEnd]:
    """Runs in `output`, each stopped at its point, by an interpreter of their own."""
    pairs = [f"{name}:{point}" for name, point in points.items()]
    done = subprocess.run(
        [sys.executable, str(TESTS / "resume_worker.py"), str(recipe), str(output), how, *pairs],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
    )
    assert done.returncode == 0, done.stderr
    return parse_endings(done.stdout)


def in_new_process(recipe: Path, output: Path, how: str, points: dict[str, int]) -> list[RunEnd]:
    """Runs in `output`, each stopped at its point, by a forked process of their own.

    Its hash seed is that of all forked processes, and differs from that of an interpreter.
    """
    pairs = [f"{name}:{point}" for name, point in points.items()]
    printed, errors = output / "printed.txt", output / "errors.txt"
    process = fork_process(
        printed, resume_worker.main, str(recipe), str(output), how, *pairs, errors=errors
    )
    process.join()
    assert process.exitcode == 0, errors.read_text()
    return parse_endings(printed.read_text())


def parse_endings(printed: str) -> list[RunEnd]:
    lines = [line.split() for line in printed.splitlines()]
    return [RunEnd(name, ending, int(calls)) for name, ending, calls in lines]


class UninterruptedRun(NamedTuple):
    run: Path
    calls: int


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def uninterrupted_run(
    task: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> UninterruptedRun:
    """An uninterrupted run without worker processes, and how often it called the model."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder / "recipe.yaml", task)
    (ending,) = in_new_interpreter(recipe, folder, "term", {"run": 0})
    assert ending.how == "done"
    return UninterruptedRun(folder / "run", ending.calls)


def check_same(run: Path, full: Path) -> None:
    expected, found = read_final_files(full), read_final_files(run)
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert found[name] == content, f"{name} of {run.name} differs"
    assert read_losses(run) == read_losses(full)


def test_task_has_the_expected_shape(uninterrupted_run: UninterruptedRun) -> None:
    names = set(read_final_files(uninterrupted_run.run))
    assert {"checkpoints/step-6/optimizer.safetensors", "model/model.safetensors"} < names
    assert len(read_final_files(uninterrupted_run.run)["adapter"]) > 10_000
    assert [step for step, _ in read_losses(uninterrupted_run.run)] == [1, 2, 3, 4, 5, 6]
    # Six steps of at least two packs but the last, and four measurements.
    assert uninterrupted_run.calls >= 5 * 2 + 1 + 4


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_at_every_model_call(
    task: dict[str, Any], uninterrupted_run: UninterruptedRun, tmp_path: Path, workers: int
) -> None:
    """Stop within and after every step, at epoch boundaries, and during evaluation."""
    recipe = write_recipe(tmp_path / "recipe.yaml", task, num_workers=workers)
    names = {str(point): point for point in range(1, uninterrupted_run.calls + 1)}
    endings = in_new_process(recipe, tmp_path, "term", names)
    stopped = [ending for ending in endings if ending.how == "stopped"]
    # During the last measurement's two calls there is nothing left to stop.
    assert endings[: len(stopped)] == stopped
    assert len(endings) - len(stopped) <= 2
    finished = [len(read_losses(tmp_path / name)) for name in names]
    assert finished == sorted(finished)
    assert set(finished) == set(range(7)), "some step was never the last before a stop"
    resumed = in_new_process(recipe, tmp_path, "term", dict.fromkeys(names, 0))
    assert {ending.how for ending in resumed} == {"done"}
    for name in names:
        check_same(tmp_path / name, uninterrupted_run.run)


def test_interrupted_repeatedly(
    task: dict[str, Any], uninterrupted_run: UninterruptedRun, tmp_path: Path
) -> None:
    """A new process for every three calls of the model, several of them within one epoch."""
    recipe = write_recipe(tmp_path / "recipe.yaml", task, num_workers=2)
    stops = 0
    while in_new_process(recipe, tmp_path, "term", {"run": 5})[0].how == "stopped":
        stops += 1
        assert stops < uninterrupted_run.calls, "the run does not advance"
    assert stops >= 3
    check_same(tmp_path / "run", uninterrupted_run.run)


def test_muon_resumes_bit_exactly(task: dict[str, Any], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", task, optimizer="muon")
    (ending,) = in_new_process(recipe, tmp_path, "term", {"whole": 0})
    assert ending.how == "done"
    assert in_new_process(recipe, tmp_path, "term", {"run": 7})[0].how == "stopped"
    assert 0 < len(read_losses(tmp_path / "run")) < 6
    assert in_new_interpreter(recipe, tmp_path, "term", {"run": 0})[0].how == "done"
    check_same(tmp_path / "run", tmp_path / "whole")


def test_nf4_and_8bit_optimizer_resume_bit_exactly(task: dict[str, Any], tmp_path: Path) -> None:
    quantised = task | {"tune": task["tune"] | {"quantize": {"nf4": ["vision", "language"]}}}
    recipe = write_recipe(tmp_path / "recipe.yaml", quantised, optimizer="adamw_8bit")
    (ending,) = in_new_process(recipe, tmp_path, "term", {"whole": 0})
    assert ending.how == "done"
    names = {str(point): point for point in range(1, ending.calls, 4)}
    endings = in_new_process(recipe, tmp_path, "term", names)
    assert sum(ending.how == "stopped" for ending in endings) > len(names) / 2
    in_new_process(recipe, tmp_path, "term", dict.fromkeys(names, 0))
    for name in names:
        check_same(tmp_path / name, tmp_path / "whole")


def test_fp8_training_resumes_bit_exactly(task: dict[str, Any], tmp_path: Path) -> None:
    """What is made of the codes on the way is not part of a checkpoint."""
    multiplied = task | {
        "tune": task["tune"] | {"vision": "lora", "quantize": {"fp8": ["vision", "language"]}}
    }
    recipe = write_recipe(tmp_path / "recipe.yaml", multiplied)
    (ending,) = in_new_process(recipe, tmp_path, "term", {"whole": 0})
    assert ending.how == "done"
    names = {str(point): point for point in range(1, ending.calls, 5)}
    endings = in_new_process(recipe, tmp_path, "term", names)
    assert sum(ending.how == "stopped" for ending in endings) > len(names) / 2
    in_new_process(recipe, tmp_path, "term", dict.fromkeys(names, 0))
    for name in names:
        check_same(tmp_path / name, tmp_path / "whole")


def test_killed_before_file_operations(
    task: dict[str, Any], uninterrupted_run: UninterruptedRun, tmp_path: Path
) -> None:
    """Kill the run before every seventh file operation, and resume to the same result."""
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
        check_same(tmp_path / name, uninterrupted_run.run)


def test_early_stopping_is_the_same_after_resume(task: dict[str, Any], tmp_path: Path) -> None:
    """Stop the run during every third call, and resume to the same last and best step.

    Of equal scores, the best step has the lower loss, which is after the first step.
    """
    (tmp_path / "mine.py").write_text("def same(case):\n    return 0.0\n")
    eval_settings = {"metric": f"{tmp_path / 'mine.py'}:same", "every": 1, "patience": 1}
    changed = task | {"eval": eval_settings | {"max_new_tokens": 2}}
    settings = {"learning_rate": 0.3, "lr_schedule": "constant"}
    recipe = write_recipe(tmp_path / "recipe.yaml", changed, **settings)
    (ending,) = in_new_process(recipe, tmp_path, "term", {"whole": 0})
    results = _results(tmp_path / "whole")
    assert (results["steps"], results["weights_step"], results["stopped_early"]) == (2, 1, True)
    names = {str(point): point for point in range(1, ending.calls + 1, 3)}
    endings = in_new_process(recipe, tmp_path, "term", names)
    assert sum(ending.how == "stopped" for ending in endings) > len(names) / 2
    in_new_process(recipe, tmp_path, "term", dict.fromkeys(names, 0))
    for name in names:
        assert _tensors(tmp_path / name) == _tensors(tmp_path / "whole")
        assert read_losses(tmp_path / name) == read_losses(tmp_path / "whole")
        assert _results(tmp_path / name) == results
        assert _answers(tmp_path / name) == _answers(tmp_path / "whole")


def _tensors(run: Path) -> dict[str, bytes]:
    # Not the last state: a stop before an evaluation saves a state without its result.
    state = ("state.json", "sha256.json")
    return {name: data for name, data in read_final_files(run).items() if not name.endswith(state)}


def _results(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found | {"run_dir": None}


def _answers(run: Path) -> bytes:
    return (run / "predictions" / "after.jsonl").read_bytes()
