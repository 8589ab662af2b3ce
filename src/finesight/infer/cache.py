"""Keys and values of the tokens so far, in pages, and the two ways attention uses them.

Shapes: L layers, P pages, S tokens of a page, R rows (one an answer that grows), B pages that a row
may have, T tokens of a pack, M places that a row is read up to, H query heads, K key and value
heads, G = H / K query heads of one key head, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finesight.model.attention import Segments, attend, has_varlen
from finesight.model.geometry import LanguageGeometry
from finesight.model.runs import upload

_TRITON = find_spec("triton") is not None

if _TRITON:
    from finesight.infer import kernels


class PagedCache:
    """One allocation of pages for all rows (Kwon et al. 2023, PagedAttention), written in place.

    `table_RB` says which pages a row's tokens lie in, `lengths_R` how many it has; a row that
    `grows_R` not (0) is no answer's and writes to page 0. All this is on the device, where steps
    count. Zeros and not uninitialised memory: a masked entry has weight 0, but 0 times NaN is NaN.
    """

    def __init__(
        self,
        language: LanguageGeometry,
        *,
        pages: int,
        page: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (language.depth, pages, page, language.kv_heads, language.head_width)
        self.keys_LPSKD = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LPSKD = torch.zeros(shape, dtype=dtype, device=device)
        self.table_RB = torch.zeros(rows, pages, dtype=torch.int32, device=device)
        self.lengths_R, self.prompts_R, self.grows_R = (
            torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3)
        )

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.keys_LPSKD.shape[2]

    @property
    def device(self) -> torch.device:
        return self.keys_LPSKD.device

    def write(self, layer: int, at_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Put keys and values at `at_T` = page x S + place of the layer."""
        self.flat_keys(layer).index_copy_(0, at_T, k_TKD)
        self.flat_values(layer).index_copy_(0, at_T, v_TKD)

    def flat_keys(self, layer: int) -> Tensor:
        """[P x S, K, D], a view."""
        return self.keys_LPSKD[layer].flatten(0, 1)

    def flat_values(self, layer: int) -> Tensor:
        """[P x S, K, D], a view."""
        return self.values_LPSKD[layer].flatten(0, 1)


def token_bytes(language: LanguageGeometry, dtype: torch.dtype) -> int:
    """What the keys and values of a token take."""
    numbers = 2 * language.depth * language.kv_heads * language.head_width
    return numbers * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, stop) of a prompt of `tokens`, whose tokens lie in `pages`."""

    pages: Sequence[int]
    start: int
    stop: int
    tokens: int

    def places(self, page: int, start: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Where tokens [start, stop) lie in the cache."""
        at = np.arange(start, self.stop)
        return np.asarray(self.pages, dtype=np.int64)[at // page] * page + at % page


class PromptAttention:
    """Causal attention of chunks of prompts, end to end, to themselves and to what the cache holds
    of their prompts; their keys and values go there too."""

    def __init__(self, cache: PagedCache, chunks: Sequence[Chunk]) -> None:
        self._cache, self._chunks = cache, chunks
        device, page = cache.device, cache.page
        self._at_T = upload(np.concatenate([c.places(page, c.start) for c in chunks]), device)
        self._new = Segments.of((c.stop - c.start for c in chunks), device)
        self._whole = Segments.of((c.stop for c in chunks), device)
        self._is_first = all(chunk.start == 0 for chunk in chunks)
        if not self._is_first:
            places = np.concatenate([c.places(page, 0) for c in chunks])
            self._read_at_M = upload(places, device)

    @property
    def contexts_T(self) -> Tensor:
        """`Attention`: prompts count whole, in however many chunks they are read."""
        tokens = [c.tokens for c in self._chunks for _ in range(c.stop - c.start)]
        return torch.tensor(tokens, device=self._cache.device)

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """`Attention`: [T, H, D] to [T, H, D]."""
        cache = self._cache
        cache.write(layer, self._at_T, k_TKD, v_TKD)
        if self._is_first:
            return attend(q_THD, k_TKD, v_TKD, self._new, causal=True)
        k_MKD = cache.flat_keys(layer).index_select(0, self._read_at_M)
        v_MKD = cache.flat_values(layer).index_select(0, self._read_at_M)
        if has_varlen(q_THD):
            return attend(q_THD, k_MKD, v_MKD, self._new, causal=True, keys=self._whole)
        return self._one_by_one(q_THD, k_MKD, v_MKD)

    def _one_by_one(self, q_THD: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        queries = torch.split(q_THD, list(self._new.lengths))
        keys, values = (torch.split(x, list(self._whole.lengths)) for x in (k_MKD, v_MKD))
        groups = q_THD.shape[1] // k_MKD.shape[1]
        pieces = []
        for chunk, q, k, v in zip(self._chunks, queries, keys, values, strict=True):
            at_T = torch.arange(chunk.start, chunk.stop, device=q.device)
            mask_TM = torch.arange(chunk.stop, device=q.device) <= at_T[:, None]
            k, v = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k, v))
            o = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=mask_TM)
            pieces.append(o.transpose(0, 1))
        return torch.cat(pieces)


