"""Qwen3.5 in several processes: DDP and FSDP equal a single process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from multi_process_run import rewind_to_checkpoint, run_to_completion
from safetensors.torch import load_file
from tiny_model import TinyFamily, create_tiny_model
from tiny_task import TinyTask, read_losses
from torch import Tensor

from finesight.config import TrainSettings, TuneSettings
from finesight.encode.packing import PackedBatch
from finesight.model.trainable import configure_tuning, trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.train.optimizer import MasterWeightOptimizer
from finesight.train.parallel.fsdp import FSDPStrategy

FULL_FINETUNE = dict.fromkeys(("vision", "merger", "language", "embeddings"), "full")
LORA = {"language": "lora", "lora": {"rank": 4}}


def make_task(folder: Path, family: TinyFamily = "qwen3_5") -> TinyTask:
    task = TinyTask(folder / "task")
    task.recipe["model"] = str(create_tiny_model(folder / "model", family, seed=3))
    return task


def read_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_resumes_bit_exactly(task: TinyTask, run: Path, count: int, **settings: Any) -> None:
    losses, expected = read_losses(run), read_weights(run)
    run_to_completion(task, count, rewind_to_checkpoint(run).name, "--resume", **settings)
    assert read_losses(run) == losses
    found = read_weights(run)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_losses_are_equal_for_one_and_two_ranks(family, tmp_path):
    task = make_task(tmp_path, family)
    alone = run_to_completion(task, 1, "alone", tune=FULL_FINETUNE)
    for parallel in ("ddp", "fsdp"):
        two = run_to_completion(task, 2, parallel, tune=FULL_FINETUNE, parallel=parallel)
        assert dict(read_losses(two)) == pytest.approx(dict(read_losses(alone)), rel=1e-5)
    if family == "qwen3_5":
        assert_resumes_bit_exactly(task, alone, 1, tune=FULL_FINETUNE)


def test_sharded_decay_parameters_are_trained_and_resumed(tmp_path):
    """Each rank updates its rows, in fp32 next to bf16 weights; resumed runs have the same bits."""
    task = make_task(tmp_path)
    settings = {"precision": "bf16", "tune": FULL_FINETUNE}
    before = load_file(tmp_path / "model" / "model.safetensors")
    alone = run_to_completion(task, 1, "alone", **settings)
    two = run_to_completion(task, 2, "two", parallel="fsdp", **settings)
    expected, found = read_weights(alone), read_weights(two)
    names = [name for name in found if name.endswith(".A_log")]
    assert names
    for name in names:
        assert not found[name].equal(before[name]), name
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)
    assert_resumes_bit_exactly(task, alone, 1, **settings)
    assert_resumes_bit_exactly(task, two, 2, parallel="fsdp", **settings)


@pytest.fixture
def single_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def load_bf16_model(folder: Path, tune: dict[str, Any]) -> VisionLanguageModel:
    path = folder / "model"
    if not path.exists():
        create_tiny_model(path, "qwen3_5", seed=3)
    model = load_model(ModelFolder(path), torch.bfloat16, torch.device("cpu"))
    configure_tuning(model, TuneSettings.model_validate(tune), 0)
    return model


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("tune", [FULL_FINETUNE, LORA])
def test_sharded_model_computes_the_decay_in_fp32(tune, tmp_path):
    """With one rank, the bf16 hidden states of the sharded model have the same bits."""
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
    hidden = []
    for is_sharded in (False, True):
        model = load_bf16_model(tmp_path, tune)
        decay = model.model.layers[0].linear_attn.A_log
        with torch.no_grad():
            decay.copy_(torch.linspace(-3.3, 0.7, len(decay)))
        assert not torch.equal(decay, decay.bfloat16().float())
        prepared = batch
        if is_sharded:
            prepared = FSDPStrategy(model, torch.bfloat16, "fsdp").prepare_batch(batch)
        hidden.append(model.eval()(prepared))
    assert torch.equal(*hidden)


@pytest.mark.usefixtures("single_rank")
def test_lora_gradients_of_several_packs_add_up_in_fp32(tmp_path):
    """LoRA weights are replicated, so FSDP does not sum their bf16 gradients."""
    model = load_bf16_model(tmp_path, LORA)
    strategy = FSDPStrategy(model, torch.bfloat16, "fsdp")
    optimizer = MasterWeightOptimizer(strategy.trainable_params, TrainSettings(), {})
    for value in (1.0, 2**-12):
        for parameter in trainable_parameters(model).values():
            assert parameter.dtype == torch.bfloat16
            parameter.grad = torch.full_like(parameter, value)
        strategy.accumulate_gradients(optimizer)
    strategy.reduce_gradients(optimizer)
    assert strategy.trainable_params.keys() == trainable_parameters(model).keys()
    for parameter in strategy.trainable_params.values():
        assert torch.equal(parameter.grad, torch.full_like(parameter, 1 + 2**-12))
