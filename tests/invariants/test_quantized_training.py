"""The package's own model learns with quantized frozen weights as with 16 bits."""

import io
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from rich.console import Console
from tiny_task import make_task, read_losses

from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import import_dataset
from finesight.settings.config import Recipe
from finesight.synth.tickets import TABLE_FILE, TICKET_FIELDS, write_tickets
from finesight.train.finalize import RunResult
from finesight.train.training_run import train

LORA = {"rank": 16, "alpha": 16, "dropout": 0.0}
each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def train_tiny(
    run: Path,
    data: dict[str, str],
    tune: dict[str, Any],
    train_settings: dict[str, Any],
    **more: Any,
) -> RunResult:
    recipe = {
        "model": "finesight-tiny",
        "data": data,
        "tune": tune | {"lora": LORA},
        "train": train_settings | {"num_workers": 0},
        "output_dir": str(run),
    }
    result = train(Recipe.model_validate(recipe | more), console=Console(file=io.StringIO()))
    assert result is not None
    return result


def import_tickets(folder: Path, num_train: int, num_eval: int) -> dict[str, str]:
    write_tickets(folder / "tickets", num_train + num_eval, 0)
    columns = {"image": "image", "fields": ",".join(TICKET_FIELDS)}
    request = ImportOptions(columns=columns, prompt="Read the ticket.", eval_last=num_eval)
    import_dataset(folder / "tickets" / TABLE_FILE, folder / "data", request)
    return {name: str(folder / "data" / f"{name}.jsonl") for name in ("train", "eval")}


@each_device
def test_fp8_training_loss_matches_bf16(tmp_path, device):
    """Within 1 %. Takes long: two runs of finesight-tiny, until the loss is halved."""
    # The steep descent of few steps amplifies the roundings of GPU kernels.
    steps, learning_rate, num_eval = (40, 5e-4, 12) if device == "cuda" else (12, 2e-3, 6)
    data = import_tickets(tmp_path, 4 * steps, num_eval)
    settings = {"steps": steps, "batch_size": 4, "learning_rate": learning_rate, "device": device}
    validation_losses, means = {}, {}
    for name, parts in (("plain", None), ("fp8", ["vision", "language"])):
        tune = {"language": "lora", "quantize": {"fp8": parts}}
        result = train_tiny(tmp_path / name, data, tune, settings)
        validation_losses[name] = result.after.validation_loss
        losses = [loss for _, loss in read_losses(tmp_path / name)]
        means[name] = fmean(losses[: steps // 2]), fmean(losses[steps // 2 :])
    assert means["fp8"] != means["plain"]
    assert means["fp8"] == pytest.approx(means["plain"], rel=0.01)
    assert means["plain"][1] < 0.5 * means["plain"][0]
    assert validation_losses["fp8"] == pytest.approx(validation_losses["plain"], rel=0.01)


@each_device
def test_nf4_training_reaches_full_accuracy(tmp_path, device):
    """All validation answers are correct, and the loss is below 0.05, as without quantization."""
    data = make_task(tmp_path / "task", num_samples=40, num_eval_samples=12)["data"]
    settings = {"steps": 30, "batch_size": 8, "learning_rate": 1e-3, "device": device}
    parts = ("vision", "merger", "language")
    result = train_tiny(
        tmp_path / "run",
        data,
        dict.fromkeys(parts, "lora") | {"quantize": {"nf4": parts}},
        settings | {"optimizer": "adamw_8bit"},
        eval={"metric": "classification", "max_new_tokens": 12},
    )
    assert result.before.scores["accuracy"] == 0.0
    assert result.before.validation_loss > 5.0
    assert result.after.scores["accuracy"] == 1.0
    assert result.after.validation_loss < 0.05
