from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from finesight.encode.tokenized_sample import EncodedSample, TokenizedSample, VisualSpan
from finesight.infer.block_manager import (
    BlockHash,
    BlockManager,
    append_tokens,
    compute_block_hashes,
    hash_images,
)

S = 4


def _key(number: int) -> bytes:
    return number.to_bytes(2, "big")


def test_blocks_are_allocated_and_freed():
    pages = BlockManager(4)
    taken = pages.allocate(3)
    assert sorted(taken) == [1, 2, 3]
    assert pages.num_free_blocks == 0
    with pytest.raises(AssertionError, match="1 blocks requested, 0 free"):
        pages.allocate(1)
    pages.release(taken[1:])
    assert pages.num_free_blocks == 2
    assert sorted(pages.allocate(2)) == sorted(taken[1:])
    with pytest.raises(AssertionError, match="num_blocks is 1"):
        BlockManager(1)


def test_cached_prefix_ends_at_first_unknown_block():
    pages = BlockManager(8)
    keys = [_key(n) for n in range(4)]
    taken = pages.allocate(4)
    pages.cache_blocks(keys, taken)
    assert pages.acquire_cached([keys[0], keys[1], _key(9), keys[3]]) == taken[:2]
    assert pages.acquire_cached([_key(9), *keys]) == []


def test_prefix_blocks_are_evicted_last():
    pages = BlockManager(4)
    keys = [_key(n) for n in range(3)]
    first = pages.allocate(3)
    pages.cache_blocks(keys, first)
    pages.release(first)
    assert pages.num_free_blocks == 3
    assert pages.allocate(1) == [first[2]]
    assert pages.acquire_cached(keys) == first[:2]
    # Held now, and not to be had.
    assert pages.num_free_blocks == 0


def test_first_of_two_equal_blocks_is_cached():
    pages = BlockManager(5)
    one, other = pages.allocate(1), pages.allocate(1)
    pages.cache_blocks([_key(1)], one)
    pages.cache_blocks([_key(1)], other)
    assert pages.acquire_cached([_key(1)]) == one
    pages.release(other)
    pages.release(one)
    assert pages.acquire_cached([_key(1)]) == one
    pages.release(one)
    pages.release(one)
    assert pages.num_free_blocks == 4
    assert sorted(pages.allocate(4)) == [1, 2, 3, 4]


class BlockLedger:
    """What any number of answers did to pages, kept the plain way."""

    def __init__(self, pages: BlockManager) -> None:
        self.pages = pages
        self.answers: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    def begin(self, keys: list[bytes], more: int) -> None:
        """An answer to a prompt with these keys, if there is room."""
        found = self.pages.acquire_cached(keys)
        assert [self.content[page] for page in found] == keys[: len(found)]
        needed = len(keys) - len(found) + more
        if needed > self.pages.num_free_blocks:
            self.pages.release(found)
            return
        new = self.pages.allocate(needed)
        held = {page for answer in self.answers for page in answer} | {*found}
        assert not held & {*new}
        assert len({*new}) == needed
        for page in new:
            self.content.pop(page, None)
        answer = found + new
        self.content.update(zip(answer, keys, strict=False))
        self.pages.cache_blocks(keys, answer[: len(keys)])
        self.answers.append(answer)

    def check(self) -> None:
        held = Counter(page for answer in self.answers for page in answer)
        assert 0 not in held
        assert self.pages.num_free_blocks == self.pages.num_blocks - 1 - len(held)
        assert self.pages._ref_counts == held


@pytest.mark.parametrize("seed", range(40))
def test_random_operations_leak_no_blocks(seed):
    rng = random.Random(seed)
    book = BlockLedger(BlockManager(rng.randrange(2, 30)))
    for _ in range(300):
        if book.answers and rng.random() < 0.5:
            book.pages.release(book.answers.pop(rng.randrange(len(book.answers))))
        else:
            # Beginnings that many share: a page's key says all that comes before it.
            branch = rng.randrange(3)
            keys = [_key(100 * branch + n) for n in range(rng.randrange(8))]
            book.begin(keys, rng.randrange(1, 4))
        book.check()
    for answer in book.answers:
        book.pages.release(answer)
    assert book.pages.num_free_blocks == book.pages.num_blocks - 1
    assert sorted(book.pages.allocate(book.pages.num_free_blocks)) == list(
        range(1, book.pages.num_blocks)
    )


