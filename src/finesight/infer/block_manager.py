"""Blocks of the KV cache: allocation, and reuse of blocks with the same prefix.

A full block of a prompt is identified by a hash of everything up to the end of the block: token
ids, position ids, image pixels and the adapter. A cached block is retained after its request
finishes, until the allocator evicts it. Prompts with the same prefix reuse it without a new
prefill.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from finesight.encode.tokenization import EncodedSample, TokenizedSample
from finesight.vision.image_processing import first_frame

BlockHash = bytes
"""Hash of a prompt from its start to the end of a KV-cache block."""


class BlockManager:
    """Reference-counted allocator of KV-cache blocks with an LRU prefix cache.

    Block 0 is reserved: inactive batch rows write to it.
    """

    def __init__(self, num_blocks: int, snapshot_slots: Sequence[int] = ()) -> None:
        """Create an allocator; `snapshot_slots` hold copies of linear attention states."""
        assert num_blocks >= 2, f"num_blocks is {num_blocks}, less than 2: block 0 is reserved"
        self.num_blocks, self.snapshot_slots = num_blocks, snapshot_slots
        self._snapshots: OrderedDict[BlockHash, int] = OrderedDict()
        """Slot of the states at the end of a block, least recently used first."""
        self._free_blocks = list(range(num_blocks - 1, 0, -1))
        self._ref_counts: Counter[int] = Counter()
        self._block_by_hash: dict[BlockHash, int] = {}
        self._hash_by_block: dict[int, BlockHash] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()
        """Cached blocks without references, least recently used first."""

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks that can be allocated, including evictable cached blocks."""
        return len(self._free_blocks) + len(self._evictable)

    def find_snapshot(self, block_hashes: Sequence[BlockHash]) -> int:
        """Return the slot of the states at the end of these blocks, if all are cached, or 0."""
        is_cached = all(block_hash in self._block_by_hash for block_hash in block_hashes)
        if not (block_hashes and is_cached and block_hashes[-1] in self._snapshots):
            return 0
        self._snapshots.move_to_end(block_hashes[-1])
        return self._snapshots[block_hashes[-1]]

    def allocate_snapshot(self, block_hash: BlockHash) -> int:
        """Return a slot for the states at the end of a block, the least recently used one."""
        slot = self._snapshots.pop(block_hash, None)
        if slot is None and len(self._snapshots) < len(self.snapshot_slots):
            slot = self.snapshot_slots[len(self._snapshots)]
        elif slot is None:
            _, slot = self._snapshots.popitem(last=False)
        self._snapshots[block_hash] = slot
        return slot

    def acquire_cached(self, block_hashes: Iterable[BlockHash]) -> list[int]:
        """Add a reference to each cached block of the longest matching prompt prefix."""
        block_ids: list[int] = []
        for block_hash in block_hashes:
            if block_hash not in self._block_by_hash:
                break
            block_ids.append(self._block_by_hash[block_hash])
        for block_id in block_ids:
            self._evictable.pop(block_id, None)
            self._ref_counts[block_id] += 1
        return block_ids

    def allocate(self, count: int) -> list[int]:
        """Allocate `count` writable blocks; evict cached blocks if necessary."""
        assert count <= self.num_free_blocks, (
            f"{count} blocks requested, {self.num_free_blocks} free"
        )
        allocated = []
        for _ in range(count):
            if self._free_blocks:
                block_id = self._free_blocks.pop()
            else:
                block_id, _ = self._evictable.popitem(last=False)
                del self._block_by_hash[self._hash_by_block.pop(block_id)]
            self._ref_counts[block_id] = 1
            allocated.append(block_id)
        return allocated

    def cache_blocks(self, block_hashes: Sequence[BlockHash], block_ids: Sequence[int]) -> None:
        """Add full prompt blocks to the prefix cache.

        If a block with the same hash is already cached, it takes precedence.
        """
        for block_hash, block_id in zip(block_hashes, block_ids, strict=True):
            if block_hash not in self._block_by_hash and block_id not in self._hash_by_block:
                self._block_by_hash[block_hash] = block_id
                self._hash_by_block[block_id] = block_hash

    def release(self, block_ids: Iterable[int]) -> None:
        """Drop one reference to each block.

        A block without references becomes free, or evictable if it is in the prefix cache.
        """
        # Release in reverse order, so that prefixes are evicted last.
        for block_id in reversed(list(block_ids)):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                del self._ref_counts[block_id]
                if block_id in self._hash_by_block:
                    self._evictable[block_id] = None
                else:
                    self._free_blocks.append(block_id)


