"""CUDA graphs with the vision encoder: image padding does not change results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import create_tiny_model
from tiny_task import make_task
from torch import Tensor

from finesight.config import PixelRange, TrainFileSettings, TuneSettings
from finesight.data.corpus import load_corpus
from finesight.encode.packing import PAD_MULTIPLE, PackedBatch, pack
from finesight.encode.renderer import NativeRenderer
from finesight.model import attention, layers
from finesight.model.attention import Segments
from finesight.model.trainable import configure_tuning, trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.train import cuda_graphs, graph_buffers
from finesight.train.cuda_graphs import CudaGraphRunner
from finesight.train.graph_buffers import (
    GraphInputs,
    GraphShape,
    GraphVisionShape,
    can_capture_vision,
    should_capture_vision,
)
from finesight.train.loss import fused_linear_cross_entropy

CPU = torch.device("cpu")
PARTS = "vision", "merger", "language", "embeddings"
ALL = dict.fromkeys(PARTS, "full")
FAMILIES = ["qwen2_vl", "qwen2_5_vl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    make_task(folder)
    for family in (*FAMILIES, "qwen3_vl", "qwen"):
        create_tiny_model(folder / family, family)
    return folder


def make_model(folder: Path, family: str, tune: dict[str, Any] = ALL) -> VisionLanguageModel:
    model = load_model(ModelFolder(folder / family), torch.float32, CPU)
    configure_tuning(model, TuneSettings.model_validate(tune), 0)
    return model.train()


def packs(folder: Path, family: str, each: int) -> list[PackedBatch]:
    rule = None if family == "qwen" else PixelRange(min_pixels=784, max_pixels=30000)
    renderer = NativeRenderer(ModelFolder(folder / family), rule)
    corpus = load_corpus((TrainFileSettings(path=folder / "train.jsonl"),))
    samples = [renderer.encode(sample) for sample in corpus.read_samples()]
    return [pack(samples[at : at + each]) for at in range(0, 3 * each, each)]


def relative_error(mine: Tensor, theirs: Tensor) -> float:
    """How far one is from the other, as a share of its length."""
    return float((mine - theirs).norm() / theirs.norm().clamp(min=1e-12))


def without_empty(segments: Segments) -> Segments:
    """Without a kernel for segments of any length, empty ones have to be left out."""
    full = [length for length in segments.cu_seqlens_S1.diff().tolist() if length]
    return Segments.from_lengths(full, CPU)


def compute_loss_and_gradients(
    model: VisionLanguageModel, static_inputs: GraphInputs
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of the buffers and all gradients."""
    ways = {id(own): without_empty(own) for own in static_inputs.vision_inputs.layout.segments}
    layout = replace(
        static_inputs.vision_inputs.layout,
        segments=tuple(ways[id(own)] for own in static_inputs.vision_inputs.layout.segments),
    )
    features = replace(static_inputs.vision_inputs, layout=layout).encode(model.visual)
    inside = without_empty(
        Segments(
            static_inputs.batch.lengths,
            static_inputs.batch.cu_seqlens_S1,
            static_inputs.shape.max_seqlen,
            static_inputs.shape.num_tokens,
        )
    )
    filled = replace(
        static_inputs.batch, lengths=inside.lengths, cu_seqlens_S1=inside.cu_seqlens_S1
    )
    h_LD = model(filled, features)
    # The kernel leaves rows without a target out; here those of the pack come first.
    count = int((static_inputs.batch.labels_L >= 0).sum())
    loss = fused_linear_cross_entropy(
        h_LD, model.lm_head_weight, static_inputs.batch.labels_L[:count], static_inputs.loss_weight
    )
    named = trainable_parameters(model)
    return loss, dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_image_padding_does_not_change_results(folder: Path, family: str) -> None:
    model = make_model(folder, family)
    other, batch, _ = packs(folder, family, 3)
    assert can_capture_vision(model)
    encoder = model.visual
    merge = encoder.config.merge_size
    # Large enough for both of them, with more than one empty segment.
    kinds = [GraphVisionShape.from_batch(one, encoder) for one in (other, batch)]
    patches = max(kind.num_patches for kind in kinds) + 2 * PAD_MULTIPLE * merge**2
    ways = tuple(
        (max(a[0], b[0]) + 8, max(a[1], b[1]))
        for a, b in zip(*(k.segment_shapes for k in kinds), strict=True)
    )
    kind = GraphShape.from_batch(batch)._replace(
        vision_shape=GraphVisionShape(patches, kinds[1].patch_bytes, ways),
        num_features=patches // merge**2,
        num_tokens=2048,
        num_sequences=16,
        max_seqlen=1024,
        num_labels=512,
    )
    static_inputs = GraphInputs.allocate(kind, batch, None, encoder)
    # Another one was there before.
    static_inputs.copy_from(other, None, torch.tensor(2.0), encoder)
    static_inputs.copy_from(batch, None, torch.tensor(0.5), encoder)
    for own in static_inputs.vision_inputs.layout.segments:
        lengths = own.cu_seqlens_S1.diff()
        assert int(own.cu_seqlens_S1[-1]) == patches, "patches outside all segments"
        assert 0 <= int(lengths.min()) <= int(lengths.max()) <= own.max_seqlen
    loss, found = compute_loss_and_gradients(model, static_inputs)
    expected = fused_linear_cross_entropy(
        model(batch), model.lm_head_weight, batch.labels_L, torch.tensor(0.5)
    )
    torch.testing.assert_close(loss, expected)
    named = trainable_parameters(model)
    for name, grad in zip(named, torch.autograd.grad(expected, list(named.values())), strict=True):
        assert relative_error(found[name], grad) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_graph_shape_fits_all_packs(folder: Path, family: str) -> None:
    """Check that the cumulative lengths end at the last patch for all sizes of padding."""
    model = make_model(folder, family)
    for each in (1, 2, 3, 5):
        for batch in packs(folder, family, each):
            kind = GraphShape.from_batch(batch, GraphVisionShape.from_batch(batch, model.visual))
            assert (
                kind.num_features * model.visual.config.merge_size**2
                == kind.vision_shape.num_patches
            )
            static_inputs = GraphInputs.allocate(kind, batch, None, model.visual)
            static_inputs.copy_from(batch, None, torch.tensor(1.0), model.visual)
            for own in static_inputs.vision_inputs.layout.segments:
                assert int(own.cu_seqlens_S1[-1]) == kind.vision_shape.num_patches
                assert int(own.cu_seqlens_S1.diff().max()) <= own.max_seqlen


