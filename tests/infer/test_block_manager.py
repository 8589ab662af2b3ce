from dataclasses import replace

import numpy as np
import pytest

from finesight.encode.tokenization import EncodedSample, TokenizedSample, VisualSpan
from finesight.infer.kv_cache import BlockHash, BlockManager, compute_block_hashes, hash_images

S = 4


def test_prefix_blocks_are_evicted_last():
    manager, keys = BlockManager(4), [n.to_bytes(2, "big") for n in range(3)]
    first = manager.allocate(3)
    manager.cache_blocks(keys, first)
    manager.release(first)
    assert manager.allocate(1) == [first[2]]
    assert manager.acquire_cached(keys) == first[:2]
    with pytest.raises(AssertionError, match="1 blocks requested, 0 free"):
        manager.allocate(1)


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


def _num_shared_blocks(one: EncodedSample, other: EncodedSample) -> int:
    equal = [mine == theirs for mine, theirs in zip(_keys(one), _keys(other), strict=False)]
    assert equal == sorted(equal, reverse=True), "alike after a difference"
    return sum(equal)


def test_prompts_share_blocks_up_to_first_difference():
    assert [len(_keys(_prompt(tokens, ()))) for tokens in (3, 4, 7, 8)] == [0, 1, 1, 2]
    prompt = _prompt()
    assert _num_shared_blocks(prompt, _prompt()) == 4
    assert _keys(prompt, "0 ")[0] not in (_keys(prompt, "1 ")[0], _keys(prompt)[0])
    for at in range(16):
        for name, index in (("ids_T", at), ("position_ids_3T", (at % 3, at))):
            values = getattr(prompt.tokenized, name).copy()
            values[index] = 99
            changed = replace(prompt.tokenized, **{name: values})
            assert _num_shared_blocks(prompt, replace(prompt, tokenized=changed)) == at // S


def test_changed_image_changes_the_block_hash():
    # Two images across blocks, and one within a block.
    prompts = _prompt(18, ((3, 6), (9, 13))), _prompt(18, ((5, 7),))
    for which, patch, num_shared in ((0, 0, 0), (0, 2, 0), (0, 3, 2), (0, 6, 2), (1, 0, 1)):
        prompt = prompts[which]
        patches = prompt.patches_ND.copy()
        patches[patch, 1] ^= 1
        assert _num_shared_blocks(prompt, replace(prompt, patches_ND=patches)) == num_shared
    prompt = _prompt(12, ((2, 6),))
    (span,) = prompt.tokenized.spans
    square = replace(span, grid_thw=(1, 2, 2), resized_size=(2, 2))
    reshaped = replace(prompt, tokenized=replace(prompt.tokenized, spans=(square,)))
    assert _num_shared_blocks(prompt, reshaped) == 0
