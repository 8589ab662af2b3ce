"""A sequence whose tokens lie with several processes: each asks with its own queries, and all keys
and values come together (sequence parallelism by all-gather, Llama Team 2024, arXiv:2407.21783,
section 3.3.2). With grouped heads keys and values are few numbers.

Shapes: T tokens of this process, R rows, S of a stretch, P processes, W tokens of the whole
sequence, H heads, K key heads, D numbers of a head, M places of pictures, F features of each.
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

from finesight.encode.slice import Slice
from finesight.model.attention import PackedAttention, Segments, attend
from finesight.model.runs import upload

# As torch calls them from 2.13 on, and before.
GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_R: Tensor, count: int) -> Tensor:
        all_PR = rows_R.new_empty(count, *rows_R.shape)
        GATHER(all_PR.flatten(0, 1), rows_R.contiguous())
        return all_PR

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads_PR: Tensor) -> tuple[Tensor, None]:
        # Added up in fp32: in one process, too, they are rounded once.
        own_R = grads_PR.new_empty(grads_PR.shape[1:], dtype=torch.float32)
        SCATTER(own_R, grads_PR.float().flatten(0, 1))
        return own_R.to(grads_PR.dtype), None


def gathered(rows_R: Tensor, count: int) -> Tensor:
    """What all `count` processes have of it, [P, R, ...]: as many rows each. Its gradients come
    back from all of them."""
    apply: Callable[..., Tensor] = _Gathered.apply
    return apply(rows_R, count)


@dataclass(frozen=True, kw_only=True)
class SharedAttention(PackedAttention):
    """Causal attention of a process's `share` of a sequence in the whole of it."""

    share: Slice

    @property
    def contexts_T(self) -> Tensor:
        """`Attention`: the sequence is read whole."""
        bounds_S1 = self.segments.bounds_S1
        return bounds_S1.new_full((sum(self.segments.lengths),), self.share.tokens)

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """`Attention`. All processes have to come to the same layer."""
        k_WKD, v_WKD = self._whole(torch.stack([k_TKD, v_TKD], dim=1)).unbind(1)
        queries = torch.split(q_THD, self.share.lengths)
        seen = [
            attend(q_SHD, k_WKD[:stop], v_WKD[:stop], own, causal=True, keys=keys)
            for q_SHD, (_, stop), (own, keys) in zip(
                queries, self.share.stretches, self._seats, strict=True
            )
            if len(q_SHD)
        ]
        return torch.cat(seen)

    @cached_property
    def _seats(self) -> tuple[tuple[Segments, Segments], ...]:
        """Of each stretch: itself, and all up to its end."""
        device = self.segments.bounds_S1.device
        return tuple(
            (Segments.of([stop - start], device), Segments.of([stop], device))
            for start, stop in self.share.stretches
        )

    def _whole(self, kv_T2KD: Tensor) -> Tensor:
        """Keys and values of all tokens, in the order of the sequence: [W, 2, K, D]."""
        share = self.share
        pieces = [filled_up(piece, share.longest) for piece in torch.split(kv_T2KD, share.lengths)]
        all_PR2KD = gathered(torch.cat(pieces), share.count)
        # The processes' first stretches in order, then their second ones, from the last process on.
        front, back = torch.split(all_PR2KD, share.longest, dim=1)
        whole = torch.cat([front.flatten(0, 1), back.flip(0).flatten(0, 1)])
        return whole[: share.tokens]


def exchanged(features_MFD: Tensor, share: Slice) -> Tensor:
    """The features of pictures that this share's tokens stand for, out of those that each process
    has made of its own frames. All processes have to come here."""
    # One row more where nobody has any: what is made of blank pictures hangs on it, too.
    most = max(1, *share.features)
    own = features_MFD[: share.features[share.number]]
    all_PMFD = gathered(filled_up(own, most), share.count)
    starts = np.cumsum([0, *share.features])
    places = np.concatenate([np.arange(*stretch) for stretch in share.wanted])
    made_by = np.searchsorted(starts, places, "right") - 1
    at_M = upload(made_by * most + places - starts[made_by], features_MFD.device)
    return all_PMFD.flatten(0, 1).index_select(0, at_M)


def wanted(known_M: Tensor, share: Slice) -> Tensor:
    """Of what is known of a sample's pictures, what this share's tokens stand for."""
    return torch.cat([known_M[start:stop] for start, stop in share.wanted])


def filled_up(x: Tensor, rows: int) -> Tensor:
    """With rows of nothing up to so many."""
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows - len(x))) if len(x) < rows else x
