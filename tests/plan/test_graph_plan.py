"""What recordings are said to hold against what they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from tiny_task import make_task
from torch import Tensor

from finesight.config import PixelRange, TrainFileSettings, TrainSettings, TuneSettings
from finesight.data.corpus import load_corpus
from finesight.encode.native_renderer import NativeRenderer
from finesight.encode.packing import PackedBatch, pack
from finesight.model.tiny import create_tiny_model
from finesight.model.trainable import configure_tuning
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder, locate_model
from finesight.plan.activation_memory import ActivationMemory
from finesight.plan.graph_plan import plan_graph
from finesight.plan.peak_memory import (
    CUBLAS_WORKSPACE_BYTES,
    CUDA_CONTEXT_BYTES,
    PeakMemory,
    compute_peak_memory,
    compute_persistent_memory,
)
from finesight.plan.planned_pack import PlannedPack, build_planned_pack
from finesight.plan.saved_activations import ComputeConfig
from finesight.plan.settings_search import PlannedSteps
from finesight.train import cuda_graphs as train_recorded
from finesight.train.cuda_graphs import MAX_GRAPHS
from finesight.train.dataset_stats import SampleStats
from finesight.train.graph_buffers import MAX_GRAPH_TOKENS, GraphInputs, GraphShape
from finesight.train.graph_vision_buffers import GraphVisionShape

CPU = torch.device("cpu")
CARD = ComputeConfig(is_cuda=True, element_size=2, has_varlen_attention=True)
LORA = {"language": "lora", "lora": {"rank": 8}}
SEEING = LORA | {"vision": "lora"}
WATCHING = SEEING | {"lora": {"rank": 8, "dropout": 0.0}}
"""Of a tower that draws nothing, and is recorded, too."""


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> PackedBatch:
    folder = tmp_path_factory.mktemp("recorded")
    make_task(folder)
    renderer = NativeRenderer(
        locate_model("finesight-tiny"), PixelRange(min_pixels=784, max_pixels=7056)
    )
    corpus = load_corpus((TrainFileSettings(path=folder / "train.jsonl"),))
    return pack([renderer.encode(sample) for sample in corpus.read_samples()])


def make_model(tune: dict[str, object]) -> VisionLanguageModel:
    model = load_model(locate_model("finesight-tiny"), torch.bfloat16, CPU).train()
    configure_tuning(model, TuneSettings.model_validate(tune), 0)
    return model


def load_of(batch: PackedBatch) -> PlannedPack:
    return PlannedPack(batch.lengths, batch.grid_thw, batch.num_supervised_tokens)


@pytest.mark.parametrize("tune", [LORA, SEEING])
def test_graph_buffer_sizes_match_a_run(batch: PackedBatch, tune: dict[str, object]) -> None:
    model = make_model(tune)
    features = model.encode_images(batch.patches_ND, batch.grid_thw)
    held = GraphInputs.allocate(GraphShape.from_batch(batch), batch, features, model.visual)
    found = plan_graph(model, CARD, 0.0, load_of(batch))
    assert found is not None
    assert found.shape == held.shape
    assert found.padded_pack.num_tokens == held.shape.num_tokens
    values = [getattr(held.batch, field.name) for field in fields(held.batch)]
    tensors = [
        value
        for value in (*values, held.features_MKD, held.features_grad_MKD)
        if isinstance(value, Tensor)
    ]
    assert found.buffer_bytes == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_vision_graph_buffer_sizes_match_a_run(
    batch: PackedBatch, family: str, tmp_path: Path
) -> None:
    create_tiny_model(tmp_path / family, family)
    model = load_model(ModelFolder(tmp_path / family), torch.bfloat16, CPU).train()
    configure_tuning(model, TuneSettings.model_validate(WATCHING), 0)
    kind = GraphShape.from_batch(batch, GraphVisionShape.from_batch(batch, model.visual))
    held = GraphInputs.allocate(kind, batch, None, model.visual)
    found = plan_graph(model, CARD, 0.0, load_of(batch))
    assert found is not None
    assert found.shape == kind
    assert held.vision_inputs is not None
    assert (found.padded_pack.num_tokens, found.padded_pack.num_patches) == (
        kind.num_tokens,
        held.vision_inputs.shape.num_patches,
    )
    values = [getattr(held.batch, field.name) for field in fields(held.batch)]
    own = held.vision_inputs.layout
    ways = {id(way): way.cu_seqlens_S1 for way in own.segments}.values()
    values += [
        held.vision_inputs.patches_NB,
        own.position_ids_N2,
        own.window_index_M,
        own.reverse_index_M,
        *ways,
    ]
    assert found.buffer_bytes == sum(value.nbytes for value in values if isinstance(value, Tensor))


def test_only_small_packs_are_captured(batch: PackedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, load = make_model(LORA), load_of(batch)
    long = replace(load, lengths=(MAX_GRAPH_TOKENS + 1,))
    assert plan_graph(frozen, CARD, 0.0, load) is not None
    assert plan_graph(frozen, CARD, 0.5, load) is not None
    some = make_model({"language": "lora", "lora": {"rank": 8, "target_modules": ["q_proj"]}})
    assert plan_graph(some, CARD, 0.0, load) is not None
    assert plan_graph(some, CARD, 0.5, load) is None
    assert plan_graph(frozen, CARD, 0.0, long) is None
    assert plan_graph(frozen, CARD, 0.0, replace(load, num_supervised_tokens=0)) is None
    assert (
        plan_graph(
            frozen,
            ComputeConfig(is_cuda=True, element_size=4, has_varlen_attention=False),
            0.0,
            load,
        )
        is None
    )
    assert plan_graph(make_model(SEEING), CARD, 0.0, load) is not None
    monkeypatch.setattr(train_recorded, "MAX_TRAINABLE_PARAMS", 1000)
    assert plan_graph(frozen, CARD, 0.0, load) is None


def peak(model: VisionLanguageModel, loads: list[PlannedPack], recompute: float) -> PeakMemory:
    stays, activations = (
        compute_persistent_memory(model, TrainSettings(), CARD),
        ActivationMemory(model, CARD, recompute),
    )
    return compute_peak_memory(stays, activations, loads, CARD, 588, has_multiple_packs=False)


def test_cuda_graph_memory_includes_gradients(batch: PackedBatch) -> None:
    model = make_model(LORA)
    load = load_of(batch)
    learning = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    found = peak(model, [load], 0.0)
    within = found.activations + found.workspace + found.logits + found.gradients - learning
    assert found.gradients >= learning
    assert found.cuda_graphs == pytest.approx(within, rel=0.1)
    assert found.allocated == found.total - found.cuda_graphs - CUDA_CONTEXT_BYTES
    assert found.libraries == 2 * CUBLAS_WORKSPACE_BYTES
    again = peak(model, [load], 1.0)
    assert 0 < again.cuda_graphs < found.cuda_graphs
    long = replace(load, lengths=(MAX_GRAPH_TOKENS + 1,))
    launched = peak(model, [long], 0.0)
    assert (launched.cuda_graphs, launched.libraries) == (0, CUBLAS_WORKSPACE_BYTES)


def test_trainable_encoder_runs_outside_the_graph(batch: PackedBatch) -> None:
    """It keeps what it needs for its way back while the decoder goes forth and back."""
    load = load_of(batch)
    frozen, seeing = make_model(LORA), make_model(SEEING)
    both = [ActivationMemory(model, CARD, 0.0) for model in (frozen, seeing)]
    retained = both[1].saved_vision_bytes(load)
    assert retained > 4 * both[0].saved_vision_bytes(load)
    found = peak(seeing, [load], 0.0)
    assert found.activations + found.workspace >= retained
    assert found.cuda_graphs < 1.05 * peak(frozen, [load], 0.0).cuda_graphs


def test_captured_encoder_memory_is_in_the_graph(batch: PackedBatch) -> None:
    load = load_of(batch)
    extra, inside = make_model(SEEING), make_model(WATCHING)
    retained = ActivationMemory(inside, CARD, 0.0).saved_vision_bytes(load)
    both = [peak(model, [load], 0.0) for model in (extra, inside)]
    assert both[1].cuda_graphs > both[0].cuda_graphs + 0.9 * retained
    assert both[1].activations + both[1].workspace == pytest.approx(both[1].cuda_graphs, rel=0.2)


def test_excess_graph_shapes_run_eagerly(batch: PackedBatch) -> None:
    model = make_model(LORA)
    kinds = [PlannedPack((64 * n,), (), 10) for n in range(1, MAX_GRAPHS + 1)]
    another = PlannedPack((MAX_GRAPH_TOKENS - 64,), (), 10)
    few, many = peak(model, kinds, 0.0), peak(model, [*kinds, another], 0.0)
    assert many.activations > 2 * few.activations
    assert many.cuda_graphs == few.cuda_graphs


@pytest.mark.parametrize(
    ("tune", "widths"), [(LORA, range(2, 82, 2)), (WATCHING, (2, 4, 6, 8))], ids=["frozen", "lora"]
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
        graphs = [plan_graph(model, CARD, 0.0, planned) for planned in packs]
        return {graph.shape for graph in graphs if graph is not None}

    planned_steps = PlannedSteps([[one] for one in stats])
    all_shapes = list_shapes([build_planned_pack([one]) for one in stats])
    assert 4 < len(all_shapes) <= MAX_GRAPHS
    assert list_shapes(planned_steps.largest_packs(4096, model, 0.0)) == all_shapes
