"""Context parallelism: shards of a long sample give the results of one process."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversation_fixtures import make_conversation, make_images
from fake_dist import FakeProcessGroup
from tiny_model import create_tiny_model
from torch import Tensor

from finesight.encode.batch import PackedBatch
from finesight.encode.context_shard import ContextShard
from finesight.encode.packing import pack
from finesight.encode.renderer_builder import build_renderer
from finesight.encode.tokenization import EncodedSample
from finesight.model import attention
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.settings.config import PixelRange
from finesight.train.objectives.objective import fused_linear_cross_entropy

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen"]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model(tmp_path_factory.mktemp(request.param) / "tiny", request.param)


def long_sample(folder: Path, tiny: Path) -> EncodedSample:
    """Return a sample of images, text, and a video if the family supports it."""
    images = make_images(folder)
    found = ModelFolder(tiny)
    videos = found.family != "qwen"
    rule = PixelRange(min_pixels=784, max_pixels=7056) if videos else None
    renderer = build_renderer(found, rule, None)
    return renderer.encode(make_conversation(4, images, videos=videos))


def make_shards(encoded: EncodedSample, number: int, count: int) -> PackedBatch:
    share = ContextShard.from_sample(encoded.tokenized, number, count)
    own = encoded.patches_ND[slice(*share.patch_range)]
    return pack([replace(encoded, patches_ND=own)]).select_shard(share)


def compute_loss_and_gradients(
    model: VisionLanguageModel, batch: PackedBatch, known_MKD: Tensor | None = None
) -> list[Tensor]:
    model = deepcopy(model)
    h_LD = model(batch, known_MKD)
    loss = fused_linear_cross_entropy(
        h_LD, model.lm_head_weight, batch.labels_L, torch.ones((), device=h_LD.device)
    )
    loss.backward()
    made = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [loss.detach(), *made]


def assert_same(shares: list[list[Tensor]], full: list[Tensor]) -> None:
    for ours, theirs in zip(zip(*shares, strict=True), full, strict=True):
        added = torch.stack(ours).sum(0)
        assert (added - theirs).norm() <= 2e-6 * max(theirs.norm().item(), 1e-3)


@pytest.mark.parametrize("count", [2, 20])
def test_context_shards_sum_to_the_full_sample(tiny, tmp_path, count, monkeypatch):
    """Use fp32 with encoded or cached features, with and without activation checkpointing."""
    encoded = long_sample(tmp_path, tiny)
    assert len(encoded.tokenized.spans) > 1
    features_per_rank = ContextShard.from_sample(encoded.tokenized, 0, count).features_per_rank
    assert all(features_per_rank) == (count == 2)
    model = load_model(ModelFolder(tiny), torch.float32, torch.device("cpu")).train()
    batch = pack([encoded])
    full = compute_loss_and_gradients(model, batch)
    group = FakeProcessGroup(count, monkeypatch)
    for model.activation_checkpointing in (0.0, 1.0):
        shares = group.run_all(
            lambda n: compute_loss_and_gradients(model, make_shards(encoded, n, count))
        )
        assert_same(shares, full)
    with torch.no_grad():
        known_MKD = model.encode_images(batch.patches_ND, batch.grid_thw)

    def compute_cached(number: int) -> list[Tensor]:
        batch = make_shards(encoded, number, count)
        ranges = batch.context_shard.feature_ranges
        own_MKD = torch.cat([known_MKD[start:stop] for start, stop in ranges])
        return compute_loss_and_gradients(model, replace(batch, grid_thw=()), own_MKD)

    full = compute_loss_and_gradients(model, batch, known_MKD)
    assert_same(group.run_all(compute_cached), full)


def test_query_key_pairs_of_shards_are_balanced(tiny, tmp_path):
    outline = long_sample(tmp_path, tiny).tokenized
    shares = [ContextShard.from_sample(outline, number, 4) for number in range(4)]
    pairs = [sum(b * (b + 1) - a * (a + 1) for a, b in share.token_ranges) for share in shares]
    assert max(pairs) <= 1.2 * min(pairs)


@pytest.mark.gpu
def test_gpu_kernels_support_context_shards(tmp_path, monkeypatch):
    """Both chunks of a sample in one process, with collectives on itself."""
    monkeypatch.setattr(attention, "ALLGATHER", Tensor.copy_)
    monkeypatch.setattr(attention, "REDUCE_SCATTER", Tensor.copy_)
    tiny = create_tiny_model(tmp_path / "tiny")
    encoded = long_sample(tmp_path, tiny)
    device = torch.device("cuda")
    model = load_model(ModelFolder(tiny), torch.bfloat16, device).train()
    full = compute_loss_and_gradients(model, pack([encoded]).to(device))
    share = compute_loss_and_gradients(model, make_shards(encoded, 0, 1).to(device))
    for ours, theirs in zip(share, full, strict=True):
        assert (ours - theirs).norm() <= 0.03 * max(theirs.norm().item(), 1e-3)
