"""Static buffers of CUDA graphs: padding does not change results, and shapes are few."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_graph_fixtures import (
    CPU,
    EagerGraphCache,
    collect_grads,
    encode_images,
    encode_samples,
    make_loss_inputs,
    make_model,
    make_runner,
    make_text_pack,
    pack_shared_prefix,
    run_pack,
)
from tiny_model import create_tiny_model
from tiny_task import make_task
from torch import Tensor, nn

from finesight.encode.batch import PackedBatch, compute_context_lengths
from finesight.encode.packing import pack
from finesight.encode.tokenization import EncodedSample
from finesight.model import attention, layers
from finesight.model.attention import Segments
from finesight.model.trainable import trainable_parameters
from finesight.model.vision_encoder import VisionEncoder
from finesight.model.vlm import VisionLanguageModel
from finesight.model_folder import ModelFolder
from finesight.settings.config import TuneSettings
from finesight.train import cuda_graphs, graph_buffers
from finesight.train.cuda_graphs import CudaGraphRunner
from finesight.train.graph_buffers import (
    GraphGradients,
    GraphInputs,
    GraphShape,
    GraphVisionShape,
    can_capture_vision,
    should_capture_vision,
)
from finesight.train.master_weight_optimizer import LARGE_PARAM_ELEMENTS
from finesight.train.objectives import dpo, objective
from finesight.train.objectives.dpo.loss import DpoObjective
from finesight.train.objectives.objective import fused_linear_cross_entropy
from finesight.train.step import forward_backward

PARTS = "vision", "merger", "language", "embeddings"
ALL = dict.fromkeys(PARTS, "full")
FAMILIES = ["qwen2_vl", "qwen2_5_vl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    make_task(folder)
    for family in (*FAMILIES, "qwen3_vl", "qwen"):
        create_tiny_model(folder / family, family)
    return folder


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[EncodedSample]:
    return encode_samples(folder)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("packed", [pack, pack_shared_prefix])
def test_pack_padding_does_not_change_results(samples, packed, shared, monkeypatch):
    """The buffers contained another pack before."""
    model = make_model(torch.float32, CPU).eval()
    batch, other = packed(samples[:5]), packed(samples[5:9])
    features = encode_images(model, batch)
    shape = GraphShape.from_batch(batch)
    if shared:
        monkeypatch.setattr(graph_buffers, "MAX_PADDING_DIVISOR", 1)
        larger = GraphShape.from_batch(packed(samples[:9]))
        shape = shape.widen([larger])
        assert shape.fits(larger)
        assert shape != GraphShape.from_batch(batch)
    inputs = GraphInputs.allocate(shape, batch, features, make_loss_inputs(batch), model.visual)
    static, longest = (
        max(compute_context_lengths(one.lengths, one.prefix_length))
        for one in (inputs.batch, batch)
    )
    assert static == shape.max_seqlen >= longest
    assert inputs.batch.prefix_length == batch.prefix_length
    inputs.copy_from(other, encode_images(model, other), make_loss_inputs(other), model.visual)
    inputs.copy_from(batch, features, make_loss_inputs(batch, 0.5), model.visual)
    lengths = inputs.batch.cu_seqlens_S1.diff().tolist()
    assert len(lengths) == shape.num_sequences
    assert lengths[: len(batch.lengths)] == list(batch.lengths)
    # Without a kernel for segments of any length, empty ones have to be left out.
    full = tuple(length for length in lengths if length)
    cu_seqlens_S1 = inputs.batch.cu_seqlens_S1[: len(full) + 1]
    filled = replace(inputs.batch, lengths=full, cu_seqlens_S1=cu_seqlens_S1)
    num_labels = batch.num_supervised_tokens
    found = model(filled, inputs.features_MKD)[:num_labels]
    torch.testing.assert_close(found, model(batch, features))
    labels_L = inputs.loss_inputs["labels_L"]
    assert torch.equal(labels_L[:num_labels], batch.labels_L)
    assert set(labels_L[num_labels:].tolist()) <= {-1}
    assert inputs.loss_inputs["loss_weight"].item() == 0.5


def make_pack(
    rng: random.Random, length_range: tuple[int, int], prefix: int, count: int
) -> PackedBatch:
    batch = make_text_pack([rng.randint(*length_range) for _ in range(count)], prefix, 0)
    labels_L = torch.zeros(rng.randint(count, 3 * count), dtype=torch.int64)
    return replace(batch, logit_indices_L=labels_L, labels_L=labels_L)


def assert_filled(inputs: GraphInputs, batch: PackedBatch, encoder: VisionEncoder) -> None:
    """Fill the buffers with a pack, and check the lengths of its sequences and of the padding."""
    inputs.copy_from(batch, None, make_loss_inputs(batch), encoder)
    lengths, prefix = inputs.batch.cu_seqlens_S1.diff(), batch.prefix_length
    assert lengths[: len(batch.lengths)].tolist() == list(batch.lengths)
    assert int(lengths.sum()) == inputs.shape.num_tokens
    assert int(lengths.min()) >= 0
    # Padding sequences continue from the shared prefix as well.
    assert int(lengths[prefix > 0 :].max()) + prefix <= inputs.shape.max_seqlen
    assert len(inputs.loss_inputs["labels_L"]) >= batch.num_supervised_tokens


def test_merged_graph_shape_accepts_its_packs():
    model, rng, num_wider = make_model(torch.float32, CPU), random.Random(0), 0
    for _ in range(100):
        prefix, most = rng.choice([0, 15, 200, 400]), rng.choice([5, 40, 140, 300])
        count, length_range = rng.randint(3, 20), (most // 2, most)
        packs = [make_pack(rng, length_range, prefix, count + rng.randint(0, 2)) for _ in range(6)]
        shapes = [GraphShape.from_batch(one) for one in packs]
        shape = shapes[0].widen(shapes[1:])
        assert shape.fits(shapes[0])
        assert shape.num_tokens <= shapes[0].num_tokens * 9 // 8
        loss_inputs = make_loss_inputs(packs[0])
        inputs = GraphInputs.allocate(shape, packs[0], None, loss_inputs, model.visual)
        for own, batch in zip(shapes, packs, strict=True):
            if shape.fits(own):
                num_wider += own != shape
                assert_filled(inputs, batch, model.visual)
    assert num_wider > 100


def test_graph_rejects_incompatible_packs(samples):
    shape = GraphShape.from_batch(pack(samples[:4]))._replace(
        num_tokens=1024, num_sequences=16, num_features=512, num_labels=128
    )
    vision_shape = GraphVisionShape(256, 588, ((8, 64),))
    changes = {
        "prefix_length": [8],
        "vision_shape": [vision_shape],
        # One padding sequence more is needed for 960 tokens.
        "num_tokens": [896, 960, 1088],
        "num_labels": [128 // 3, 192],
        "max_seqlen": [shape.max_seqlen + 256],
        "num_features": [0, 576],
        "num_sequences": [7, 17],
    }
    for other in (shape._replace(**{name: v}) for name, values in changes.items() for v in values):
        assert not shape.fits(other), other
    assert shape.fits(shape)
    assert shape.fits(shape._replace(num_tokens=960, num_sequences=15))
    long = shape._replace(max_seqlen=1024)
    assert not long.fits(shape), "long sequences have other kernels"
    assert long.fits(long._replace(max_seqlen=512))


def test_static_gradients_keep_their_addresses():
    large = nn.Parameter(torch.ones(LARGE_PARAM_ELEMENTS))
    small, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    transposed = nn.Parameter(torch.ones(2, 3))
    features = torch.ones(4, requires_grad=True)
    features.grad = torch.zeros(4)
    own = GraphGradients([large, small, idle, transposed])
    locations = []
    for factor in (2.0, 3.0):
        # The large parameter is used twice, as a tied embedding table is. A gradient is transposed.
        turned = (transposed.T * torch.arange(6.0).view(3, 2)).sum()
        loss = factor * (large.sum() + (large**2).sum() + small.sum() + features.sum() + turned)
        own.backward(loss, features)
        own.assign_grads()
        assert torch.equal(large.grad, torch.full_like(large, 3 * factor))
        assert torch.equal(small.grad, torch.full_like(small, factor))
        assert torch.equal(features.grad, torch.full_like(features, factor))
        assert idle.grad is None
        assert transposed.grad.is_contiguous()
        assert torch.equal(transposed.grad, factor * torch.arange(6.0).view(3, 2).T)
        locations.append((large.grad.data_ptr(), small.grad.data_ptr()))
    assert locations[0] == locations[1]
    loss = large.sum()
    loss.backward()
    assert torch.equal(large.grad, torch.full_like(large, 10.0)), "a hook was not removed"


def make_vision_model(folder: Path, family: str, tune: dict[str, Any] = ALL) -> VisionLanguageModel:
    settings = TuneSettings.model_validate(tune)
    return make_model(torch.float32, CPU, settings, ModelFolder(folder / family))


def make_packs(folder: Path, family: str, each: int) -> list[PackedBatch]:
    samples = encode_samples(folder, ModelFolder(folder / family), max_pixels=30_000)
    return [pack(samples[at : at + each]) for at in range(0, 3 * each, each)]


def assert_close_gradients(found: Tensor | None, expected: Tensor | None, most: float) -> None:
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert float((found - expected).norm()) < most * float(expected.norm().clamp(min=1e-12))


def without_empty(segments: Segments) -> Segments:
    """Without a kernel for segments of any length, empty ones have to be left out."""
    full = [length for length in segments.cu_seqlens_S1.diff().tolist() if length]
    return Segments.from_lengths(full, CPU)


def test_capturable_vision_encoders(folder, monkeypatch):
    def is_captured(family: str, tune: dict[str, Any], checkpointed: float = 0.0) -> bool:
        return can_capture_vision(
            make_vision_model(folder, family, tune)
        ) and should_capture_vision(100, checkpointed)

    lora: dict[str, Any] = {"language": "lora", "vision": "lora"}
    for family in FAMILIES:
        assert is_captured(family, ALL)
        assert is_captured(family, lora | {"lora": {"rank": 4, "dropout": 0.0}})
        assert not is_captured(family, lora | {"lora": {"rank": 4, "dropout": 0.1}}), "dropout"
        assert not is_captured(family, {"language": "full"}), "a frozen encoder"
        assert not is_captured(family, ALL, checkpointed=1.0), "activation checkpointing"
    assert not is_captured("qwen3_vl", ALL), "positions depend on sizes"
    assert not is_captured("qwen", ALL)
    odd = make_vision_model(folder, "qwen2_vl")
    odd.visual.config = replace(odd.visual.config, num_heads=odd.visual.config.hidden_size // 4)
    assert not can_capture_vision(odd), "an unsupported head dimension"
    monkeypatch.setattr(graph_buffers, "MAX_GRAPH_PATCHES", 99)
    assert not is_captured("qwen2_vl", ALL)
    assert not should_capture_vision(0, 0.0), "texts"


@pytest.fixture
def eager_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run static buffers on a CPU, with cumulative lengths and a loss without padding."""
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

    def compute_loss_of_labels(
        h_LD: Tensor, head_VD: Tensor, target_L: Tensor, scale: Tensor
    ) -> Tensor:
        count = int((target_L >= 0).sum())
        return fused_linear_cross_entropy(h_LD, head_VD, target_L[:count], scale)

    for module in (attention, layers):
        monkeypatch.setattr(module, "varlen_attention", attend_nonempty)
    monkeypatch.setattr(objective, "fused_linear_cross_entropy", compute_loss_of_labels)
    monkeypatch.setattr(cuda_graphs, "is_capturable", lambda *_: True)
    monkeypatch.setattr(cuda_graphs, "CudaGraphCache", EagerGraphCache)
    monkeypatch.setattr(cuda_graphs, "NUM_WARMUP_PACKS", 0)