def test_capturable_vision_encoders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_captured(family: str, tune: dict[str, Any], checkpointed: float = 0.0) -> bool:
        return can_capture_vision(make_model(folder, family, tune)) and should_capture_vision(
            100, checkpointed
        )

    lora: dict[str, Any] = {"language": "lora", "vision": "lora"}
    for family in FAMILIES:
        assert is_captured(family, ALL)
        assert is_captured(family, lora | {"lora": {"rank": 4, "dropout": 0.0}})
        assert not is_captured(family, lora | {"lora": {"rank": 4, "dropout": 0.1}}), (
            "draws elsewhere"
        )
        assert not is_captured(family, {"language": "full"}), "a frozen encoder"
        assert not is_captured(family, ALL, checkpointed=1.0), "draws again"
    assert not is_captured("qwen3_vl", ALL), "positions that hang on sizes"
    assert not is_captured("qwen", ALL)
    odd = make_model(folder, "qwen2_vl")
    odd.visual.config = replace(odd.visual.config, num_heads=odd.visual.config.hidden_size // 4)
    assert not can_capture_vision(odd), "heads that the kernel does not take"
    monkeypatch.setattr(graph_buffers, "MAX_GRAPH_PATCHES", 99)
    assert not is_captured("qwen2_vl", ALL)
    assert not should_capture_vision(0, 0.0), "texts"


class FakeGraphCache:
    """Graph cache that runs eagerly."""

    def __init__(self, device: torch.device) -> None:
        self.keys: list[int] = []

    def contains(self, key: int) -> bool:
        return False

    def run(self, key: int, function: Callable[[], Tensor]) -> Tensor:
        self.keys.append(key)
        return function()


def run_graphs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run static buffers on a CPU, with attention over cumulative lengths and a loss without
    padding."""
    attend = attention.varlen_attention

    def attend_nonempty(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments,
        *,
        causal: bool,
        key_segments: None = None,
    ) -> Tensor:
        return attend(q, k, v, without_empty(segments), causal=causal)

    def of_targets(h_LD: Tensor, head_VD: Tensor, target_L: Tensor, scale: Tensor) -> Tensor:
        return fused_linear_cross_entropy(
            h_LD, head_VD, target_L[: int((target_L >= 0).sum())], scale
        )

    for module in (attention, layers):
        monkeypatch.setattr(module, "varlen_attention", attend_nonempty)
    monkeypatch.setattr(cuda_graphs, "fused_linear_cross_entropy", of_targets)
    monkeypatch.setattr(cuda_graphs, "is_capturable", lambda *_: True)
    monkeypatch.setattr(cuda_graphs, "CudaGraphCache", FakeGraphCache)
    monkeypatch.setattr(cuda_graphs, "NUM_WARMUP_PACKS", 0)


def check_pack(
    passes: CudaGraphRunner,
    model: VisionLanguageModel,
    batch: PackedBatch,
    share: Tensor,
    rtol: float = 1.3e-6,
    grad_tolerance: float = 1e-5,
) -> None:
    """Compare loss and gradients of a pack with those of the model itself.

    The autograd graph ends here: its streams would break the next capture.
    """
    learning = list(trainable_parameters(model).values())
    loss = passes.forward_backward(batch, None, share)
    found = [None if p.grad is None else p.grad.float().clone() for p in learning]
    for parameter in learning:
        parameter.grad = None
    exact = fused_linear_cross_entropy(model(batch), model.lm_head_weight, batch.labels_L, share)
    torch.testing.assert_close(loss, exact.detach(), rtol=rtol, atol=1e-5 if rtol < 1e-3 else 0)
    expected = torch.autograd.grad(exact, learning, allow_unused=True)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert relative_error(mine, theirs.float()) < grad_tolerance


def without_images(batch: PackedBatch) -> PackedBatch:
    empty = batch.patches_ND[:0], batch.visual_indices_M[:0]
    return replace(batch, grid_thw=(), patches_ND=empty[0], visual_indices_M=empty[1])


@pytest.mark.parametrize("parts", [PARTS, ("merger", "language")], ids=len)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_pack_gets_its_own_gradients(
    folder: Path, family: str, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs with small, large and no images alternate; gradients of one graph do not leak into the
    next."""
    run_graphs_eagerly(monkeypatch)
    model = make_model(folder, family, dict.fromkeys(parts, "full"))
    few, many = packs(folder, family, 1)[0], packs(folder, family, 5)[0]
    monkeypatch.setattr(graph_buffers, "MAX_GRAPH_PATCHES", len(many.patches_ND) - 1)
    texts = without_images(few)
    learning = list(trainable_parameters(model).values())
    passes, share = CudaGraphRunner(model, learning), torch.tensor(0.5)
    for batch in (few, texts, few, many, few, texts, many, few):
        check_pack(passes, model, batch, share)
    assert isinstance(passes.graphs, FakeGraphCache)
    assert len(passes.graphs.keys) == 8
    assert [kind.vision_shape is not None for kind in passes.static_inputs] == [True, False, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_graph_gives_each_pack_its_gradients(
    folder: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_graphs_eagerly(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "MIN_STARVED_PACKS", 0)
    monkeypatch.setattr(cuda_graphs, "NUM_WARMUP_PACKS", 100)
    monkeypatch.setattr(cuda_graphs, "has_half_free", lambda device: True)
    monkeypatch.setattr("finesight.train.graph_buffers.MAX_PADDING_DIVISOR", 1)
    # The vision encoder runs eagerly; captured, it would need equal numbers of images.
    monkeypatch.setattr(graph_buffers, "MAX_GRAPH_PATCHES", 0)
    model = make_model(folder, family, {"merger": "full", "language": "full"})
    few, more = packs(folder, family, 2)[0], packs(folder, family, 3)[0]
    texts = without_images(few)
    assert GraphShape.from_batch(few) != GraphShape.from_batch(more)
    learning = list(trainable_parameters(model).values())
    passes, share = CudaGraphRunner(model, learning), torch.tensor(0.5)
    passes.shape_counts.update(map(GraphShape.from_batch, (few, more)))
    monkeypatch.setattr(passes.timer, "is_replay_faster", lambda tokens: True)
    for batch in (few, more, texts, few, more, texts, few):
        check_pack(passes, model, batch, share)
    assert isinstance(passes.graphs, FakeGraphCache)
    assert passes.graphs.keys == [0, 0, 1, 0, 0, 1, 0]


def test_rare_pack_sizes_exclude_the_encoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_graphs_eagerly(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "NUM_WARMUP_PACKS", 3)
    model = make_model(folder, "qwen2_vl")
    passes = CudaGraphRunner(model, list(trainable_parameters(model).values()))
    batch, sizes = packs(folder, "qwen2_vl", 2)[0], iter(range(100))
    # Each of another kind.
    monkeypatch.setattr(
        GraphVisionShape,
        "from_batch",
        lambda *_: GraphVisionShape(256, 588, ((8, 64 * (4 + next(sizes))),)),
    )
    for _ in range(5):
        passes.forward_backward(batch, None, torch.tensor(1.0))
    assert [kind.vision_shape for kind in passes.static_inputs] == [None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_graph_encoder_matches_eager_training(
    folder: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = torch.device("cuda")
    model = make_model(folder, family).to(cuda, torch.bfloat16)
    monkeypatch.setattr(cuda_graphs, "NUM_WARMUP_PACKS", 0)
    learning = list(trainable_parameters(model).values())
    share, passes = torch.tensor(0.1, device=cuda), CudaGraphRunner(model, learning)
    batches = [batch.to(cuda) for batch in packs(folder, family, 3)]
    batches.append(without_images(batches[0]))

    for batch in [*batches, *batches, *batches]:
        check_pack(passes, model, batch, share, rtol=2e-3, grad_tolerance=0.05)
    assert passes.graphs is not None, "a capture failed"
    assert any(
        static_inputs.vision_inputs is not None for static_inputs in passes.static_inputs.values()
    )
