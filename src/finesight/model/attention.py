"""Attention backends for packed sequences, used by the decoder and the vision encoders.

`varlen_attention` selects an implementation by device, dtype and segment lengths. Without a
variable-length kernel, each bucket of segments with equal or similar length is one batch.

On a CPU, bf16 attention uses explicit matmuls (`cpu_attention`). As long as the scores of a
sequence fit into the CPU caches, they are several times faster than torch's fused attention (3
times on Zen 5, forward and backward at 125 tokens). On CPUs with AMX this holds only in training.
Scores and softmax are computed in fp32: bf16 would save a sixth of the time but lose precision for
peaked attention. The attention weights are rounded to bf16.

Shapes: T tokens of the packed batch, H query heads, K key heads, D head dimension, S sequences or
segments, N sequences of one length, L that length, M rows of a batch with an expanded prefix, P
prefix tokens, or positions of the concatenated buckets.

Shapes of `cpu_attention`: X rows (heads of positions), Y a subset of them, B = N K matrices, G =
H/K query heads per key head, Q = G L queries of one matrix, C queries of a block, S keys of a
block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from finesight.encode.batch import compute_cu_seqlens, copy_to_device
from finesight.encode.context_shard import ContextShard
from finesight.model.fused_ops import apply, has_tensor_cores
from finesight.model.gated_delta_net import (
    ChunkLayout,
    DeltaNetInputs,
    forward_packed,
    forward_with_states,
)
from finesight.model.kernels import varlen_attention as varlen_kernels
from finesight.model.kernels.runtime import HAS_TRITON

MAX_LENGTH_RATIO = 2
"""Maximum length ratio of the segments in a padded bucket."""

LENGTH_MULTIPLE = 64
"""Divisor of the padded length of a bucket.