def assert_matches_model(
    runner: CudaGraphRunner,
    model: VisionLanguageModel,
    batch: PackedBatch,
    rtol: float = 1.3e-6,
    grad_tolerance: float = 1e-5,
) -> None:
    """Compare with the model itself; an autograd graph that lives on would break a capture."""
    weight = torch.tensor(0.1, device=batch.ids_T.device)
    loss, found = run_pack(runner, batch, None, weight), collect_grads(model)
    head_VD = model.lm_head_weight
    expected = fused_linear_cross_entropy(model(batch), head_VD, batch.labels_L, weight)
    atol = 1e-5 if rtol < 1e-3 else 0
    torch.testing.assert_close(loss, expected.detach()[None], rtol=rtol, atol=atol)
    parameters = list(trainable_parameters(model).values())
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    for mine, theirs in zip(found, gradients, strict=True):
        assert_close_gradients(mine, None if theirs is None else theirs.float(), grad_tolerance)


def without_images(batch: PackedBatch) -> PackedBatch:
    empty = batch.patches_ND[:0], batch.visual_indices_M[:0]
    return replace(batch, grid_thw=(), patches_ND=empty[0], visual_indices_M=empty[1])


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("parts", [PARTS, ("merger", "language")], ids=len)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_pack_gets_its_own_gradients(folder, family, parts, monkeypatch):
    """Packs with small, large and no images alternate; no gradient leaks into the next graph."""
    model = make_vision_model(folder, family, dict.fromkeys(parts, "full"))
    few, many = make_packs(folder, family, 3)[1], make_packs(folder, family, 5)[0]
    assert len(few.patches_ND) < len(many.patches_ND)
    monkeypatch.setattr(graph_buffers, "MAX_GRAPH_PATCHES", len(many.patches_ND) - 1)
    texts, runner = without_images(few), make_runner(model)
    for batch in (few, texts, few, many, few, texts, many, few):
        assert_matches_model(runner, model, batch)
    assert len(runner.graphs.keys) == 8
    has_vision = [shape.vision_shape is not None for shape in runner.static_inputs]
    assert has_vision == [True, False, False]


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_graph_gives_each_pack_its_gradients(folder, family, monkeypatch):
    """The vision encoder runs eagerly; captured, it would need equal numbers of images."""
    for module, name, value in (
        (cuda_graphs, "MIN_STARVED_PACKS", 0),
        (cuda_graphs, "NUM_WARMUP_PACKS", 100),
        (cuda_graphs, "has_half_free", lambda device: True),
        (graph_buffers, "MAX_PADDING_DIVISOR", 1),
        (graph_buffers, "MAX_GRAPH_PATCHES", 0),
    ):
        monkeypatch.setattr(module, name, value)
    model = make_vision_model(folder, family, {"merger": "full", "language": "full"})
    few, more = make_packs(folder, family, 2)[0], make_packs(folder, family, 3)[0]
    texts, runner = without_images(few), make_runner(model)
    assert GraphShape.from_batch(few) != GraphShape.from_batch(more)
    runner.shape_counts.update(map(GraphShape.from_batch, (few, more)))
    monkeypatch.setattr(runner.timer, "is_replay_faster", lambda tokens: True)
    for batch in (few, more, texts, few, more, texts, few):
        assert_matches_model(runner, model, batch)
    assert runner.graphs.keys == [0, 0, 1, 0, 0, 1, 0]


