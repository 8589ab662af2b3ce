"""Paged KV cache: blocks, prefix caching, and attention of prefill and decoding steps.

A full block of a prompt is identified by a hash of everything up to the end of the block: token
ids, position ids, image pixels and the adapter. A cached block is retained after its request
finishes, until the allocator evicts it. Prompts with the same prefix reuse it without a new
prefill.

Shapes: L layers, P blocks, S tokens per block, R sequences of the decoding batch, B blocks of one
sequence, T tokens of a packed batch, M cached positions of a sequence, H query heads, K key and
value heads, G = H / K query heads per key head, D head_dim.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from finesight.encode.packing import copy_to_device
from finesight.encode.tokenization import EncodedSample, TokenizedSample
from finesight.model.attention import Segments, varlen_attention
from finesight.model.config import DecoderConfig
from finesight.model.gated_delta_net import (
    DeltaNetInputs,
    DeltaNetState,
    forward_step,
    forward_with_states,
    update_states,
)
from finesight.model.kernels import decoding
from finesight.model.kernels.runtime import HAS_TRITON
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
    image_hashes = []
    for span_index, span in enumerate(prompt.tokenized.spans):
        hasher = hashlib.sha256(repr(span.grid_thw).encode())
        hasher.update(np.ascontiguousarray(get_span_patches(prompt, span_index)).data)
        image_hashes.append(hasher.digest())
    return tuple(image_hashes)


def get_span_patches(prompt: EncodedSample, span_index: int) -> NDArray[np.uint8]:
    """Return the patches of one image or video of a prompt.

    Patches of an image have one frame, even if the prompt also contains videos. The hash of an
    image and its cached features are then independent of the other content.
    """
    spans = prompt.tokenized.spans
    patch_counts = [math.prod(span.grid_thw) for span in spans]
    start, span = sum(patch_counts[:span_index]), spans[span_index]
    patches_ND = prompt.patches_ND[start : start + patch_counts[span_index]]
    if span.num_frames > 1:
        return patches_ND
    return first_frame(patches_ND, span.resized_size[0] // span.grid_thw[1])


class KVCache:
    """Paged KV cache of all sequences (Kwon et al. 2023, PagedAttention).

    All state is on the device, so that decoding steps need no synchronization. Memory is
    zero-initialized: a masked entry has weight 0, but 0 times NaN is NaN.

    Attributes:
        active_R: 1 for a decoding sequence, 0 for an unused row, which writes to block 0.
        state_slots_R: Slot of each sequence in `linear_states`; 0 for an unused row.
        matches_training: Whether decoder layers and attention round as in training.
    """

    def __init__(
        self,
        decoder_config: DecoderConfig,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        dtype: torch.dtype,
        device: torch.device,
        matches_training: bool = False,
        num_snapshots: int = 0,
    ) -> None:
        self.matches_training = matches_training
        heads = decoder_config.num_kv_heads, decoder_config.head_dim
        shape = decoder_config.num_full_attention_layers, num_blocks, block_size, *heads
        self.keys_LPSKD = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LPSKD = torch.zeros(shape, dtype=dtype, device=device)
        self.block_table_RB = torch.zeros(
            max_num_seqs, num_blocks, dtype=torch.int32, device=device
        )
        self.seq_lens_R, self.prompt_lens_R, self.active_R, self.state_slots_R = (
            torch.zeros(max_num_seqs, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.linear_states = (
            LinearStateCache(decoder_config, max_num_seqs, dtype, device, num_snapshots)
            if decoder_config.linear_attention is not None
            else None
        )

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.keys_LPSKD.shape[2]

    @property
    def device(self) -> torch.device:
        return self.keys_LPSKD.device

    def write(self, layer_index: int, slot_mapping_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Write the keys and values of new tokens to the cache of one layer.

        `slot_mapping_T` is the cache slot of each token: block id * S + offset in the block.
        """
        for x_XKD, new_TKD in zip(self.flatten_layer(layer_index), (k_TKD, v_TKD), strict=True):
            x_XKD.index_copy_(0, slot_mapping_T, new_TKD)

    def flatten_layer(self, layer_index: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer as views [P x S, K, D]."""
        keys_PSKD, values_PSKD = self.keys_LPSKD[layer_index], self.values_LPSKD[layer_index]
        return keys_PSKD.flatten(0, 1), values_PSKD.flatten(0, 1)


class LinearStateCache:
    """States of the linear attention layers of all sequences.

    Each sequence has a slot from its first prefill step to its end. Slot 0 is reserved for unused
    rows of the decoding batch. The last slots are snapshots of prompts.
    """

    def __init__(
        self,
        decoder_config: DecoderConfig,
        max_num_seqs: int,
        dtype: torch.dtype,
        device: torch.device,
        num_snapshots: int = 0,
    ) -> None:
        config = decoder_config.linear_attention
        assert config is not None, "a decoder without linear attention"
        num_layers = decoder_config.num_layers - decoder_config.num_full_attention_layers
        shape = num_layers, max_num_seqs + num_snapshots + 1
        conv_shape = (config.conv_kernel_size - 1, config.conv_size)
        delta_shape = (config.num_value_heads, config.key_head_dim, config.value_head_dim)
        self._conv_LSWN = torch.zeros(*shape, *conv_shape, dtype=dtype, device=device)
        wide_dtype = torch.promote_types(dtype, torch.float32)
        self._delta_LSHDV = torch.zeros(*shape, *delta_shape, dtype=wide_dtype, device=device)

    @property
    def num_bytes(self) -> int:
        return self._conv_LSWN.nbytes + self._delta_LSHDV.nbytes

    def get_layer(self, layer_index: int) -> DeltaNetState:
        """Return the states of all slots of a layer, to be updated in place."""
        return DeltaNetState(self._conv_LSWN[layer_index], self._delta_LSHDV[layer_index])

    def reset(self, slots_S: Tensor) -> None:
        """Set the states of new sequences to zero."""
        self._conv_LSWN[:, slots_S] = 0
        self._delta_LSHDV[:, slots_S] = 0

    def copy(self, source: int, target: int) -> None:
        """Copy the states of one slot to another, in all layers."""
        for x_LSX in (self._conv_LSWN, self._delta_LSHDV):
            x_LSX[:, target] = x_LSX[:, source]

    def read(self, layer_index: int, slots_S: Tensor) -> DeltaNetState:
        return DeltaNetState(*(x.index_select(0, slots_S) for x in self.get_layer(layer_index)))

    def write(self, layer_index: int, slots_S: Tensor, state: DeltaNetState) -> None:
        self._conv_LSWN[layer_index].index_copy_(0, slots_S, state.conv_SWN)
        self._delta_LSHDV[layer_index].index_copy_(0, slots_S, state.delta_SHDV)


def get_linear_state_bytes(
    decoder_config: DecoderConfig, dtype: torch.dtype, max_num_seqs: int
) -> int:
    """Return the size of `LinearStateCache` in bytes, with the reserved slot."""
    if decoder_config.linear_attention is None:
        return 0
    states = LinearStateCache(decoder_config, max_num_seqs, dtype, torch.device("meta"))
    return states.num_bytes


def get_kv_bytes_per_token(decoder_config: DecoderConfig, dtype: torch.dtype) -> int:
    """Return the KV-cache size of one token in bytes, over all layers."""
    num_elements = decoder_config.num_kv_heads * decoder_config.head_dim
    return 2 * decoder_config.num_full_attention_layers * num_elements * dtype.itemsize


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens [start, stop) of a prompt, which one prefill step processes."""

    block_ids: Sequence[int]
    start: int
    stop: int
    prompt_length: int
    state_slot: int = 0

    def compute_slot_mapping(
        self, block_size: int, start: int
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return the KV-cache slots of tokens [start, self.stop)."""
        positions = np.arange(start, self.stop)
        return (
            np.asarray(self.block_ids, dtype=np.int64)[positions // block_size] * block_size
            + positions % block_size
        )


class PrefillAttention:
    """Causal attention of packed prompt chunks over the chunk and the cached prefix.

    Calls write the keys and values of the chunks to the KV cache.
    """

    dropout_seed_1 = None

    def __init__(self, cache: KVCache, chunks: Sequence[PrefillChunk]) -> None:
        self._cache, self._chunks = cache, chunks
        device, block_size = cache.device, cache.block_size
        self._slot_mapping_T = copy_to_device(
            np.concatenate([c.compute_slot_mapping(block_size, c.start) for c in chunks]), device
        )
        self._query_segments = Segments.from_lengths((c.stop - c.start for c in chunks), device)
        self._kv_segments = Segments.from_lengths((c.stop for c in chunks), device)
        self._is_first_chunk = all(chunk.start == 0 for chunk in chunks)
        if not self._is_first_chunk:
            slot_mapping = np.concatenate([c.compute_slot_mapping(block_size, 0) for c in chunks])
            self._context_slots_M = copy_to_device(slot_mapping, device)
        if cache.linear_states is not None:
            slots = np.array([chunk.state_slot for chunk in chunks], dtype=np.int64)
            self._state_slots_S = copy_to_device(slots, device)
            if not self._is_first_chunk:
                is_new_S = np.array([chunk.start == 0 for chunk in chunks])
                cache.linear_states.reset(copy_to_device(slots[is_new_S], device))
        if cache.linear_states is not None and self.fuses_layers:
            # A response of training begins with the last token of the prompt.
            is_end_S = np.array([chunk.stop == chunk.prompt_length for chunk in chunks])
            lengths_S = np.array(self._query_segments.lengths)
            ends = lengths_S.cumsum()[is_end_S] - 1
            others = np.delete(np.arange(lengths_S.sum()), ends)
            inverse = np.argsort(np.concatenate([others, ends]))
            self._others_X, self._ends_E, self._end_slots_E, self._inverse_T = (
                copy_to_device(x, device) for x in (others, ends, slots[is_end_S], inverse)
            )
            self._other_segments = Segments.from_lengths((lengths_S - is_end_S).tolist(), device)

    @property
    def fuses_layers(self) -> bool:
        return self._cache.matches_training

    @property
    def context_lengths_T(self) -> Tensor:
        """Full prompt length for each token, independent of chunking."""
        lengths = [c.prompt_length for c in self._chunks for _ in range(c.stop - c.start)]
        return torch.tensor(lengths, device=self._cache.device)

    def __call__(self, layer_index: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Write the new keys and values, then compute attention: [T, H, D] to [T, H, D]."""
        cache = self._cache
        cache.write(layer_index, self._slot_mapping_T, k_TKD, v_TKD)
        uses_cache = not self._is_first_chunk
        if uses_cache:
            flat = cache.flatten_layer(layer_index)
            k_TKD, v_TKD = (x.index_select(0, self._context_slots_M) for x in flat)
        key_segments = self._kv_segments if uses_cache or self.fuses_layers else None
        return varlen_attention(
            q_THD, k_TKD, v_TKD, self._query_segments, causal=True, key_segments=key_segments
        )

    def linear_attention(self, layer_index: int, inputs: DeltaNetInputs) -> Tensor:
        """Continue from the states of the prompts, unless all chunks are first ones."""
        states = self._cache.linear_states
        assert states is not None, "a cache without linear attention states"
        state = None
        if not self._is_first_chunk:
            state = states.read(layer_index, self._state_slots_S)
        if not self.fuses_layers:
            o_THV, state = forward_with_states(inputs, self._query_segments, state)
            states.write(layer_index, self._state_slots_S, state)
            return o_THV
        outputs, layer = [], states.get_layer(layer_index)
        if self._other_segments.num_tokens:
            others = inputs.select(self._others_X)
            o_XHV, state = forward_with_states(others, self._other_segments, state)
            states.write(layer_index, self._state_slots_S, state)
            outputs.append(o_XHV)
        outputs.append(update_states(inputs.select(self._ends_E), layer, self._end_slots_E))
        return torch.cat(outputs)[self._inverse_T]


class DecodeAttention:
    """Attention of one new token per sequence over its cached tokens.

    Create an object for each decoding step: the constructor increments the sequence lengths on the
    device. `max_seq_len` is the length of the longest sequence. It is used only if the paged
    attention kernels are not available.
    """

    dropout_seed_1 = None

    def __init__(self, cache: KVCache, num_seqs: int, max_seq_len: int) -> None:
        self.cache, self.num_seqs = cache, num_seqs
        self.seq_lens_R = cache.seq_lens_R[:num_seqs]
        self.block_table_RB = cache.block_table_RB[:num_seqs]
        self.state_slots_R = cache.state_slots_R[:num_seqs]
        positions_R = self.seq_lens_R.clone()
        self.seq_lens_R += cache.active_R[:num_seqs]
        block_ids_R1 = self.block_table_RB.gather(
            1, (positions_R // cache.block_size).unsqueeze(1)
        ).long()
        self.slot_mapping_R = (
            block_ids_R1.squeeze(1) * cache.block_size + positions_R % cache.block_size
        )
        self._use_kernels = has_paged_kernels(cache)
        if not self._use_kernels:
            max_blocks = -(-max_seq_len // cache.block_size)
            self._block_ids_X = self.block_table_RB[:, :max_blocks].flatten().long()
            positions_M = torch.arange(max_blocks * cache.block_size, device=cache.device)
            self._mask_R11M = (positions_M < self.seq_lens_R[:, None])[:, None, None, :]

    @property
    def fuses_layers(self) -> bool:
        return self.cache.matches_training

    @property
    def context_lengths_T(self) -> Tensor:
        """Prompt length of each sequence."""
        return self.cache.prompt_lens_R[: self.num_seqs]

    def __call__(self, layer_index: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Write the new keys and values, then compute attention: [R, H, D] to [R, H, D]."""
        self.cache.write(layer_index, self.slot_mapping_R, k_TKD, v_TKD)
        return self.attend(layer_index, q_THD)

    def linear_attention(self, layer_index: int, inputs: DeltaNetInputs) -> Tensor:
        """Compute the next token of each sequence from its state, and update the state."""
        states = self.cache.linear_states
        assert states is not None, "a cache without linear attention states"
        if self.fuses_layers:
            return update_states(inputs, states.get_layer(layer_index), self.state_slots_R)
        o_RHV, state = forward_step(inputs, states.read(layer_index, self.state_slots_R))
        states.write(layer_index, self.state_slots_R, state)
        return o_RHV

    def attend(self, layer_index: int, q_RHD: Tensor) -> Tensor:
        """Compute attention [R, H, D] after the new keys and values have been cached."""
        cache = self.cache
        keys_PSKD, values_PSKD = cache.keys_LPSKD[layer_index], cache.values_LPSKD[layer_index]
        if self._use_kernels:
            attend = decoding.flash_decode if self.fuses_layers else decoding.paged_attention
            block_args = self.block_table_RB, self.seq_lens_R
            o_RHD: Tensor = attend(q_RHD, keys_PSKD, values_PSKD, *block_args)
            return o_RHD
        # Grouped-query attention: the G query heads of a key head are computed as G queries.
        q_RKGD = q_RHD.view(self.num_seqs, keys_PSKD.shape[2], -1, q_RHD.shape[-1])
        k_RKMD, v_RKMD = (self._select_blocks(x) for x in (keys_PSKD, values_PSKD))
        mask = self._mask_R11M.expand(-1, *q_RKGD.shape[1:3], -1)
        o_RKGD = F.scaled_dot_product_attention(q_RKGD, k_RKMD, v_RKMD, attn_mask=mask)
        return o_RKGD.flatten(1, 2)

    def _select_blocks(self, x_PSKD: Tensor) -> Tensor:
        x_XSKD = x_PSKD.index_select(0, self._block_ids_X)
        x_RKMD = x_XSKD.view(self.num_seqs, -1, *x_PSKD.shape[2:]).transpose(1, 2)
        # Slots after the last token may contain non-finite values of an earlier sequence.
        return x_RKMD.masked_fill_(~self._mask_R11M.transpose(2, 3), 0.0)


def has_paged_kernels(cache: KVCache) -> bool:
    """Return whether the Triton kernels of paged attention are available.

    With them, decoding needs no sequence lengths on the host.
    """
    return HAS_TRITON and cache.device.type == "cuda"