Few distinct lengths remain, which recur between packed batches. A CPU rebuilds its kernels for each
new size, which costs more than the padding.
"""


class HeadRowIndices(NamedTuple):
    """Row indices that group the heads of each segment.

    Attributes:
        order_X: Row at each bucket position.
        inverse_Y: Bucket position of each row.
        padding_Y: Positions of padding and duplicates; None if there are none.
        copies_RC: Positions of the C duplicates of each of the first R rows; None without
            duplicates.
    """

    order_X: Tensor
    inverse_Y: Tensor
    padding_Y: Tensor | None
    copies_RC: Tensor | None


@dataclass(frozen=True)
class LengthBuckets:
    """Buckets of segments, concatenated to one sequence of positions.

    Attributes:
        shapes: Segment length and number of segments of each bucket.
        order_T: Token at each position, any token for padding; None if the order is unchanged.
        inverse_T: Position of each token; None if the order is unchanged, or with a shared prefix.
        padding_P: Flags of positions after the end of a segment; None without padding.
        duplicate_P: Flags of positions with copies of tokens; None without duplicates.
    """

    shapes: tuple[tuple[int, int], ...]
    order_T: Tensor | None = None
    inverse_T: Tensor | None = None
    padding_P: Tensor | None = None
    duplicate_P: Tensor | None = None
    _head_rows_cache: dict[int, HeadRowIndices] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def bucket_sizes(self) -> list[int]:
        """Number of positions of each bucket, including padding."""
        return [length * count for length, count in self.shapes]

    @property
    def num_positions(self) -> int:
        return sum(self.bucket_sizes)

    def head_rows(self, num_heads: int) -> HeadRowIndices:
        """Return the row indices for `num_heads` heads, cached for all layers."""
        if num_heads not in self._head_rows_cache:
            self._head_rows_cache[num_heads] = self._build_head_rows(num_heads)
        return self._head_rows_cache[num_heads]

    def _build_head_rows(self, num_heads: int) -> HeadRowIndices:
        order_P = self.order_T
        if order_P is None:
            order_P = torch.arange(self.num_positions)
        order_X = self._repeat_per_head(order_P * num_heads, torch.arange(num_heads))
        padding_X = self._repeat_flags(self.padding_P, num_heads)
        duplicate_X = self._repeat_flags(self.duplicate_P, num_heads)
        unused_X = padding_X | duplicate_X
        real_Y = (~unused_X).nonzero().squeeze(1)
        unused_Y = unused_X.nonzero().squeeze(1)
        inverse_Y = torch.empty_like(real_Y)
        inverse_Y[order_X[real_Y]] = real_Y
        padding_Y = unused_Y if len(unused_Y) else None
        copies_RC = None
        if self.duplicate_P is not None:
            duplicate_Y = duplicate_X.nonzero().squeeze(1)
            rows_Y = order_X[duplicate_Y]
            # All copies of a row follow each other. Only the first rows, the prefix, have copies,
            # and each of them has the same number.
            sorted_Y = duplicate_Y[rows_Y.argsort(stable=True)]
            num_prefix_rows = int(rows_Y.max()) + 1
            copies_RC = sorted_Y.view(num_prefix_rows, -1)
        return HeadRowIndices(order_X, inverse_Y, padding_Y, copies_RC)

    def _repeat_flags(self, flags_P: Tensor | None, num_heads: int) -> Tensor:
        """Return the flags of all rows. None means that no flag is set."""
        if flags_P is None:
            flags_P = torch.zeros(self.num_positions, dtype=torch.bool)
        return self._repeat_per_head(flags_P, torch.zeros(num_heads, dtype=torch.bool))

    def _repeat_per_head(self, values_P: Tensor, offsets_H: Tensor) -> Tensor:
        """Repeat the values of each segment once per head, plus its offset."""
        parts = torch.split(values_P, self.bucket_sizes)
        repeated = []
        for part, (length, _) in zip(parts, self.shapes, strict=True):
            values_SHL = part.view(-1, 1, length) + offsets_H[:, None]
            repeated.append(values_SHL.flatten())
        return torch.cat(repeated)


def bucket_by_length(lengths: Sequence[int], device: torch.device) -> LengthBuckets:
    """Group segments of equal length; reorder tokens only if that reduces the number of buckets."""
    contiguous = _run_lengths(lengths)
    if len(contiguous) == len(set(lengths)):
        return LengthBuckets(contiguous)
    return _sort_segments(np.array(lengths), np.sort(lengths), device)


def bucket_with_padding(lengths: Sequence[int], device: torch.device) -> LengthBuckets:
    """Group segments of similar length into buckets and pad each bucket to one length."""
    sorted_S = np.sort(lengths)
    padded_S = np.empty_like(sorted_S)
    stop = len(padded_S)
    while stop:
        longest = sorted_S[stop - 1]
        start = np.searchsorted(sorted_S * MAX_LENGTH_RATIO, longest)
        padded_S[start:stop] = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        stop = int(start)
    if np.array_equal(padded_S, sorted_S):
        return bucket_by_length(lengths, device)
    return _sort_segments(np.array(lengths), padded_S, device)


def _sort_segments(
    lengths_S: NDArray[np.int64], padded_S: NDArray[np.int64], device: torch.device
) -> LengthBuckets:
    """Sort segments by length and pad them to `padded_S`, in ascending order."""
    by_length = np.argsort(lengths_S, kind="stable")
    starts = np.cumsum(lengths_S) - lengths_S
    within = np.arange(padded_S.sum()) - np.repeat(np.cumsum(padded_S) - padded_S, padded_S)
    order = np.repeat(starts[by_length], padded_S) + within
    padding = within >= np.repeat(lengths_S[by_length], padded_S)
    order[padding] = 0
    real = np.flatnonzero(~padding)
    inverse = real[np.argsort(order[real])]
    return LengthBuckets(
        _run_lengths(padded_S.tolist()),
        copy_to_device(order, device),
        copy_to_device(inverse, device),
        copy_to_device(padding, device) if padding.any() else None,
    )


def bucket_shared_prefix(lengths: Sequence[int]) -> LengthBuckets:
    """Build padded buckets of sequences with a shared prefix, on the CPU."""
    prefix_length, *suffix_lengths = lengths
    full_lengths = [prefix_length + length for length in suffix_lengths]
    starts = np.cumsum([prefix_length, *suffix_lengths[:-1]])
    sources = []
    for start, length in zip(starts, suffix_lengths, strict=True):
        sources.append(np.arange(prefix_length))
        sources.append(np.arange(start, start + length))
    source_M = np.concatenate(sources)
    # The first sequence has the prefix itself, and the others have copies of it.
    is_in_other_M = np.arange(len(source_M)) >= full_lengths[0]
    duplicate_M = (source_M < prefix_length) & is_in_other_M
    buckets = bucket_with_padding(full_lengths, torch.device("cpu"))
    order_P = buckets.order_T
    if order_P is None:
        order_P = torch.arange(len(source_M))
    duplicate_P = torch.from_numpy(duplicate_M)[order_P]
    if buckets.padding_P is not None:
        duplicate_P &= ~buckets.padding_P
    duplicates = duplicate_P if bool(duplicate_P.any()) else None
    return replace(
        buckets, order_T=torch.from_numpy(source_M)[order_P], inverse_T=None, duplicate_P=duplicates
    )


def _run_lengths(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((length, len(list(group))) for length, group in groupby(lengths))


MAX_TRITON_SEQLEN = 256
"""Maximum segment length, in tokens, for which the kernels of `kernels.varlen_attention` are the
fastest on an H200."""

_TORCH_VERSION = tuple(int(piece) for piece in torch.__version__.split(".")[:2])


class AttentionBackend(Protocol):
    """Interface of the decoder's attention over a packed batch or a KV cache."""

    @property
    def fuses_layers(self) -> bool:
        """Return whether decoder layers run as in training, with the same rounding."""
        ...

    @property
    def dropout_seed_1(self) -> Tensor | None:
        """Seed of the LoRA dropout of fused layers."""
        ...

    @property
    def context_lengths_T(self) -> Tensor:
        """Context length of the sequence of each new token, [T] on the device."""
        ...

    def __call__(self, layer_index: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Compute the attention of the new tokens in one decoder layer."""
        ...

    def linear_attention(self, layer_index: int, inputs: DeltaNetInputs) -> Tensor:
        """Compute the linear attention [T, H, V] of the new tokens in one decoder layer."""
        ...


@dataclass(frozen=True)
class Segments(ChunkLayout):
    """Boundaries of the attention segments in a packed tensor.

    A segment is a sequence of the decoder, or a frame or window of the vision encoder.
    """

    @classmethod
    def from_lengths(cls, lengths: Iterable[int], device: torch.device) -> Self:
        """Lay out sequences of these lengths and copy `cu_seqlens` to `device`."""
        lengths = tuple(lengths)
        cu_seqlens = copy_to_device(compute_cu_seqlens(lengths), device)
        return cls(lengths, cu_seqlens, max(lengths), sum(lengths))

    @cached_property
    def context_lengths_T(self) -> Tensor:
        """Length of the segment that each token belongs to, [T]."""
        return self.lengths_S.repeat_interleave(self.lengths_S, output_size=self.num_tokens)

    @cached_property
    def length_buckets(self) -> LengthBuckets:
        """Segments grouped into buckets of equal length."""
        return bucket_by_length(self.lengths, self.cu_seqlens_S1.device)

    @cached_property
    def padded_buckets(self) -> LengthBuckets:
        """Segments grouped into buckets of similar length, with padding."""
        return bucket_with_padding(self.lengths, self.cu_seqlens_S1.device)


@dataclass(frozen=True)
class PackedAttention:
    """Causal attention within each sequence of a packed batch, without a KV cache.

    Used in training and to score completions. `dropout_seed_1` (int32, on the device) seeds the
    LoRA dropout of the fused decoder layers.
    """

    segments: Segments
    dropout_seed_1: Tensor | None = None
    matches_decoding: bool = False
    """Return whether to compute the attention of responses as decoding steps of rollouts: with
    FlashAttention only, and linear attention token by token."""
    fuses_layers: ClassVar[bool] = True

    @property
    def context_lengths_T(self) -> Tensor:
        return self.segments.context_lengths_T

    def __call__(self, layer_index: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        return varlen_attention(q_THD, k_TKD, v_TKD, self.segments, causal=True)

    def linear_attention(self, layer_index: int, inputs: DeltaNetInputs) -> Tensor:
        return forward_packed(inputs, self.segments)[0]


class SharedPrefixIndices(NamedTuple):
    """Indices that expand a packed batch so that each sequence contains the shared prefix.

    The packed batch has T rows and stores the prefix of P tokens once. In the expanded batch of M
    rows, each sequence starts with a copy of the prefix.
    """

    source_indices_M: Tensor
    position_indices_T: Tensor
    prefix_indices_SP: Tensor


class _ExpandSharedPrefix(torch.autograd.Function):
    """Autograd function that copies packed rows [T, ...] to expanded rows [M, ...]."""

    @staticmethod
    def forward(ctx: Any, x_TX: Tensor, indices: SharedPrefixIndices) -> Tensor:
        ctx.indices = indices
        return x_TX.index_select(0, indices.source_indices_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MX: Tensor) -> tuple[Tensor, None]:
        _, position_indices_T, prefix_indices_SP = ctx.indices
        dx_TX = dy_MX.index_select(0, position_indices_T)
        # Sum the prefix gradients of all sequences in fp32 and round once.
        num_sequences, prefix_length = prefix_indices_SP.shape
        prefix_grads_SPX = dy_MX.index_select(0, prefix_indices_SP.flatten()).view(
            num_sequences, prefix_length, *dy_MX.shape[1:]
        )
        wide_dtype = torch.promote_types(dy_MX.dtype, torch.float32)
        dx_TX[:prefix_length] = prefix_grads_SPX.sum(0, dtype=wide_dtype)
        return dx_TX, None


class SharedPrefixAttention(PackedAttention):
    """Causal attention of sequences that share a prefix, which is computed once."""

    @property
    def context_lengths_T(self) -> Tensor:
        raise AssertionError(f"{self.prefix_length} prefix tokens have several context lengths")

    def __call__(self, layer_index: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        segments = self.segments
        full_segments = self.full_segments
        if _use_triton_attention(q_THD, full_segments) and not self.matches_decoding:
            cu_seqlens = varlen_kernels.CuSeqlens(
                segments.cu_seqlens_S1, full_segments.max_seqlen, self.prefix_length
            )
            return apply(_TritonAttention, q_THD, k_TKD, v_TKD, cu_seqlens)
        if _use_cpu_attention(q_THD, full_segments):
            return cpu_attention(q_THD, k_TKD, v_TKD, self.length_buckets, causal=True)
        k_MKD = self._expand(k_TKD)
        v_MKD = self._expand(v_TKD)
        if supports_varlen_attention(q_THD):
            return _flash_attention(q_THD, k_MKD, v_MKD, segments, full_segments, causal=True)
        o_MHD = varlen_attention(self._expand(q_THD), k_MKD, v_MKD, full_segments, causal=True)
        return o_MHD.index_select(0, self.indices.position_indices_T)

    def linear_attention(self, layer_index: int, inputs: DeltaNetInputs) -> Tensor:
        """Compute the prefix once; its state is the initial state of the other sequences."""
        prefix_layout, suffix_layout = self.chunk_layouts
        suffixes = inputs.select(slice(self.prefix_length, None))
        prefix = inputs.select(slice(self.prefix_length))
        prefix_THV, state = forward_with_states(prefix, prefix_layout)
        num_suffixes = len(suffix_layout.lengths)
        conv_SWN = state.conv_SWN.expand(num_suffixes, -1, -1)
        delta_SHDV = state.delta_SHDV.expand(num_suffixes, -1, -1, -1)
        suffix_THV, _ = forward_packed(
            suffixes, suffix_layout, conv_SWN, delta_SHDV, self.matches_decoding
        )
        return torch.cat([prefix_THV, suffix_THV])

    def _expand(self, x_TX: Tensor) -> Tensor:
        return apply(_ExpandSharedPrefix, x_TX, self.indices)

    @property
    def prefix_length(self) -> int:
        return self.segments.lengths[0]

    @cached_property
    def chunk_layouts(self) -> tuple[ChunkLayout, ChunkLayout]:
        """Chunks of the prefix and of the other sequences for linear attention."""
        prefix_length, *suffix_lengths = self.segments.lengths
        cu_seqlens_S1 = self.segments.cu_seqlens_S1
        prefix = ChunkLayout((prefix_length,), cu_seqlens_S1[:2], prefix_length, prefix_length)
        suffixes = ChunkLayout(
            tuple(suffix_lengths),
            cu_seqlens_S1[1:] - prefix_length,
            max(suffix_lengths),
            self.segments.num_tokens - prefix_length,
        )
        return prefix, suffixes

    @cached_property
    def full_segments(self) -> Segments:
        prefix_length, *suffix_lengths = self.segments.lengths
        cu_seqlens_S1 = self.segments.cu_seqlens_S1
        full_lengths = [prefix_length + length for length in suffix_lengths]
        lengths = (prefix_length, *full_lengths)
        # Each sequence starts with a copy of the prefix: 0, 0, 1, 2, ... copies precede the
        # boundaries of the prefix and the sequences.
        num_copies_S1 = torch.arange(
            -1, len(suffix_lengths) + 1, device=cu_seqlens_S1.device
        ).clamp(0)
        full_cu_seqlens_S1 = cu_seqlens_S1 + num_copies_S1 * prefix_length
        return Segments(
            lengths,
            full_cu_seqlens_S1.to(cu_seqlens_S1.dtype),
            max(lengths),
            self._num_expanded_tokens,
        )

    @property
    def _num_expanded_tokens(self) -> int:
        return self.segments.num_tokens + self.prefix_length * (len(self.segments.lengths) - 1)

    @cached_property
    def length_buckets(self) -> LengthBuckets:
        return bucket_shared_prefix(self.segments.lengths)

    @cached_property
    def indices(self) -> SharedPrefixIndices:
        """Row indices of the expanded batch, computed on the device."""
        prefix_length = self.prefix_length
        cu_seqlens_S1 = self.segments.cu_seqlens_S1
        full_cu_seqlens_S1 = self.full_segments.cu_seqlens_S1
        position_M = torch.arange(
            self._num_expanded_tokens, device=cu_seqlens_S1.device, dtype=cu_seqlens_S1.dtype
        )
        token_T = position_M[: self.segments.num_tokens]
        sequence_T = torch.searchsorted(cu_seqlens_S1[1:], token_T, right=True)
        prefix_indices_SP = full_cu_seqlens_S1[:-1, None] + token_T[:prefix_length]
        sequence_M = torch.searchsorted(full_cu_seqlens_S1[1:], position_M, right=True)
        offset_M = position_M - full_cu_seqlens_S1[sequence_M]
        suffix_source_M = cu_seqlens_S1[sequence_M] + offset_M - prefix_length * (sequence_M > 0)
        source_indices_M = torch.where(offset_M < prefix_length, offset_M, suffix_source_M)
        return SharedPrefixIndices(
            source_indices_M, token_T + prefix_length * sequence_T, prefix_indices_SP
        )


def varlen_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    segments: Segments,
    *,
    causal: bool,
    key_segments: Segments | None = None,
) -> Tensor:
    """Compute softmax(q k^T / sqrt(D)) v within each segment.

    Uses FlashAttention or Triton kernels for variable lengths where the device supports them,
    explicit matmuls or one SDPA call per segment length otherwise.
    """
    if key_segments is not None and supports_varlen_attention(q_THD):
        return _flash_attention(q_THD, k_TKD, v_TKD, segments, key_segments, causal)
    if key_segments is not None:
        assert causal, "key_segments require causal attention"
        return _suffix_attention(q_THD, k_TKD, v_TKD, segments, key_segments)
    if _use_cpu_attention(q_THD, segments):
        buckets = segments.padded_buckets if causal else segments.length_buckets
        return cpu_attention(q_THD, k_TKD, v_TKD, buckets, causal=causal)
    if not supports_varlen_attention(q_THD):
        return bucketed_attention(q_THD, k_TKD, v_TKD, segments.length_buckets, causal)
    cu_seqlens = varlen_kernels.CuSeqlens(segments.cu_seqlens_S1, segments.max_seqlen)
    if causal and _use_triton_attention(q_THD, segments):
        return apply(_TritonAttention, q_THD, k_TKD, v_TKD, cu_seqlens)
    if HAS_TRITON and not (causal or torch.is_grad_enabled()):
        return varlen_kernels.vision_attention(q_THD, k_TKD, v_TKD, cu_seqlens)
    return _flash_attention(q_THD, k_TKD, v_TKD, segments, segments, causal)


def _use_cpu_attention(q_THD: Tensor, segments: Segments) -> bool:
    """Return True if explicit matmuls are faster than torch's fused CPU attention."""
    if q_THD.is_cuda or q_THD.dtype != torch.bfloat16:
        return False
    return segments.max_seqlen <= MAX_CPU_SEQLEN and (torch.is_grad_enabled() or not has_amx_bf16())


@lru_cache
def has_amx_bf16() -> bool:
    """Return True if the CPU has AMX instructions for bf16 matrix products."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _use_triton_attention(q_THD: Tensor, segments: Segments) -> bool:
    return (
        HAS_TRITON and segments.max_seqlen <= MAX_TRITON_SEQLEN and supports_varlen_attention(q_THD)
    )


class _TritonAttention(torch.autograd.Function):
    """Autograd function of causal attention for short segments, with Triton kernels."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_seqlens: varlen_kernels.CuSeqlens
    ) -> Tensor:
        o_THD, lse_HT = varlen_kernels.attention_forward(q_THD, k_TKD, v_TKD, cu_seqlens)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, o_THD, lse_HT)
        ctx.cu_seqlens = cu_seqlens
        return o_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_TKD, v_TKD, o_THD, lse_HT = ctx.saved_tensors
        dq_THD, dk_TKD, dv_TKD = varlen_kernels.attention_backward(
            q_THD, k_TKD, v_TKD, o_THD, do_THD, lse_HT, ctx.cu_seqlens
        )
        return dq_THD, dk_TKD, dv_TKD, None


