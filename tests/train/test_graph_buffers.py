"""Static buffers of CUDA graphs: padding does not change results, and shapes are few."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_graph_fixtures import (
    CPU,
    FULL_FINETUNE,
    encode_images,
    encode_samples,
    make_model,
    make_pack,
    pack_shared_prefix,
)
from tiny_task import make_task
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finesight.encode.packing import PackedBatch, compute_context_lengths, pack
from finesight.encode.tokenization import EncodedSample
from finesight.model.linear import FusedLinear
from finesight.model.lora import fused
from finesight.model.lora.fused import LoraMatmul
from finesight.model.vision_encoder import VisionEncoder
from finesight.train import graph_buffers
from finesight.train.graph_buffers import GraphGradients, GraphInputs, GraphShape, GraphVisionShape
from finesight.train.optimizer import LARGE_PARAM_ELEMENTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    make_task(folder)
    return folder


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("packed", [pack, pack_shared_prefix])
def test_pack_padding_does_not_change_results(
    folder: Path,
    packed: Callable[[Sequence[EncodedSample]], PackedBatch],
    shared: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(torch.float32, CPU).eval()
    samples = encode_samples(folder)
    batch = packed(samples[:5])
    features = encode_images(model, batch)
    kind = GraphShape.from_batch(batch)
    if shared:
        monkeypatch.setattr("finesight.train.graph_buffers.MAX_PADDING_DIVISOR", 1)
        larger = GraphShape.from_batch(packed(samples[:9]))
        kind = kind.widen([larger])
        assert kind.fits(larger)
        assert kind != GraphShape.from_batch(batch)
    static_inputs = GraphInputs.allocate(kind, batch, features, model.visual)
    most = max(compute_context_lengths(batch.lengths, batch.prefix_length))
    assert (
        max(compute_context_lengths(static_inputs.batch.lengths, static_inputs.batch.prefix_length))
        == static_inputs.shape.max_seqlen
        >= most
    )
    assert static_inputs.batch.prefix_length == batch.prefix_length
    # Another one was there before.
    other = packed(samples[5:9])
    static_inputs.copy_from(other, encode_images(model, other), torch.tensor(2.0), model.visual)
    static_inputs.copy_from(batch, features, torch.tensor(0.5), model.visual)
    lengths = static_inputs.batch.cu_seqlens_S1.diff().tolist()
    assert len(lengths) == static_inputs.shape.num_sequences
    assert lengths[: len(batch.lengths)] == list(batch.lengths)
    # Without a kernel for segments of any length, empty ones have to be left out.
    full = [length for length in lengths if length]
    cu_seqlens_S1 = static_inputs.batch.cu_seqlens_S1[: len(full) + 1]
    filled = replace(static_inputs.batch, lengths=tuple(full), cu_seqlens_S1=cu_seqlens_S1)
    found = model(filled, static_inputs.features_MKD)[: batch.num_supervised_tokens]
    torch.testing.assert_close(found, model(batch, features))
    assert torch.equal(static_inputs.batch.labels_L[: batch.num_supervised_tokens], batch.labels_L)
    assert set(static_inputs.batch.labels_L[batch.num_supervised_tokens :].tolist()) <= {-1}
    assert static_inputs.loss_weight.item() == 0.5


def assert_filled(
    static_inputs: GraphInputs, batch: PackedBatch, prefix: int, encoder: VisionEncoder
) -> None:
    """Fill the buffers with a pack, and check the lengths of its sequences and of the padding."""
    static_inputs.copy_from(batch, None, torch.tensor(1.0), encoder)
    lengths = static_inputs.batch.cu_seqlens_S1.diff()
    assert lengths[: len(batch.lengths)].tolist() == list(batch.lengths)
    assert int(lengths.sum()) == static_inputs.shape.num_tokens
    assert int(lengths.min()) >= 0
    assert int(lengths[prefix > 0 :].max()) + prefix <= static_inputs.shape.max_seqlen


def test_padding_stays_within_graph_shape(folder: Path) -> None:
    """Padding sequences continue from the shared prefix as well."""
    model, chance = make_model(torch.float32, CPU), random.Random(0)
    some = pack(encode_samples(folder)[:2])
    for _ in range(300):
        prefix = chance.choice([0, 15, 200, 400])
        own = chance.choice([5, 40, 140, 300])
        count = chance.randint(2, min(60, 16_000 // own))
        lengths = [chance.randint(1, own) for _ in range(count)]
        lengths = [prefix, *lengths] if prefix else lengths
        batch = make_pack(some, lengths, prefix, some.num_supervised_tokens)
        kind = GraphShape.from_batch(batch)
        static_inputs = GraphInputs.allocate(kind, batch, None, model.visual)
        assert_filled(static_inputs, batch, prefix, model.visual)


def test_few_graph_shapes_are_used(folder: Path) -> None:
    samples = encode_samples(folder)
    packs = [pack(samples[start : start + 4]) for start in range(8)]
    kinds = {GraphShape.from_batch(batch) for batch in packs}
    assert len(kinds) < len({len(batch.ids_T) for batch in packs})
    for batch in packs:
        kind = GraphShape.from_batch(batch)
        assert kind.num_tokens > len(batch.ids_T)
        assert kind.num_sequences > len(batch.lengths)
        assert kind.max_seqlen >= max(batch.lengths)
        assert kind.num_features >= len(batch.visual_indices_M)
        assert kind.num_labels >= batch.num_supervised_tokens


def test_merged_graph_shape_accepts_its_packs(folder: Path) -> None:
    model, chance = make_model(torch.float32, CPU), random.Random(0)
    some, taken = pack(encode_samples(folder)[:2]), 0
    for _ in range(100):
        prefix, most = chance.choice([0, 15, 200]), chance.choice([40, 140, 300])
        count = chance.randint(3, 20)
        packs = []
        for _ in range(6):
            lengths = [chance.randint(most // 2, most) for _ in range(count + chance.randint(0, 2))]
            lengths = [prefix, *lengths] if prefix else lengths
            labels = chance.randint(count, 3 * count)
            packs.append(make_pack(some, lengths, prefix, labels))
        kinds = [GraphShape.from_batch(one) for one in packs]
        kind = kinds[0].widen(kinds[1:])
        assert kind.fits(kinds[0])
        assert kind.num_tokens <= kinds[0].num_tokens * 9 // 8
        static_inputs = GraphInputs.allocate(kind, packs[0], None, model.visual)
        for own, batch in zip(kinds, packs, strict=True):
            if not kind.fits(own):
                continue
            taken += own != kind
            assert_filled(static_inputs, batch, prefix, model.visual)
            assert len(static_inputs.batch.labels_L) >= batch.num_supervised_tokens
    assert taken > 100


def test_graph_rejects_incompatible_packs(folder: Path) -> None:
    samples = encode_samples(folder)
    kind = GraphShape.from_batch(pack(samples[:4]))._replace(num_tokens=1024, num_sequences=16)
    assert kind.fits(kind)
    for other in (
        kind._replace(prefix_length=8),
        kind._replace(vision_shape=GraphVisionShape(256, 588, ((8, 64),))),
        kind._replace(num_features=0),
        kind._replace(num_tokens=kind.num_tokens * 7 // 8),
        kind._replace(num_tokens=kind.num_tokens + 64),
        # What fills it up is a sequence more.
        kind._replace(num_tokens=kind.num_tokens - 64),
        kind._replace(num_labels=kind.num_labels // 3),
        kind._replace(num_labels=kind.num_labels + 64),
        kind._replace(max_seqlen=kind.max_seqlen + 256),
        kind._replace(num_features=kind.num_features + 64),
        kind._replace(num_sequences=kind.num_sequences + 1),
        kind._replace(num_sequences=kind.num_sequences // 2 - 1),
    ):
        assert not kind.fits(other), other
    assert kind.fits(kind._replace(num_tokens=kind.num_tokens - 64, num_sequences=15))
    long = kind._replace(max_seqlen=1024)
    assert not long.fits(kind), "they have other kernels"
    assert long.fits(long._replace(max_seqlen=512))


def test_merged_graph_shape_covers_all_shapes(folder: Path) -> None:
    kind = GraphShape.from_batch(pack(encode_samples(folder)[:4]))._replace(
        num_tokens=1024, num_features=512, num_labels=128
    )
    for other in (
        kind._replace(num_features=768),
        kind._replace(num_labels=192),
        kind._replace(num_tokens=1088),
        kind._replace(num_sequences=kind.num_sequences + 8),
    ):
        wider = kind.widen([other])
        assert wider.fits(other)
        assert wider.fits(kind)
    assert kind.widen([kind._replace(num_tokens=2048), kind._replace(prefix_length=4)]) == kind


def test_feature_gradients_reach_the_encoder(folder: Path) -> None:
    model = make_model(torch.float32, CPU, FULL_FINETUNE)
    batch = pack(encode_samples(folder)[:5])
    features = model.encode_images(batch.patches_ND, batch.grid_thw)
    static_inputs = GraphInputs.allocate(
        GraphShape.from_batch(batch), batch, features, model.visual
    )
    static_inputs.copy_from(batch, features, torch.tensor(1.0), model.visual)
    ((packed_value, back),) = static_inputs.trainable_features
    assert torch.equal(packed_value[: len(features)], features)
    # Gradients of padding features are ignored.
    back.copy_(torch.arange(back.numel()).view_as(back) / back.numel())
    static_inputs.backward_features(features)
    parameters = list(model.visual.parameters())
    found = [parameter.grad for parameter in parameters]
    again = model.encode_images(batch.patches_ND, batch.grid_thw)
    expected = torch.autograd.grad((again * back[: len(again)]).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_static_gradients_keep_their_addresses() -> None:
    large = nn.Parameter(torch.ones(LARGE_PARAM_ELEMENTS))
    small, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    transposed = nn.Parameter(torch.ones(2, 3))
    features, back = torch.ones(4, requires_grad=True), torch.zeros(4)
    own = GraphGradients([large, small, idle, transposed])
    locations = []
    for factor in (2.0, 3.0):
        # The large one is read twice, as a table is that is the head, too.
        # The gradient of what is turned comes turned.
        turned = (transposed.T * torch.arange(6.0).view(3, 2)).sum()
        loss = factor * (large.sum() + (large**2).sum() + small.sum() + features.sum() + turned)
        own.backward(loss, [(features, back)])
        own.assign_grads()
        assert torch.equal(large.grad, torch.full_like(large, 3 * factor))
        assert torch.equal(small.grad, torch.full_like(small, factor))
        assert torch.equal(back, torch.full_like(back, factor))
        assert idle.grad is None
        assert transposed.grad.is_contiguous(), "not as the parameter lies: a step reads it so"
        assert torch.equal(transposed.grad, factor * torch.arange(6.0).view(3, 2).T)
        locations.append((large.grad.data_ptr(), small.grad.data_ptr()))
    assert locations[0] == locations[1]
    loss = large.sum()
    loss.backward()
    assert torch.equal(large.grad, torch.full_like(large, 10.0)), "a hook was left behind"


class _Product(torch.autograd.Function):
    """Product x W^T with the backward pass of fused layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, wide: LoraMatmul) -> Tensor:
        ctx.save_for_backward(x)
        ctx.wide = wide
        return wide.forward(x, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, None]:
        return None, ctx.wide.base_grads(dy, *ctx.saved_tensors)[0], None


def test_large_weight_gradient_is_written_directly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graph_buffers, "LARGE_PARAM_ELEMENTS", 20)
    large, small = (FusedLinear(5, {"up": rows}, bias=False) for rows in (4, 3))
    weights = [group.weight for group in (large, small)]
    came: list[int] = []
    for weight in weights:
        assert isinstance(weight, nn.Parameter)
        torch.nn.init.normal_(weight)
        weight.register_hook(lambda gradient: came.append(gradient.data_ptr()))
    own, x = GraphGradients(weights), torch.randn(6, 5)
    for _ in range(2):
        products = [
            _Product.apply(x, g.weight, LoraMatmul.from_linear(g)).sum() for g in (large, small)
        ]
        own.backward(sum(products), [])
        own.assign_grads()
        for weight in weights:
            torch.testing.assert_close(weight.grad, x.sum(0).expand_as(weight))
    assert large.weight.grad.data_ptr() in came, "made elsewhere, and copied"
    assert small.weight.grad.data_ptr() not in came
    assert fused._GRADIENT_BUFFERS == []
