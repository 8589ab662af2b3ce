"""Task for training a tiny model in a second: colours of small images of mixed sizes."""

import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from case_files import load_cases
from huggingface_hub import constants
from PIL import Image
from rich.console import Console
from tiny_model import create_tiny_model

from finesight.files import storage
from finesight.settings.recipe import load_recipe
from finesight.train import flops, setup, trainer
from finesight.train.checkpoint import CheckpointState
from finesight.train.finalize import RunResult
from finesight.train.oom import MemoryBudget
from finesight.train.state import StepOutput, TrainState
from finesight.train.step_batch import StepBatch
from finesight.train.training_run import train

COLORS = {"red": "#f00", "green": "#0f0", "light blue": "#5a5aff", "white": "#fff"}


def make_task(folder: Path, num_samples: int = 11, num_eval_samples: int = 3) -> dict[str, Any]:
    """Write model, images and data to a folder, and return a recipe without output folder."""
    folder.mkdir(exist_ok=True)
    create_tiny_model(folder / "tiny")
    rng = random.Random(0)
    for name, count in (("train", num_samples), ("eval", num_eval_samples)):
        lines = [json.dumps(_make_sample(folder, f"{name}{i}", rng)) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    data = {name: str(folder / f"{name}.jsonl") for name in ("train", "eval")}
    return {"model": str(folder / "tiny"), "data": data} | load_cases("tiny_task")


def _make_sample(folder: Path, name: str, rng: random.Random) -> dict[str, Any]:
    color = rng.choice(list(COLORS))
    size = rng.choice([28, 56, 84]), rng.choice([28, 56, 84])
    Image.new("RGB", size, COLORS[color]).save(folder / f"{name}.png")
    image = {"type": "image", "image": f"{name}.png"}
    question = {"role": "user", "content": [image, {"type": "text", "text": "Which colour?"}]}
    return {"id": name, "messages": [question, {"role": "assistant", "content": color}]}


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
    """Return (step, loss) of all metrics lines with a loss.

    Skips a last line without its end, which a running training may be writing.
    """
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        return []
    *complete, _ = metrics.read_text().split("\n")
    lines = map(json.loads, complete)
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def make_checkpoint_state(step: int) -> CheckpointState:
    return CheckpointState(
        step=step,
        consumed_samples=4 * step,
        last_eval_step=0,
        best=None,
        loss_scale={"scale": 1.0},
        budget=MemoryBudget(pack_tokens=100, activation_checkpointing=0.0),
        resume_config={"train.batch_size": 4},
    )


def rewind_to_checkpoint(run: Path) -> Path:
    """Restore a run to the checkpoint of its fourth step, as if it was interrupted after it."""
    (run / "result.json").unlink()
    storage.remove_folder(run / "checkpoints" / "step-6")
    return run


def assert_same_run(run: Path, expected: Path) -> None:
    """Assert that two runs have equal losses, weights and optimizer states."""
    found_files, expected_files = read_final_files(run), read_final_files(expected)
    assert found_files.keys() == expected_files.keys()
    differing = [name for name in found_files if found_files[name] != expected_files[name]]
    assert not differing, differing
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
        """Return a run that was interrupted after the checkpoint of step 4; `whole` was not."""
        self.run(*overrides)
        shutil.copytree(self.folder / "run", self.folder / "whole")
        return rewind_to_checkpoint(self.folder / "run")


def act_before_step(patch: pytest.MonkeyPatch, index: int, act: Callable[[], object]) -> None:
    """Do something before each attempt of a training step."""
    real = trainer.train_step

    def train_step(state: TrainState, step: StepBatch, *rest: Any, **more: Any) -> StepOutput:
        if step.step_index == index:
            act()
        return real(state, step, *rest, **more)

    patch.setattr(trainer, "train_step", train_step)


@pytest.fixture
def task(tmp_path: Path) -> TinyTask:
    return TinyTask(tmp_path)


_measure_peak_flops = cache(flops.measure_peak_flops)


@pytest.fixture(autouse=True)
def assets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty vision cache folder for each test and its subprocesses.

    The peak of the CPU is measured once, which takes a sixth of the time of a tiny run.
    """
    monkeypatch.setattr(setup, "measure_peak_flops", _measure_peak_flops)
    folder = tmp_path_factory.mktemp("assets")
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(folder))
    monkeypatch.setenv("HF_ASSETS_CACHE", str(folder))
    return folder


THOUGHT, ANSWER = "It is plain.\nSo say it.", "Red it is."
FULL = {"language": "full", "embeddings": "full"}


def train_run(
    folder: Path,
    *,
    model: Path | None = None,
    num_thoughts: int = 6,
    steps: int = 25,
    tune: dict[str, Any] | None = None,
) -> Path:
    """Train a run with reasoning in some of its 11 samples; six make thinking its default mode.

    The chat template defines reasoning efforts, as that of Qwen3.8.
    """
    task = TinyTask(folder)
    if model is None:
        model = create_tiny_model(folder / "qwen3_8", "qwen3_5")
        template = model / "chat_template.json"
        content = json.loads(template.read_text())
        content["chat_template"] += "{# reasoning_effort #}"
        template.write_text(json.dumps(content))
        (model / "sha256.json").unlink()
    with edit_samples(folder / "train.jsonl") as samples:
        for number, sample in enumerate(samples):
            thought = f"<think>\n{THOUGHT}\n</think>\n\n" if number < num_thoughts else ""
            sample["messages"][-1]["content"] = thought + ANSWER
    name, overrides = f"run-{num_thoughts}", ("train.epochs=null", "train.save_every=null")
    del task.recipe["data"]["eval"]
    task.recipe |= {"model": str(model), "tune": tune or FULL}
    fast = "train.learning_rate=0.02", "train.seed=1"
    task.run(*overrides, *fast, f"train.steps={steps}", name=name)
    return folder / name
