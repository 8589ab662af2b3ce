"""Estimated memory of sharded models compared with that of real ranks on a CPU."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from multi_process_run import fork_ranks
from plan_fixtures import Tune, compute_loss, make_batch, make_model, make_planned_pack
from rank_memory import TINY, measure_rank
from tiny_task import make_task

from finesight.model.linear import stacked_row_counts
from finesight.model.trainable import configure_tuning, trainable_parameters
from finesight.plan.dry_run import ComputeTarget, PlannedPack, StepTracer
from finesight.plan.peak_memory import (
    NCCL_BYTES,
    PersistentMemory,
    compute_evaluation_memory,
    compute_loading_memory,
    compute_peak_memory,
    compute_persistent_memory,
)
from finesight.plan.settings_search import build_meta_model
from finesight.plan.sharded_memory import RankLayout
from finesight.settings import config
from finesight.settings.config import ParallelMode, TrainSettings
from finesight.train.master_weight_optimizer import MasterWeightOptimizer
from finesight.train.objectives.sft import Settings
from finesight.train.objectives.sft.loss import SftObjective
from finesight.train.parallel.fsdp_units import mark_as_sharded

LORA: Tune = {"language": "lora", "lora": {"rank": 8}}
ALL: Tune = {"language": "full", "embeddings": "full", "vision": "full", "merger": "full"}
PACK = PlannedPack((40,) * 4, ((1, 8, 8),) * 4, 40)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    make_task(folder)
    return folder / "train.jsonl"


def plan_rank(
    mode: ParallelMode, tune: Tune, dtype: torch.dtype, num_ranks: int = 2, is_cuda: bool = False
) -> tuple[PersistentMemory, StepTracer]:
    model = build_meta_model(TINY, dtype, (), ()).train()
    configure_tuning(model, config.TuneSettings.model_validate(tune), 0)
    compute, layout = ComputeTarget(is_cuda=is_cuda, dtype=dtype), RankLayout(num_ranks, mode)
    if layout.is_sharded:
        mark_as_sharded(model)
    persistent = compute_persistent_memory(model, TrainSettings(), compute, None, layout)
    return persistent, StepTracer(
        model, SftObjective(Settings()), compute, None, persistent.sharded
    )


@pytest.mark.parametrize(
    ("mode", "tune", "dtype"),
    [
        ("fsdp", ALL, "bfloat16"),
        ("zero2", ALL, "bfloat16"),
        ("fsdp", LORA, "bfloat16"),
        ("zero2", LORA, "float32"),
        ("fsdp", {"merger": "full", "language": "lora"}, "float32"),
    ],
    ids=["fsdp-all", "zero2-all", "fsdp-lora", "zero2-lora-fp32", "fsdp-both-fp32"],
)
def test_memory_of_two_ranks_is_estimated(data, tmp_path, mode, tune, dtype):
    """Persistent memory is exact, and the peak of a step within an eighth."""
    outputs = [tmp_path / "0.txt", tmp_path / "1.txt"]
    arguments = str(tmp_path / "store"), str(data), mode, tune, dtype
    ranks = fork_ranks(0, outputs, measure_rank, *arguments)
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0, 0], outputs[0].read_text()
    lines = outputs[0].read_text().splitlines()
    measured = json.loads(next(line for line in lines if line.startswith("{")))
    persistent, tracer = plan_rank(mode, tune, getattr(torch, dtype))
    assert persistent.weight_bytes == measured["weights"]
    assert persistent.master_weight_bytes == measured["master_weights"]
    assert persistent.optimizer_state_bytes == measured["optimizer_states"]
    pack = make_planned_pack(make_batch(TINY, data))
    assert tracer.trace(pack, 0.0).total == pytest.approx(measured["peak"], rel=0.125)
    assert persistent.sharded is not None
    replicated = 0
    for parameter in trainable_parameters(tracer.model).values():
        if id(parameter) not in persistent.sharded.unit_by_param:
            replicated += parameter.nbytes
    assert measured["gradients"] == persistent.sharded.total.gradient_shard_bytes + replicated


def test_ddp_has_flat_fp32_gradients(data):
    """The gradients of all parameters exist in fp32, even with one pack per step."""
    model = make_model(TINY, torch.bfloat16, ALL)
    optimizer = MasterWeightOptimizer(
        trainable_parameters(model), TrainSettings(), stacked_row_counts(model)
    )
    optimizer.use_flat_gradients()
    compute_loss(model, make_batch(TINY, data)).backward()
    flat = [group.gradients.flat_gradient() for group in optimizer.param_groups]
    alone, _ = plan_rank("ddp", ALL, torch.bfloat16, num_ranks=1)
    two, _ = plan_rank("ddp", ALL, torch.bfloat16, num_ranks=2)
    assert two.grad_sum_bytes == sum(tensor.nbytes for tensor in flat)
    assert (alone.grad_sum_bytes, two.multi_pack_grad_sum_bytes) == (0, 0)
    assert alone.multi_pack_grad_sum_bytes == two.grad_sum_bytes
    for name in ("weight_bytes", "master_weight_bytes", "optimizer_state_bytes"):
        assert getattr(alone, name) == getattr(two, name), name
    # A single process never shards.
    single, _ = plan_rank("fsdp", ALL, torch.bfloat16, num_ranks=1)
    assert (single.sharded, single.weight_bytes) == (None, alone.weight_bytes)


def compute_peak(
    mode: ParallelMode, num_ranks: int, *, has_multiple_packs: bool = False
) -> dict[str, int]:
    persistent, tracer = plan_rank(mode, ALL, torch.bfloat16, num_ranks, is_cuda=True)
    peak = compute_peak_memory(
        persistent, tracer, [PACK], 0.0, has_multiple_packs=has_multiple_packs, use_graphs=False
    )
    return asdict(peak) | {"total": peak.total, "allocated": peak.allocated}


def test_shards_halve_with_twice_the_ranks():
    two, four = (compute_peak("fsdp", count) for count in (2, 4))
    for name in ("weights", "master_weights", "optimizer_states"):
        assert four[name] == pytest.approx(two[name] / 2, rel=0.01), name
    # The activations and gathered units of a rank stay the same.
    assert four["gathered_weights"] == pytest.approx(two["gathered_weights"], rel=0.01)
    assert four["total"] < two["total"]


def test_modes_differ_as_documented():
    """The table of the documentation: what each mode keeps in the memory of a GPU."""
    ddp, zero2, fsdp, offload = (
        compute_peak(mode, 2) for mode in ("ddp", "zero2", "fsdp", "fsdp_offload")
    )
    persistent, _ = plan_rank("fsdp", ALL, torch.bfloat16)
    num_params = persistent.num_trainable * 2
    assert ddp["weights"] == pytest.approx(2 * num_params, rel=0.01)
    # Those of small parameters exist in bf16, too.
    assert 4 * num_params < ddp["gradients"] <= 1.01 * 6 * num_params
    assert ddp["gathered_weights"] == 0
    for sharded in (zero2, fsdp):
        assert sharded["weights"] == pytest.approx(4 * num_params / 2, rel=0.01)
        assert sharded["optimizer_states"] == pytest.approx(8 * num_params / 2, rel=0.01)
    assert zero2["gathered_weights"] > fsdp["gathered_weights"] > 0
    assert (offload["weights"], offload["master_weights"], offload["optimizer_states"]) == (0, 0, 0)
    assert offload["total"] < fsdp["total"] < zero2["total"] < ddp["total"]
    host, _ = plan_rank("fsdp_offload", ALL, torch.bfloat16)
    # Master weights and two moments in fp32; weights and gradients in blocks of a power of two.
    assert host.sharded is not None
    pinned_bytes = 0
    for parameter in host.sharded.local_params.values():
        pinned_bytes += 2 * 2 ** math.ceil(math.log2(parameter.nbytes))
    assert host.host_bytes == pytest.approx(12 * num_params / 2 + pinned_bytes, rel=0.001)
    assert persistent.host_bytes == 0
    for peak in (ddp, zero2, fsdp, offload):
        assert peak["nccl"] == NCCL_BYTES
        assert peak["allocated"] == peak["total"] - peak["nccl"] - peak["cuda_context"]


def test_gradient_shards_exist_between_packs():
    one, several = (
        compute_peak("fsdp", 2, has_multiple_packs=has_multiple_packs)
        for has_multiple_packs in (False, True)
    )
    assert several["gradients"] > one["gradients"]


@pytest.mark.parametrize("num_ranks", [2, 3, 8, 1000])
def test_evaluation_and_loading_need_the_complete_model(num_ranks):
    """Uneven shards are padded, and no number of GPUs goes below the complete weights."""
    persistent, tracer = plan_rank("fsdp", ALL, torch.bfloat16, num_ranks, is_cuda=True)
    complete_bytes = sum(parameter.nbytes for parameter in tracer.model.parameters())
    evaluation = compute_evaluation_memory(persistent, tracer, complete_bytes)
    loading = compute_loading_memory(persistent, tracer)
    assert evaluation is not None
    assert loading is not None
    assert evaluation.gathered_weights >= complete_bytes
    assert evaluation.workspace == complete_bytes
    # The all-gather of the last unit needs a buffer before any generation.
    without_generation = compute_evaluation_memory(persistent, tracer, 0)
    assert without_generation is not None
    assert persistent.sharded is not None
    assert without_generation.workspace == persistent.sharded.units[-1].weight_bytes > 0
    assert evaluation.weights == persistent.weight_bytes
    assert complete_bytes <= loading.weights < 3 * complete_bytes
    replicated, _ = plan_rank("ddp", ALL, torch.bfloat16, num_ranks)
    assert compute_evaluation_memory(replicated, tracer, 0) is None
    assert compute_loading_memory(replicated, tracer) is None