def compute_block_hashes(
    tokenized: TokenizedSample, image_hashes: Sequence[bytes], block_size: int, cache_salt: str
) -> list[BlockHash]:
    """Compute the hash of each full block of a prompt, for prefix caching.

    Args:
        cache_salt: Identifies the adapter and the model state, which change the keys and values.
    """
    block_hashes: list[BlockHash] = []
    parent_hash = hashlib.sha256(cache_salt.encode()).digest()
    for end in range(block_size, tokenized.num_tokens + 1, block_size):
        start = end - block_size
        hasher = hashlib.sha256(parent_hash)
        hasher.update(tokenized.ids_T[start:end].tobytes())
        hasher.update(np.ascontiguousarray(tokenized.position_ids_3T[:, start:end]).tobytes())
        for span, image_hash in zip(tokenized.spans, image_hashes, strict=True):
            if span.start < end and span.stop > start:
                hasher.update(image_hash)
        parent_hash = hasher.digest()
        block_hashes.append(parent_hash)
    return block_hashes


def append_tokens(
    tokenized: TokenizedSample, ids: Sequence[int], *, is_supervised: bool = False
) -> TokenizedSample:
    """Append completion tokens to a tokenized prompt.

    Their positions continue after the largest position of the prompt.
    """
    next_position = tokenized.position_ids_3T.max() + 1
    positions = np.arange(
        next_position, next_position + len(ids), dtype=tokenized.position_ids_3T.dtype
    )
    return replace(
        tokenized,
        ids_T=np.concatenate([tokenized.ids_T, np.array(ids, dtype=tokenized.ids_T.dtype)]),
        loss_mask_T=np.concatenate([tokenized.loss_mask_T, np.full(len(ids), is_supervised)]),
        position_ids_3T=np.concatenate(
            [tokenized.position_ids_3T, np.tile(positions, (3, 1))], axis=1
        ),
    )


def hash_images(prompt: EncodedSample) -> tuple[bytes, ...]:
    """Hash the resized pixels of each image or video of a prompt."""
    return tuple(hash_image(prompt, index) for index in range(len(prompt.tokenized.spans)))


def hash_image(prompt: EncodedSample, span_index: int) -> bytes:
    """Hash the resized pixels of one image or video of a prompt."""
    span = prompt.tokenized.spans[span_index]
    hasher = hashlib.sha256(repr(span.grid_thw).encode())
    hasher.update(np.ascontiguousarray(get_span_patches(prompt, span_index)).data)
    return hasher.digest()


def get_span_patches(prompt: EncodedSample, span_index: int) -> NDArray[np.uint8]:
    """Return the patches of one image or video of a prompt.

    Patches of an image have one frame, even if the prompt also contains videos. The hash of an
    image and its cached features are then independent of the other content.
    """
    spans = prompt.tokenized.spans
    span = spans[span_index]
    num_own = len(spans) - len(prompt.appended_patches)
    if span_index >= num_own:
        return prompt.appended_patches[span_index - num_own]
    patch_counts = [math.prod(span.grid_thw) for span in spans]
    start = sum(patch_counts[:span_index])
    patches_ND = prompt.patches_ND[start : start + patch_counts[span_index]]
    if span.num_frames > 1:
        return patches_ND
    return first_frame(patches_ND, span.resized_size[0] // span.grid_thw[1])