def _flash_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    query_segments: Segments,
    key_segments: Segments,
    causal: bool,
) -> Tensor:
    # Imported lazily: this loads torch's compiler, which takes as long as importing torch.
    from torch.nn.attention.varlen import varlen_attn

    # If a segment has fewer queries than keys, the causal mask is aligned to its last key.
    window_size = (-1, 0) if causal else (-1, -1)
    # Releases before 2.12 support grouped-query attention without a flag.
    options: dict[str, Any] = {}
    if _TORCH_VERSION >= (2, 12):
        options["enable_gqa"] = True
    o_THD = varlen_attn(
        q_THD,
        k_TKD,
        v_TKD,
        query_segments.cu_seqlens_S1,
        key_segments.cu_seqlens_S1,
        query_segments.max_seqlen,
        key_segments.max_seqlen,
        window_size=window_size,
        **options,
    )
    assert isinstance(o_THD, Tensor), f"varlen_attn returned {type(o_THD)}"
    return o_THD


def _suffix_attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, query_segments: Segments, key_segments: Segments
) -> Tensor:
    """Compute causal attention of the last tokens of each segment with SDPA."""
    outputs = []
    for q_LHD, k_LKD, v_LKD in zip(
        torch.split(q_THD, [*query_segments.lengths]),
        torch.split(k_TKD, [*key_segments.lengths]),
        torch.split(v_TKD, [*key_segments.lengths]),
        strict=True,
    ):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_LHD, k_LKD, v_LKD))
        all_true = torch.ones(len(q_LHD), len(k_LKD), dtype=torch.bool, device=q.device)
        # The last query attends to all keys.
        mask = all_true.tril(len(k_LKD) - len(q_LHD))
        enable_gqa = q.shape[1] > k.shape[1]
        o_1HLD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)
        outputs.append(o_1HLD.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def supports_varlen_attention(q_THD: Tensor) -> bool:
    """Return True if variable-length FlashAttention supports these queries."""
    return q_THD.shape[-1] % 8 == 0 and has_tensor_cores(q_THD.dtype, q_THD.device)


def bucketed_attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, buckets: LengthBuckets, causal: bool
) -> Tensor:
    """Compute attention with SDPA, one call per segment length."""
    # The fused kernels for CPU and older GPUs require as many key heads as query heads.
    repeats = q_THD.shape[1] // k_TKD.shape[1]
    if repeats > 1:
        k_TKD = k_TKD.repeat_interleave(repeats, dim=1)
        v_TKD = v_TKD.repeat_interleave(repeats, dim=1)
    if buckets.order_T is not None:
        q_THD = q_THD.index_select(0, buckets.order_T)
        k_TKD = k_TKD.index_select(0, buckets.order_T)
        v_TKD = v_TKD.index_select(0, buckets.order_T)
    sizes = buckets.bucket_sizes
    outputs = []
    for (length, count), *bucket in zip(
        buckets.shapes,
        torch.split(q_THD, sizes),
        torch.split(k_TKD, sizes),
        torch.split(v_TKD, sizes),
        strict=True,
    ):
        q, k, v = (torch.unflatten(x, 0, (count, length)).transpose(1, 2) for x in bucket)
        o_NHLD = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        outputs.append(o_NHLD.transpose(1, 2).flatten(0, 1))
    o_THD = torch.cat(outputs)
    if buckets.inverse_T is None:
        return o_THD
    return o_THD.index_select(0, buckets.inverse_T)


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
    """Gather the same number of rows from all ranks, [P, R, ...], with reduce-scatter backward."""
    return apply(_AllGather, rows_R, world_size)


