"""Context parallelism: attention over one sequence that is sharded across ranks.

Each rank computes the attention of its own queries and all-gathers keys and values (Llama Team
2024, arXiv:2407.21783, section 3.3.2), which are small with grouped-query attention.

Shapes: T tokens of this rank, R rows, S tokens of a chunk, P ranks, W tokens of the full sequence,
H heads, K key heads, D head dimension, M image tokens, F features of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from finesight.encode.packing import ContextShard
from finesight.model.attention import PackedAttention, Segments, varlen_attention
from finesight.model.length_buckets import copy_to_device

# Names since torch 2.13 and in earlier releases.
ALLGATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_R: Tensor, world_size: int) -> Tensor:
        all_PR = rows_R.new_empty(world_size, *rows_R.shape)
        ALLGATHER(all_PR.flatten(0, 1), rows_R.contiguous())
        return all_PR

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads_PR: Tensor) -> tuple[Tensor, None]:
        # Sum in fp32 and round once, as in a single process.
        local_R = grads_PR.new_empty(grads_PR.shape[1:], dtype=torch.float32)
        REDUCE_SCATTER(local_R, grads_PR.float().flatten(0, 1))
        return local_R.to(grads_PR.dtype), None


def all_gather_rows(rows_R: Tensor, world_size: int) -> Tensor:
    """Gather rows from all ranks by an all-gather, [P, R, ...].

    Every rank must pass the same number of rows. The backward pass reduce-scatters the gradients.
    """
    apply: Callable[..., Tensor] = _AllGather.apply
    return apply(rows_R, world_size)


@dataclass(frozen=True, kw_only=True)
class ContextParallelAttention(PackedAttention):
    """Causal attention of one rank's tokens over a sequence sharded across ranks."""

    context_shard: ContextShard

    @property
    def context_lengths_T(self) -> Tensor:
        """Length of the full sequence, repeated for each token of this rank."""
        cu_seqlens_S1 = self.segments.cu_seqlens_S1
        return cu_seqlens_S1.new_full((sum(self.segments.lengths),), self.context_shard.num_tokens)

    def __call__(self, layer_index: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Compute the attention output of this rank's tokens.

        This is a collective operation: all ranks must call it for the same layer.
        """
        k_WKD, v_WKD = self._all_gather_kv(torch.stack([k_TKD, v_TKD], dim=1)).unbind(1)
        queries = torch.split(q_THD, self.context_shard.lengths)
        outputs = [
            varlen_attention(
                q_SHD,
                k_WKD[:stop],
                v_WKD[:stop],
                query_segments,
                causal=True,
                key_segments=key_segments,
            )
            for q_SHD, (_, stop), (query_segments, key_segments) in zip(
                queries, self.context_shard.token_ranges, self._chunk_segments, strict=True
            )
            if len(q_SHD)
        ]
        return torch.cat(outputs)

    @cached_property
    def _chunk_segments(self) -> tuple[tuple[Segments, Segments], ...]:
        """Query and key segments of each chunk of this rank.

        The keys of a chunk are all tokens of the sequence up to the end of the chunk.
        """
        device = self.segments.cu_seqlens_S1.device
        return tuple(
            (Segments.from_lengths([stop - start], device), Segments.from_lengths([stop], device))
            for start, stop in self.context_shard.token_ranges
        )

    def _all_gather_kv(self, kv_T2KD: Tensor) -> Tensor:
        """Gather keys and values of all ranks in sequence order, [W, 2, K, D]."""
        shard = self.context_shard
        padded_chunks = [
            pad_rows(chunk, shard.max_range_length) for chunk in torch.split(kv_T2KD, shard.lengths)
        ]
        all_PR2KD = all_gather_rows(torch.cat(padded_chunks), shard.world_size)
        # The sequence consists of the first chunks in rank order and the second chunks in reverse
        # order.
        front, back = torch.split(all_PR2KD, shard.max_range_length, dim=1)
        full_T2KD = torch.cat([front.flatten(0, 1), back.flip(0).flatten(0, 1)])
        return full_T2KD[: shard.num_tokens]


def exchange_features(features_MFD: Tensor, shard: ContextShard) -> Tensor:
    """Exchange image features so that each rank has those of its own image tokens.

    Each rank encodes a part of the frames, which may belong to tokens of other ranks. This is a
    collective operation that all ranks must call.
    """
    # At least one row, so that the features of a dummy image remain in the autograd graph.
    max_features = max(1, *shard.features_per_rank)
    local_MFD = features_MFD[: shard.features_per_rank[shard.rank]]
    all_PMFD = all_gather_rows(pad_rows(local_MFD, max_features), shard.world_size)
    starts = np.cumsum([0, *shard.features_per_rank])
    feature_ids = np.concatenate(
        [np.arange(*feature_range) for feature_range in shard.feature_ranges]
    )
    source_ranks = np.searchsorted(starts, feature_ids, "right") - 1
    source_indices_M = copy_to_device(
        source_ranks * max_features + feature_ids - starts[source_ranks], features_MFD.device
    )
    return all_PMFD.flatten(0, 1).index_select(0, source_indices_M)


def select_shard_features(features_M: Tensor, shard: ContextShard) -> Tensor:
    """Select the features of this rank's image tokens from those of the full sample."""
    return torch.cat([features_M[start:stop] for start, stop in shard.feature_ranges])


def pad_rows(x: Tensor, num_rows: int) -> Tensor:
    """Pad a tensor with zero rows to `num_rows` rows."""
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, num_rows - len(x))) if len(x) < num_rows else x
