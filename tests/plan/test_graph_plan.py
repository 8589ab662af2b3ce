"""Estimated memory of CUDA graphs compared with their static buffers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import plan_fixtures
import pytest
import torch
from plan_fixtures import H200, make_planned_pack
from tiny_model import create_tiny_model
from tiny_task import make_task
from torch import Tensor

from finesight.config import TrainSettings
from finesight.encode.packing import PackedBatch
from finesight.model.vlm import VisionLanguageModel
from finesight.model_folder import ModelFolder, locate_model
from finesight.plan.dry_run import ComputeTarget, StepTracer
from finesight.plan.peak_memory import (
    CUBLAS_WORKSPACE_BYTES,
    CUDA_CONTEXT_BYTES,
    PeakMemory,
    compute_peak_memory,
    compute_persistent_memory,
    plan_graph,
)
from finesight.plan.planned_pack import PlannedPack, build_planned_pack
from finesight.plan.settings_search import PlannedSteps
from finesight.train import cuda_graphs
from finesight.train.cuda_graphs import MAX_GRAPHS
from finesight.train.dataset_stats import SampleStats
from finesight.train.graph_buffers import (
    MAX_GRAPH_TOKENS,
    GraphInputs,
    GraphShape,
    GraphVisionShape,
)

TINY = locate_model("finesight-tiny")
LORA = {"language": "lora", "lora": {"rank": 8}}
VISION_LORA = LORA | {"vision": "lora"}
VISION_LORA_NO_DROPOUT = VISION_LORA | {"lora": {"rank": 8, "dropout": 0.0}}
"""Without dropout, the vision encoder is captured, too."""


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> PackedBatch:
    folder = tmp_path_factory.mktemp("graphs")
    make_task(folder)
    return plan_fixtures.make_batch(TINY, folder / "train.jsonl")


def make_model(tune: dict[str, object]) -> VisionLanguageModel:
    return plan_fixtures.make_model(TINY, torch.bfloat16, tune)


def sum_bytes(values: Iterable[object]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


@pytest.mark.parametrize("tune", [LORA, VISION_LORA])
def test_graph_buffer_sizes_match_a_run(batch: PackedBatch, tune: dict[str, object]) -> None:
    model = make_model(tune)
    features = model.encode_images(batch.patches_ND, batch.grid_thw)
    graph_inputs = GraphInputs.allocate(GraphShape.from_batch(batch), batch, features, model.visual)
    graph_plan = plan_graph(model, H200, 0.0, make_planned_pack(batch))
    assert graph_plan is not None
    assert graph_plan.shape == graph_inputs.shape
    assert graph_plan.padded_pack.num_tokens == graph_inputs.shape.num_tokens
    values = [getattr(graph_inputs.batch, field.name) for field in fields(graph_inputs.batch)]
    values += [graph_inputs.features_MKD, graph_inputs.features_grad_MKD]
    assert graph_plan.buffer_bytes == sum_bytes(values)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_vision_graph_buffer_sizes_match_a_run(
    batch: PackedBatch, family: str, tmp_path: Path
) -> None:
    folder = ModelFolder(create_tiny_model(tmp_path / family, family))
    model = plan_fixtures.make_model(folder, torch.bfloat16, VISION_LORA_NO_DROPOUT)
    shape = GraphShape.from_batch(batch, GraphVisionShape.from_batch(batch, model.visual))
    graph_inputs = GraphInputs.allocate(shape, batch, None, model.visual)
    graph_plan = plan_graph(model, H200, 0.0, make_planned_pack(batch))
    assert graph_plan is not None
    assert graph_plan.shape == shape
    assert graph_inputs.vision_inputs is not None
    assert (graph_plan.padded_pack.num_tokens, graph_plan.padded_pack.num_patches) == (
        shape.num_tokens,
        graph_inputs.vision_inputs.shape.num_patches,
    )
    values = [getattr(graph_inputs.batch, field.name) for field in fields(graph_inputs.batch)]
    layout = graph_inputs.vision_inputs.layout
    cu_seqlens = {id(segments): segments.cu_seqlens_S1 for segments in layout.segments}.values()
    values += [graph_inputs.vision_inputs.patches_NB, layout.position_ids_N2]
    values += [layout.window_index_M, layout.reverse_index_M, *cu_seqlens]
    assert graph_plan.buffer_bytes == sum_bytes(values)


def test_only_small_packs_are_captured(batch: PackedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    model, small_pack = make_model(LORA), make_planned_pack(batch)
    partial_model = make_model(LORA | {"lora": {"rank": 8, "target_modules": ["q_proj"]}})
    long_pack = replace(small_pack, lengths=(MAX_GRAPH_TOKENS + 1,))
    unlabeled_pack = replace(small_pack, num_supervised_tokens=0)
    fp32 = ComputeTarget(is_cuda=True, dtype=torch.float32, capability=(9, 0))

    def is_captured(*arguments: Any) -> bool:
        return plan_graph(*arguments) is not None

    assert is_captured(model, H200, 0.0, small_pack)
    assert is_captured(model, H200, 0.5, small_pack)
    assert is_captured(partial_model, H200, 0.0, small_pack)
    assert not is_captured(partial_model, H200, 0.5, small_pack)
    assert not is_captured(model, H200, 0.0, long_pack)
    assert not is_captured(model, H200, 0.0, unlabeled_pack)
    assert not is_captured(model, fp32, 0.0, small_pack)
    assert is_captured(make_model(VISION_LORA), H200, 0.0, small_pack)
    monkeypatch.setattr(cuda_graphs, "MAX_TRAINABLE_PARAMS", 1000)
    assert not is_captured(model, H200, 0.0, small_pack)


def make_tracer(tune: dict[str, object]) -> StepTracer:
    return plan_fixtures.make_tracer(TINY, H200, tune)


def compute_peak(
    tune: dict[str, object], packs: list[PlannedPack], checkpointed_fraction: float = 0.0
) -> PeakMemory:
    tracer = make_tracer(tune)
    persistent = compute_persistent_memory(tracer.model, TrainSettings(), H200)
    return compute_peak_memory(
        persistent, tracer, packs, checkpointed_fraction, has_multiple_packs=False
    )


def test_cuda_graph_memory_includes_gradients(batch: PackedBatch) -> None:
    small_pack = make_planned_pack(batch)
    trainable_bytes = sum(p.nbytes for p in make_model(LORA).parameters() if p.requires_grad)
    peak = compute_peak(LORA, [small_pack])
    graph_bytes = peak.activations + peak.workspace + peak.gradients - trainable_bytes
    assert peak.gradients >= trainable_bytes
    assert peak.cuda_graphs == pytest.approx(graph_bytes, rel=0.1)
    assert peak.allocated == peak.total - peak.cuda_graphs - CUDA_CONTEXT_BYTES
    assert peak.libraries == 2 * CUBLAS_WORKSPACE_BYTES
    checkpointed_peak = compute_peak(LORA, [small_pack], 1.0)
    assert 0 < checkpointed_peak.cuda_graphs < peak.cuda_graphs
    long_pack = replace(small_pack, lengths=(MAX_GRAPH_TOKENS + 1,))
    eager_peak = compute_peak(LORA, [long_pack])
    assert (eager_peak.cuda_graphs, eager_peak.libraries) == (0, CUBLAS_WORKSPACE_BYTES)


def test_trainable_encoder_runs_outside_the_graph(batch: PackedBatch) -> None:
    """Its saved activations remain allocated during both passes of the decoder."""
    small_pack = make_planned_pack(batch)
    saved_bytes = make_tracer(VISION_LORA).trace_vision(small_pack, 0.0).saved
    assert saved_bytes > 4 * make_tracer(LORA).trace_vision(small_pack, 0.0).saved
    peak = compute_peak(VISION_LORA, [small_pack])
    assert peak.activations + peak.workspace >= saved_bytes
    assert peak.cuda_graphs < 1.05 * compute_peak(LORA, [small_pack]).cuda_graphs


def test_captured_encoder_memory_is_in_the_graph(batch: PackedBatch) -> None:
    small_pack = make_planned_pack(batch)
    saved_bytes = make_tracer(VISION_LORA_NO_DROPOUT).trace_vision(small_pack, 0.0).saved
    peaks = [compute_peak(tune, [small_pack]) for tune in (VISION_LORA, VISION_LORA_NO_DROPOUT)]
    assert peaks[1].cuda_graphs > peaks[0].cuda_graphs + 0.9 * saved_bytes
    assert peaks[1].activations + peaks[1].workspace == pytest.approx(peaks[1].cuda_graphs, rel=0.2)


def test_excess_graph_shapes_run_eagerly(batch: PackedBatch) -> None:
    packs = [PlannedPack((64 * n,), (), 10) for n in range(1, MAX_GRAPHS + 1)]
    excess_pack = PlannedPack((MAX_GRAPH_TOKENS - 64,), (), 10)
    captured_peak = compute_peak(LORA, packs)
    excess_peak = compute_peak(LORA, [*packs, excess_pack])
    assert excess_peak.activations > 2 * captured_peak.activations
    assert excess_peak.cuda_graphs == captured_peak.cuda_graphs


@pytest.mark.parametrize(
    ("tune", "widths"),
    [(LORA, range(2, 82, 2)), (VISION_LORA_NO_DROPOUT, (2, 4, 6, 8))],
    ids=["frozen", "lora"],
)
def test_one_pack_of_each_graph_shape_is_estimated(
    tune: dict[str, object], widths: Sequence[int]
) -> None:
    """A shape depends on the image tokens, and on the patches only with a captured encoder."""
    height = 128 if tune is LORA else 32
    stats = [
        SampleStats(str(n), 402, 400, 50, ((1, height, width),), (), frozenset())
        for n, width in enumerate(widths)
    ]
    stats.append(SampleStats("long", 1002, 1000, 50, ((1, height, 2),), (), frozenset()))
    model = make_model(tune)

    def list_shapes(packs: Sequence[PlannedPack]) -> set[GraphShape]:
        graphs = [plan_graph(model, H200, 0.0, planned) for planned in packs]
        return {graph.shape for graph in graphs if graph is not None}

    planned_steps = PlannedSteps([[one] for one in stats])
    all_shapes = list_shapes([build_planned_pack([one]) for one in stats])
    assert 4 < len(all_shapes) <= MAX_GRAPHS
    assert list_shapes(planned_steps.largest_packs(4096, model, 0.0)[0]) == all_shapes
