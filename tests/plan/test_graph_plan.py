"""Estimated memory of CUDA graphs compared with their static buffers."""

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace

import pytest
import torch
from cuda_graph_fixtures import make_loss_inputs
from plan_fixtures import GPU, Tune, make_batch, make_model, make_planned_pack, make_tracer
from tiny_model import create_tiny_model
from tiny_task import make_task
from torch import Tensor

from finesight.encode.batch import PackedBatch
from finesight.model.vlm import VisionLanguageModel
from finesight.model_folder import ModelFolder, locate_model
from finesight.plan.dry_run import PlannedPack, build_planned_pack
from finesight.plan.peak_memory import (
    CUBLAS_WORKSPACE_BYTES,
    CUDA_CONTEXT_BYTES,
    compute_peak_memory,
    compute_persistent_memory,
    plan_graph,
)
from finesight.plan.settings_search import PlannedSteps
from finesight.settings.config import TrainSettings
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
LORA: Tune = {"language": "lora", "lora": {"rank": 8}}
VISION_LORA = LORA | {"vision": "lora"}
VISION_LORA_NO_DROPOUT = VISION_LORA | {"lora": {"rank": 8, "dropout": 0.0}}
"""Without dropout, the vision encoder is captured, too."""


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> PackedBatch:
    folder = tmp_path_factory.mktemp("graphs")
    make_task(folder)
    return make_batch(TINY, folder / "train.jsonl")


@pytest.fixture
def small_pack(batch: PackedBatch) -> PlannedPack:
    return make_planned_pack(batch)


def tune_model(tune: Tune) -> VisionLanguageModel:
    return make_model(TINY, torch.bfloat16, tune)


def list_values(inputs: GraphInputs) -> list[object]:
    values = [getattr(inputs.batch, field.name) for field in fields(inputs.batch)]
    return [*values, inputs.loss_inputs["labels_L"]]


