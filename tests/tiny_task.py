"""Task for training a tiny model in a second: colours of small images of mixed sizes."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from rich.console import Console
from tiny_model import create_tiny_model

from finesight import storage
from finesight.recipe import load_recipe
from finesight.train import trainer
from finesight.train.dataloader import StepBatch
from finesight.train.finalize import RunResult
from finesight.train.trainer import StepOutput, TrainState
from finesight.train.training_run import train

COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "light blue": (90, 90, 255),
    "white": (255,) * 3,
}


def make_task(folder: Path, num_samples: int = 11, num_eval_samples: int = 3) -> dict[str, Any]:
    """Write model, images and data to a folder, and return a recipe without output folder.

    The 11 samples in batches of 4 over two epochs give six steps. The third step crosses the epoch
    boundary, and the last one has two samples. All steps except the last have several packs.
    """
    folder.mkdir(exist_ok=True)
    create_tiny_model(folder / "tiny")
    rng = random.Random(0)
    for name, count in (("train", num_samples), ("eval", num_eval_samples)):
        lines = [json.dumps(_make_sample(folder, f"{name}{i}", rng)) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "model": str(folder / "tiny"),
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")},
        "image": {"min_pixels": 784, "max_pixels": 7056},
        "tune": {
            "merger": "full",
            "language": "lora",
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        },
        "train": {
            "epochs": 2,
            "batch_size": 4,
            "pack_tokens": 100,
            "learning_rate": 0.01,
            "weight_decay": 0.01,
            "num_workers": 0,
            "device": "cpu",
            "save_every": 2,
        },
    }


def _make_sample(folder: Path, name: str, rng: random.Random) -> dict[str, Any]:
    color = rng.choice(list(COLORS))
    size = rng.choice([28, 56, 84]), rng.choice([28, 56, 84])
    Image.new("RGB", size, COLORS[color]).save(folder / f"{name}.png")
    user_content = [
        {"type": "image", "image": f"{name}.png"},
        {"type": "text", "text": "Which colour?"},
    ]
    return {
        "id": name,
        "messages": [
            {"role": "user", "content": user_content},
            {"role": "assistant", "content": color},
        ],
    }


@contextmanager
def edit_samples(data: Path) -> Iterator[list[dict[str, Any]]]:
    """Read samples from a JSONL file, and write them back after the context."""
    samples = [json.loads(line) for line in data.read_text().splitlines()]
    yield samples
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def write_recipe(path: Path, recipe: dict[str, Any], **train: Any) -> Path:
    """Write the recipe with changed training settings."""
    changed = recipe | {"train": recipe["train"] | train}
    path.write_text(yaml.safe_dump(changed))
    return path


def read_final_files(run: Path) -> dict[str, bytes]:
    """Return the contents of the last checkpoint and all trained weights by name."""
    checkpoints = run / "checkpoints"
    last = max(checkpoints.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    files = [*last.iterdir(), *(run / "model").iterdir()]
    contents = {str(path.relative_to(run)): path.read_bytes() for path in sorted(files)}
    # Only the tensors of the adapter: its metadata contain the folder of the run in random order.
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    return contents | {"adapter": adapter[8 + int.from_bytes(adapter[:8], "little") :]}


def read_losses(run: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of all metrics lines with a loss."""
    metrics = run / "metrics.jsonl"
    lines = (
        [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    )
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def assert_same_run(run: Path, expected: Path) -> None:
    """Assert that two runs have equal losses, weights and optimizer states."""
    found_files, expected_files = read_final_files(run), read_final_files(expected)
    assert found_files.keys() == expected_files.keys()
    assert [name for name in found_files if found_files[name] != expected_files[name]] == []
    assert read_losses(run) == read_losses(expected)


class TinyTask:
    """Tiny task in a folder, with a method to train it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = make_task(folder)
        self.console_output = ""

    def run(
        self, *overrides: str, name: str = "run", resume: bool = False, **groups: Any
    ) -> RunResult:
        recipe = self.recipe | groups | {"output_dir": str(self.folder / name)}
        path = write_recipe(self.folder / "recipe.yaml", recipe)
        shown = io.StringIO()
        console = Console(file=shown, width=200)
        try:
            result = train(load_recipe(path, overrides), resume=resume, console=console)
        finally:
            self.console_output = shown.getvalue()
        assert result is not None
        return result

    def read_metrics(self, name: str | Path = "run") -> list[dict[str, Any]]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def truncate_images(self, *names: str) -> None:
        """Truncate images after their header, so that only decoding fails."""
        for name in names:
            path = self.folder / f"{name}.png"
            path.write_bytes(path.read_bytes()[:-30])

    def rewind_to_checkpoint(self, *overrides: str) -> Path:
        """Return a run that was interrupted after the checkpoint of step 4."""
        self.run(*overrides)
        run = self.folder / "run"
        (run / "result.json").unlink()
        storage.remove_folder(run / "checkpoints" / "step-6")
        return run


def act_before_step(patch: pytest.MonkeyPatch, index: int, act: Callable[[], object]) -> None:
    """Do something before each attempt of a training step."""
    real = trainer.train_step

    def train_step(state: TrainState, step: StepBatch, *rest: Any) -> StepOutput:
        if step.step_index == index:
            act()
        return real(state, step, *rest)

    patch.setattr(trainer, "train_step", train_step)
