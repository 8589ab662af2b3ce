"""Estimated persistent and peak memory compared with allocations on a CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plan_fixtures import Tune, compute_loss, make_batch, make_model, make_tracer, measure_peak
from tiny_task import make_task

from finesight.model.linear import stacked_row_counts
from finesight.model.trainable import trainable_parameters
from finesight.model_folder import locate_model
from finesight.plan.dry_run import ComputeTarget
from finesight.plan.peak_memory import (
    CPU_PROCESS_BYTES,
    CUBLAS_WORKSPACE_BYTES,
    CUDA_CONTEXT_BYTES,
    PersistentMemory,
    compute_peak_memory,
    compute_persistent_memory,
)
from finesight.settings.config import TrainSettings
from finesight.train.master_weight_optimizer import MasterWeightOptimizer

TINY = locate_model("finesight-tiny")
LORA: Tune = {"language": "lora", "lora": {"rank": 8, "dropout": 0.05}}
ALL: Tune = {"language": "full", "embeddings": "full", "vision": "full", "merger": "full"}
each_tune = pytest.mark.parametrize("tune", [LORA, ALL], ids=["lora", "all"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
each_fraction = pytest.mark.parametrize("checkpointed_fraction", [0.0, 0.6, 1.0])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    make_task(folder)
    return folder / "train.jsonl"


@each_fraction
@each_tune
@each_dtype
@pytest.mark.parametrize("shares_prefix", [False, True])
def test_peak_memory_of_pack_is_within_an_eighth(
    data, shares_prefix, dtype, tune, checkpointed_fraction
):
    batch = make_batch(TINY, data, shares_prefix)
    estimated, measured = measure_peak(TINY, batch, dtype, tune, checkpointed_fraction)
    assert estimated == pytest.approx(measured, rel=0.125)


@each_fraction
@each_tune
def test_long_sequence_peak_is_within_six_percent(data, tune, checkpointed_fraction):
    batch = make_batch(TINY, data)
    num_tokens = sum(batch.lengths)
    cu_seqlens_S1 = torch.tensor([0, num_tokens], dtype=torch.int32)
    long_batch = replace(batch, lengths=(num_tokens,), cu_seqlens_S1=cu_seqlens_S1)
    dtype = torch.bfloat16
    estimated, measured = measure_peak(TINY, long_batch, dtype, tune, checkpointed_fraction)
    # The estimate of oneDNN buffers per thread is rough.
    assert estimated == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "muon"])
@each_tune
@each_dtype
def test_static_memory_matches_a_run(data, dtype, tune, optimizer):
    train = TrainSettings.model_validate({"optimizer": optimizer})
    tracer = make_tracer(TINY, ComputeTarget(is_cuda=False, dtype=dtype), tune)
    estimated = compute_persistent_memory(tracer.model, train, tracer.compute)
    model = make_model(TINY, dtype, tune)
    rows = stacked_row_counts(model)
    master_optimizer = MasterWeightOptimizer(trainable_parameters(model), train, rows)
    assert estimated.weight_bytes == sum(p.nbytes for p in model.parameters())
    groups = master_optimizer.param_groups
    num_values = sum(len(group.master_weights) for group in groups)
    assert estimated.num_trainable == pytest.approx(num_values, rel=0.01)
    is_fp32 = dtype == torch.float32
    assert estimated.master_weight_bytes == (0 if is_fp32 else 2 * estimated.num_trainable)
    compute_loss(model, make_batch(TINY, data)).backward()
    grad_bytes = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    # Large gradients are accumulated into existing sums and then freed.
    accumulated_ids = estimated.accumulated_ids[False]
    waiting = [p for p in tracer.model.parameters() if id(p) not in accumulated_ids]
    assert sum(p.nbytes for p in waiting if p.requires_grad) == grad_bytes
    master_optimizer.accumulate_gradients()
    gradients = [one for group in groups for one in group.gradients.per_parameter()]
    grad_sum_bytes = sum(gradient.nbytes for gradient in gradients if gradient is not None)
    estimated_sum_bytes = estimated.grad_sum_bytes + estimated.multi_pack_grad_sum_bytes
    assert estimated_sum_bytes == pytest.approx(grad_sum_bytes, rel=0.05)
    optimizer_state = master_optimizer.optimizer_state()
    state_bytes = sum(tensor.nbytes for name, tensor in optimizer_state.items() if name != "steps")
    assert estimated.optimizer_state_bytes == pytest.approx(state_bytes, rel=0.01)


def test_memory_parts_sum_to_the_peak() -> None:
    persistent = PersistentMemory(
        num_trainable=3,
        weight_bytes=10,
        master_weight_bytes=20,
        grad_sum_bytes=30,
        multi_pack_grad_sum_bytes=7,
        optimizer_state_bytes=40,
        optimizer_step_bytes=5,
        optimizer_traffic_bytes=0,
    )
    gpu, cpu = (
        make_tracer(TINY, ComputeTarget(is_cuda=is_cuda, dtype=torch.bfloat16), LORA)
        for is_cuda in (True, False)
    )
    peak, multi_pack_peak, cpu_peak = (
        compute_peak_memory(persistent, tracer, [], 0.0, has_multiple_packs=has_multiple_packs)
        for tracer, has_multiple_packs in ((gpu, False), (gpu, True), (cpu, False))
    )
    expected_bytes = 105 + sum(p.nbytes for p in trainable_parameters(gpu.model).values())
    assert peak.allocated == expected_bytes + CUBLAS_WORKSPACE_BYTES
    assert peak.total == peak.allocated + CUDA_CONTEXT_BYTES
    assert multi_pack_peak.total == peak.total + 7
    assert cpu_peak.allocated == cpu_peak.total == expected_bytes + CPU_PROCESS_BYTES
