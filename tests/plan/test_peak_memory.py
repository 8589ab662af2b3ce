"""Estimated persistent and peak memory compared with allocations on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_profile import profile_memory
from tiny_model import create_tiny_model
from tiny_task import make_task

from finesight.config import PixelRange, TrainFileSettings, TrainSettings, TuneSettings
from finesight.data.corpus import load_corpus
from finesight.encode.packing import PackedBatch, find_shared_prefix_length, pack
from finesight.encode.renderer import NativeRenderer
from finesight.model.linear import stacked_row_counts
from finesight.model.trainable import configure_tuning, trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.plan.dry_run import ComputeTarget, StepTracer
from finesight.plan.peak_memory import (
    CPU_PROCESS_BYTES,
    CUBLAS_WORKSPACE_BYTES,
    CUDA_CONTEXT_BYTES,
    PersistentMemory,
    compute_peak_memory,
    compute_persistent_memory,
)
from finesight.plan.planned_model import build_meta_model
from finesight.plan.planned_pack import PlannedPack
from finesight.train.loss import fused_linear_cross_entropy
from finesight.train.optimizer import MasterWeightOptimizer

CPU = torch.device("cpu")
LORA = {"language": "lora", "lora": {"rank": 8, "dropout": 0.05}}
ALL_BUT_VISION = {"language": "full", "embeddings": "full"}
ALL = ALL_BUT_VISION | {"vision": "full", "merger": "full"}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    make_task(folder)
    create_tiny_model(folder / "deep", "qwen2_vl", preset="finesight-tiny")
    return folder


def make_batch(task: Path, *, shares_prefix: bool = False) -> PackedBatch:
    """Pack all samples, with a shared prefix or without."""
    renderer = NativeRenderer(
        ModelFolder(task / "deep"), PixelRange(min_pixels=784, max_pixels=7056)
    )
    corpus = load_corpus((TrainFileSettings(path=task / "train.jsonl"),))
    samples = [renderer.encode(sample) for sample in corpus.read_samples()]
    return pack(
        samples,
        prefix_length=find_shared_prefix_length([sample.tokenized for sample in samples])
        if shares_prefix
        else 0,
    )


def make_model(task: Path, dtype: torch.dtype, tune: dict[str, Any]) -> VisionLanguageModel:
    model = load_model(ModelFolder(task / "deep"), dtype, CPU).train()
    configure_tuning(model, TuneSettings.model_validate(tune), 0)
    return model


def run_forward_backward(model: VisionLanguageModel, batch: PackedBatch) -> None:
    """Run the forward and backward pass of a training step."""
    h_LD = model(batch, dropout_seed_1=torch.ones(1, dtype=torch.int32))
    loss = fused_linear_cross_entropy(h_LD, model.lm_head_weight, batch.labels_L, torch.tensor(1.0))
    loss.backward()  # type: ignore[no-untyped-call]


def trace_model(task: Path, compute: ComputeTarget, tune: dict[str, Any]) -> StepTracer:
    model = build_meta_model(ModelFolder(task / "deep"), compute.dtype, (), ()).train()
    configure_tuning(model, TuneSettings.model_validate(tune), 0)
    return StepTracer(model, compute)


def measure_peak(
    task: Path,
    batch: PackedBatch,
    compute: ComputeTarget,
    tune: dict[str, Any],
    checkpointed_fraction: float,
) -> tuple[int, int]:
    """Return the estimated and the measured peak of a forward and backward pass.

    Both include gradients, but not memory that was allocated before.
    """
    model = make_model(task, compute.dtype, tune)
    model.activation_checkpointing = checkpointed_fraction
    run_forward_backward(model, batch)
    model.zero_grad(set_to_none=True)
    with profile_memory() as measured:
        run_forward_backward(model, batch)
    planned_pack = PlannedPack(
        batch.lengths, batch.grid_thw, batch.num_supervised_tokens, batch.prefix_length
    )
    memory = trace_model(task, compute, tune).trace(planned_pack, checkpointed_fraction)
    return memory.total, measured.peak_bytes


@pytest.mark.parametrize("checkpointed_fraction", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("tune", [LORA, ALL], ids=["lora", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shares_prefix", [False, True])
def test_peak_memory_of_pack_is_within_an_eighth(
    task: Path,
    shares_prefix: bool,
    dtype: torch.dtype,
    tune: dict[str, Any],
    checkpointed_fraction: float,
) -> None:
    compute = ComputeTarget(is_cuda=False, dtype=dtype)
    estimated, measured = measure_peak(
        task, make_batch(task, shares_prefix=shares_prefix), compute, tune, checkpointed_fraction
    )
    assert estimated == pytest.approx(measured, rel=0.125)


@pytest.mark.parametrize("checkpointed_fraction", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("tune", [LORA, ALL], ids=["lora", "all"])
def test_long_sequence_peak_is_within_six_percent(
    task: Path, tune: dict[str, Any], checkpointed_fraction: float
) -> None:
    batch = make_batch(task)
    num_tokens = sum(batch.lengths)
    cu_seqlens_S1 = torch.tensor([0, num_tokens], dtype=torch.int32)
    long_batch = replace(batch, lengths=(num_tokens,), cu_seqlens_S1=cu_seqlens_S1)
    compute = ComputeTarget(is_cuda=False, dtype=torch.bfloat16)
    estimated, measured = measure_peak(task, long_batch, compute, tune, checkpointed_fraction)
    # The estimate of oneDNN buffers per thread is rough.
    assert estimated == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "muon"])
@pytest.mark.parametrize("tune", [LORA, ALL], ids=["lora", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_static_memory_matches_a_run(
    task: Path, dtype: torch.dtype, tune: dict[str, Any], optimizer: str
) -> None:
    train = TrainSettings.model_validate({"optimizer": optimizer})
    meta_model = build_meta_model(ModelFolder(task / "deep"), dtype, (), ())
    configure_tuning(meta_model, TuneSettings.model_validate(tune), 0)
    estimated = compute_persistent_memory(
        meta_model,
        train,
        ComputeTarget(is_cuda=False, dtype=dtype),
    )
    model = make_model(task, dtype, tune)
    master_optimizer = MasterWeightOptimizer(
        trainable_parameters(model), train, stacked_row_counts(model)
    )
    assert estimated.weight_bytes == sum(p.nbytes for p in model.parameters())
    groups = master_optimizer.param_groups
    is_fp32 = dtype == torch.float32
    num_values = sum(len(group.master_weights) for group in groups)
    assert estimated.num_trainable == pytest.approx(num_values, rel=0.01)
    assert estimated.master_weight_bytes == (0 if is_fp32 else 2 * estimated.num_trainable)
    run_forward_backward(model, make_batch(task))
    grad_bytes = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    master_optimizer.accumulate_gradients()
    grad_sum_bytes = sum(
        gradient.nbytes
        for group in groups
        for gradient in group.gradients.per_parameter()
        if gradient is not None
    )
    # Large gradients are accumulated into existing sums and then freed.
    waiting = [p for p in meta_model.parameters() if id(p) not in estimated.accumulated_ids[False]]
    assert sum(p.nbytes for p in waiting if p.requires_grad) == grad_bytes
    assert estimated.grad_sum_bytes + estimated.multi_pack_grad_sum_bytes == pytest.approx(
        grad_sum_bytes, rel=0.05
    )
    optimizer_state = master_optimizer.optimizer_state()
    state_bytes = sum(tensor.nbytes for name, tensor in optimizer_state.items() if name != "steps")
    assert estimated.optimizer_state_bytes == pytest.approx(state_bytes, rel=0.01)


def test_memory_parts_sum_to_the_peak(task: Path) -> None:
    sizes = {
        "weight_bytes": 10,
        "master_weight_bytes": 20,
        "grad_sum_bytes": 30,
        "multi_pack_grad_sum_bytes": 7,
        "optimizer_state_bytes": 40,
        "optimizer_step_bytes": 5,
    }
    persistent = PersistentMemory(num_trainable=3, **sizes)
    tracer = trace_model(task, ComputeTarget(is_cuda=True, dtype=torch.bfloat16), LORA)
    peak = compute_peak_memory(persistent, tracer, [], 0.0, has_multiple_packs=False)
    expected_bytes = 105 + sum(p.nbytes for p in trainable_parameters(tracer.model).values())
    assert peak.total == expected_bytes + CUBLAS_WORKSPACE_BYTES + CUDA_CONTEXT_BYTES
    assert peak.allocated == expected_bytes + CUBLAS_WORKSPACE_BYTES
    several = compute_peak_memory(persistent, tracer, [], 0.0, has_multiple_packs=True)
    assert several.total == peak.total + 7
    tracer = trace_model(task, ComputeTarget(is_cuda=False, dtype=torch.bfloat16), LORA)
    peak = compute_peak_memory(persistent, tracer, [], 0.0, has_multiple_packs=False)
    assert peak.allocated == peak.total == expected_bytes + CPU_PROCESS_BYTES
