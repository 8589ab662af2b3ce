"""Interrupted and resumed equals uninterrupted: whole final checkpoints, bit for bit."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import resume_worker
from multi_process_run import fork_process
from tiny_task import assert_same_run, make_task, read_final_files, read_losses, write_recipe

TESTS = Path(__file__).parents[1]


class RunEnd(NamedTuple):
    name: str
    how: str
    calls: int


def train_runs(
    recipe: Path,
    output: Path,
    points: dict[str, int],
    how: str = "term",
    in_new_interpreter: bool = False,
) -> list[RunEnd]:
    """Train runs in `output` in a process with another hash seed; stop each at its point."""
    arguments = [str(recipe), str(output), how]
    arguments += [f"{name}:{point}" for name, point in points.items()]
    if in_new_interpreter:
        command = [sys.executable, str(TESTS / "resume_worker.py"), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        output_file, errors = output / "printed.txt", output / "errors.txt"
        process = fork_process(output_file, resume_worker.main, *arguments, errors=errors)
        process.join()
        assert process.exitcode == 0, errors.read_text()
        printed = output_file.read_text()
    lines = [line.split() for line in printed.splitlines()]
    return [RunEnd(name, ending, int(calls)) for name, ending, calls in lines]


def resume_runs(recipe: Path, output: Path, names: Iterable[str]) -> None:
    resumed = train_runs(recipe, output, dict.fromkeys(names, 0))
    assert {ending.how for ending in resumed} == {"done"}


class UninterruptedRun(NamedTuple):
    run: Path
    calls: int


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def uninterrupted_run(task, tmp_path_factory) -> UninterruptedRun:
    """An uninterrupted run without worker processes, and how often it called the model."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder / "recipe.yaml", task)
    (ending,) = train_runs(recipe, folder, {"run": 0}, in_new_interpreter=True)
    assert ending.how == "done"
    return UninterruptedRun(folder / "run", ending.calls)


def test_task_has_the_expected_shape(uninterrupted_run):
    names = set(read_final_files(uninterrupted_run.run))
    assert {"checkpoints/step-6/optimizer.safetensors", "model/model.safetensors"} < names
    assert len(read_final_files(uninterrupted_run.run)["adapter"]) > 10_000
    assert [step for step, _ in read_losses(uninterrupted_run.run)] == [1, 2, 3, 4, 5, 6]
    # Six steps of at least two packs but the last, and four measurements.
    assert uninterrupted_run.calls >= 5 * 2 + 1 + 4


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_at_every_model_call(task, uninterrupted_run, tmp_path, workers):
    """Stop within and after every step, at epoch boundaries, and during evaluation."""
    recipe = write_recipe(tmp_path / "recipe.yaml", task, num_workers=workers)
    names = {str(point): point for point in range(1, uninterrupted_run.calls + 1)}
    endings = train_runs(recipe, tmp_path, names)
    stopped = [ending for ending in endings if ending.how == "stopped"]
    # During the last measurement's two calls there is nothing left to stop.
    assert endings[: len(stopped)] == stopped
    assert len(endings) - len(stopped) <= 2
    finished = [len(read_losses(tmp_path / name)) for name in names]
    assert finished == sorted(finished)
    assert set(finished) == set(range(7)), "some step was never the last before a stop"
    resume_runs(recipe, tmp_path, names)
    for name in names:
        assert_same_run(tmp_path / name, uninterrupted_run.run)


def test_interrupted_repeatedly(task, uninterrupted_run, tmp_path):
    """A new process for every three calls of the model, several of them within one epoch."""
    recipe = write_recipe(tmp_path / "recipe.yaml", task, num_workers=2)
    stops = 0
    while train_runs(recipe, tmp_path, {"run": 5})[0].how == "stopped":
        stops += 1
        assert stops < uninterrupted_run.calls, "the run does not advance"
    assert stops >= 3
    assert_same_run(tmp_path / "run", uninterrupted_run.run)


