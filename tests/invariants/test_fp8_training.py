"""The package's own model learns a task with its frozen weights multiplied in FP8 as without."""

from __future__ import annotations

import io
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from finesight.data.import_source import ImportOptions
from finesight.data.importer import import_dataset
from finesight.recipe import load_recipe
from finesight.synth.tickets import TABLE_FILE, TICKET_FIELDS, write_tickets
from finesight.train.finalize import RunResult
from finesight.train.training_run import train

STEPS = 20
"""Of a mean."""

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def tickets(folder: Path) -> dict[str, Any]:
    """Train to read train tickets as JSON, with a validation split."""
    write_tickets(folder / "tickets", 172, 0)
    columns = {"image": "image", "fields": ",".join(TICKET_FIELDS)}
    request = ImportOptions(columns=columns, prompt="Read the ticket.", eval_last=12)
    import_dataset(folder / "tickets" / TABLE_FILE, folder / "data", request)
    return {name: str(folder / "data" / f"{name}.jsonl") for name in ("train", "eval")}


def train_with(
    folder: Path, data: dict[str, Any], parts: list[str] | None, device: str
) -> tuple[RunResult, list[float]]:
    """The run's result, and means of its loss."""
    lora = {"rank": 16, "alpha": 16, "dropout": 0.0}
    recipe = {
        "model": "finesight-tiny",
        "data": data,
        "tune": {"language": "lora", "lora": lora, "quantize": {"fp8": parts}},
        "train": {
            "steps": 40,
            "batch_size": 4,
            "learning_rate": 5e-4,
            "device": device,
            "num_workers": 0,
        },
        "output_dir": str(folder / "run"),
    }
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = train(load_recipe(folder / "recipe.yaml"), console=Console(file=io.StringIO()))
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    return result, [fmean(losses[at : at + STEPS]) for at in range(0, len(losses), STEPS)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def test_fp8_training_loss_matches_bf16(tmp_path: Path, device: str) -> None:
    """Check that each mean over 20 steps and the validation loss are within 1 %.

    Takes long: two runs of 40 steps of finesight-tiny, until the loss is halved.
    """
    data = tickets(tmp_path)
    baseline, losses = train_with(tmp_path / "plain", data, None, device)
    multiplied, found = train_with(tmp_path / "fp8", data, ["vision", "language"], device)
    assert found != losses
    assert found == pytest.approx(losses, rel=0.01)
    assert losses[-1] < 0.5 * losses[0]
    expected = pytest.approx(baseline.after.validation_loss, rel=0.01)
    assert multiplied.after.validation_loss == expected