def count_bytes(values: Iterable[object]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


@pytest.mark.parametrize("tune", [LORA, VISION_LORA])
def test_graph_buffer_sizes_match_a_run(batch: PackedBatch, tune: Tune) -> None:
    model = tune_model(tune)
    features = model.encode_images(batch.patches_ND, batch.grid_thw)
    inputs = GraphInputs.allocate(
        GraphShape.from_batch(batch), batch, features, make_loss_inputs(batch), model.visual
    )
    plan = plan_graph(model, GPU, 0.0, make_planned_pack(batch))
    assert plan is not None
    assert plan.shape == inputs.shape
    assert plan.padded_pack.num_tokens == inputs.shape.num_tokens
    assert inputs.features_MKD is not None
    values = [*list_values(inputs), inputs.features_MKD, inputs.features_MKD.grad]
    assert plan.buffer_bytes == count_bytes(values)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_vision_graph_buffer_sizes_match_a_run(batch, family, tmp_path):
    folder = ModelFolder(create_tiny_model(tmp_path / family, family))
    model = make_model(folder, torch.bfloat16, VISION_LORA_NO_DROPOUT)
    sizes = batch.grid_thw, *batch.patches_ND.shape
    shape = GraphShape.from_batch(batch, GraphVisionShape.from_grids(model.visual, *sizes))
    inputs = GraphInputs.allocate(shape, batch, None, make_loss_inputs(batch), model.visual)
    plan, layout = plan_graph(model, GPU, 0.0, make_planned_pack(batch)), inputs.layout
    assert plan is not None
    assert layout is not None
    assert plan.shape == shape
    assert plan.padded_pack.num_tokens == shape.num_tokens
    assert plan.padded_pack.num_patches == len(inputs.batch.patches_ND)
    cu_seqlens = {id(segments): segments.cu_seqlens_S1 for segments in layout.segments}.values()
    indices = (layout.position_ids_N2, layout.window_index_M, layout.reverse_index_M)
    values = [*list_values(inputs), *indices, *cu_seqlens]
    assert plan.buffer_bytes == count_bytes(values)


def test_only_small_packs_are_captured(small_pack, monkeypatch):
    model = tune_model(LORA)
    partial_model = tune_model({"language": "lora", "lora": {"target_modules": ["q_proj"]}})
    long_pack = replace(small_pack, lengths=(MAX_GRAPH_TOKENS + 1,))
    unsupervised_pack = replace(small_pack, num_supervised_tokens=0)
    fp32 = replace(GPU, dtype=torch.float32)
    assert plan_graph(model, GPU, 0.0, small_pack) is not None
    assert plan_graph(model, GPU, 0.5, small_pack) is not None
    assert plan_graph(partial_model, GPU, 0.0, small_pack) is not None
    assert plan_graph(tune_model(VISION_LORA), GPU, 0.0, small_pack) is not None
    assert plan_graph(partial_model, GPU, 0.5, small_pack) is None
    assert plan_graph(model, GPU, 0.0, long_pack) is None
    assert plan_graph(model, GPU, 0.0, unsupervised_pack) is None
    assert plan_graph(model, fp32, 0.0, small_pack) is None
    monkeypatch.setattr(cuda_graphs, "MAX_TRAINABLE_PARAMS", 1000)
    assert plan_graph(model, GPU, 0.0, small_pack) is None


def compute_peak(tune, packs, checkpointed_fraction=0.0):
    tracer = make_tracer(TINY, GPU, tune)
    persistent = compute_persistent_memory(tracer.model, TrainSettings(), GPU)
    return compute_peak_memory(
        persistent, tracer, packs, checkpointed_fraction, has_multiple_packs=False
    )


def test_cuda_graph_memory_includes_gradients(small_pack: PlannedPack) -> None:
    trainable_bytes = sum(p.nbytes for p in tune_model(LORA).parameters() if p.requires_grad)
    peak = compute_peak(LORA, [small_pack])
    graph_bytes = peak.activations + peak.workspace + peak.gradients - trainable_bytes
    assert peak.gradients >= trainable_bytes
    assert peak.cuda_graphs == pytest.approx(graph_bytes, rel=0.1)
    assert peak.allocated == peak.total - peak.cuda_graphs - CUDA_CONTEXT_BYTES
    assert peak.libraries == 2 * CUBLAS_WORKSPACE_BYTES
    assert 0 < compute_peak(LORA, [small_pack], 1.0).cuda_graphs < peak.cuda_graphs
    eager_peak = compute_peak(LORA, [replace(small_pack, lengths=(MAX_GRAPH_TOKENS + 1,))])
    assert (eager_peak.cuda_graphs, eager_peak.libraries) == (0, CUBLAS_WORKSPACE_BYTES)


def test_encoder_is_in_the_graph_only_without_dropout(small_pack: PlannedPack) -> None:
    """Outside, its saved activations remain allocated during both passes of the decoder."""
    saved, outside_saved, inside_saved = (
        make_tracer(TINY, GPU, tune).trace_vision(small_pack, 0.0).saved
        for tune in (LORA, VISION_LORA, VISION_LORA_NO_DROPOUT)
    )
    frozen, outside, inside = (
        compute_peak(tune, [small_pack]) for tune in (LORA, VISION_LORA, VISION_LORA_NO_DROPOUT)
    )
    assert outside_saved > 4 * saved
    assert outside.activations + outside.workspace >= outside_saved
    assert outside.cuda_graphs < 1.05 * frozen.cuda_graphs
    assert inside.cuda_graphs > outside.cuda_graphs + 0.9 * inside_saved
    assert inside.activations + inside.workspace == pytest.approx(inside.cuda_graphs, rel=0.2)


def test_excess_graph_shapes_run_eagerly() -> None:
    packs = [PlannedPack((64 * n,), (), 10) for n in range(1, MAX_GRAPHS + 1)]
    captured_peak = compute_peak(LORA, packs)
    excess_peak = compute_peak(LORA, [*packs, PlannedPack((MAX_GRAPH_TOKENS - 64,), (), 10)])
    assert excess_peak.activations > 2 * captured_peak.activations
    assert excess_peak.cuda_graphs == captured_peak.cuda_graphs


@pytest.mark.parametrize(
    ("tune", "height", "widths"),
    [(LORA, 128, range(2, 82, 2)), (VISION_LORA_NO_DROPOUT, 32, (2, 4, 6, 8))],
    ids=["frozen", "lora"],
)
def test_one_pack_of_each_graph_shape_is_estimated(tune, height, widths):
    """A shape depends on the image tokens, and on the patches only with a captured encoder."""
    model = tune_model(tune)
    stats = [
        SampleStats(str(length), length + 2, length, 50, ((1, height, width),), (), frozenset())
        for length, width in [(1000, 2), *((400, width) for width in widths)]
    ]

    def list_shapes(packs: Sequence[PlannedPack]) -> set[GraphShape]:
        graphs = [plan_graph(model, GPU, 0.0, planned) for planned in packs]
        return {graph.shape for graph in graphs if graph is not None}

    all_shapes = list_shapes([build_planned_pack([one]) for one in stats])
    assert 4 < len(all_shapes) <= MAX_GRAPHS
    steps = PlannedSteps([[one] for one in stats])
    assert list_shapes(steps.largest_packs(4096, model, 0.0)[0]) == all_shapes
