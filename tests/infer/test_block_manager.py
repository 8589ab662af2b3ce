from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from each_value import each

from finesight.encode.tokenization import EncodedSample, TokenizedSample, VisualSpan
from finesight.infer.kv_cache import (
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
    manager = BlockManager(4)
    taken = manager.allocate(3)
    assert sorted(taken) == [1, 2, 3]
    assert manager.num_free_blocks == 0
    with pytest.raises(AssertionError, match="1 blocks requested, 0 free"):
        manager.allocate(1)
    manager.release(taken[1:])
    assert manager.num_free_blocks == 2
    assert sorted(manager.allocate(2)) == sorted(taken[1:])
    with pytest.raises(AssertionError, match="num_blocks is 1"):
        BlockManager(1)


def test_cached_prefix_ends_at_first_unknown_block():
    manager = BlockManager(8)
    keys = [_key(n) for n in range(4)]
    taken = manager.allocate(4)
    manager.cache_blocks(keys, taken)
    assert manager.acquire_cached([keys[0], keys[1], _key(9), keys[3]]) == taken[:2]
    assert manager.acquire_cached([_key(9), *keys]) == []


def test_prefix_blocks_are_evicted_last():
    manager = BlockManager(4)
    keys = [_key(n) for n in range(3)]
    first = manager.allocate(3)
    manager.cache_blocks(keys, first)
    manager.release(first)
    assert manager.num_free_blocks == 3
    assert manager.allocate(1) == [first[2]]
    assert manager.acquire_cached(keys) == first[:2]
    # Both blocks are in use now.
    assert manager.num_free_blocks == 0


def test_first_of_two_equal_blocks_is_cached():
    manager = BlockManager(5)
    one, other = manager.allocate(1), manager.allocate(1)
    manager.cache_blocks([_key(1)], one)
    manager.cache_blocks([_key(1)], other)
    assert manager.acquire_cached([_key(1)]) == one
    manager.release(other)
    manager.release(one)
    assert manager.acquire_cached([_key(1)]) == one
    manager.release(one)
    manager.release(one)
    assert manager.num_free_blocks == 4
    assert sorted(manager.allocate(4)) == [1, 2, 3, 4]


class BlockLedger:
    """Reference implementation of the prefix cache."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.answers: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    def start(self, keys: list[bytes], more: int) -> None:
        """Start a sequence for a prompt with these keys, if enough blocks are available."""
        found = self.manager.acquire_cached(keys)
        assert [self.content[block] for block in found] == keys[: len(found)]
        needed = len(keys) - len(found) + more
        if needed > self.manager.num_free_blocks:
            self.manager.release(found)
            return
        new = self.manager.allocate(needed)
        used = {block for answer in self.answers for block in answer} | {*found}
        assert not used & {*new}
        assert len({*new}) == needed
        for block in new:
            self.content.pop(block, None)
        answer = found + new
        self.content.update(zip(answer, keys, strict=False))
        self.manager.cache_blocks(keys, answer[: len(keys)])
        self.answers.append(answer)

    def check(self) -> None:
        used = Counter(block for answer in self.answers for block in answer)
        assert 0 not in used
        assert self.manager.num_free_blocks == self.manager.num_blocks - 1 - len(used)
        assert self.manager._ref_counts == used


@each("seed", range(40))
def test_random_operations_leak_no_blocks(seed):
    rng = random.Random(seed)
    book = BlockLedger(BlockManager(rng.randrange(2, 30)))
    for _ in range(300):
        if book.answers and rng.random() < 0.5:
            book.manager.release(book.answers.pop(rng.randrange(len(book.answers))))
        else:
            # Shared prefixes: the key of a block identifies all tokens before it.
            branch = rng.randrange(3)
            keys = [_key(100 * branch + n) for n in range(rng.randrange(8))]
            book.start(keys, rng.randrange(1, 4))
        book.check()
    for answer in book.answers:
        book.manager.release(answer)
    assert book.manager.num_free_blocks == book.manager.num_blocks - 1
    assert sorted(book.manager.allocate(book.manager.num_free_blocks)) == list(
        range(1, book.manager.num_blocks)
    )


def _prompt(
    tokens: int = 18, num_images: tuple[tuple[int, int], ...] = ((3, 6), (9, 13))
) -> EncodedSample:
    """Make images of one row of patches each, one token for a patch of one pixel."""
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


def _keys(prompt: EncodedSample, cache_salt: str = "") -> list[BlockHash]:
    return compute_block_hashes(prompt.tokenized, hash_images(prompt), S, cache_salt)


def _num_shared_blocks(
    one: EncodedSample, other: EncodedSample, salts: tuple[str, str] = ("", "")
) -> int:
    """Return the number of shared blocks."""
    pairs = zip(_keys(one, salts[0]), _keys(other, salts[1]), strict=False)
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
        changed = replace(prompt.tokenized, ids_T=ids)
        assert _num_shared_blocks(prompt, replace(prompt, tokenized=changed)) == at // S
        positions = prompt.tokenized.position_ids_3T.copy()
        positions[at % 3, at] = 99
        changed = replace(prompt.tokenized, position_ids_3T=positions)
        assert _num_shared_blocks(prompt, replace(prompt, tokenized=changed)) == at // S


def test_changed_pixels_change_the_block_hash():
    prompt = _prompt()
    # Patch 0 belongs to the image at tokens 3 to 5, patch 3 to that at 9 to 12.
    for patch, manager in ((0, 0), (2, 0), (3, 2), (6, 2)):
        patches = prompt.patches_ND.copy()
        patches[patch, 1] ^= 1
        assert _num_shared_blocks(prompt, replace(prompt, patches_ND=patches)) == manager


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