def make_pairs(folder: Path, family: str) -> list[PackedBatch]:
    """Make packs of preference pairs, each of a conversation with two different answers."""
    first, *others = encode_samples(folder, ModelFolder(folder / family), max_pixels=30_000)
    pairs = []
    for encoded in (first, *others[:2]):
        chosen = encoded.tokenized
        ids_T = np.where(chosen.loss_mask_T, chosen.ids_T[::-1], chosen.ids_T)
        pair = chosen.join_responses([replace(chosen, ids_T=ids_T)])
        pairs.append(pack([replace(encoded, tokenized=pair)]))
    return pairs


@pytest.mark.usefixtures("eager_graphs")
def test_graph_has_the_inputs_of_the_objective(folder):
    model, weight = make_vision_model(folder, "qwen2_vl"), torch.tensor(0.1)
    runner, eager = (
        CudaGraphRunner(
            forward_backward,
            model,
            DpoObjective(dpo.Settings()),
            [*trainable_parameters(model).values()],
        )
        for _ in range(2)
    )
    eager.release_graphs()
    for batch in make_pairs(folder, "qwen2_vl"):
        replayed = run_pack(runner, batch, None, weight), collect_grads(model)
        expected = run_pack(eager, batch, None, weight), collect_grads(model)
        torch.testing.assert_close(replayed, expected)
    assert runner.graphs.keys


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_graph_encoder_matches_eager_training(folder, family, monkeypatch):
    cuda = torch.device("cuda")
    model = make_vision_model(folder, family).to(cuda, torch.bfloat16)
    monkeypatch.setattr(cuda_graphs, "NUM_WARMUP_PACKS", 0)
    runner = make_runner(model)
    packs = [batch.to(cuda) for batch in make_packs(folder, family, 3)]
    packs.append(without_images(packs[0]))
    for batch in packs * 3:
        assert_matches_model(runner, model, batch, rtol=2e-3, grad_tolerance=0.05)
    assert runner.graphs is not None, "a capture failed"
    assert any(inputs.layout is not None for inputs in runner.static_inputs.values())
