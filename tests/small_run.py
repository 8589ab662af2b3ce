"""A task that a tiny model trains on in a second: colours of small pictures, mixed sizes."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from rich.console import Console

from finesight import storage
from finesight.model.tiny import make_tiny
from finesight.recipe import load_recipe
from finesight.train.finish import RunResult
from finesight.train.loop import train

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "light blue": (90, 90, 255),
    "white": (255,) * 3,
}


def make_task(folder: Path, samples: int = 11, held_out: int = 3) -> dict[str, Any]:
    """Write model, pictures and data below `folder`; returns a recipe without output.

    11 samples in batches of 4 over two epochs: six steps, the third of which crosses the border
    of the epochs, and a last one of two samples. Every step but the last takes two packs or more.
    """
    folder.mkdir(exist_ok=True)
    make_tiny(folder / "tiny")
    rng = random.Random(0)
    for name, count in (("train", samples), ("eval", held_out)):
        lines = [json.dumps(_sample(folder, f"{name}{i}", rng)) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "model": str(folder / "tiny"),
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")},
        "picture": {"min_pixels": 784, "max_pixels": 7056},
        "tune": {
            "merger": "full",
            "language": "lora",
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        },
        "train": {
            "epochs": 2,
            "batch": 4,
            "pack_tokens": 100,
            "learning_rate": 0.01,
            "weight_decay": 0.01,
            "workers": 0,
            "device": "cpu",
            "save_every": 2,
        },
    }


def _sample(folder: Path, name: str, rng: random.Random) -> dict[str, Any]:
    colour = rng.choice(list(COLOURS))
    size = rng.choice([28, 56, 84]), rng.choice([28, 56, 84])
    Image.new("RGB", size, COLOURS[colour]).save(folder / f"{name}.png")
    asked = [{"type": "image", "image": f"{name}.png"}, {"type": "text", "text": "Which colour?"}]
    return {
        "id": name,
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": colour},
        ],
    }


def write_recipe(path: Path, recipe: dict[str, Any], **train: Any) -> Path:
    """Write `recipe` with other settings of its training."""
    changed = recipe | {"train": recipe["train"] | train}
    path.write_text(yaml.safe_dump(changed))
    return path


def final_files(run: Path) -> dict[str, bytes]:
    """The last checkpoint and all trained weights, by name."""
    checkpoints = run / "checkpoints"
    last = max(checkpoints.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    files = [*last.iterdir(), *(run / "model").iterdir()]
    contents = {str(path.relative_to(run)): path.read_bytes() for path in sorted(files)}
    # Of the adapter the tensors alone: it names its base, which lies in another folder in each
    # run, and the order of its notes is random.
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    return contents | {"adapter": adapter[8 + int.from_bytes(adapter[:8], "little") :]}


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line of the run's metrics that has one."""
    metrics = run / "metrics.jsonl"
    lines = (
        [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    )
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


class Task:
    """The tiny task in a folder; `run` trains it with settings of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = make_task(folder)
        self.screen = ""

    def run(
        self, *overrides: str, name: str = "run", resume: bool = False, **groups: Any
    ) -> RunResult:
        recipe = self.recipe | groups | {"output": str(self.folder / name)}
        path = write_recipe(self.folder / "recipe.yaml", recipe)
        shown = io.StringIO()
        console = Console(file=shown, width=200)
        try:
            result = train(load_recipe(path, overrides), resume=resume, console=console)
        finally:
            self.screen = shown.getvalue()
        assert result is not None
        return result

    def history(self, name: str = "run") -> list[dict[str, Any]]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def unfinished(self) -> Path:
        """A run whose end has not been written yet, its last checkpoint that of step 4."""
        self.run()
        run = self.folder / "run"
        (run / "result.json").unlink()
        storage.remove_folder(run / "checkpoints" / "step-6")
        return run
