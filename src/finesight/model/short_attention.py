"""Attention over short sequences in plain products: for bf16 on a CPU.

There torch's fused kernel is several times slower than products (on Zen 5, 3 times forwards and
backwards at 125 tokens), as long as the scores of a sequence fit the caches. As in that kernel,
scores and their softmax are fp32: in bf16 they would cost a sixth less, and sharp weights would
lose several times as much to rounding. What the values are summed with is rounded to bf16.

Shapes: T tokens, P places of the batches, H query heads, K key heads, D numbers of a head, N
sequences of a batch, L their length, B = N K matrices, Q = H/K L queries of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finesight.model.runs import Runs

LONGEST = 512
"""Tokens of the longest sequences that products are faster for."""


def attend_short(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, runs: Runs, *, causal: bool
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each segment. The batches of `runs` may be padded only
    where attention is causal: no query looks at what follows it."""
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
        shared = k_TKD.shape[1]
        kept: list[Tensor] = []
        outputs: list[Tensor] = []
        batches = (_batches(x, runs, shared) for x in (q_THD, k_TKD, v_TKD))
        for q_BQD, k_BLD, v_BLD in zip(*batches, strict=True):
            weights_BQL = _weights(q_BQD, k_BLD, scale, causal)
            outputs.append(_places(torch.bmm(weights_BQL, v_BLD), shared, v_BLD.shape[1]))
            kept += [q_BQD, k_BLD, v_BLD, weights_BQL]
        ctx.save_for_backward(*kept)
        ctx.runs, ctx.shared, ctx.scale = runs, shared, scale
        return _joined(outputs, runs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_THD: Tensor) -> tuple[Tensor | None, ...]:
        kept, shared = iter(ctx.saved_tensors), ctx.shared
        gradients: tuple[list[Tensor], ...] = ([], [], [])
        do_PHD = _ordered(do_THD, ctx.runs)
        if ctx.runs.padding_P is not None:
            do_PHD = do_PHD.masked_fill(ctx.runs.padding_P[:, None, None], 0)
        for do_BQD in _split(do_PHD, ctx.runs, shared):
            q_BQD, k_BLD, v_BLD, weights_BQL = (next(kept) for _ in range(4))
            dscores_BQL = torch.ops.aten._softmax_backward_data(
                torch.bmm(do_BQD, v_BLD.mT), weights_BQL, -1, weights_BQL.dtype
            )
            made = (
                torch.bmm(dscores_BQL, k_BLD),
                torch.bmm(dscores_BQL.mT, q_BQD),
                torch.bmm(weights_BQL.mT, do_BQD),
            )
            for gradient, x in zip(gradients, made, strict=True):
                gradient.append(_places(x, shared, v_BLD.shape[1]))
        dq_THD, dk_TKD, dv_TKD = (_joined(gradient, ctx.runs) for gradient in gradients)
        return dq_THD.mul_(ctx.scale), dk_TKD.mul_(ctx.scale), dv_TKD, None, None


def _weights(q_BQD: Tensor, k_BLD: Tensor, scale: float, causal: bool) -> Tensor:
    """softmax(scale q k^T), computed in fp32 or wider and rounded once, to the type of `q`."""
    wide = torch.promote_types(q_BQD.dtype, torch.float32)
    length = k_BLD.shape[1]
    mask_QL = q_BQD.new_zeros(q_BQD.shape[1], length, dtype=wide)
    if causal:
        above_LL = q_BQD.new_full((length, length), -torch.inf, dtype=wide).triu_(1)
        mask_QL.view(-1, length, length).copy_(above_LL)
    scores_BQL = torch.baddbmm(mask_QL, q_BQD.to(wide), k_BLD.to(wide).mT, alpha=scale)
    return scores_BQL.softmax(-1).to(q_BQD.dtype)


def _batches(x_THD: Tensor, runs: Runs, shared: int) -> Iterator[Tensor]:
    return _split(_ordered(x_THD, runs), runs, shared)


def _ordered(x_THD: Tensor, runs: Runs) -> Tensor:
    return x_THD if runs.order_T is None else x_THD.index_select(0, runs.order_T)


def _split(x_PHD: Tensor, runs: Runs, shared: int) -> Iterator[Tensor]:
    """Each batch as matrices [B, Q, D]: the queries of heads with one key head in one matrix."""
    width = x_PHD.shape[-1]
    parts = torch.split(x_PHD, [length * count for length, count in runs.lengths])
    for (length, count), x in zip(runs.lengths, parts, strict=True):
        yield x.view(count, length, -1, width).transpose(1, 2).reshape(count * shared, -1, width)


def _places(x_BQD: Tensor, shared: int, length: int) -> Tensor:
    """The inverse of `_split` for one batch, a view: [N, L, H, D]."""
    count, width = len(x_BQD) // shared, x_BQD.shape[-1]
    return x_BQD.view(count, -1, length, width).transpose(1, 2)


def _joined(batches: list[Tensor], runs: Runs) -> Tensor:
    x_PHD = torch.cat([x_NLHD.flatten(0, 1) for x_NLHD in batches])
    return x_PHD if runs.back_T is None else x_PHD.index_select(0, runs.back_T)
