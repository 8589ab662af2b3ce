"""Estimated persistent and peak memory compared with allocations on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from each_value import each
from plan_fixtures import (
    H200,
    compute_loss,
    make_batch,
    make_model,
    make_planned_pack,
    make_tracer,
    profile_memory,
)
from tiny_model import create_tiny_model
from tiny_task import make_task

from finesight.config import TrainSettings
from finesight.encode.packing import PackedBatch
from finesight.model.linear import stacked_row_counts
from finesight.model.trainable import trainable_parameters
from finesight.model_folder import ModelFolder
from finesight.plan.dry_run import ComputeTarget
from finesight.plan.peak_memory import (
    CPU_PROCESS_BYTES,
    CUBLAS_WORKSPACE_BYTES,
    CUDA_CONTEXT_BYTES,
    PersistentMemory,
    compute_peak_memory,
    compute_persistent_memory,
)
from finesight.train.optimizer import MasterWeightOptimizer

LORA = {"language": "lora", "lora": {"rank": 8, "dropout": 0.05}}
ALL = {"language": "full", "embeddings": "full", "vision": "full", "merger": "full"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    folder = tmp_path_factory.mktemp("task")
    make_task(folder)
    create_tiny_model(folder / "deep", "qwen2_vl", preset="finesight-tiny")
    return ModelFolder(folder / "deep")


def make_task_batch(folder: ModelFolder, *, shares_prefix: bool = False) -> PackedBatch:
    data = folder.path.parent / "train.jsonl"
    return make_batch(folder, data, shares_prefix=shares_prefix)


def check_peak(
    folder: ModelFolder,
    batch: PackedBatch,
    dtype: torch.dtype,
    tune: dict[str, Any],
    checkpointed_fraction: float,
    tolerance: float,
) -> None:
    """Compare the estimated with the measured peak of a forward and backward pass.

    Both include gradients, but not memory that was allocated before.
    """
    model = make_model(folder, dtype, tune)
    model.activation_checkpointing = checkpointed_fraction
    compute_loss(model, batch).backward()
    model.zero_grad(set_to_none=True)
    with profile_memory() as measured:
        compute_loss(model, batch).backward()
    tracer = make_tracer(folder, ComputeTarget(is_cuda=False, dtype=dtype), tune)
    memory = tracer.trace(make_planned_pack(batch), checkpointed_fraction)
    assert memory.total == pytest.approx(measured.peak_bytes, rel=tolerance)


@pytest.mark.parametrize("tune", [LORA, ALL], ids=["lora", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each("checkpointed_fraction", [0.0, 0.6, 1.0])
@each("shares_prefix", [False, True])
def test_peak_memory_of_pack_is_within_an_eighth(
    folder: ModelFolder,
    shares_prefix: bool,
    dtype: torch.dtype,
    tune: dict[str, Any],
    checkpointed_fraction: float,
) -> None:
    batch = make_task_batch(folder, shares_prefix=shares_prefix)
    check_peak(folder, batch, dtype, tune, checkpointed_fraction, 0.125)


@pytest.mark.parametrize("tune", [LORA, ALL], ids=["lora", "all"])
@each("checkpointed_fraction", [0.0, 0.6, 1.0])
def test_long_sequence_peak_is_within_six_percent(
    folder: ModelFolder, tune: dict[str, Any], checkpointed_fraction: float
) -> None:
    """The estimate of oneDNN buffers per thread is rough."""
    batch = make_task_batch(folder)
    num_tokens = sum(batch.lengths)
    cu_seqlens_S1 = torch.tensor([0, num_tokens], dtype=torch.int32)
    long_batch = replace(batch, lengths=(num_tokens,), cu_seqlens_S1=cu_seqlens_S1)
    check_peak(folder, long_batch, torch.bfloat16, tune, checkpointed_fraction, 0.06)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "muon"])
@pytest.mark.parametrize("tune", [LORA, ALL], ids=["lora", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_static_memory_matches_a_run(
    folder: ModelFolder, dtype: torch.dtype, tune: dict[str, Any], optimizer: str
) -> None:
    train = TrainSettings.model_validate({"optimizer": optimizer})
    compute = ComputeTarget(is_cuda=False, dtype=dtype)
    meta_model, model = make_tracer(folder, compute, tune).model, make_model(folder, dtype, tune)
    estimated = compute_persistent_memory(meta_model, train, compute)
    stacked = stacked_row_counts(model)
    master_optimizer = MasterWeightOptimizer(trainable_parameters(model), train, stacked)
    assert estimated.weight_bytes == sum(p.nbytes for p in model.parameters())
    groups = master_optimizer.param_groups
    is_fp32 = dtype == torch.float32
    num_values = sum(len(group.master_weights) for group in groups)
    assert estimated.num_trainable == pytest.approx(num_values, rel=0.01)
    assert estimated.master_weight_bytes == (0 if is_fp32 else 2 * estimated.num_trainable)
    compute_loss(model, make_task_batch(folder)).backward()
    grad_bytes = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    master_optimizer.accumulate_gradients()
    gradients = [g for group in groups for g in group.gradients.per_parameter() if g is not None]
    grad_sum_bytes = sum(gradient.nbytes for gradient in gradients)
    # Large gradients are accumulated into existing sums and then freed.
    waiting = [p for p in meta_model.parameters() if id(p) not in estimated.accumulated_ids[False]]
    assert sum(p.nbytes for p in waiting if p.requires_grad) == grad_bytes
    assert estimated.grad_sum_bytes + estimated.multi_pack_grad_sum_bytes == pytest.approx(
        grad_sum_bytes, rel=0.05
    )
    optimizer_state = master_optimizer.optimizer_state()
    state_bytes = sum(tensor.nbytes for name, tensor in optimizer_state.items() if name != "steps")
    assert estimated.optimizer_state_bytes == pytest.approx(state_bytes, rel=0.01)


def test_memory_parts_sum_to_the_peak(folder: ModelFolder) -> None:
    persistent = PersistentMemory(
        num_trainable=3,
        weight_bytes=10,
        master_weight_bytes=20,
        grad_sum_bytes=30,
        multi_pack_grad_sum_bytes=7,
        optimizer_state_bytes=40,
        optimizer_step_bytes=5,
    )
    tracer = make_tracer(folder, H200, LORA)
    peak = compute_peak_memory(persistent, tracer, [], 0.0, has_multiple_packs=False)
    expected_bytes = 105 + sum(p.nbytes for p in trainable_parameters(tracer.model).values())
    assert peak.total == expected_bytes + CUBLAS_WORKSPACE_BYTES + CUDA_CONTEXT_BYTES
    assert peak.allocated == expected_bytes + CUBLAS_WORKSPACE_BYTES
    several = compute_peak_memory(persistent, tracer, [], 0.0, has_multiple_packs=True)
    assert several.total == peak.total + 7
    tracer = make_tracer(folder, ComputeTarget(is_cuda=False, dtype=torch.bfloat16), LORA)
    peak = compute_peak_memory(persistent, tracer, [], 0.0, has_multiple_packs=False)
    assert peak.allocated == peak.total == expected_bytes + CPU_PROCESS_BYTES
