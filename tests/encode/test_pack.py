"""Samples end to end: who predicts whom, where the pictures stand, what a budget holds."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conversations import make_conversation, make_folder, make_pictures

from finesight.encode.encoded import Encoded, Outline, Span
from finesight.encode.pack import EVEN, beginning_of, filled, pack, plan_packs, together, worth
from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model
from finesight.train.loss import label_loss
from finesight.vision.patches import whole

SPAN = Span("image", 6, 8, (1, 2, 4), (), (28, 56), (28, 56))


def plain(name: str, ids: list[int], learned: list[bool]) -> Encoded:
    positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
    outline = Outline(name, np.array(ids, dtype=np.int32), np.array(learned), positions, ())
    return Encoded(outline, np.empty((0, 1176), dtype=np.uint8))


def test_a_first_token_has_no_predecessor() -> None:
    batch = pack(
        [
            plain("a", [5, 6, 7], [True, False, True]),
            plain("b", [8], [True]),
            plain("c", [9, 10], [True, True]),
        ]
    )
    assert batch.sample_ids == ("a", "b", "c")
    assert batch.lengths == (2, 1, 1)
    assert batch.bounds_S1.tolist() == [0, 2, 3, 4]
    assert batch.bounds_S1.dtype == torch.int32
    assert batch.ids_T.tolist() == [5, 6, 8, 9]
    assert batch.positions_3T[0].tolist() == [0, 1, 0, 0]
    assert batch.predict_L.tolist() == [1, 3]
    assert batch.target_L.tolist() == [7, 10]
    assert batch.supervised == 2
    assert batch.visual_at_M.tolist() == []
    assert batch.patches_ND.shape == (0, 1176)


def ending(others: int, learned: int, after: int, picture: int | None = None) -> Outline:
    """So many tokens of each kind, and where a picture ends."""
    marks = [False] * others + [True] * learned + [False] * after
    outline = plain("a", list(range(len(marks))), marks).outline
    spans = () if picture is None else (replace(SPAN, start=picture - 2, stop=picture),)
    return replace(outline, spans=spans)


@pytest.mark.parametrize(
    ("outline", "needed"),
    [
        (ending(5, 3, 0), 7),
        (ending(5, 3, 4), 7),
        (ending(0, 3, 2), 2),
        (ending(5, 3, 4, picture=3), 7),
        (ending(5, 3, 4, picture=11), 11),
        (ending(6, 0, 0), 6),
    ],
)
def test_what_no_loss_hangs_on_is_not_needed(outline: Outline, needed: int) -> None:
    assert outline.needed == needed
    patches = np.empty((8 * len(outline.spans), 588), dtype=np.uint8)
    batch = pack([Encoded(outline, patches)])
    assert batch.ids_T.tolist() == list(range(needed))
    learned = [at for at in np.flatnonzero(outline.learned_T).tolist() if at > 0]
    assert batch.target_L.tolist() == learned
    whole = pack([Encoded(outline, patches, inputs={"mask": torch.ones(1)})])
    assert whole.lengths == (outline.tokens,)
    assert whole.predict_L.tolist() == batch.predict_L.tolist()
    assert whole.target_L.tolist() == batch.target_L.tolist()


def test_tokens_that_are_not_needed_change_no_loss(tmp_path: Path) -> None:
    folder = ModelFolder(make_tiny(tmp_path / "model", "qwen2_vl"))
    renderer = Renderer(folder)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    pictures = make_pictures(tmp_path)
    encoded = [renderer.encode(make_conversation(n, pictures, videos=False)) for n in range(6)]
    for one in encoded:
        short, whole = pack([one]), pack([replace(one, inputs={"mask": torch.ones(1)})])
        assert len(short.ids_T) < len(whole.ids_T) == one.outline.tokens
        torch.testing.assert_close(model(short), model(whole), rtol=1e-4, atol=1e-5)
        assert short.target_L.tolist() == whole.target_L.tolist()


def test_a_pack_holds_what_its_samples_held(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path)
    renderer = Renderer(ModelFolder(make_folder(tmp_path / "model", "qwen2_5_vl")))
    encoded = [
        renderer.encode(make_conversation(number, pictures, videos=True)) for number in range(12)
    ]
    batch = pack(encoded)
    pads = [renderer.tokenizer.id_of(name) for name in ("<|image_pad|>", "<|video_pad|>")]
    placeholders = torch.isin(batch.ids_T, torch.tensor(pads)).nonzero()[:, 0]
    assert batch.visual_at_M.tolist() == placeholders.tolist()
    assert len(batch.visual_at_M) == sum(t * h * w // 4 for t, h, w in batch.grids)
    assert len(batch.patches_ND) == 4 * len(batch.visual_at_M)
    assert batch.patches_ND.dtype == torch.uint8
    assert batch.supervised == sum(one.outline.supervised for one in encoded)
    start = 0
    for one, length in zip(encoded, batch.lengths, strict=True):
        stop = start + length
        outline = one.outline
        assert length == outline.needed < outline.tokens
        assert batch.ids_T[start:stop].tolist() == outline.ids_T[:length].tolist()
        assert (
            batch.positions_3T[:, start:stop].tolist() == outline.positions_3T[:, :length].tolist()
        )
        mine = (batch.predict_L >= start) & (batch.predict_L < stop)
        targets = outline.learned_T.nonzero()[0]
        assert (batch.predict_L[mine] + 1 - start).tolist() == targets.tolist()
        assert batch.target_L[mine].tolist() == outline.ids_T[targets].tolist()
        start = stop
    assert batch.to(torch.device("cpu")).ids_T.tolist() == batch.ids_T.tolist()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("videos", [False, True])
def test_a_filled_pack_has_even_sizes_and_teaches_the_same(
    tmp_path: Path, family: str, videos: bool
) -> None:
    pictures = make_pictures(tmp_path)
    folder = ModelFolder(make_tiny(tmp_path / "model", family))
    renderer = Renderer(folder)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    for first in range(0, 12, 3):
        batch = pack(
            [
                renderer.encode(make_conversation(number, pictures, videos=videos))
                for number in range(first, first + 3)
            ]
        )
        even = filled(batch, 2)
        sizes = [len(even.ids_T), len(even.predict_L), len(even.patches_ND)]
        assert [size % EVEN for size in sizes] == [0, 0, 0]
        assert sum(even.lengths) == len(even.ids_T) == int(even.bounds_S1[-1])
        assert even.bounds_S1.dtype == batch.bounds_S1.dtype
        assert 4 * len(even.visual_at_M) == len(even.patches_ND)
        assert even.supervised == batch.supervised
        gradients = []
        for one in (batch, even):
            model.zero_grad()
            loss = label_loss(model(one), model.head_weight, one.target_L, torch.tensor(1.0))
            loss.backward()
            gradients.append({"loss": loss} | {n: p.grad for n, p in model.named_parameters()})
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_a_pack_that_is_even_already_gets_a_sequence_all_the_same() -> None:
    batch = pack([plain("a", [3] * (EVEN + 1), [False] + [True] * EVEN)])
    even = filled(batch, 2)
    assert even.lengths == (EVEN, EVEN)
    assert even.grids == ()
    assert len(even.predict_L) == EVEN
    assert even.predict_L.tolist() == batch.predict_L.tolist()


def test_squares_of_three_are_filled_whole() -> None:
    batch = replace(
        pack([plain("a", [3] * 20, [True] * 20)]),
        patches_ND=torch.zeros((63, 12), dtype=torch.uint8),
        grids=((1, 9, 7),),
        visual_at_M=torch.arange(7),
    )
    even = filled(batch, 3)
    assert sum(t * h * w for t, h, w in even.grids) == len(even.patches_ND) == 576
    assert len(even.visual_at_M) == 64
    assert len(even.ids_T) % EVEN == 0


@pytest.mark.parametrize("samples", [64, 16])
@pytest.mark.parametrize("one_size", [True, False])
def test_little_of_a_pack_is_filling(samples: int, one_size: bool) -> None:
    """Under 2 % of the tokens and of the patches at the size of the caption recipes: pictures of
    280 x 280 pixels or about that, and 20 to 60 tokens of text."""
    rng = random.Random(samples)
    tokens = patches = more_tokens = more_patches = 0
    for _ in range(50):
        places = [100 if one_size else rng.randint(80, 120) for _ in range(samples)]
        lengths = [seen + rng.randint(20, 60) for seen in places]
        texts = [plain("a", [3] * (n + 1), [True] * (n + 1)) for n in lengths]
        batch = replace(
            pack(texts),
            patches_ND=torch.zeros((4 * sum(places), 1), dtype=torch.uint8),
            grids=tuple((1, 2, 2 * seen) for seen in places),
            visual_at_M=torch.arange(sum(places)),
        )
        even = filled(batch, 2)
        tokens, patches = tokens + sum(lengths), patches + 4 * sum(places)
        more_tokens += len(even.ids_T) - sum(lengths)
        more_patches += len(even.patches_ND) - 4 * sum(places)
    assert 0 < more_tokens < 0.02 * tokens
    assert more_patches < 0.02 * patches


def test_an_empty_pack_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="no samples"):
        pack([])


def test_packs_are_filled_first_fit() -> None:
    assert plan_packs([4, 3, 5, 2, 9, 1, 20, 1], 10) == [[0, 1, 3, 5], [2, 7], [4], [6]]
    assert plan_packs([], 10) == []
    assert plan_packs([10, 10], 10) == [[0], [1]]


def test_every_sample_is_in_one_pack_within_the_budget() -> None:
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


def test_stills_travel_as_one_frame_and_videos_whole(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path)
    renderer = Renderer(ModelFolder(make_folder(tmp_path / "model", "qwen2_5_vl")))
    stills = [renderer.encode(make_conversation(n, pictures, videos=False)) for n in range(8)]
    stills = [one for one in stills if len(one.patches_ND)]
    one_frame = np.concatenate([one.patches_ND for one in stills])
    assert one_frame.shape[1] == 588
    np.testing.assert_array_equal(pack(stills).patches_ND.numpy(), one_frame)
    mixed = [renderer.encode(make_conversation(n, pictures, videos=True)) for n in range(12)]
    kinds = {span.kind for one in mixed for span in one.outline.spans}
    assert kinds == {"image", "video"}, kinds
    expected = np.concatenate([whole(one.patches_ND, 1176) for one in mixed])
    np.testing.assert_array_equal(pack(mixed).patches_ND.numpy(), expected)
    room = np.zeros_like(expected)
    assert pack(mixed, room).patches_ND.data_ptr() == room.ctypes.data
    np.testing.assert_array_equal(room, expected)


def beginning_with(same: list[int], others: list[int], learned: int = 2) -> Encoded:
    """So many tokens at the end are learned."""
    ids = same + others
    marks = [False] * (len(ids) - learned) + [True] * learned
    return plain(str(others), ids, marks)


def test_what_samples_share_is_laid_once() -> None:
    same = [1, 2, 3, 4, 5]
    samples = [beginning_with(same, [*others, 90, 91]) for others in ([6], [7, 8, 9], [10, 11])]
    spans = (replace(SPAN, start=5, stop=7),)
    samples[1] = replace(samples[1], outline=replace(samples[1].outline, spans=spans))
    outlines = [one.outline for one in samples]
    assert beginning_of(outlines) == 5
    batch = pack(samples, beginning=5)
    assert batch.lengths == (5, 2, 4, 3)
    assert batch.bounds_S1.tolist() == [0, 5, 7, 11, 14]
    assert batch.ids_T.tolist() == [*same, 6, 90, 7, 8, 9, 90, 10, 11, 90]
    assert batch.positions_3T[2].tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 5, 6, 7]
    assert batch.visual_at_M.tolist() == [7, 8], "of the second sample"
    assert batch.predict_L.tolist() == [5, 6, 9, 10, 12, 13]
    assert batch.target_L.tolist() == [90, 91] * 3
    assert (batch.samples, batch.tokens, batch.beginning) == (3, 24, 5)
    alone = pack(samples)
    assert (alone.samples, alone.tokens, alone.beginning) == (3, 24, 0)
    assert alone.target_L.tolist() == batch.target_L.tolist()
    assert pack(samples[:1], beginning=5).beginning == 0, "there is nobody to share it with"
    with pytest.raises(AssertionError, match="5 tokens are the same, not 6"):
        pack(samples, beginning=6)
    even = filled(batch, 2)
    assert (even.beginning, even.samples, even.tokens) == (5, 3, 24 + EVEN - 14)


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
def test_how_much_is_shared(heads: tuple[list[int], ...], shared: int) -> None:
    samples = [beginning_with(head, [20 + n, 30, 40]) for n, head in enumerate(heads)]
    assert beginning_of([one.outline for one in samples]) == shared


def test_how_much_is_shared_hangs_on_no_order() -> None:
    heads = [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 9], [1, 2, 3, 4, 5]
    samples = [beginning_with(head, [20 + n, 30, 40]) for n, head in enumerate(heads)]
    orders = itertools.permutations([one.outline for one in samples])
    assert {beginning_of(order) for order in orders} == {5}


def test_what_predicts_a_learned_token_is_not_shared() -> None:
    """The tokens after it may differ, and so would what is learned there."""
    same = [1, 2, 3, 4, 5, 6]
    samples = [beginning_with(same, [7, last]) for last in (8, 9)]
    assert beginning_of([one.outline for one in samples]) == 5
    assert beginning_of([one.outline for one in (*samples, samples[0])]) == 5


def test_pictures_are_not_shared() -> None:
    """Their placeholders are the same ones, whatever they show."""
    same = list(range(1, 12))
    samples = [beginning_with(same, [20, 21, 22]) for _ in range(2)]
    seen = [replace(one, outline=replace(one.outline, spans=(SPAN,))) for one in samples]
    assert beginning_of([one.outline for one in seen]) == 6
    assert beginning_of([one.outline for one in samples]) == 11


def test_little_is_not_shared() -> None:
    samples = [beginning_with([1, 2, 3, 4], list(range(10 * n, 10 * n + 200))) for n in (1, 2)]
    assert beginning_of([one.outline for one in samples]) == 0
    assert worth(4, [100, 100]) == 4
    assert worth(4, [100, 101]) == 0


def test_a_budget_counts_what_is_shared_once() -> None:
    assert plan_packs([100, 100, 100, 100], 250) == [[0, 1], [2, 3]]
    assert plan_packs([100, 100, 100, 100], 250, 50) == [[0, 1, 2, 3]]
    assert plan_packs([100, 100, 100, 100], 249, 50) == [[0, 1, 2], [3]]
    assert plan_packs([100, 300, 100], 40, 50) == [[0], [1], [2]]
    assert together([100, 100, 100, 100], 50) == 250
    assert together([100, 100]) == 200


def test_many_short_ones_after_a_long_beginning_are_several_packs() -> None:
    """Each reads all of it, and where sequences are long, has a copy of keys and values."""
    assert len(plan_packs([1001] * 40, 4096, 1000)) == 4
    assert together([1001] * 40, 1000) == 1000 + 40 * 250