def interrupt_at_calls(
    recipe: Path, folder: Path, every: int, in_new_interpreter: bool = False
) -> list[Path]:
    """Train `whole`; then stop a run at every so many model calls, and resume each."""
    (ending,) = train_runs(recipe, folder, {"whole": 0}, "term", in_new_interpreter)
    assert ending.how == "done"
    points = {str(point): point for point in range(1, ending.calls, every)}
    endings = train_runs(recipe, folder, points)
    assert sum(ending.how == "stopped" for ending in endings) > len(points) / 2
    resume_runs(recipe, folder, points)
    return [folder / name for name in points]


@pytest.mark.parametrize(
    ("quantize", "optimizer", "every", "augment"),
    [
        ({"nf4": ["vision", "language"]}, "adamw_8bit", 4, None),
        # What is made of the FP8 codes on the way is not part of a checkpoint.
        ({"fp8": ["vision", "language"]}, "adamw", 5, None),
        ({}, "muon", 8, "strong"),
    ],
    ids=["nf4", "fp8", "muon"],
)
def test_quantized_runs_and_optimizers_resume_bit_exactly(
    task, tmp_path, quantize, optimizer, every, augment
):
    adapted = {"vision": "lora"} if "fp8" in quantize else {}
    changed = task | {"tune": task["tune"] | adapted | {"quantize": quantize}}
    changed["data"] = task["data"] | {"augment": augment}
    recipe = write_recipe(tmp_path / "recipe.yaml", changed, optimizer=optimizer)
    for run in interrupt_at_calls(recipe, tmp_path, every, optimizer == "muon"):
        assert_same_run(run, tmp_path / "whole")


def test_killed_before_file_operations(task, uninterrupted_run, tmp_path):
    """Kill the run before every seventh file operation, and resume to the same result."""
    recipe = write_recipe(tmp_path / "recipe.yaml", task)
    points = {str(point): point for point in range(1, 176, 7)}
    endings = train_runs(recipe, tmp_path, points, "kill")
    survivors = [ending.name for ending in endings if ending.how == "exit-0"]
    killed = [ending.name for ending in endings if ending.how == "killed"]
    assert survivors, "the run has more operations than were tried"
    assert len(survivors) + len(killed) == len(endings)
    assert len(killed) > 10
    resume_runs(recipe, tmp_path, killed)
    for name in [*killed, survivors[0]]:
        assert_same_run(tmp_path / name, uninterrupted_run.run)


def test_early_stopping_is_the_same_after_resume(task, tmp_path):
    """Stopped during every third call; of equal scores, the best step has the lower loss."""
    (tmp_path / "mine.py").write_text("def same(case):\n    return 0.0\n")
    metric = {"metric": f"{tmp_path / 'mine.py'}:same", "max_new_tokens": 2}
    changed = task | {"eval": metric | {"every": 1, "patience": 1}}
    settings = {"learning_rate": 0.3, "lr_schedule": "constant"}
    recipe = write_recipe(tmp_path / "recipe.yaml", changed, **settings)
    runs = interrupt_at_calls(recipe, tmp_path, every=3)
    expected = read_outcome(tmp_path / "whole")
    result = expected[0]
    assert (result["steps"], result["weights_step"], result["stopped_early"]) == (2, 1, True)
    for run in runs:
        assert read_outcome(run) == expected


def read_outcome(run: Path) -> tuple[dict[str, Any], object, object, bytes]:
    """A stop before an evaluation saves a last state without its result, which is left out."""
    state = ("state.json", "sha256.json")
    files = read_final_files(run)
    tensors = {name: data for name, data in files.items() if not name.endswith(state)}
    result = json.loads((run / "result.json").read_text()) | {"run_dir": None}
    answers = (run / "predictions" / "after.jsonl").read_bytes()
    return result, read_losses(run), tensors, answers