@dataclass(frozen=True, kw_only=True)
class ContextParallelAttention(PackedAttention):
    """Causal attention of one rank's tokens over a sequence sharded across ranks."""

    context_shard: ContextShard

    @property
    def context_lengths_T(self) -> Tensor:
        cu_seqlens_S1 = self.segments.cu_seqlens_S1
        return cu_seqlens_S1.new_full((sum(self.segments.lengths),), self.context_shard.num_tokens)

    def __call__(self, layer_index: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Compute the attention output of this rank's tokens."""
        k_WKD, v_WKD = self._all_gather_kv(torch.stack([k_TKD, v_TKD], dim=1)).unbind(1)
        queries = torch.split(q_THD, self.context_shard.lengths)
        outputs = []
        for q_SHD, (_, stop), (query_segments, key_segments) in zip(
            queries, self.context_shard.token_ranges, self._chunk_segments, strict=True
        ):
            if len(q_SHD) == 0:
                continue
            o_SHD = varlen_attention(
                q_SHD,
                k_WKD[:stop],
                v_WKD[:stop],
                query_segments,
                causal=True,
                key_segments=key_segments,
            )
            outputs.append(o_SHD)
        return torch.cat(outputs)

    def linear_attention(self, layer_index: int, inputs: DeltaNetInputs) -> Tensor:
        raise AssertionError(f"layer {layer_index} has linear attention, in context parallelism")

    @cached_property
    def _chunk_segments(self) -> tuple[tuple[Segments, Segments], ...]:
        """Query and key segments of each chunk of this rank."""
        device = self.segments.cu_seqlens_S1.device
        chunk_segments = []
        for start, stop in self.context_shard.token_ranges:
            queries = Segments.from_lengths([stop - start], device)
            keys = Segments.from_lengths([stop], device)
            chunk_segments.append((queries, keys))
        return tuple(chunk_segments)

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
    """Exchange image features so that each rank has those of its own image tokens."""
    # At least one row, so that the features of a dummy image remain in the autograd graph.
    max_features = max(1, *shard.features_per_rank)
    local_MFD = features_MFD[: shard.features_per_rank[shard.rank]]
    all_PMFD = all_gather_rows(pad_rows(local_MFD, max_features), shard.world_size)
    starts = np.cumsum([0, *shard.features_per_rank])
    feature_ids = np.concatenate(
        [np.arange(*feature_range) for feature_range in shard.feature_ranges]
    )
    source_ranks = np.searchsorted(starts, feature_ids, "right") - 1
    source_rows = source_ranks * max_features + feature_ids - starts[source_ranks]
    source_indices_M = copy_to_device(source_rows, features_MFD.device)
    return all_PMFD.flatten(0, 1).index_select(0, source_indices_M)


def pad_rows(x: Tensor, num_rows: int) -> Tensor:
    """Pad a tensor with zero rows to `num_rows` rows."""
    if len(x) >= num_rows:
        return x
    # F.pad counts dimensions from the last one; only the first one is padded.
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, num_rows - len(x)))


