"""Qwen3.5 in several processes: DDP and FSDP equal a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from multi_process_run import rewind_to_checkpoint, run_to_completion
from safetensors.torch import load_file
from tiny_model import TinyFamily, create_tiny_model
from tiny_task import TinyTask, read_losses

from finesight.config import TrainSettings, TuneSettings
from finesight.encode.packing import PackedBatch
from finesight.model.trainable import configure_tuning, trainable_parameters
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.train.optimizer import MasterWeightOptimizer
from finesight.train.parallel.fsdp import FSDPStrategy

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


@pytest.mark.parametrize("tune", [FULL_FINETUNE, LORA])
def test_sharded_model_computes_the_decay_in_fp32(tune: dict[str, Any], tmp_path: Path) -> None:
    """With one rank, the bf16 hidden states of the sharded model have the same bits."""
    folder = ModelFolder(create_tiny_model(tmp_path / "model", "qwen3_5", seed=3))
    ids_T = torch.randint(0, 90, (70,), generator=torch.Generator().manual_seed(0))
    batch = PackedBatch(
        sample_ids=("text",),
        lengths=(70,),
        grid_thw=(),
        ids_T=ids_T,
        position_ids_3T=torch.arange(70).expand(3, -1),
        cu_seqlens_S1=torch.tensor([0, 70], dtype=torch.int32),
        patches_ND=torch.empty(0, 1536, dtype=torch.uint8),
        visual_indices_M=torch.empty(0, dtype=torch.int64),
        logit_indices_L=torch.arange(69),
        labels_L=ids_T[1:],
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        hidden = []
        for is_sharded in (False, True):
            model = load_model(folder, torch.bfloat16, torch.device("cpu"))
            configure_tuning(model, TuneSettings.model_validate(tune), 0)
            decay = model.model.layers[0].linear_attn.A_log
            with torch.no_grad():
                decay.copy_(torch.linspace(-3.3, 0.7, len(decay)))
            assert not torch.equal(decay, decay.bfloat16().float())
            prepared = batch
            if is_sharded:
                prepared = FSDPStrategy(model, torch.bfloat16, "fsdp").prepare_batch(batch)
            hidden.append(model.eval()(prepared))
        assert torch.equal(*hidden)
    finally:
        dist.destroy_process_group()


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


def test_sharded_decay_parameters_are_trained_and_resumed(tmp_path: Path) -> None:
    """Each rank updates its rows; the resumed run has the same bits."""
    task = TinyTask(tmp_path / "task")
    task.recipe["model"] = str(create_tiny_model(tmp_path / "model", "qwen3_5", seed=3))
    settings = {"precision": "bf16", "save_every": 2, "tune": FULL_FINETUNE}
    before = load_file(tmp_path / "model" / "model.safetensors")
    alone = run_to_completion(task, 1, "alone", **settings)
    run = run_to_completion(task, 2, "run", parallel="fsdp", **settings)
    files = [folder / "model" / "model.safetensors" for folder in (alone, run)]
    expected, found = (load_file(file) for file in files)
    names = [name for name in found if name.endswith(".A_log")]
    assert names
    for name in names:
        assert not found[name].equal(before[name]), name
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)
    rewind_to_checkpoint(run)
    run_to_completion(task, 2, "run", "--resume", parallel="fsdp", **settings)
    resumed = load_file(files[1])
    assert all(resumed[name].equal(tensor) for name, tensor in found.items())


def test_lora_gradients_of_several_packs_add_up_in_fp32(tmp_path: Path) -> None:
    """LoRA weights are replicated, so FSDP does not sum their bf16 gradients."""
    folder = ModelFolder(create_tiny_model(tmp_path / "model", "qwen3_5", seed=3))
    model = load_model(folder, torch.bfloat16, torch.device("cpu"))
    configure_tuning(model, TuneSettings.model_validate(LORA), 0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        strategy = FSDPStrategy(model, torch.bfloat16, "fsdp")
        optimizer = MasterWeightOptimizer(strategy.trainable_params, TrainSettings(), {})
        for value in (1.0, 2**-12):
            for parameter in trainable_parameters(model).values():
                assert parameter.dtype == torch.bfloat16
                parameter.grad = torch.full_like(parameter, value)
            strategy.accumulate_gradients(optimizer)
        strategy.reduce_gradients(optimizer)
    finally:
        dist.destroy_process_group()
    assert strategy.trainable_params.keys() == trainable_parameters(model).keys()
    for parameter in strategy.trainable_params.values():
        assert torch.equal(parameter.grad, torch.full_like(parameter, 1 + 2**-12))