class StepAttention:
    """One new token of each of the first rows against all tokens of its row, itself included.

    Made anew for each step, before the layers run: it counts the new tokens in, on the device.
    `longest` is how many tokens the longest row has then, and is asked for only where there are no
    kernels.
    """

    def __init__(self, cache: PagedCache, rows: int, longest: int) -> None:
        self.cache, self.rows = cache, rows
        self.lengths_R = cache.lengths_R[:rows]
        self.table_RB = cache.table_RB[:rows]
        last_R = self.lengths_R.clone()
        self.lengths_R += cache.grows_R[:rows]
        page_R1 = self.table_RB.gather(1, (last_R // cache.page).unsqueeze(1)).long()
        self.at_R = page_R1.squeeze(1) * cache.page + last_R % cache.page
        self._kernels = has_kernels(cache)
        if not self._kernels:
            blocks = -(-longest // cache.page)
            self._pages_X = self.table_RB[:, :blocks].flatten().long()
            places_M = torch.arange(blocks * cache.page, device=cache.device)
            self._mask_R11M = (places_M < self.lengths_R[:, None])[:, None, None, :]

    @property
    def contexts_T(self) -> Tensor:
        """`Attention`: one new token a row."""
        return self.cache.prompts_R[: self.rows]

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """`Attention`, [R, H, D] to [R, H, D]: the new tokens T are one of each row R."""
        self.cache.write(layer, self.at_R, k_TKD, v_TKD)
        return self.look(layer, q_THD)

    def look(self, layer: int, q_RHD: Tensor) -> Tensor:
        """The same where the new keys and values lie in the cache already."""
        cache = self.cache
        keys_PSKD, values_PSKD = cache.keys_LPSKD[layer], cache.values_LPSKD[layer]
        if self._kernels:
            at = self.table_RB, self.lengths_R
            o_RHD: Tensor = kernels.attend_pages(q_RHD, keys_PSKD, values_PSKD, *at)
            return o_RHD
        # The query heads that share a key head are its G "queries": no key is copied for them.
        q_RKGD = q_RHD.view(self.rows, keys_PSKD.shape[2], -1, q_RHD.shape[-1])
        k_RKMD, v_RKMD = (self._gathered(x) for x in (keys_PSKD, values_PSKD))
        mask = self._mask_R11M.expand(-1, *q_RKGD.shape[1:3], -1)
        o_RKGD = F.scaled_dot_product_attention(q_RKGD, k_RKMD, v_RKMD, attn_mask=mask)
        return o_RKGD.flatten(1, 2)

    def _gathered(self, x_PSKD: Tensor) -> Tensor:
        x_XSKD = x_PSKD.index_select(0, self._pages_X)
        x_RKMD = x_XSKD.view(self.rows, -1, *x_PSKD.shape[2:]).transpose(1, 2)
        # What overflowed in an earlier answer may lie beyond this one's last token.
        return x_RKMD.masked_fill_(~self._mask_R11M.transpose(2, 3), 0.0)


def has_kernels(cache: PagedCache) -> bool:
    """Whether rows are read in their pages, without asking the host how long they are."""
    return _TRITON and cache.device.type == "cuda"