MAX_CPU_SEQLEN = 512
"""Maximum sequence length, in tokens, for which matmuls are faster than torch's fused attention."""

QUERY_BLOCK = 64
"""Number of queries per block of scores. Causal attention skips the keys after a block."""


def cpu_attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, buckets: LengthBuckets, *, causal: bool
) -> Tensor:
    """Compute softmax(q k^T / sqrt(D)) v within each segment.

    Padded `buckets` require causal attention, so that no query attends to the padding. For tokens
    with duplicates (a shared prefix) the output of one copy is returned.
    """
    assert causal or buckets.padding_P is None, "padded buckets require causal attention"
    return apply(_CpuAttention, q_THD, k_TKD, v_TKD, buckets, causal)


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, buckets: LengthBuckets, causal: bool
    ) -> Tensor:
        scale = q_THD.shape[-1] ** -0.5
        num_kv_heads = k_TKD.shape[1]
        query_rows = buckets.head_rows(q_THD.shape[1])
        key_rows = buckets.head_rows(num_kv_heads)
        q_XD = _select_rows(q_THD, query_rows)
        k_XD = _select_rows(k_TKD, key_rows)
        v_XD = _select_rows(v_TKD, key_rows)
        o_XD = torch.empty_like(q_XD)
        weights: list[Tensor] = []
        batches = (_split_batches(x, buckets, num_kv_heads) for x in (q_XD, k_XD, v_XD, o_XD))
        for q_BQD, k_BLD, v_BLD, o_BQD in zip(*batches, strict=True):
            weights.append(_attention_weights(q_BQD, k_BLD, scale, causal))
            torch.bmm(weights[-1], v_BLD, out=o_BQD)
        ctx.save_for_backward(*query_rows, *key_rows, q_XD, k_XD, v_XD, *weights)
        ctx.buckets = buckets
        ctx.num_kv_heads = num_kv_heads
        ctx.scale = scale
        return o_XD.index_select(0, query_rows.inverse_Y).view(q_THD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_THD: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        query_rows = HeadRowIndices(*saved[:4])
        key_rows = HeadRowIndices(*saved[4:8])
        q_XD, k_XD, v_XD, *weights = saved[8:]
        num_kv_heads = ctx.num_kv_heads
        do_XD = _select_rows(do_THD, query_rows)
        if query_rows.padding_Y is not None:
            do_XD.index_fill_(0, query_rows.padding_Y, 0)
        dq_XD = torch.empty_like(q_XD)
        dk_XD = torch.empty_like(k_XD)
        dv_XD = torch.empty_like(v_XD)
        tensors = (q_XD, k_XD, v_XD, do_XD, dq_XD, dk_XD, dv_XD)
        batches = (_split_batches(x, ctx.buckets, num_kv_heads) for x in tensors)
        for weights_BQL, q_BQD, k_BLD, v_BLD, do_BQD, dq_BQD, dk_BLD, dv_BLD in zip(
            weights, *batches, strict=True
        ):
            dscores_BQL = torch.bmm(do_BQD, v_BLD.mT)
            torch.ops.aten._softmax_backward_data.out(
                dscores_BQL, weights_BQL, -1, weights_BQL.dtype, grad_input=dscores_BQL
            )
            dq_BQD.baddbmm_(dscores_BQL, k_BLD, beta=0, alpha=ctx.scale)
            dk_BLD.baddbmm_(dscores_BQL.mT, q_BQD, beta=0, alpha=ctx.scale)
            torch.bmm(weights_BQL.mT, do_BQD, out=dv_BLD)
            # Free the memory before the next iteration.
            del dscores_BQL
        head_dim = q_XD.shape[1]
        dk_TKD = _sum_duplicates(dk_XD, key_rows).view(-1, num_kv_heads, head_dim)
        dv_TKD = _sum_duplicates(dv_XD, key_rows).view(-1, num_kv_heads, head_dim)
        dq_THD = dq_XD.index_select(0, query_rows.inverse_Y).view(do_THD.shape)
        return dq_THD, dk_TKD, dv_TKD, None, None


def _attention_weights(q_BQD: Tensor, k_BLD: Tensor, scale: float, causal: bool) -> Tensor:
    """Compute softmax(scale q k^T) in at least fp32, rounded to the dtype of `q_BQD`."""
    length, head_dim = k_BLD.shape[1:]
    q_BGLD = q_BQD.view(len(k_BLD), -1, length, head_dim)
    weights_BGLL = q_BQD.new_empty(*q_BGLD.shape[:3], length)
    wide_dtype = torch.promote_types(q_BQD.dtype, torch.float32)
    k_wide_BLD = k_BLD.to(wide_dtype)
    if not causal:
        weights_BGLL.copy_(_scaled_softmax(q_BGLD.to(wide_dtype), k_wide_BLD, scale))
        return weights_BGLL.flatten(1, 2)
    causal_mask_CC = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=wide_dtype).triu_(1)
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        weights_BGLL[:, :, start:stop, :stop] = _scaled_softmax(
            q_BGLD[:, :, start:stop].to(wide_dtype),
            k_wide_BLD[:, :stop],
            scale,
            causal_mask_CC[: stop - start, : stop - start],
        )
        weights_BGLL[:, :, start:stop, stop:] = 0
    return weights_BGLL.flatten(1, 2)


