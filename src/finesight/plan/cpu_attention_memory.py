"""Estimate the memory of attention on a CPU (`model.cpu_attention`) in bytes.

Update this module if the allocations of CPU attention change.
tests/plan/test_cpu_attention_memory.py compares it with measured allocations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from finesight.model.cpu_attention import QUERY_BLOCK, LengthBuckets

BF16_BYTES, FP32_BYTES, INDEX_BYTES = (
    torch.bfloat16.itemsize,
    torch.float32.itemsize,
    torch.int64.itemsize,
)
"""Bytes per element of inputs and outputs (bf16), of scores (fp32), and of indices (int64)."""

MAX_REORDERED_ELEMENTS = 1 << 18
"""Maximum number of elements, approximately, that oneDNN copies to transpose a large matrix."""


@dataclass(frozen=True, slots=True)
class CpuAttentionMemory:
    """Memory of CPU attention for one pack, whose sequences are batched by length.

    Attributes:
        query_dim: Number of query elements per token.
        kv_dim: Number of key elements per token, and also of value elements.
        num_heads: Number of query heads.
        is_causal: True in the decoder, False in the vision encoder.
        num_tokens: Number of tokens of the pack.
        buckets: Batches of sequences with similar lengths.
    """

    query_dim: int
    kv_dim: int
    num_heads: int
    is_causal: bool
    num_tokens: int
    buckets: LengthBuckets

    @property
    def saved_bytes(self) -> int:
        """Bytes saved for the backward pass: queries, keys, values and all attention weights."""
        return BF16_BYTES * (self._num_rows * self._qkv_dim + self._num_scores)

    @property
    def index_bytes(self) -> int:
        """Bytes of the gather and scatter indices that sort tokens into batches.

        There is an index per query head. Grouped-query attention adds an index per key head.
        """
        is_grouped = self.kv_dim < self.query_dim
        num_index_heads = (
            self.num_heads + is_grouped * self.num_heads * self.kv_dim // self.query_dim
        )
        return 2 * INDEX_BYTES * num_index_heads * self._num_rows

    @property
    def forward_peak(self) -> int:
        """Peak bytes of the forward pass, including the tensors saved for the backward pass."""
        sorted_bytes = BF16_BYTES * self._num_rows * (self._qkv_dim + self.query_dim)
        peak = weight_bytes = 0
        for length, count in self.buckets.shapes:
            num_rows, num_scores = self._compute_batch_size(length, count)
            weight_bytes += BF16_BYTES * num_scores
            softmax_bytes = max(self._iter_softmax_bytes(length, count))
            peak = max(
                peak,
                weight_bytes
                + FP32_BYTES * (num_rows * self.kv_dim + QUERY_BLOCK**2)
                + softmax_bytes,
            )
        # Outputs in token order, at the end.
        return sorted_bytes + max(
            peak, weight_bytes + BF16_BYTES * self.num_tokens * self.query_dim
        )

    @property
    def backward_workspace(self) -> int:
        """Peak bytes of the backward pass without saved tensors, including the output gradient."""
        sorted_elements = self._num_rows * (self.query_dim + self._qkv_dim)
        peak = max(
            self._compute_batch_size(length, count)[1] + self._reordered_elements(length)
            for length, count in self.buckets.shapes
        )
        # Gradients in token order, at the end.
        peak = max(peak, self.num_tokens * self._qkv_dim)
        return BF16_BYTES * (self.num_tokens * self.query_dim + sorted_elements + peak)

    def _iter_softmax_bytes(self, length: int, count: int) -> Iterator[int]:
        """Iterate over the fp32 bytes of queries and scores per query block."""
        for start in range(0, length, QUERY_BLOCK) if self.is_causal else (0,):
            stop = min(start + QUERY_BLOCK, length) if self.is_causal else length
            yield FP32_BYTES * count * (stop - start) * (self.query_dim + self.num_heads * stop)

    def _reordered_elements(self, length: int) -> int:
        """Return the number of elements that oneDNN copies to read weights by column."""
        num_rows = length * self.query_dim // self.kv_dim
        return torch.get_num_threads() * min(
            MAX_REORDERED_ELEMENTS, num_rows * (length + self.query_dim // self.num_heads)
        )

    @property
    def _qkv_dim(self) -> int:
        return self.query_dim + 2 * self.kv_dim

    @property
    def _num_rows(self) -> int:
        return sum(num_rows for num_rows, _ in self._iter_batch_sizes())

    @property
    def _num_scores(self) -> int:
        return sum(num_scores for _, num_scores in self._iter_batch_sizes())

    def _iter_batch_sizes(self) -> Iterator[tuple[int, int]]:
        return (self._compute_batch_size(length, count) for length, count in self.buckets.shapes)

    def _compute_batch_size(self, length: int, count: int) -> tuple[int, int]:
        """Return the number of rows and of attention scores of one batch."""
        return length * count, self.num_heads * length**2 * count
