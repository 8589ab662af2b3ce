"""Attention for bf16 on a CPU, by explicit matmuls.

As long as the scores of a sequence fit into the CPU caches, they are several times faster than
torch's fused attention (3 times on Zen 5, forward and backward at 125 tokens). On CPUs with AMX
this holds only in training. Scores and softmax are computed in fp32: bf16 would save a sixth of the
time but lose precision for peaked attention. The attention weights are rounded to bf16.

Shapes: T tokens of the packed batch, H query heads, K key heads, D head dimension, X rows (heads of
positions in `LengthBuckets`), Y a subset of them, N sequences of a batch, L their length, B = N K
matrices, G = H/K query heads per key head, Q = G L queries of one matrix, C queries of a block, S
keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finesight.model.length_buckets import HeadRowIndices, LengthBuckets

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
    o_THD: Tensor = _CpuAttention.apply(  # type: ignore[no-untyped-call]
        q_THD, k_TKD, v_TKD, buckets, causal
    )
    return o_THD


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, buckets: LengthBuckets, causal: bool
    ) -> Tensor:
        scale = q_THD.shape[-1] ** -0.5
        query_rows, key_rows = (buckets.head_rows(x.shape[1]) for x in (q_THD, k_TKD))
        q_XD = _select_rows(q_THD, query_rows)
        k_XD, v_XD = (_select_rows(x, key_rows) for x in (k_TKD, v_TKD))
        o_XD = torch.empty_like(q_XD)
        weights: list[Tensor] = []
        batches = (_split_batches(x, buckets, k_TKD.shape[1]) for x in (q_XD, k_XD, v_XD, o_XD))
        for q_BQD, k_BLD, v_BLD, o_BQD in zip(*batches, strict=True):
            weights.append(_attention_weights(q_BQD, k_BLD, scale, causal))
            torch.bmm(weights[-1], v_BLD, out=o_BQD)
        ctx.save_for_backward(*query_rows, *key_rows, q_XD, k_XD, v_XD, *weights)
        ctx.buckets, ctx.num_kv_heads, ctx.scale = buckets, k_TKD.shape[1], scale
        return _restore_rows(o_XD, query_rows).view(q_THD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_THD: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        query_rows, key_rows = HeadRowIndices(*saved[:4]), HeadRowIndices(*saved[4:8])
        (q_XD, k_XD, v_XD), weights = saved[8:11], saved[11:]
        scale, num_kv_heads = ctx.scale, ctx.num_kv_heads
        do_XD = _select_rows(do_THD, query_rows)
        if query_rows.padding_Y is not None:
            do_XD.index_fill_(0, query_rows.padding_Y, 0)
        dq_XD, dk_XD, dv_XD = (torch.empty_like(x) for x in (q_XD, k_XD, v_XD))
        tensors = (q_XD, k_XD, v_XD, do_XD, dq_XD, dk_XD, dv_XD)
        batches = (_split_batches(x, ctx.buckets, num_kv_heads) for x in tensors)
        for weights_BQL, q_BQD, k_BLD, v_BLD, do_BQD, dq_BQD, dk_BLD, dv_BLD in zip(
            weights, *batches, strict=True
        ):
            dscores_BQL = torch.bmm(do_BQD, v_BLD.mT)
            torch.ops.aten._softmax_backward_data.out(
                dscores_BQL, weights_BQL, -1, weights_BQL.dtype, grad_input=dscores_BQL
            )
            dq_BQD.baddbmm_(dscores_BQL, k_BLD, beta=0, alpha=scale)
            dk_BLD.baddbmm_(dscores_BQL.mT, q_BQD, beta=0, alpha=scale)
            torch.bmm(weights_BQL.mT, do_BQD, out=dv_BLD)
            # Free the memory before the next iteration.
            del dscores_BQL
        dk_TKD, dv_TKD = (
            _sum_duplicates(x, key_rows).view(-1, num_kv_heads, x.shape[1]) for x in (dk_XD, dv_XD)
        )
        return _restore_rows(dq_XD, query_rows).view(do_THD.shape), dk_TKD, dv_TKD, None, None


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


def _restore_rows(x_XD: Tensor, rows: HeadRowIndices) -> Tensor:
    return x_XD.index_select(0, rows.inverse_Y)


def _sum_duplicates(dx_XD: Tensor, rows: HeadRowIndices) -> Tensor:
    """Restore the packed row order and sum the gradients of duplicated rows in fp32."""
    dx_YD = _restore_rows(dx_XD, rows)
    if rows.copies_RC is not None:
        count, num_copies = rows.copies_RC.shape
        wide_dtype = torch.promote_types(dx_XD.dtype, torch.float32)
        duplicates_RCD = dx_XD.index_select(0, rows.copies_RC.flatten()).view(count, num_copies, -1)
        dx_YD[:count] = duplicates_RCD.sum(1, dtype=wide_dtype) + dx_YD[:count]
    return dx_YD


def _split_batches(x_XD: Tensor, buckets: LengthBuckets, num_kv_heads: int) -> Iterator[Tensor]:
    """Yield one batch of matrices [B, Q, D] per bucket."""
    num_heads = len(x_XD) // buckets.num_positions
    parts = torch.split(x_XD, [num_heads * length * count for length, count in buckets.shapes])
    for (_, count), x in zip(buckets.shapes, parts, strict=True):
        yield x.view(count * num_kv_heads, -1, x.shape[1])