def _prompt(
    tokens: int = 18, num_images: tuple[tuple[int, int], ...] = ((3, 6), (9, 13))
) -> EncodedSample:
    """Pictures of one row of patches each, one token a patch of one pixel."""
    spans = tuple(
        VisualSpan("image", start, stop, (1, 1, stop - start), (), (14, 14), (1, stop - start))
        for start, stop in num_images
    )
    count = sum(stop - start for start, stop in num_images)
    patches = np.arange(count * 3, dtype=np.uint8).reshape(count, 3)
    positions = np.tile(np.arange(tokens, dtype=np.int32), (3, 1))
    ids = np.arange(tokens, dtype=np.int32)
    return EncodedSample(
        TokenizedSample("s", ids, np.zeros(tokens, dtype=bool), positions, spans), patches
    )


def _keys(prompt: EncodedSample, reader: str = "") -> list[BlockHash]:
    return compute_block_hashes(prompt.tokenized, hash_images(prompt), S, reader)


def _num_shared_blocks(
    one: EncodedSample, other: EncodedSample, readers: tuple[str, str] = ("", "")
) -> int:
    """How many pages both begin with."""
    pairs = zip(_keys(one, readers[0]), _keys(other, readers[1]), strict=False)
    equal = [mine == theirs for mine, theirs in pairs]
    assert equal == sorted(equal, reverse=True), "alike after a difference"
    return sum(equal)


def test_only_full_blocks_have_hashes():
    assert [len(_keys(_prompt(tokens, ()))) for tokens in (3, 4, 7, 8)] == [0, 1, 1, 2]


def test_prompts_share_blocks_up_to_first_difference():
    prompt = _prompt()
    assert _num_shared_blocks(prompt, _prompt()) == 4
    for at in range(16):
        ids = prompt.tokenized.ids_T.copy()
        ids[at] = 99
        assert (
            _num_shared_blocks(
                prompt, replace(prompt, tokenized=replace(prompt.tokenized, ids_T=ids))
            )
            == at // S
        )
        positions = prompt.tokenized.position_ids_3T.copy()
        positions[at % 3, at] = 99
        changed = replace(prompt.tokenized, position_ids_3T=positions)
        assert _num_shared_blocks(prompt, replace(prompt, tokenized=changed)) == at // S


def test_changed_pixels_change_the_block_hash():
    prompt = _prompt()
    # Patch 0 is of the picture at tokens 3 to 5, patch 3 of that at 9 to 12.
    for patch, pages in ((0, 0), (2, 0), (3, 2), (6, 2)):
        patches = prompt.patches_ND.copy()
        patches[patch, 1] ^= 1
        assert _num_shared_blocks(prompt, replace(prompt, patches_ND=patches)) == pages


def test_image_shape_is_part_of_the_block_hash():
    prompt = _prompt(12, ((2, 6),))
    (span,) = prompt.tokenized.spans
    square = replace(
        prompt.tokenized, spans=(replace(span, grid_thw=(1, 2, 2), resized_size=(2, 2)),)
    )
    assert _num_shared_blocks(prompt, replace(prompt, tokenized=square)) == 0


def test_adapters_share_no_blocks():
    assert _num_shared_blocks(_prompt(), _prompt(), ("0 ", "1 ")) == 0
    assert _num_shared_blocks(_prompt(), _prompt(), ("None ", "0 ")) == 0


def test_answer_hashes_match_the_next_prompt():
    """As if the answer had been a part of the prompt."""
    full, prompt = _prompt(18, ()), _prompt(10, ())
    output = append_tokens(prompt.tokenized, full.tokenized.ids_T[10:].tolist())
    assert compute_block_hashes(output, (), S, "") == _keys(full)
    assert compute_block_hashes(append_tokens(prompt.tokenized, []), (), S, "") == _keys(prompt)
    far = replace(prompt.tokenized, position_ids_3T=prompt.tokenized.position_ids_3T + 5)
    assert append_tokens(far, [1, 2]).position_ids_3T[:, -2:].tolist() == [[15, 16]] * 3
