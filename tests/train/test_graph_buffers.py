"""Static buffers of CUDA graphs: padding does not change results, and shapes are few."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
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

ONE = torch.tensor(1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    make_task(folder)
    return folder


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[EncodedSample]:
    return encode_samples(folder)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("packed", [pack, pack_shared_prefix])
def test_pack_padding_does_not_change_results(
    samples: list[EncodedSample],
    packed: Callable[[Sequence[EncodedSample]], PackedBatch],
    shared: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
    inputs = GraphInputs.allocate(shape, batch, features, model.visual)
    static, longest = (
        max(compute_context_lengths(one.lengths, one.prefix_length))
        for one in (inputs.batch, batch)
    )
    assert static == shape.max_seqlen >= longest
    assert inputs.batch.prefix_length == batch.prefix_length
    inputs.copy_from(other, encode_images(model, other), torch.tensor(2.0), model.visual)
    inputs.copy_from(batch, features, torch.tensor(0.5), model.visual)
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
    assert torch.equal(inputs.batch.labels_L[:num_labels], batch.labels_L)
    assert set(inputs.batch.labels_L[num_labels:].tolist()) <= {-1}
    assert inputs.loss_weight.item() == 0.5


def make_pack(
    template: PackedBatch, rng: random.Random, bounds: tuple[int, int], prefix: int, count: int
) -> PackedBatch:
    """Create a pack of random sequence lengths within bounds, with arbitrary content."""
    own = [rng.randint(*bounds) for _ in range(count)]
    lengths = (prefix, *own) if prefix else tuple(own)
    ids_T = torch.zeros(sum(lengths), dtype=torch.int64)
    labels_L = torch.zeros(rng.randint(count, 3 * count), dtype=torch.int64)
    return replace(
        template,
        lengths=lengths,
        prefix_length=prefix,
        ids_T=ids_T,
        position_ids_3T=ids_T.expand(3, -1),
        cu_seqlens_S1=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        logit_indices_L=labels_L,
        labels_L=labels_L,
    )


def assert_filled(inputs: GraphInputs, batch: PackedBatch, encoder: VisionEncoder) -> None:
    """Fill the buffers with a pack, and check the lengths of its sequences and of the padding."""
    inputs.copy_from(batch, None, ONE, encoder)
    lengths, prefix = inputs.batch.cu_seqlens_S1.diff(), batch.prefix_length
    assert lengths[: len(batch.lengths)].tolist() == list(batch.lengths)
    assert int(lengths.sum()) == inputs.shape.num_tokens
    assert int(lengths.min()) >= 0
    # Padding sequences continue from the shared prefix as well.
    assert int(lengths[prefix > 0 :].max()) + prefix <= inputs.shape.max_seqlen
    assert len(inputs.batch.labels_L) >= batch.num_supervised_tokens


def test_padding_stays_within_graph_shape(samples: list[EncodedSample]) -> None:
    model, rng, template = make_model(torch.float32, CPU), random.Random(0), pack(samples[:2])
    for _ in range(300):
        prefix, longest = rng.choice([0, 15, 200, 400]), rng.choice([5, 40, 140, 300])
        count = rng.randint(2, min(60, 16_000 // longest))
        batch = make_pack(template, rng, (1, longest), prefix, count)
        shape = GraphShape.from_batch(batch)
        inputs = GraphInputs.allocate(shape, batch, None, model.visual)
        assert_filled(inputs, batch, model.visual)


def test_merged_graph_shape_accepts_its_packs(samples: list[EncodedSample]) -> None:
    model, rng, template = make_model(torch.float32, CPU), random.Random(0), pack(samples[:2])
    num_wider = 0
    for _ in range(100):
        prefix, most = rng.choice([0, 15, 200]), rng.choice([40, 140, 300])
        count, bounds = rng.randint(3, 20), (most // 2, most)
        packs = [
            make_pack(template, rng, bounds, prefix, count + rng.randint(0, 2)) for _ in range(6)
        ]
        shapes = [GraphShape.from_batch(one) for one in packs]
        shape = shapes[0].widen(shapes[1:])
        assert shape.fits(shapes[0])
        assert shape.num_tokens <= shapes[0].num_tokens * 9 // 8
        inputs = GraphInputs.allocate(shape, packs[0], None, model.visual)
        for own, batch in zip(shapes, packs, strict=True):
            if shape.fits(own):
                num_wider += own != shape
                assert_filled(inputs, batch, model.visual)
    assert num_wider > 100


def test_few_graph_shapes_are_used(samples: list[EncodedSample]) -> None:
    packs = [pack(samples[start : start + 4]) for start in range(8)]
    shapes = {GraphShape.from_batch(batch) for batch in packs}
    assert len(shapes) < len({len(batch.ids_T) for batch in packs})
    assert all(GraphShape.from_batch(one).num_tokens > len(one.ids_T) for one in packs)


@pytest.fixture
def shape(samples: list[EncodedSample]) -> GraphShape:
    shape = GraphShape.from_batch(pack(samples[:4]))
    return shape._replace(num_tokens=1024, num_sequences=16, num_features=512, num_labels=128)


def vary(shape: GraphShape, **changes: Sequence[Any]) -> Iterator[GraphShape]:
    return (shape._replace(**{name: one}) for name, values in changes.items() for one in values)


def test_graph_rejects_incompatible_packs(shape: GraphShape) -> None:
    vision_shape = GraphVisionShape(256, 588, ((8, 64),))
    for other in vary(
        shape,
        prefix_length=[8],
        vision_shape=[vision_shape],
        # One padding sequence more is needed for 960 tokens.
        num_tokens=[896, 960, 1088],
        num_labels=[128 // 3, 192],
        max_seqlen=[shape.max_seqlen + 256],
        num_features=[0, 576],
        num_sequences=[7, 17],
    ):
        assert not shape.fits(other), other
    assert shape.fits(shape)
    assert shape.fits(shape._replace(num_tokens=960, num_sequences=15))
    long = shape._replace(max_seqlen=1024)
    assert not long.fits(shape), "long sequences have other kernels"
    assert long.fits(long._replace(max_seqlen=512))


def test_merged_graph_shape_covers_all_shapes(shape: GraphShape) -> None:
    for other in vary(
        shape, num_features=[768], num_labels=[192], num_tokens=[1088], num_sequences=[24]
    ):
        wider = shape.widen([other])
        assert wider.fits(other)
        assert wider.fits(shape)
    assert shape.widen([*vary(shape, num_tokens=[2048], prefix_length=[4])]) == shape


def test_feature_gradients_reach_the_encoder(samples: list[EncodedSample]) -> None:
    """Gradients of padding features are ignored."""
    model, batch = make_model(torch.float32, CPU, FULL_FINETUNE), pack(samples[:5])
    features = model.encode_images(batch.patches_ND, batch.grid_thw)
    shape = GraphShape.from_batch(batch)
    inputs = GraphInputs.allocate(shape, batch, features, model.visual)
    inputs.copy_from(batch, features, ONE, model.visual)
    ((static, gradient),) = inputs.trainable_features
    assert torch.equal(static[: len(features)], features)
    gradient.copy_(torch.arange(gradient.numel()).view_as(gradient) / gradient.numel())
    inputs.backward_features(features)
    parameters = list(model.visual.parameters())
    found = [parameter.grad for parameter in parameters]
    again = model.encode_images(batch.patches_ND, batch.grid_thw)
    expected = torch.autograd.grad((again * gradient[: len(again)]).sum(), parameters)
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
        # The large parameter is used twice, as a tied embedding table is. A gradient is transposed.
        turned = (transposed.T * torch.arange(6.0).view(3, 2)).sum()
        loss = factor * (large.sum() + (large**2).sum() + small.sum() + features.sum() + turned)
        own.backward(loss, [(features, back)])
        own.assign_grads()
        assert torch.equal(large.grad, torch.full_like(large, 3 * factor))
        assert torch.equal(small.grad, torch.full_like(small, factor))
        assert torch.equal(back, torch.full_like(back, factor))
        assert idle.grad is None
        assert transposed.grad.is_contiguous()
        assert torch.equal(transposed.grad, factor * torch.arange(6.0).view(3, 2).T)
        locations.append((large.grad.data_ptr(), small.grad.data_ptr()))
    assert locations[0] == locations[1]
    loss = large.sum()
    loss.backward()
    assert torch.equal(large.grad, torch.full_like(large, 10.0)), "a hook was not removed"


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
    assert large.weight.grad.data_ptr() in came, "computed elsewhere, and copied"
    assert small.weight.grad.data_ptr() not in came
    assert fused._GRADIENT_BUFFERS == []
