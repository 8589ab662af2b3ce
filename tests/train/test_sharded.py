"""A model that lies in parts with several processes: what one process learns, whatever they see."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import TUNE, run, unfinished
from PIL import Image
from safetensors.torch import load_file
from small_run import Task, losses, write_recipe
from torch import Tensor

from finesight.digests import verify_folder
from finesight.errors import UserError
from finesight.infer.load import find_parts
from finesight.model.any_family import load_any
from finesight.recipe import load_recipe
from finesight.train.checkpoint import MOMENTS, VALUES, Checkpoints
from finesight.train.parallel import share_model
from finesight.train.ranks import Ranks

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


def test_one_process_does_not_wait_for_what_several_need(tmp_path: Path) -> None:
    """What models lie in parts with takes torch a second to import, and sympy with it."""
    task = Task(tmp_path / "task")
    recipe = task.recipe | {"output": str(tmp_path / "run")}
    file = write_recipe(tmp_path / "recipe.yaml", recipe, epochs=1)
    code = (
        "import sys\n"
        "from finesight.cli.app import main\n"
        "try:\n    main()\n"
        "finally:\n    print(*sys.modules, file=open('modules.txt', 'w'))\n"
    )
    words = [sys.executable, "-c", code, "train", str(file)]
    subprocess.run(words, check=True, cwd=tmp_path, capture_output=True)
    loaded = set((tmp_path / "modules.txt").read_text().split())
    assert "finesight.train.parallel" in loaded
    assert not loaded & {"torch.distributed.tensor", "torch.distributed.fsdp", "sympy"}


def test_one_two_and_four_learn_the_same(tmp_path: Path) -> None:
    """Each run is gone on with by another number of processes, or another way to share, and in
    smaller packs: some samples are then too long for one process."""
    task = mixed(tmp_path / "task")
    alone = trained(task, 1, "alone")
    two = trained(task, 2, "two", parallel="fsdp")
    four = trained(task, 4, "four", parallel="zero2")
    for folder in (two, four):
        assert_alike(folder, alone)
        assert moved(folder) == moved(alone)
        published, values = load_file(folder / "model" / "model.safetensors"), learned(folder)
        for name, tensor in load_file(alone / "model" / "model.safetensors").items():
            ours, (before, is_key, _) = published[name], name.partition("k_proj.bias")
            if is_key:
                # It moves with rounding alone (see `assert_alike`): what this run has learned.
                start = len(published[f"{before}q_proj.bias"])
                tensor = values[f"{before}qkv_proj.bias"][start : start + len(ours)]
                assert torch.equal(ours, tensor), name
            assert (ours - tensor).square().mean().sqrt() <= 1e-5, name
    last = two / "checkpoints" / "step-6"
    verify_folder(last)
    for name in (VALUES, MOMENTS):
        parts = sorted(last.glob(f"{Path(name).stem}-*-of-00002.safetensors"))
        assert len(parts) == 2
        assert not (last / name).exists()
    for folder, count, how in ((two, 1, "ddp"), (alone, 2, "fsdp"), (four, 2, "ddp")):
        before = losses(folder)
        settings = {"parallel": how, "pack_tokens": 10}
        trained(task, count, unfinished(folder).name, "--resume", **settings)
        assert [step for step, _ in losses(folder)] == [step for step, _ in before]
        assert dict(losses(folder)) == pytest.approx(dict(before), rel=1e-6)
        assert_alike(folder, alone if folder is not alone else two)


def test_adapters_lie_in_parts_too(tmp_path: Path) -> None:
    """Beside frozen weights, and a merger that learns whole: what is written at the end is what one
    process writes, in fp32."""
    task = mixed(tmp_path / "task")
    alone, two = run(task, 1, "alone"), run(task, 2, "two", parallel="fsdp")
    frozen = run(task, 2, "frozen", tune=TUNE | {"merger": "frozen"}, parallel="zero2", epochs=1)
    assert "the tower lies in parts" in (frozen / "metrics.jsonl").read_text()
    assert_alike(two, alone)
    assert moved(two) == moved(alone)
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        ours, theirs = load_file(two / name), load_file(alone / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert (tensor - theirs[key]).square().mean().sqrt() <= 1e-5, key


def test_what_cannot_lie_in_parts_is_refused(tmp_path: Path) -> None:
    task = Task(tmp_path / "task")
    path = write_recipe(tmp_path / "recipe.yaml", task.recipe | {"output": "run"})
    recipe = load_recipe(path, ["train.parallel=fsdp", "train.optimizer=muon"])
    model = load_any(find_parts(recipe.model).folder, torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match="does not share out") as error:
        share_model(recipe, model, torch.float32, Ranks(0, 2))
    assert "train.optimizer=muon" in error.value.what
    assert "train.parallel=ddp" in error.value.remedy
