"""The package's own model learns a task with its frozen weights in four bits as with 16."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small_run import make_task, write_recipe

from finesight.recipe import load_recipe
from finesight.train.finish import RunResult
from finesight.train.loop import train


def run_with(folder: Path, parts: list[str] | None, optimizer: str, device: str) -> RunResult:
    task = make_task(folder, samples=40, held_out=12)
    lora = {"rank": 16, "alpha": 16, "dropout": 0.0}
    adapted = {"vision": "lora", "merger": "lora", "language": "lora", "lora": lora}
    recipe = {
        "model": "finesight-tiny",
        "data": task["data"],
        "tune": adapted | {"nf4": parts},
        "train": {"steps": 30, "batch": 8, "learning_rate": 1e-3, "device": device, "workers": 0},
        "eval": {"metric": "classification", "max_new_tokens": 12},
        "output": str(folder / "run"),
    }
    path = write_recipe(folder / "recipe.yaml", recipe, optimizer=optimizer)
    return train(load_recipe(path), console=Console(file=io.StringIO()))


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
def test_answers_are_as_right_and_the_loss_falls_as_far(tmp_path: Path, device: str) -> None:
    """Every held-out answer is right in both; the loss of a learned token ends within 0.05."""
    every = ["vision", "merger", "language"]
    plain = run_with(tmp_path / "plain", None, "adamw", device)
    quantised = run_with(tmp_path / "nf4", every, "adamw8bit", device)
    for result in (plain, quantised):
        assert result.before is not None
        assert result.after is not None
        assert result.before.scores["accuracy"] == 0.0
        assert result.before.held_out_loss > 5.0
        assert result.after.scores["accuracy"] == 1.0
        assert result.after.held_out_loss < 0.05
