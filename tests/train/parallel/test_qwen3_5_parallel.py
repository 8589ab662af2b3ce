"""Qwen3.5 in several processes: DDP and FSDP equal a single process."""

from __future__ import annotations

from pathlib import Path

import pytest
from multi_process_run import rewind_to_checkpoint, run_to_completion
from safetensors.torch import load_file
from tiny_model import TinyFamily, create_tiny_model
from tiny_task import TinyTask, read_losses

FULL_FINETUNE = dict.fromkeys(("vision", "merger", "language", "embeddings"), "full")
LORA = {"language": "lora", "lora": {"rank": 4}}


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_losses_are_equal_for_one_and_two_ranks(family: TinyFamily, tmp_path: Path) -> None:
    task = TinyTask(tmp_path / "task")
    task.recipe["model"] = str(create_tiny_model(tmp_path / "model", family, seed=3))
    alone = run_to_completion(task, 1, "alone", tune=FULL_FINETUNE)
    for parallel in ("ddp", "fsdp"):
        two = run_to_completion(task, 2, parallel, tune=FULL_FINETUNE, parallel=parallel)
        assert dict(read_losses(two)) == pytest.approx(dict(read_losses(alone)), rel=1e-5)


def test_bf16_adapters_train_with_sharded_weights(tmp_path: Path) -> None:
    """Decay parameters are frozen in fp32, the other weights in bf16."""
    task = TinyTask(tmp_path / "task")
    task.recipe["model"] = str(create_tiny_model(tmp_path / "model", "qwen3_5", seed=3))
    alone = run_to_completion(task, 1, "alone", tune=LORA, precision="bf16")
    two = run_to_completion(task, 2, "two", tune=LORA, precision="bf16", parallel="fsdp")
    assert dict(read_losses(two)) == pytest.approx(dict(read_losses(alone)), rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_is_bit_identical(precision: str, tmp_path: Path) -> None:
    """All parameters are trained: those in fp32 and, in bf16, the others in bf16."""
    task = TinyTask(tmp_path / "task")
    task.recipe["model"] = str(create_tiny_model(tmp_path / "model", "qwen3_5", seed=3))
    settings = {"precision": precision, "save_every": 2}
    run = run_to_completion(task, 1, "run", tune=FULL_FINETUNE, **settings)
    expected = load_file(run / "model" / "model.safetensors")
    losses = dict(read_losses(run))
    rewind_to_checkpoint(run)
    run_to_completion(task, 1, "run", "--resume", tune=FULL_FINETUNE, **settings)
    assert dict(read_losses(run)) == losses
    found = load_file(run / "model" / "model.safetensors")
    assert all(found[name].equal(expected[name]) for name in expected)
