"""Attention of prefill chunks and decoding steps to the paged KV cache.

The names of shapes are those of `infer/kv_cache.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from finesight.encode.batch import copy_to_device
from finesight.infer.kv_cache import KVCache
from finesight.model.attention import Segments, varlen_attention
from finesight.model.gated_delta_net import (
    DeltaNetInputs,
    forward_step,
    forward_with_states,
    update_states,
)
from finesight.model.kernels import decoding
from finesight.model.kernels.runtime import HAS_TRITON


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
        block_ids = np.asarray(self.block_ids, dtype=np.int64)[positions // block_size]
        return block_ids * block_size + positions % block_size


class PrefillAttention:
    """Causal attention of packed prompt chunks over the chunk and the cached prefix.

    Calls write the keys and values of the chunks to the KV cache.
    """

    dropout_seed_1 = None

    def __init__(self, cache: KVCache, chunks: Sequence[PrefillChunk]) -> None:
        self._cache = cache
        self._chunks = chunks
        device = cache.device
        starts = [chunk.start for chunk in chunks]
        stops = [chunk.stop for chunk in chunks]
        lengths = [chunk.stop - chunk.start for chunk in chunks]
        self._slot_mapping_T = self._map_slots(starts)
        self._query_segments = Segments.from_lengths(lengths, device)
        self._kv_segments = Segments.from_lengths(stops, device)
        self._is_first_chunk = all(start == 0 for start in starts)
        if not self._is_first_chunk:
            self._context_slots_M = self._map_slots([0] * len(chunks))
        if cache.linear_states is not None:
            slots_S = np.array([chunk.state_slot for chunk in chunks], dtype=np.int64)
            self._state_slots_S = copy_to_device(slots_S, device)
            # Fused layers update the state of a prompt of one token.
            if self.fuses_layers or not self._is_first_chunk:
                is_new_S = np.array(starts) == 0
                cache.linear_states.reset(copy_to_device(slots_S[is_new_S], device))
            if self.fuses_layers:
                self._separate_prompt_ends(slots_S)

    def _map_slots(self, starts: Sequence[int]) -> Tensor:
        """Return the KV-cache slots of the tokens of each chunk from `starts` to its end."""
        block_size = self._cache.block_size
        slots = [
            chunk.compute_slot_mapping(block_size, start)
            for chunk, start in zip(self._chunks, starts, strict=True)
        ]
        return copy_to_device(np.concatenate(slots), self._cache.device)

    def _separate_prompt_ends(self, slots_S: NDArray[np.int64]) -> None:
        """Divide the tokens into the last ones of prompts and all others.

        A response of training begins with the last token of the prompt.
        """
        device = self._cache.device
        is_end_S = np.array([chunk.stop == chunk.prompt_length for chunk in self._chunks])
        lengths_S = np.array(self._query_segments.lengths)
        ends = lengths_S.cumsum()[is_end_S] - 1
        others = np.delete(np.arange(lengths_S.sum()), ends)
        inverse = np.argsort(np.concatenate([others, ends]))
        self._others_X = copy_to_device(others, device)
        self._ends_E = copy_to_device(ends, device)
        self._end_slots_E = copy_to_device(slots_S[is_end_S], device)
        self._inverse_T = copy_to_device(inverse, device)
        other_lengths = (lengths_S - is_end_S).tolist()
        self._other_segments = Segments.from_lengths(other_lengths, device)

    @property
    def fuses_layers(self) -> bool:
        return self._cache.matches_training

    @property
    def context_lengths_T(self) -> Tensor:
        """Full prompt length for each token, independent of chunking."""
        lengths: list[int] = []
        for chunk in self._chunks:
            lengths += [chunk.prompt_length] * (chunk.stop - chunk.start)
        return torch.tensor(lengths, device=self._cache.device)

    def __call__(self, layer_index: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Write the new keys and values, then compute attention: [T, H, D] to [T, H, D]."""
        cache = self._cache
        cache.write(layer_index, self._slot_mapping_T, k_TKD, v_TKD)
        if not self._is_first_chunk:
            keys, values = cache.flatten_layer(layer_index)
            k_TKD = keys.index_select(0, self._context_slots_M)
            v_TKD = values.index_select(0, self._context_slots_M)
        is_packed = self._is_first_chunk and not self.fuses_layers
        key_segments = None if is_packed else self._kv_segments
        return varlen_attention(
            q_THD, k_TKD, v_TKD, self._query_segments, causal=True, key_segments=key_segments
        )

    def linear_attention(self, layer_index: int, inputs: DeltaNetInputs) -> Tensor:
        """Continue from the states of the prompts, unless all chunks are first ones."""
        states = self._cache.linear_states
        assert states is not None, "a cache without linear attention states"
        state = None if self._is_first_chunk else states.read(layer_index, self._state_slots_S)
        if not self.fuses_layers:
            o_THV, state = forward_with_states(inputs, self._query_segments, state)
            states.write(layer_index, self._state_slots_S, state)
            return o_THV
        outputs = []
        layer = states.get_layer(layer_index)
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
        self.cache = cache
        self.num_seqs = num_seqs
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
        keys_PSKD = self.cache.keys_LPSKD[layer_index]
        values_PSKD = self.cache.values_LPSKD[layer_index]
        if self._use_kernels:
            attend = decoding.flash_decode if self.fuses_layers else decoding.paged_attention
            block_args = self.block_table_RB, self.seq_lens_R
            o_RHD: Tensor = attend(q_RHD, keys_PSKD, values_PSKD, *block_args)
            return o_RHD
        # Grouped-query attention: the G query heads of a key head are computed as G queries.
        q_RKGD = q_RHD.view(self.num_seqs, keys_PSKD.shape[2], -1, q_RHD.shape[-1])
        k_RKMD = self._select_blocks(keys_PSKD)
        v_RKMD = self._select_blocks(values_PSKD)
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
