"""Attention over short sequences in plain products: for bf16 on a CPU.

There torch's fused kernel is several times slower than products (on Zen 5, 3 times forwards and
backwards at 125 tokens), as long as the scores of a sequence fit the caches; forwards alone, only
where the processor has no tiles for bf16. As in that kernel,
scores and their softmax are fp32: in bf16 they would cost a sixth less, and sharp weights would
lose several times as much to rounding. What the values are summed with is rounded to bf16.

Shapes: T tokens, H query heads, K key heads, D numbers of a head, X rows of all heads of the
batches, N sequences of a batch, L their length, B = N K matrices, G = H/K query heads of one,
Q = G L queries of one, C of them at a time, S keys that these look at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finesight.model.runs import Rows, Runs

LONGEST = 512
"""Tokens of the longest sequences that products are faster for."""

AT_ONCE = 64
"""Queries of a head whose scores are computed together: where attention is causal, only those of
the keys before them."""


def attend_short(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, runs: Runs, *, causal: bool
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each segment. The batches of `runs` may be padded only
    where attention is causal: no query looks at what follows it. Of what stands in several places
    one gives the output."""
    assert causal or runs.padding_P is None, "padding would be looked at"
    o_THD: Tensor = _ShortAttention.apply(  # type: ignore[no-untyped-call]
        q_THD, k_TKD, v_TKD, runs, causal
    )
    return o_THD


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, runs: Runs, causal: bool
    ) -> Tensor:
        scale = q_THD.shape[-1] ** -0.5
        queries, keys = (runs.rows(x.shape[1]) for x in (q_THD, k_TKD))
        q_XD, k_XD, v_XD = _laid(q_THD, queries), _laid(k_TKD, keys), _laid(v_TKD, keys)
        o_XD = torch.empty_like(q_XD)
        weights: list[Tensor] = []
        every = (_batches(x, runs, k_TKD.shape[1]) for x in (q_XD, k_XD, v_XD, o_XD))
        for q_BQD, k_BLD, v_BLD, o_BQD in zip(*every, strict=True):
            weights.append(_weights(q_BQD, k_BLD, scale, causal))
            torch.bmm(weights[-1], v_BLD, out=o_BQD)
        ctx.save_for_backward(*queries, *keys, q_XD, k_XD, v_XD, *weights)
        ctx.runs, ctx.shared, ctx.scale = runs, k_TKD.shape[1], scale
        return _returned(o_XD, queries).view(q_THD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_THD: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        queries, keys, weights = Rows(*saved[:4]), Rows(*saved[4:8]), saved[11:]
        q_XD, k_XD, v_XD = saved[8:11]
        scale, shared = ctx.scale, ctx.shared
        do_XD = _laid(do_THD, queries)
        if queries.idle_Y is not None:
            do_XD.index_fill_(0, queries.idle_Y, 0)
        dq_XD, dk_XD, dv_XD = (torch.empty_like(x) for x in (q_XD, k_XD, v_XD))
        given = (q_XD, k_XD, v_XD, do_XD, dq_XD, dk_XD, dv_XD)
        every = (_batches(x, ctx.runs, shared) for x in given)
        for weights_BQL, q_BQD, k_BLD, v_BLD, do_BQD, dq_BQD, dk_BLD, dv_BLD in zip(
            weights, *every, strict=True
        ):
            dscores_BQL = _back(do_BQD, v_BLD, weights_BQL)
            dq_BQD.baddbmm_(dscores_BQL, k_BLD, beta=0, alpha=scale)
            dk_BLD.baddbmm_(dscores_BQL.mT, q_BQD, beta=0, alpha=scale)
            torch.bmm(weights_BQL.mT, do_BQD, out=dv_BLD)
            # Or they would be there until the next ones are.
            del dscores_BQL
        dk_TKD, dv_TKD = (_summed(x, keys).view(-1, shared, x.shape[1]) for x in (dk_XD, dv_XD))
        return _returned(dq_XD, queries).view(do_THD.shape), dk_TKD, dv_TKD, None, None


def _weights(q_BQD: Tensor, k_BLD: Tensor, scale: float, causal: bool) -> Tensor:
    """softmax(scale q k^T), computed in fp32 or wider and rounded once, to the type of `q`."""
    length, width = k_BLD.shape[1:]
    q_BGLD = q_BQD.view(len(k_BLD), -1, length, width)
    weights_BGLL = q_BQD.new_empty(*q_BGLD.shape[:3], length)
    wide = torch.promote_types(q_BQD.dtype, torch.float32)
    k_wide_BLD = k_BLD.to(wide)
    if not causal:
        weights_BGLL.copy_(_softmax(q_BGLD.to(wide), k_wide_BLD, scale))
        return weights_BGLL.flatten(1, 2)
    after_CC = torch.full((AT_ONCE, AT_ONCE), -torch.inf, dtype=wide).triu_(1)
    for start in range(0, length, AT_ONCE):
        stop = min(start + AT_ONCE, length)
        weights_BGLL[:, :, start:stop, :stop] = _softmax(
            q_BGLD[:, :, start:stop].to(wide),
            k_wide_BLD[:, :stop],
            scale,
            after_CC[: stop - start, : stop - start],
        )
        weights_BGLL[:, :, start:stop, stop:] = 0
    return weights_BGLL.flatten(1, 2)


def _softmax(q_BGCD: Tensor, k_BSD: Tensor, scale: float, last_CC: Tensor | None = None) -> Tensor:
    """That of the scores, to those of the last keys of which `last_CC` is added."""
    scores_BGCS = q_BGCD.new_empty(*q_BGCD.shape[:3], k_BSD.shape[1])
    # With beta 0 the first operand only gives the place, its content is not read.
    scores_BGCS.flatten(1, 2).baddbmm_(q_BGCD.flatten(1, 2), k_BSD.mT, beta=0, alpha=scale)
    if last_CC is not None:
        scores_BGCS[..., -len(last_CC) :] += last_CC
    return torch.softmax(scores_BGCS, -1, out=scores_BGCS)


def _back(do_BQD: Tensor, v_BLD: Tensor, weights_BQL: Tensor) -> Tensor:
    """The gradient by the scores."""
    made_BQL = torch.bmm(do_BQD, v_BLD.mT)
    torch.ops.aten._softmax_backward_data.out(
        made_BQL, weights_BQL, -1, weights_BQL.dtype, grad_input=made_BQL
    )
    return made_BQL


def _laid(x_THD: Tensor, rows: Rows) -> Tensor:
    return x_THD.reshape(-1, x_THD.shape[-1]).index_select(0, rows.order_X)


def _returned(x_XD: Tensor, rows: Rows) -> Tensor:
    return x_XD.index_select(0, rows.back_Y)


def _summed(dx_XD: Tensor, rows: Rows) -> Tensor:
    """`_returned`, with what comes back to copies, summed up wide and rounded once."""
    dx_YD = _returned(dx_XD, rows)
    if rows.copies_RC is not None:
        count, copies = rows.copies_RC.shape
        wide = torch.promote_types(dx_XD.dtype, torch.float32)
        copied_RCD = dx_XD.index_select(0, rows.copies_RC.flatten()).view(count, copies, -1)
        dx_YD[:count] = copied_RCD.sum(1, dtype=wide) + dx_YD[:count]
    return dx_YD


def _batches(x_XD: Tensor, runs: Runs, shared: int) -> Iterator[Tensor]:
    """Each batch as matrices [B, Q, D]: the queries of heads with one key head in one matrix."""
    heads = len(x_XD) // runs.places
    parts = torch.split(x_XD, [heads * length * count for length, count in runs.lengths])
    for (_, count), x in zip(runs.lengths, parts, strict=True):
        yield x.view(count * shared, -1, x.shape[1])
