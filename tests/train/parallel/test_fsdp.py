"""Sharded training: equality with single-process training."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cuda_graph_fixtures import make_text_pack
from multi_process_run import TUNE, rewind_to_checkpoint, run_to_completion
from PIL import Image
from safetensors.torch import load_file
from tiny_model import TinyFamily, create_tiny_model
from tiny_task import TinyTask, edit_samples, read_losses, write_recipe
from torch import Tensor

from finesight.errors import UserError
from finesight.files.storage import verify_folder
from finesight.model.trainable import configure_tuning, trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.settings.config import TrainSettings, TuneSettings
from finesight.settings.recipe import load_recipe
from finesight.train.checkpoint import OPTIMIZER_FILE, WEIGHTS_FILE, CheckpointManager
from finesight.train.master_weight_optimizer import MasterWeightOptimizer
from finesight.train.parallel.fsdp import FSDPStrategy
from finesight.train.setup import check_sharding

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


def read_relative_changes(folder: Path) -> dict[str, float]:
    rows = json.loads((folder / "param_audit.json").read_text())
    return {row["part"]: row["relative_change"] for row in rows if row["is_trained"]}


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
    assert read_relative_changes(two) == pytest.approx(read_relative_changes(alone), rel=1e-4)
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        ours, theirs = load_file(two / name), load_file(alone / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert (tensor - theirs[key]).square().mean().sqrt() <= 1e-5, key


def test_unsupported_sharding_is_rejected(tmp_path):
    task = TinyTask(tmp_path / "task")
    path = write_recipe(tmp_path / "recipe.yaml", task.recipe | {"output_dir": "run"})
    recipe = load_recipe(path, ["train.parallel=fsdp", "train.optimizer=muon"])
    with pytest.raises(UserError, match="does not support") as error:
        check_sharding(recipe.train, "cpu", is_native=True)
    assert "train.optimizer=muon" in error.value.what
    assert "train.parallel=ddp" in error.value.remedy


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
    batch, hidden = make_text_pack([70], 0, 0), []
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


REWARD = """
def early(case):
    return sum(letter < "n" for letter in case.answer) / max(1, len(case.answer))
"""


def test_reference_of_sampled_responses_is_equal_when_sharded(tmp_path):
    """The ranks have one and two groups of a step, whose responses are in packs of their own."""
    task = TinyTask(tmp_path / "task")
    (task.folder / "rewards.py").write_text(REWARD)
    task.recipe["rewards"] = [f"{task.folder / 'rewards.py'}:early"]
    grpo = {"num_generations": 3, "max_completion_length": 4, "max_refills": 0, "beta": 0.1}
    settings = {"tune": {"language": "lora", "lora": {"rank": 2, "dropout": 0.0}}}
    settings |= {"objective": "grpo", "grpo": grpo, "batch_size": 3, "pack_tokens": 10, "epochs": 1}
    alone = run_to_completion(task, 1, "alone", **settings)
    two = run_to_completion(task, 2, "two", parallel="fsdp", **settings)
    # Losses are differences of advantages of both signs, and nearly 0.
    assert dict(read_losses(two)) == pytest.approx(dict(read_losses(alone)), abs=2e-6)
