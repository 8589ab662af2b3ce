"""Concatenated samples: labels, image positions, shared prefixes and the token budget."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conversation_fixtures import make_conversation, make_images
from tiny_model import create_tiny_model

from finesight.encode.batch import PAD_MULTIPLE, PackedBatch, pad_batch
from finesight.encode.packing import compute_min_budget, find_shared_prefix_length, pack, plan_packs
from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample, TokenizedSample, VisualSpan
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.train.objectives.objective import fused_linear_cross_entropy


def make_sample(
    ids: list[int], supervised: list[bool], image: tuple[int, int] | None = None, name: str = "a"
) -> EncodedSample:
    positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
    spans = (VisualSpan("image", *image, (1, 2, 4), (), (28, 56), (28, 56)),) if image else ()
    ids_T, mask_T = np.array(ids, dtype=np.int32), np.array(supervised)
    tokenized = TokenizedSample(name, ids_T, mask_T, positions, spans)
    return EncodedSample(tokenized, np.empty((8 * len(spans), 588), dtype=np.uint8))


def make_prefixed(ids: list[int], image: tuple[int, int] | None = None) -> EncodedSample:
    """Make a sample whose last two tokens are supervised."""
    return make_sample(ids, [False] * (len(ids) - 2) + [True] * 2, image)


def test_first_token_has_no_loss():
    rows = (("a", [5, 6, 7], [True, False, True]), ("b", [8], [True]), ("c", [9, 10], [True, True]))
    batch = pack([make_sample(ids, supervised, name=name) for name, ids, supervised in rows])
    assert batch.sample_ids == ("a", "b", "c")
    assert batch.lengths == (2, 1, 1)
    assert batch.cu_seqlens_S1.tolist() == [0, 2, 3, 4]
    assert batch.cu_seqlens_S1.dtype == torch.int32
    assert batch.ids_T.tolist() == [5, 6, 8, 9]
    assert batch.position_ids_3T[0].tolist() == [0, 1, 0, 0]
    assert batch.logit_indices_L.tolist() == [1, 3]
    assert batch.labels_L.tolist() == [7, 10]
    assert batch.visual_indices_M.tolist() == []


def test_tokens_after_last_label_are_removed():
    for others, supervised, after, image, needed in (
        (5, 3, 0, None, 7),
        (5, 3, 4, None, 7),
        (0, 3, 2, None, 2),
        (5, 3, 4, (1, 3), 7),
        (5, 3, 4, (9, 11), 11),
        (6, 0, 0, None, 6),
    ):
        marks = [False] * others + [True] * supervised + [False] * after
        sample = make_sample(list(range(len(marks))), marks, image)
        batch, full = pack([sample]), pack([replace(sample, hf_inputs={"mask": torch.ones(1)})])
        assert sample.tokenized.num_packed_tokens == needed
        assert batch.ids_T.tolist() == list(range(needed))
        assert full.lengths == (len(marks),)
        for one in (batch, full):
            assert one.labels_L.tolist() == [at for at, mark in enumerate(marks) if mark and at > 0]
            assert (one.logit_indices_L + 1).tolist() == one.labels_L.tolist()


def compute_gradients(model: VisionLanguageModel, batch: PackedBatch) -> dict[str, object]:
    model.zero_grad()
    loss = fused_linear_cross_entropy(
        model(batch), model.lm_head_weight, batch.labels_L, torch.tensor(1.0)
    )
    loss.backward()
    return {"loss": loss} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("videos", [False, True])
def test_removed_and_padding_tokens_do_not_change_the_loss(tmp_path, family, videos):
    images = make_images(tmp_path)
    folder = ModelFolder(create_tiny_model(tmp_path / "model", family))
    renderer = NativeRenderer(folder)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    encoded = [renderer.encode(make_conversation(n, images, videos=videos)) for n in range(12)]
    for one in encoded[:6]:
        short, full = pack([one]), pack([replace(one, hf_inputs={"mask": torch.ones(1)})])
        assert len(short.ids_T) < len(full.ids_T)
        torch.testing.assert_close(model(short), model(full), rtol=1e-4, atol=1e-5)
    for first in range(0, 12, 3):
        batch = pack(encoded[first : first + 3])
        even = pad_batch(batch, 2)
        sizes = [len(even.ids_T), len(even.logit_indices_L), len(even.patches_ND)]
        assert [size % PAD_MULTIPLE for size in sizes] == [0, 0, 0]
        assert len(even.patches_ND) - len(batch.patches_ND) < PAD_MULTIPLE
        features = len(even.visual_indices_M) - len(batch.visual_indices_M)
        assert 0 < len(even.ids_T) - len(batch.ids_T) - features <= PAD_MULTIPLE
        assert sum(even.lengths) == len(even.ids_T) == int(even.cu_seqlens_S1[-1])
        assert even.cu_seqlens_S1.dtype == batch.cu_seqlens_S1.dtype
        assert 4 * len(even.visual_indices_M) == len(even.patches_ND)
        assert even.num_supervised_tokens == batch.num_supervised_tokens
        expected = compute_gradients(model, batch)
        torch.testing.assert_close(compute_gradients(model, even), expected, rtol=1e-4, atol=1e-5)


def test_packs_are_planned_first_fit_within_budget():
    assert plan_packs([4, 3, 5, 2, 9, 1, 20, 1], 10) == [[0, 1, 3, 5], [2, 7], [4], [6]]
    assert plan_packs([], 10) == []
    assert plan_packs([10, 10], 10) == [[0], [1]]
    chance = random.Random(0)
    for _ in range(200):
        lengths = [chance.randint(1, 600) for _ in range(chance.randint(1, 64))]
        packs = plan_packs(lengths, 500)
        assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
        for members in packs:
            assert members == sorted(members)
            assert sum(lengths[index] for index in members) <= 500 or len(members) == 1
        assert [members[0] for members in packs] == sorted(members[0] for members in packs)
        # First fit leaves at most one pack half empty.
        assert sum(sum(lengths[index] for index in members) <= 250 for members in packs) <= 1


def test_pack_budget_counts_the_prefix_once():
    assert plan_packs([100, 100, 100, 100], 250) == [[0, 1], [2, 3]]
    assert plan_packs([100, 100, 100, 100], 250, 50) == [[0, 1, 2, 3]]
    assert plan_packs([100, 100, 100, 100], 249, 50) == [[0, 1, 2], [3]]
    assert plan_packs([100, 300, 100], 40, 50) == [[0], [1], [2]]
    assert compute_min_budget([100, 100, 100, 100], 50) == 250
    assert compute_min_budget([100, 100]) == 200
    # Each sequence has its own copy of the keys and values of a long prefix.
    assert len(plan_packs([1001] * 40, 4096, 1000)) == 4
    assert compute_min_budget([1001] * 40, 1000) == 1000 + 40 * 250


def test_shared_prefix_is_stored_once():
    same = [1, 2, 3, 4, 5]
    rests = (([6], None), ([7, 8, 9], (5, 7)), ([10, 11], None))
    samples = [make_prefixed([*same, *rest, 90, 91], image) for rest, image in rests]
    batch = pack(samples, prefix_length=5)
    assert batch.lengths == (5, 2, 4, 3)
    assert batch.cu_seqlens_S1.tolist() == [0, 5, 7, 11, 14]
    assert batch.ids_T.tolist() == [*same, 6, 90, 7, 8, 9, 90, 10, 11, 90]
    assert batch.position_ids_3T[2].tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 5, 6, 7]
    assert batch.visual_indices_M.tolist() == [7, 8], "of the second sample"
    assert batch.logit_indices_L.tolist() == [5, 6, 9, 10, 12, 13]
    assert batch.labels_L.tolist() == [90, 91] * 3
    assert (batch.num_samples, batch.num_tokens, batch.prefix_length) == (3, 24, 5)
    alone = pack(samples)
    assert (alone.num_samples, alone.num_tokens, alone.prefix_length) == (3, 24, 0)
    assert pack(samples[:1], prefix_length=5).prefix_length == 0, "a single sample has no prefix"
    with pytest.raises(AssertionError, match="share 5 tokens, not 6"):
        pack(samples, prefix_length=6)
    even = pad_batch(batch, 2)
    assert (even.prefix_length, even.num_samples, even.num_tokens) == (5, 3, 24 + PAD_MULTIPLE - 14)


def test_shared_prefix_length():
    for ids, image, shared in (
        # A multiple of four where texts diverge.
        (([1, 2, 3, 4, 5, 6, 20, 8, 9], [1, 2, 3, 4, 5, 7, 21, 8, 9]), None, 4),
        (([1, 2, 3, 4, 20, 8, 9], [1, 2, 3, 4, 21, 8, 9]), None, 4),
        (([1, 2, 3, 20, 8, 9], [1, 2, 9, 21, 8, 9]), None, 0),
        (([9, 2, 3, 4, 5, 6, 20, 8, 9], [1, 2, 3, 4, 5, 6, 21, 8, 9]), None, 0),
        (
            ([1, 2, 3, 4, 5, 20, 8, 9], [1, 2, 3, 4, 5, 6, 21, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9]),
            None,
            5,
        ),
        # The token that predicts the first label is not shared.
        (([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 9], [1, 2, 3, 4, 5, 6, 7, 8]), None, 5),
        (([*range(12), 20, 21],) * 2, None, 11),
        # Placeholders of different images are equal.
        (([*range(12), 20, 21],) * 2, (6, 8), 6),
        # Sharing saves less than 2 % of the tokens.
        (([1, 2, 3, 4, *range(10, 210)], [1, 2, 3, 4, *range(20, 220)]), None, 0),
        (([1, 2, 3, 4, 5, 6, 20, 8, 9],), None, 0),
        ((), None, 0),
    ):
        samples = [make_prefixed(one, image).tokenized for one in ids]
        orders = itertools.permutations(samples)
        assert {find_shared_prefix_length(order) for order in orders} == {shared}
