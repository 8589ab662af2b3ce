"""Concatenated samples: labels, image positions and the token budget."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conversation_fixtures import make_conversation, make_folder, make_images
from tiny_model import create_tiny_model

from finesight.encode.packing import (
    PAD_MULTIPLE,
    compute_min_budget,
    effective_prefix_length,
    find_shared_prefix_length,
    pack,
    pad_batch,
    plan_packs,
)
from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample, TokenizedSample, VisualSpan
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.train.loss import fused_linear_cross_entropy
from finesight.vision.image_processing import repeat_still_frames

SPAN = VisualSpan("image", 6, 8, (1, 2, 4), (), (28, 56), (28, 56))


def text_sample(name: str, ids: list[int], supervised: list[bool]) -> EncodedSample:
    positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
    outline = TokenizedSample(
        name, np.array(ids, dtype=np.int32), np.array(supervised), positions, ()
    )
    return EncodedSample(outline, np.empty((0, 1176), dtype=np.uint8))


def test_first_token_has_no_loss() -> None:
    batch = pack(
        [
            text_sample("a", [5, 6, 7], [True, False, True]),
            text_sample("b", [8], [True]),
            text_sample("c", [9, 10], [True, True]),
        ]
    )
    assert batch.sample_ids == ("a", "b", "c")
    assert batch.lengths == (2, 1, 1)
    assert batch.cu_seqlens_S1.tolist() == [0, 2, 3, 4]
    assert batch.cu_seqlens_S1.dtype == torch.int32
    assert batch.ids_T.tolist() == [5, 6, 8, 9]
    assert batch.position_ids_3T[0].tolist() == [0, 1, 0, 0]
    assert batch.logit_indices_L.tolist() == [1, 3]
    assert batch.labels_L.tolist() == [7, 10]
    assert batch.num_supervised_tokens == 2
    assert batch.visual_indices_M.tolist() == []
    assert batch.patches_ND.shape == (0, 1176)


def sample_with_image_and_text(
    others: int, supervised: int, after: int, image: int | None = None
) -> TokenizedSample:
    """Make the given number of tokens of each kind, and the end of an image."""
    marks = [False] * others + [True] * supervised + [False] * after
    outline = text_sample("a", list(range(len(marks))), marks).tokenized
    spans = () if image is None else (replace(SPAN, start=image - 2, stop=image),)
    return replace(outline, spans=spans)


@pytest.mark.parametrize(
    ("outline", "needed"),
    [
        (sample_with_image_and_text(5, 3, 0), 7),
        (sample_with_image_and_text(5, 3, 4), 7),
        (sample_with_image_and_text(0, 3, 2), 2),
        (sample_with_image_and_text(5, 3, 4, image=3), 7),
        (sample_with_image_and_text(5, 3, 4, image=11), 11),
        (sample_with_image_and_text(6, 0, 0), 6),
    ],
)
def test_tokens_after_last_label_are_removed(outline: TokenizedSample, needed: int) -> None:
    assert outline.num_packed_tokens == needed
    patches = np.empty((8 * len(outline.spans), 588), dtype=np.uint8)
    batch = pack([EncodedSample(outline, patches)])
    assert batch.ids_T.tolist() == list(range(needed))
    supervised = [at for at in np.flatnonzero(outline.loss_mask_T).tolist() if at > 0]
    assert batch.labels_L.tolist() == supervised
    full = pack([EncodedSample(outline, patches, hf_inputs={"mask": torch.ones(1)})])
    assert full.lengths == (outline.num_tokens,)
    assert full.logit_indices_L.tolist() == batch.logit_indices_L.tolist()
    assert full.labels_L.tolist() == batch.labels_L.tolist()


def test_removed_tokens_do_not_change_the_loss(tmp_path: Path) -> None:
    folder = ModelFolder(create_tiny_model(tmp_path / "model", "qwen2_vl"))
    renderer = NativeRenderer(folder)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    images = make_images(tmp_path)
    encoded = [renderer.encode(make_conversation(n, images, videos=False)) for n in range(6)]
    for one in encoded:
        short, full = pack([one]), pack([replace(one, hf_inputs={"mask": torch.ones(1)})])
        assert len(short.ids_T) < len(full.ids_T) == one.tokenized.num_tokens
        torch.testing.assert_close(model(short), model(full), rtol=1e-4, atol=1e-5)
        assert short.labels_L.tolist() == full.labels_L.tolist()


def test_packed_batch_contains_all_sample_tensors(tmp_path: Path) -> None:
    images = make_images(tmp_path)
    renderer = NativeRenderer(ModelFolder(make_folder(tmp_path / "model", "qwen2_5_vl")))
    encoded = [
        renderer.encode(make_conversation(number, images, videos=True)) for number in range(12)
    ]
    batch = pack(encoded)
    pads = [renderer.tokenizer.token_to_id(name) for name in ("<|image_pad|>", "<|video_pad|>")]
    placeholders = torch.isin(batch.ids_T, torch.tensor(pads)).nonzero()[:, 0]
    assert batch.visual_indices_M.tolist() == placeholders.tolist()
    assert len(batch.visual_indices_M) == sum(t * h * w // 4 for t, h, w in batch.grid_thw)
    assert len(batch.patches_ND) == 4 * len(batch.visual_indices_M)
    assert batch.patches_ND.dtype == torch.uint8
    assert batch.num_supervised_tokens == sum(
        one.tokenized.num_supervised_tokens for one in encoded
    )
    start = 0
    for one, length in zip(encoded, batch.lengths, strict=True):
        stop = start + length
        outline = one.tokenized
        assert length == outline.num_packed_tokens < outline.num_tokens
        assert batch.ids_T[start:stop].tolist() == outline.ids_T[:length].tolist()
        assert (
            batch.position_ids_3T[:, start:stop].tolist()
            == outline.position_ids_3T[:, :length].tolist()
        )
        mine = (batch.logit_indices_L >= start) & (batch.logit_indices_L < stop)
        targets = outline.loss_mask_T.nonzero()[0]
        assert (batch.logit_indices_L[mine] + 1 - start).tolist() == targets.tolist()
        assert batch.labels_L[mine].tolist() == outline.ids_T[targets].tolist()
        start = stop
    assert batch.to(torch.device("cpu")).ids_T.tolist() == batch.ids_T.tolist()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("videos", [False, True])
def test_padded_pack_has_even_sizes_and_equal_loss(
    tmp_path: Path, family: str, videos: bool
) -> None:
    images = make_images(tmp_path)
    folder = ModelFolder(create_tiny_model(tmp_path / "model", family))
    renderer = NativeRenderer(folder)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    for first in range(0, 12, 3):
        batch = pack(
            [
                renderer.encode(make_conversation(number, images, videos=videos))
                for number in range(first, first + 3)
            ]
        )
        even = pad_batch(batch, 2)
        sizes = [len(even.ids_T), len(even.logit_indices_L), len(even.patches_ND)]
        assert [size % PAD_MULTIPLE for size in sizes] == [0, 0, 0]
        assert sum(even.lengths) == len(even.ids_T) == int(even.cu_seqlens_S1[-1])
        assert even.cu_seqlens_S1.dtype == batch.cu_seqlens_S1.dtype
        assert 4 * len(even.visual_indices_M) == len(even.patches_ND)
        assert even.num_supervised_tokens == batch.num_supervised_tokens
        gradients = []
        for one in (batch, even):
            model.zero_grad()
            loss = fused_linear_cross_entropy(
                model(one), model.lm_head_weight, one.labels_L, torch.tensor(1.0)
            )
            loss.backward()
            gradients.append({"loss": loss} | {n: p.grad for n, p in model.named_parameters()})
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_even_pack_still_gets_a_padding_sequence() -> None:
    batch = pack([text_sample("a", [3] * (PAD_MULTIPLE + 1), [False] + [True] * PAD_MULTIPLE)])
    even = pad_batch(batch, 2)
    assert even.lengths == (PAD_MULTIPLE, PAD_MULTIPLE)
    assert even.grid_thw == ()
    assert len(even.logit_indices_L) == PAD_MULTIPLE
    assert even.logit_indices_L.tolist() == batch.logit_indices_L.tolist()


def test_image_padding_fills_odd_patch_counts() -> None:
    batch = replace(
        pack([text_sample("a", [3] * 20, [True] * 20)]),
        patches_ND=torch.zeros((63, 12), dtype=torch.uint8),
        grid_thw=((1, 9, 7),),
        visual_indices_M=torch.arange(7),
    )
    even = pad_batch(batch, 3)
    assert sum(t * h * w for t, h, w in even.grid_thw) == len(even.patches_ND) == 576
    assert len(even.visual_indices_M) == 64
    assert len(even.ids_T) % PAD_MULTIPLE == 0


@pytest.mark.parametrize("samples", [64, 16])
@pytest.mark.parametrize("one_size", [True, False])
def test_padding_overhead_is_small(samples: int, one_size: bool) -> None:
    """Check that padding is below 2 % of tokens and patches at the size of the caption recipes.

    Images have about 280 x 280 pixels, texts 20 to 60 tokens.
    """
    rng = random.Random(samples)
    tokens = patches = more_tokens = more_patches = 0
    for _ in range(50):
        locations = [100 if one_size else rng.randint(80, 120) for _ in range(samples)]
        lengths = [seen + rng.randint(20, 60) for seen in locations]
        texts = [text_sample("a", [3] * (n + 1), [True] * (n + 1)) for n in lengths]
        batch = replace(
            pack(texts),
            patches_ND=torch.zeros((4 * sum(locations), 1), dtype=torch.uint8),
            grid_thw=tuple((1, 2, 2 * seen) for seen in locations),
            visual_indices_M=torch.arange(sum(locations)),
        )
        even = pad_batch(batch, 2)
        tokens, patches = tokens + sum(lengths), patches + 4 * sum(locations)
        more_tokens += len(even.ids_T) - sum(lengths)
        more_patches += len(even.patches_ND) - 4 * sum(locations)
    assert 0 < more_tokens < 0.02 * tokens
    assert more_patches < 0.02 * patches


def test_empty_pack_raises() -> None:
    with pytest.raises(AssertionError, match="cannot pack 0 samples"):
        pack([])


def test_packs_are_planned_first_fit() -> None:
    assert plan_packs([4, 3, 5, 2, 9, 1, 20, 1], 10) == [[0, 1, 3, 5], [2, 7], [4], [6]]
    assert plan_packs([], 10) == []
    assert plan_packs([10, 10], 10) == [[0], [1]]


def test_each_sample_is_in_one_pack_within_budget() -> None:
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
        halves = [sum(lengths[index] for index in members) <= 250 for members in packs]
        assert sum(halves) <= 1


def test_images_are_one_frame_and_videos_complete(tmp_path: Path) -> None:
    images = make_images(tmp_path)
    renderer = NativeRenderer(ModelFolder(make_folder(tmp_path / "model", "qwen2_5_vl")))
    stills = [renderer.encode(make_conversation(n, images, videos=False)) for n in range(8)]
    stills = [one for one in stills if len(one.patches_ND)]
    one_frame = np.concatenate([one.patches_ND for one in stills])
    assert one_frame.shape[1] == 588
    np.testing.assert_array_equal(pack(stills).patches_ND.numpy(), one_frame)
    mixed = [renderer.encode(make_conversation(n, images, videos=True)) for n in range(12)]
    kinds = {span.kind for one in mixed for span in one.tokenized.spans}
    assert kinds == {"image", "video"}, kinds
    expected = np.concatenate([repeat_still_frames(one.patches_ND, 1176) for one in mixed])
    np.testing.assert_array_equal(pack(mixed).patches_ND.numpy(), expected)
    buffer = np.zeros_like(expected)
    assert pack(mixed, buffer).patches_ND.data_ptr() == buffer.ctypes.data
    np.testing.assert_array_equal(buffer, expected)


def sample_with_prefix(same: list[int], others: list[int], supervised: int = 2) -> EncodedSample:
    """Make a sample whose last tokens are supervised."""
    ids = same + others
    marks = [False] * (len(ids) - supervised) + [True] * supervised
    return text_sample(str(others), ids, marks)


def test_shared_prefix_is_stored_once() -> None:
    same = [1, 2, 3, 4, 5]
    samples = [sample_with_prefix(same, [*others, 90, 91]) for others in ([6], [7, 8, 9], [10, 11])]
    spans = (replace(SPAN, start=5, stop=7),)
    samples[1] = replace(samples[1], tokenized=replace(samples[1].tokenized, spans=spans))
    outlines = [one.tokenized for one in samples]
    assert find_shared_prefix_length(outlines) == 5
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
    assert alone.labels_L.tolist() == batch.labels_L.tolist()
    assert pack(samples[:1], prefix_length=5).prefix_length == 0, "there is nobody to share it with"
    with pytest.raises(AssertionError, match="share 5 tokens, not 6"):
        pack(samples, prefix_length=6)
    even = pad_batch(batch, 2)
    assert (even.prefix_length, even.num_samples, even.num_tokens) == (5, 3, 24 + PAD_MULTIPLE - 14)


@pytest.mark.parametrize(
    ("heads", "shared"),
    [
        # Where texts part, a multiple of four.
        (([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7]), 4),
        (([1, 2, 3, 4], [1, 2, 3, 4]), 4),
        (([1, 2, 3], [1, 2, 9]), 0),
        (([9, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]), 0),
        (([1, 2, 3, 4, 5, 6],), 0),
        ((), 0),
    ],
)
def test_shared_prefix_length(heads: tuple[list[int], ...], shared: int) -> None:
    samples = [sample_with_prefix(head, [20 + n, 30, 40]) for n, head in enumerate(heads)]
    assert find_shared_prefix_length([one.tokenized for one in samples]) == shared


def test_shared_prefix_length_is_order_independent() -> None:
    heads = [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 9], [1, 2, 3, 4, 5]
    samples = [sample_with_prefix(head, [20 + n, 30, 40]) for n, head in enumerate(heads)]
    orders = itertools.permutations([one.tokenized for one in samples])
    assert {find_shared_prefix_length(order) for order in orders} == {5}


def test_label_positions_are_not_in_the_prefix() -> None:
    """The tokens after it may differ, and so would what is learned there."""
    same = [1, 2, 3, 4, 5, 6]
    samples = [sample_with_prefix(same, [7, last]) for last in (8, 9)]
    assert find_shared_prefix_length([one.tokenized for one in samples]) == 5
    assert find_shared_prefix_length([one.tokenized for one in (*samples, samples[0])]) == 5


def test_images_are_not_in_the_prefix() -> None:
    """Their placeholders are the same ones, whatever they show."""
    same = list(range(1, 12))
    samples = [sample_with_prefix(same, [20, 21, 22]) for _ in range(2)]
    seen = [replace(one, tokenized=replace(one.tokenized, spans=(SPAN,))) for one in samples]
    assert find_shared_prefix_length([one.tokenized for one in seen]) == 6
    assert find_shared_prefix_length([one.tokenized for one in samples]) == 11


def test_short_prefix_is_not_shared() -> None:
    samples = [sample_with_prefix([1, 2, 3, 4], list(range(10 * n, 10 * n + 200))) for n in (1, 2)]
    assert find_shared_prefix_length([one.tokenized for one in samples]) == 0
    assert effective_prefix_length(4, [100, 100]) == 4
    assert effective_prefix_length(4, [100, 101]) == 0


def test_pack_budget_counts_the_prefix_once() -> None:
    assert plan_packs([100, 100, 100, 100], 250) == [[0, 1], [2, 3]]
    assert plan_packs([100, 100, 100, 100], 250, 50) == [[0, 1, 2, 3]]
    assert plan_packs([100, 100, 100, 100], 249, 50) == [[0, 1, 2], [3]]
    assert plan_packs([100, 300, 100], 40, 50) == [[0], [1], [2]]
    assert compute_min_budget([100, 100, 100, 100], 50) == 250
    assert compute_min_budget([100, 100]) == 200


def test_many_sequences_with_long_prefix_are_split() -> None:
    """Each reads all of it, and where sequences are long, has a copy of keys and values."""
    assert len(plan_packs([1001] * 40, 4096, 1000)) == 4
    assert compute_min_budget([1001] * 40, 1000) == 1000 + 40 * 250
