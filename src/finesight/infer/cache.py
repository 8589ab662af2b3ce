"""Keys and values of the tokens so far, and the two ways attention uses them.

Shapes: L layers, R rows (one a sequence), M room (tokens a row can hold), T tokens of a prefill
pack, H query heads, K key and value heads, G = H / K query heads of one key head, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from finesight.model.attention import Segments, attend


class KeyValueCache:
    """A static cache: one allocation for all layers, written in place, read up to the longest row.

    How long its rows are is known twice: on the device (`lengths_R`), where steps count, and to the
    host (`lengths`), which never asks the device. Zeros and not uninitialised memory: a masked
    entry has weight 0, but 0 times NaN is NaN.
    """

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        room: int,
        heads: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, rows, room, heads, width)
        self.keys_LRMKD = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LRMKD = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * rows
        self.lengths_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.prompts_R = torch.zeros(rows, dtype=torch.int64, device=device)
        """Tokens of each row's prompt."""

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def room(self) -> int:
        return self.keys_LRMKD.shape[2]

    @property
    def device(self) -> torch.device:
        return self.keys_LRMKD.device

    def write(self, layer: int, at_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Put keys and values at `at_T` = row * room + place of the layer."""
        self.keys_LRMKD[layer].view(-1, *k_TKD.shape[1:]).index_copy_(0, at_T, k_TKD)
        self.values_LRMKD[layer].view(-1, *v_TKD.shape[1:]).index_copy_(0, at_T, v_TKD)

    def grown(self, even: int) -> int:
        """Make room for a token more in every row; how far the longest reaches now, filled up to a
        multiple of `even` as far as there is room."""
        longest = max(self.lengths) + 1
        assert longest <= self.room, f"{longest} tokens for a room of {self.room}"
        self.lengths = [length + 1 for length in self.lengths]
        return min(self.room, -(-longest // even) * even)

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Give up all other rows, in place; returns which old row each new one holds.

        Kept rows at the end move into the gaps before them, so few rows are copied.
        """
        wanted = set(rows)
        gaps = [row for row in range(len(rows)) if row not in wanted]
        movers = [row for row in rows if row >= len(rows)]
        order = list(range(len(rows)))
        for gap, mover in zip(gaps, movers, strict=True):
            order[gap] = mover
            used = self.lengths[mover]
            for store in (self.keys_LRMKD, self.values_LRMKD):
                store[:, gap, :used] = store[:, mover, :used]
        self.lengths = [self.lengths[row] for row in order]
        order_R = torch.tensor(order, device=self.device)
        self.lengths_R, self.prompts_R = self.lengths_R[order_R], self.prompts_R[order_R]
        self.keys_LRMKD = self.keys_LRMKD[:, : len(order)]
        self.values_LRMKD = self.values_LRMKD[:, : len(order)]
        return order


class PrefillAttention:
    """Causal attention within each prompt of a pack; its keys and values go into the cache, the
    prompts' into the empty rows `rows`, in this order."""

    def __init__(self, cache: KeyValueCache, rows: Sequence[int], segments: Segments) -> None:
        self._cache, self._segments = cache, segments
        places: list[Tensor] = []
        for row, length in zip(rows, segments.lengths, strict=True):
            assert cache.lengths[row] == 0, f"row {row} holds {cache.lengths[row]} tokens already"
            assert length <= cache.room, f"prompt of {length} tokens for a room of {cache.room}"
            places.append(torch.arange(length) + row * cache.room)
            cache.lengths[row] = length
        self._at_T = torch.cat(places).to(cache.device)
        at_S = torch.tensor(rows, device=cache.device)
        cache.lengths_R[at_S] = torch.tensor(segments.lengths, device=cache.device)
        cache.prompts_R[at_S] = cache.lengths_R[at_S]

    @property
    def contexts_T(self) -> Tensor:
        """`Attention`: prompts are read whole."""
        return self._segments.contexts_T

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        self._cache.write(layer, self._at_T, k_TKD, v_TKD)
        return attend(q_THD, k_TKD, v_TKD, self._segments, causal=True)


class StepAttention:
    """One new token a row against all tokens of its row, itself included.

    Made anew for each step, after `KeyValueCache.grown` has said how many places to read (`seen`)
    and before the layers run: it counts the new tokens in on the device.
    """

    def __init__(self, cache: KeyValueCache, seen: int) -> None:
        self._cache, self._seen = cache, seen
        starts_R = torch.arange(cache.rows, device=cache.device) * cache.room
        self._at_R = starts_R + cache.lengths_R
        cache.lengths_R += 1
        places_M = torch.arange(seen, device=cache.device)
        self._mask_R11M = (places_M < cache.lengths_R[:, None])[:, None, None, :]

    @property
    def contexts_T(self) -> Tensor:
        """`Attention`: one new token a row."""
        return self._cache.prompts_R

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """[R, H, D] to [R, H, D]: the new tokens T are one of each row R."""
        cache = self._cache
        cache.write(layer, self._at_R, k_TKD, v_TKD)
        # The query heads that share a key head are its G "queries": no key is copied for them.
        q_RKGD = q_THD.view(cache.rows, k_TKD.shape[1], -1, q_THD.shape[-1])
        k_RKMD = cache.keys_LRMKD[layer, :, : self._seen].transpose(1, 2)
        v_RKMD = cache.values_LRMKD[layer, :, : self._seen].transpose(1, 2)
        mask = self._mask_R11M.expand(-1, *q_RKGD.shape[1:3], -1)
        o_RKGD = F.scaled_dot_product_attention(q_RKGD, k_RKMD, v_RKMD, attn_mask=mask)
        return o_RKGD.flatten(1, 2)