def _scaled_softmax(
    q_BGCD: Tensor, k_BSD: Tensor, scale: float, causal_mask_CC: Tensor | None = None
) -> Tensor:
    """Compute the softmax of the attention scores of one query block."""
    scores_BGCS = q_BGCD.new_empty(*q_BGCD.shape[:3], k_BSD.shape[1])
    # With beta 0 the first operand is only a buffer; its content is not read.
    scores_BGCS.flatten(1, 2).baddbmm_(q_BGCD.flatten(1, 2), k_BSD.mT, beta=0, alpha=scale)
    if causal_mask_CC is not None:
        scores_BGCS[..., -len(causal_mask_CC) :] += causal_mask_CC
    return torch.softmax(scores_BGCS, -1, out=scores_BGCS)


def _select_rows(x_THD: Tensor, rows: HeadRowIndices) -> Tensor:
    return x_THD.reshape(-1, x_THD.shape[-1]).index_select(0, rows.order_X)


def _sum_duplicates(dx_XD: Tensor, rows: HeadRowIndices) -> Tensor:
    """Restore the packed row order and sum the gradients of duplicated rows in fp32."""
    dx_YD = dx_XD.index_select(0, rows.inverse_Y)
    if rows.copies_RC is not None:
        count, num_copies = rows.copies_RC.shape
        wide_dtype = torch.promote_types(dx_XD.dtype, torch.float32)
        duplicates_RCD = dx_XD.index_select(0, rows.copies_RC.flatten()).view(count, num_copies, -1)
        dx_YD[:count] = duplicates_RCD.sum(1, dtype=wide_dtype) + dx_YD[:count]
    return dx_YD


def _split_batches(x_XD: Tensor, buckets: LengthBuckets, num_kv_heads: int) -> Iterator[Tensor]:
    """Yield one batch of matrices [B, Q, D] per bucket."""
    num_heads = len(x_XD) // buckets.num_positions
    parts = torch.split(x_XD, [num_heads * size for size in buckets.bucket_sizes])
    for (_, count), x in zip(buckets.shapes, parts, strict=True):
        yield x.view(count * num_kv_heads, -1, x.shape[1])
