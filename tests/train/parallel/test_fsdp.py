"""Sharded training: equality with single-process training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from multi_process_run import TUNE, rewind_to_checkpoint, run_to_completion
from PIL import Image
from safetensors.torch import load_file
from tiny_task import TinyTask, edit_samples, read_losses, write_recipe
from torch import Tensor

from finesight.errors import UserError
from finesight.infer.model_loader import resolve_model_source
from finesight.model.hf_backend import load_auto_model
from finesight.recipe import load_recipe
from finesight.storage import verify_folder
from finesight.train.checkpoint import OPTIMIZER_FILE, WEIGHTS_FILE, CheckpointManager
from finesight.train.parallel.distributed import ProcessGroup
from finesight.train.setup import parallelize_model

FULL_FINETUNE = dict.fromkeys(("vision", "merger", "language", "embeddings"), "full")


def make_mixed_task(folder: Path) -> TinyTask:
    """Create a task with images, videos and text, where some ranks have no image in a step."""
    task = TinyTask(folder)
    with edit_samples(folder / "train.jsonl") as samples:
        for number, sample in enumerate(samples):
            content = sample["messages"][0]["content"]
            if number % 3 == 0:
                del content[0]
            elif number % 5 == 1:
                with Image.open(folder / content[0]["image"]) as image:
                    image.resize((56, 56)).save(folder / f"frame{number}.png")
                content[0] = {"type": "video", "frames": [f"frame{number}.png"] * 4}
    return task


def read_trained_state(folder: Path) -> dict[str, Tensor]:
    """Weights and moments of the last checkpoint, put together of as many files as it has."""
    _, values, moments = CheckpointManager(folder / "checkpoints", 2).load(6, "")
    return {**dict(values), **dict(moments)}


def assert_close(folder: Path, other: Path) -> None:
    """Compare root mean squares of tensors with gradients beyond rounding (not key biases)."""
    assert dict(read_losses(folder)) == pytest.approx(dict(read_losses(other)), rel=1e-6)
    ours, theirs = read_trained_state(folder), read_trained_state(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        squares = theirs.get(f"exp_avg_sq.{name}", torch.ones(()))
        far = (tensor - theirs[name]).where(squares > 1e-14, 0)
        assert far.square().mean().sqrt() <= 1e-6, name


def read_param_audit(folder: Path) -> list[list[Any]]:
    rows = json.loads((folder / "param_audit.json").read_text())
    names = ("part", "num_tensors", "num_params", "num_changed", "num_with_grad")
    return [[row[name] for name in names] for row in rows]


def test_training_is_equal_for_1_2_and_4_ranks(tmp_path):
    """Resumed runs have other shards and smaller packs. Takes long: six runs, four processes."""
    task = make_mixed_task(tmp_path / "task")
    alone = run_to_completion(task, 1, "alone", tune=FULL_FINETUNE)
    two = run_to_completion(task, 2, "two", tune=FULL_FINETUNE, parallel="fsdp")
    four = run_to_completion(task, 4, "four", tune=FULL_FINETUNE, parallel="zero2")
    for folder in (two, four):
        assert_close(folder, alone)
        assert read_param_audit(folder) == read_param_audit(alone)
        published = load_file(folder / "model" / "model.safetensors")
        values = read_trained_state(folder)
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
    for name in (WEIGHTS_FILE, OPTIMIZER_FILE):
        parts = sorted(last.glob(f"{Path(name).stem}-*-of-00002.safetensors"))
        assert len(parts) == 2
        assert not (last / name).exists()
    for folder, count, how in ((two, 1, "ddp"), (alone, 2, "fsdp"), (four, 2, "ddp")):
        before = read_losses(folder)
        settings = {"tune": FULL_FINETUNE, "parallel": how, "pack_tokens": 10}
        run_to_completion(task, count, rewind_to_checkpoint(folder).name, "--resume", **settings)
        assert [step for step, _ in read_losses(folder)] == [step for step, _ in before]
        assert dict(read_losses(folder)) == pytest.approx(dict(before), rel=1e-6)
        assert_close(folder, alone if folder is not alone else two)


def test_lora_training_is_equal_when_sharded(tmp_path):
    """The base model is frozen, the merger fully trained; the fp32 results are equal."""
    task = make_mixed_task(tmp_path / "task")
    alone = run_to_completion(task, 1, "alone")
    two = run_to_completion(task, 2, "two", parallel="fsdp")
    tune = TUNE | {"merger": "frozen"}
    frozen = run_to_completion(task, 2, "frozen", tune=tune, parallel="zero2", epochs=1)
    assert "the vision encoder is sharded" in (frozen / "metrics.jsonl").read_text()
    assert_close(two, alone)
    assert read_param_audit(two) == read_param_audit(alone)
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        ours, theirs = load_file(two / name), load_file(alone / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert (tensor - theirs[key]).square().mean().sqrt() <= 1e-5, key


def test_unsupported_sharding_is_rejected(tmp_path):
    task = TinyTask(tmp_path / "task")
    path = write_recipe(tmp_path / "recipe.yaml", task.recipe | {"output_dir": "run"})
    recipe = load_recipe(path, ["train.parallel=fsdp", "train.optimizer=muon"])
    source = resolve_model_source(recipe.model).folder
    model = load_auto_model(source, torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match="does not support") as error:
        parallelize_model(recipe, model, torch.float32, ProcessGroup(0, 2))
    assert "train.optimizer=muon" in error.value.what
    assert "train.parallel=ddp" in error.value.remedy
