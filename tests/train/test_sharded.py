"""A model that lies in parts with several processes: what one process learns, whatever they see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import run, start, unfinished
from PIL import Image
from safetensors.torch import load_file
from small_run import Task, losses
from torch import Tensor

from finesight.digests import verify_folder
from finesight.train.checkpoint import MOMENTS, VALUES, Checkpoints

WHOLE = dict.fromkeys(("vision", "merger", "language", "embeddings"), "full")


def mixed(folder: Path) -> Task:
    """A task whose samples show one picture, a video, or nothing: of the steps of four, some leave
    one process without anything to see."""
    task = Task(folder)
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        asked = line["messages"][0]["content"]
        if number % 3 == 0:
            del asked[0]
        elif number % 5 == 1:
            with Image.open(folder / asked[0]["image"]) as picture:
                picture.resize((56, 56)).save(folder / f"frame{number}.png")
            asked[0] = {"type": "video", "frames": [f"frame{number}.png"] * 4}
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return task


def trained(task: Task, count: int, name: str, *words: str, **train: Any) -> Path:
    return run(task, count, name, *words, tune=WHOLE, **train)


def learned(folder: Path) -> dict[str, Tensor]:
    """Weights and moments of the last checkpoint, put together of as many files as it has."""
    _, values, moments = Checkpoints(folder / "checkpoints", 2).read(6, "")
    return {**dict(values), **dict(moments)}


def assert_alike(folder: Path, other: Path) -> None:
    """Weights by the root mean square over those of each tensor whose gradients were more than
    rounding: a key's bias changes nothing, and AdamW steps as far for it as for any other."""
    assert dict(losses(folder)) == pytest.approx(dict(losses(other)), rel=1e-6)
    ours, theirs = learned(folder), learned(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        squares = theirs.get(f"second.{name}", torch.ones(()))
        far = (tensor - theirs[name]).where(squares > 1e-14, 0)
        assert far.square().mean().sqrt() <= 1e-6, name


def moved(folder: Path) -> list[tuple[Any, ...]]:
    rows = json.loads((folder / "moved.json").read_text())
    return [
        tuple(row[n] for n in ("part", "tensors", "numbers", "changed", "reached")) for row in rows
    ]


def test_one_two_and_four_learn_the_same(tmp_path: Path) -> None:
    """Each run is gone on with by another number of processes, or another way to share."""
    task = mixed(tmp_path / "task")
    alone = trained(task, 1, "alone")
    two = trained(task, 2, "two", parallel="fsdp")
    four = trained(task, 4, "four", parallel="zero2")
    for folder in (two, four):
        assert_alike(folder, alone)
        assert moved(folder) == moved(alone)
        for name, tensor in load_file(alone / "model" / "model.safetensors").items():
            ours = load_file(folder / "model" / "model.safetensors")[name]
            assert (ours - tensor).square().mean().sqrt() <= 1e-5, name
    last = two / "checkpoints" / "step-6"
    verify_folder(last)
    for name in (VALUES, MOMENTS):
        parts = sorted(last.glob(f"{Path(name).stem}-*-of-00002.safetensors"))
        assert len(parts) == 2
        assert not (last / name).exists()
    for folder, count, how in ((two, 1, "ddp"), (alone, 2, "fsdp"), (four, 2, "fsdp")):
        before = losses(folder)
        trained(task, count, unfinished(folder).name, "--resume", parallel=how)
        assert [step for step, _ in losses(folder)] == [step for step, _ in before]
        assert dict(losses(folder)) == pytest.approx(dict(before), rel=1e-6)
        assert_alike(folder, alone if folder is not alone else two)


@pytest.mark.parametrize(
    ("tune", "train", "said"),
    [
        ({"language": "lora", "lora": {"rank": 2, "alpha": 2}}, {}, "tune.lora"),
        (WHOLE, {"optimizer": "muon"}, "train.optimizer=muon"),
    ],
)
def test_what_cannot_lie_in_parts_is_refused(
    tmp_path: Path, tune: dict[str, Any], train: dict[str, Any], said: str
) -> None:
    task = Task(tmp_path / "task")
    process = start(task, 2, "run", tune=tune, parallel="fsdp", **train)
    words, _ = process.communicate(timeout=120)
    assert process.returncode
    assert "train.parallel=fsdp does not share out" in words
    assert said in words
    assert "set train.parallel=ddp" in words
    assert "/finesight/" not in words
    assert not (task.folder / "run" / "metrics.jsonl").exists()
