"""Losses and gradients that are no finite numbers, and losses that jump."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from small_run import Task, final_files, losses, write_recipe
from spoiled import Kind, spoiled

from finesight.errors import UserError
from finesight.recipe import load_recipe
from finesight.train import loop
from finesight.train.checkpoint import MOMENTS, VALUES
from finesight.train.prepare import Session, prepare
from finesight.train.progress import Screen
from finesight.train.run import Run
from finesight.train.step import take_step
from finesight.train.stop import Stop
from finesight.train.tolerance import IN_A_ROW

TESTS = Path(__file__).parents[1]
WHOLE = dict.fromkeys(("vision", "merger", "language", "embeddings"), "full")


def state_of(session: Session) -> dict[str, torch.Tensor]:
    masters = session.masters
    return {
        name: tensor.clone()
        for name, tensor in (*masters.values().items(), *masters.moments().items())
    }


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_without_finite_figures_moves_nothing(
    task: Task, optimizer: str, kind: Kind
) -> None:
    """Breaks: a loss is NaN, a gradient infinite. Survive: weights, moments, the optimiser's count,
    and the step after it, which is what it would have been."""
    recipe = task.recipe | {"output": str(task.folder / "run")}
    path = write_recipe(task.folder / "recipe.yaml", recipe, optimizer=optimizer)
    screen = Screen(Console(file=sys.stderr))
    broken, whole = (
        prepare(load_recipe(path), Run(task.folder / "run"), screen, resume=False) for _ in range(2)
    )
    for session in (broken, whole):
        take_step(session, session.data.step(0), Stop())
    before = state_of(broken)
    with spoiled(kind, [2]):
        figures = loop.take_step(broken, broken.data.step(1), Stop()).wait()
    assert not math.isfinite(sum(figures))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(broken).items())
    for session in (broken, whole):
        take_step(session, session.data.step(2), Stop())
    expected = state_of(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(broken).items())
    assert not all(torch.equal(tensor, before[name]) for name, tensor in expected.items())


def test_a_void_step_is_noted_and_the_run_goes_on(task: Task) -> None:
    """Breaks: one step of six. Survive: the other five, to the end; the loss is NaN in the metrics,
    with the places of its samples, and the report can be drawn."""
    with spoiled("loss", [3]):
        result = task.run()
    lines = [line for line in task.history() if "loss" in line]
    assert [line["step"] for line in lines if math.isnan(line["loss"])] == [3]
    assert math.isnan(lines[2]["grad_norm"])
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert len(lines[2]["void"]) == 4
    assert all(place.startswith(f"{task.folder / 'train.jsonl'}:") for place in lines[2]["void"])
    assert not any(line["void"] for line in lines if line["step"] != 3)
    assert "step 3 is void, nothing has moved: loss nan" in task.screen
    assert result.loss == lines[-1]["loss"]
    assert (task.folder / "run" / "report.html").is_file()


def test_void_steps_in_a_row_end_the_run_and_name_their_samples(task: Task) -> None:
    """Breaks: every step from the second on. Survives: the checkpoint, with finite numbers; the
    error names file and line of the samples."""
    with (
        spoiled("gradient", range(2, 20)),
        pytest.raises(UserError, match=f"{IN_A_ROW} steps in a row") as caught,
    ):
        task.run("train.save_every=2", "train.epochs=4")
    assert [step for step, _ in losses(task.folder / "run")] == [*range(1, IN_A_ROW + 2)]
    assert f"{task.folder / 'train.jsonl'}:" in caught.value.what
    for folder in (task.folder / "run" / "checkpoints").glob("step-*"):
        values = load_file(folder / VALUES) | load_file(folder / MOMENTS)
        assert all(value.isfinite().all() for value in values.values())


def test_void_steps_are_counted_over_an_interruption(task: Task) -> None:
    """Breaks: the run stops between void steps. Survive: the count, the names, and all bits."""
    settings = ("train.save_every=1", "train.epochs=4")
    data = {"train": task.recipe["data"]["train"]}
    steps = range(2, 2 + IN_A_ROW)
    stop = 2 + IN_A_ROW // 2

    def cut(*given: object) -> object:
        if given[1].number == stop:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return taking(*given)  # type: ignore[arg-type]

    with spoiled("loss", steps):
        with pytest.raises(UserError, match="steps in a row") as whole:
            task.run(*settings, name="whole", data=data)
        taking = loop.take_step
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(loop, "take_step", cut)
            with pytest.raises(KeyboardInterrupt):
                task.run(*settings, data=data)
        assert len(losses(task.folder / "run")) == stop
        with pytest.raises(UserError, match="steps in a row") as resumed:
            task.run(*settings, resume=True, data=data)
    assert resumed.value.what == whole.value.what
    with spoiled("loss", steps[:-1]):
        for name in ("run", "whole"):
            task.run(*settings, name=name, resume=True, data=data)
    task.run(*settings, name="again", resume=True, data=data)
    assert final_files(task.folder / "run") == final_files(task.folder / "whole")
    assert final_files(task.folder / "run") != final_files(task.folder / "again")


def test_several_processes_leave_out_the_same_step(task: Task, every: bool) -> None:
    """Breaks: a step of two processes, whose model is whole in each, or lies in parts. Survive:
    equal weights in both: they learn what one process does that leaves the step out."""
    figures = []
    for count, parallel in ((1, "ddp"), (2, "ddp"), (2, "zero2"), (2, "fsdp"))[: 4 if every else 2]:
        name = f"{parallel}{count}"
        output = {"output": str(task.folder / name), "tune": WHOLE}
        settings = {"learning_rate": 1e-3, "parallel": parallel}
        recipe = write_recipe(task.folder / f"{name}.yaml", task.recipe | output, **settings)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        words = [*(launcher if count > 1 else []), str(TESTS / "spoiled.py"), "loss", "2"]
        surroundings = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
        done = subprocess.run(
            [sys.executable, *words, str(recipe)], capture_output=True, text=True, env=surroundings
        )
        assert done.returncode == 0, done.stderr
        figures.append(dict(losses(Path(output["output"]))))
    assert [step for step in figures[0] if math.isnan(figures[0][step])] == [2]
    for other in figures[1:]:
        assert other == pytest.approx(figures[0], rel=1e-5, nan_ok=True)


def test_a_loss_that_jumps_is_reported(task: Task) -> None:
    """Breaks: the loss of one step. Survives: the run, which says so once."""
    settings = ("train.learning_rate=1e-6", "train.epochs=8", "train.save_every=30")
    with spoiled("jump", [19]):
        task.run(*settings)
    assert task.screen.count("has jumped to") == 1
    assert "the loss of step 19 has jumped to" in task.screen
    lines = [line for line in task.history() if "loss" in line]
    assert [line["step"] for line in lines if line["jumped"]] == [19]
    assert len(lines[18]["jumped"]) == 4
