"""The package's own model learns a task with its frozen weights in four bits as with 16."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_task import make_task, write_recipe

from finesight.recipe import load_recipe
from finesight.train.finalize import RunResult
from finesight.train.training_run import train


def train_with(folder: Path, parts: list[str] | None, optimizer: str, device: str) -> RunResult:
    task = make_task(folder, num_samples=40, num_eval_samples=12)
    lora = {"rank": 16, "alpha": 16, "dropout": 0.0}
    adapted = {"vision": "lora", "merger": "lora", "language": "lora", "lora": lora}
    recipe = {
        "model": "finesight-tiny",
        "data": task["data"],
        "tune": adapted | {"quantize": {"nf4": parts}},
        "train": {
            "steps": 30,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "device": device,
            "num_workers": 0,
        },
        "eval": {"metric": "classification", "max_new_tokens": 12},
        "output_dir": str(folder / "run"),
    }
    path = write_recipe(folder / "recipe.yaml", recipe, optimizer=optimizer)
    return train(load_recipe(path), console=Console(file=io.StringIO()))


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def test_nf4_training_matches_bf16_accuracy_and_loss(tmp_path: Path, device: str) -> None:
    """Check that all validation answers of both runs are correct, with a final loss below 0.05."""
    every = ["vision", "merger", "language"]
    baseline = train_with(tmp_path / "plain", None, "adamw", device)
    quantised = train_with(tmp_path / "nf4", every, "adamw_8bit", device)
    for result in (baseline, quantised):
        assert result.before.scores["accuracy"] == 0.0
        assert result.before.validation_loss > 5.0
        assert result.after.scores["accuracy"] == 1.0
        assert result.after.validation_loss < 0.05
