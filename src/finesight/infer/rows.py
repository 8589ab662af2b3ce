"""The device's side of answering: prompts that are read, and rows that grow by a token a step.

Shapes: R rows, V vocabulary, W model width, T tokens of a pack, M places of pictures, K features of
each, N adapters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from finesight.encode.encoded import Encoded
from finesight.encode.pack import PackedBatch, plan_packs
from finesight.infer.cache import Chunk, PagedCache, PromptAttention, StepAttention, has_kernels
from finesight.infer.pages import patches_of
from finesight.infer.quick import is_quick, quick_step
from finesight.infer.recorded import Recorded
from finesight.model.network import VisionLanguageModel
from finesight.model.runs import upload
from finesight.vision.patches import end_to_end

PATCHES = 1 << 15
"""Seen together at most, if it is several pictures: bounds the memory of activations."""

PICTURE_BYTES = 1 << 28
"""Of the features of pictures that are kept for when they come again, on a card: 37 of a thousand
tokens each of the 7B models, more of smaller ones."""

CPU_PICTURE_BYTES = 1 << 26
"""The same elsewhere, where models are small."""


@dataclass(slots=True)
class Prompt:
    """A prompt in its pages, read up to `read`; `pictures` are the digests of what it shows,
    `features` those of it that are still to be read, by span."""

    encoded: Encoded
    pages: list[int]
    adapter: int | None
    pictures: tuple[bytes, ...]
    read: int = 0
    features: list[Tensor | None] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.encoded.outline.tokens

    @property
    def position(self) -> int:
        """The largest of its positions in any row: M-RoPE goes on from there, in all alike."""
        return int(self.encoded.outline.positions_3T.max())


class Rows:
    """A model, its cache, and what the next step needs to know of each row.

    Rows from 0 on are in use, without gaps. Nothing here waits for the device.
    """

    def __init__(
        self, model: VisionLanguageModel, *, rows: int, pages: int, page: int, record: bool = True
    ) -> None:
        self.model = model
        weight = model.model.embed_tokens.weight
        self.device = weight.device
        self.cache = PagedCache(
            model.geometry.language,
            pages=pages,
            page=page,
            rows=rows,
            dtype=weight.dtype,
            device=self.device,
        )
        self.rows = rows
        self.ids_R = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.finite_R = torch.ones(rows, dtype=torch.bool, device=self.device)
        self._positions_R = torch.zeros(rows, dtype=torch.int64, device=self.device)
        recordable = record and model.recordable and has_kernels(self.cache)
        self._recorded = Recorded(self.device) if recordable else None
        self._is_quick = is_quick(model)
        self._pictures = _Pictures(
            PICTURE_BYTES if self.device.type == "cuda" else CPU_PICTURE_BYTES
        )
        readers = model.readers
        if readers is not None:
            self._masks_RN = torch.zeros_like(readers.mask(None)).repeat(rows, 1)

    def read(self, prompts: Sequence[Prompt], stops: Sequence[int]) -> Tensor | None:
        """Read each prompt on to its stop; logits [n, V] of the token after each of the n that are
        at their end then. All of one adapter."""
        if self.model.readers is not None:
            self.model.readers.choose(self.model.readers.mask(prompts[0].adapter))
        see(self.model, prompts, self._pictures)
        chunks = [
            Chunk(prompt.pages, prompt.read, stop, prompt.tokens)
            for prompt, stop in zip(prompts, stops, strict=True)
        ]
        batch, features_MKD = _packed(prompts, chunks)
        attention = PromptAttention(self.cache, chunks)
        ends = np.cumsum([chunk.stop - chunk.start for chunk in chunks]) - 1
        last = np.array([c.stop == c.tokens for c in chunks])
        only_L = upload(ends[last] if last.any() else ends[:1], self.device)
        h_LW = self.model.read(batch.to(self.device), attention, only_L, features_MKD)
        for prompt, chunk in zip(prompts, chunks, strict=True):
            prompt.read = chunk.stop
            if chunk.stop == chunk.tokens:
                prompt.features = []
        return self.model.logits(self.model.normed(h_LW)) if last.any() else None

    def start(self, row: int, prompt: Prompt, id_1: Tensor, read: int = 0) -> None:
        """Let the row grow from the end of a prompt, after its first token [1].

        `read` is how many tokens of the answer the cache holds already, before that one.
        """
        self.ids_R[row : row + 1] = id_1
        numbers = [prompt.tokens + read, prompt.tokens, 1, prompt.position + read]
        cache = self.cache
        for store, number in zip(
            (cache.lengths_R, cache.prompts_R, cache.grows_R, self._positions_R),
            numbers,
            strict=True,
        ):
            store[row].fill_(number)
        if self.model.readers is not None:
            self._masks_RN[row] = self.model.readers.mask(prompt.adapter)[0]
        pages = upload(np.array(prompt.pages, dtype=np.int32), self.device)
        cache.table_RB[row, : len(prompt.pages)] = pages

    def stop(self, row: int, last: int) -> None:
        """Take the row out of use, and put the `last` one in its place."""
        cache = self.cache
        stores = (cache.lengths_R, cache.prompts_R, cache.grows_R, self._positions_R, self.ids_R)
        if row != last:
            masks = () if self.model.readers is None else (self._masks_RN,)
            for store in (*stores, cache.table_RB, *masks):
                store[row] = store[last]
        for store in (cache.lengths_R, cache.grows_R):
            store[last].fill_(0)
        cache.table_RB[last].fill_(0)

    def step(self, rows: int, longest: int) -> Tensor:
        """Append its id to each of the first rows; logits [rows, V] of the one after it, until the
        next step, and the most probable one as its id, with whether it is a number. `longest` is
        the longest row then."""
        if self._recorded is None:
            return self._grow(rows, longest)
        even = min(evened(rows), self.rows)
        return self._recorded.run(even, lambda: self._grow(even, longest))[:rows]

    def _grow(self, rows: int, longest: int) -> Tensor:
        """What a step does on the device, in place but for the logits."""
        positions_R = self._positions_R[:rows]
        positions_R += self.cache.grows_R[:rows]
        if self.model.readers is not None:
            self.model.readers.choose(self._masks_RN[:rows])
        attention = StepAttention(self.cache, rows, longest)
        ids_R, positions_3R = self.ids_R[:rows], positions_R.expand(3, -1)
        if self._is_quick:
            logits_RV = quick_step(self.model, ids_R, positions_3R, attention)
        else:
            h_RW = self.model.step(ids_R, positions_3R, attention)
            logits_RV = self.model.logits(self.model.normed(h_RW))
        best_R, ids_R = logits_RV.max(-1)
        self.ids_R[:rows].copy_(ids_R)
        # The largest of numbers among which one is not a number is none.
        self.finite_R[:rows].copy_(best_R.isfinite())
        return logits_RV


def evened(rows: int) -> int:
    """So many rows are recorded together: 1, 2, 4 and multiples of 8."""
    return next((few for few in (1, 2, 4) if rows <= few), -(-rows // 8) * 8)


class _Pictures:
    """Features of pictures by adapter and pixels, the longest unused first, `most` bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._features: OrderedDict[tuple[int | None, bytes], Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, adapter: int | None, digest: bytes) -> Tensor | None:
        """[M, K, W] of the picture, if it is still known."""
        found = self._features.get((adapter, digest))
        if found is not None:
            self._features.move_to_end((adapter, digest))
        return found

    def put(self, adapter: int | None, digest: bytes, features_MKW: Tensor) -> None:
        """Keep features, and let the longest unused go where they are too many."""
        if (adapter, digest) in self._features:
            return
        # A copy: features of one picture must not keep those of all that were seen with it.
        self._features[adapter, digest] = features_MKW.clone()
        self._bytes += features_MKW.nbytes
        while self._bytes > self._most:
            _, oldest = self._features.popitem(last=False)
            self._bytes -= oldest.nbytes


def see(model: VisionLanguageModel, prompts: Sequence[Prompt], known: _Pictures) -> None:
    """Give each prompt the features of the pictures that it has still to read: those that are not
    known are looked at together."""
    wanted: list[tuple[Prompt, int, bytes]] = []
    for prompt in prompts:
        if prompt.features or not prompt.encoded.outline.spans:
            continue
        spans = prompt.encoded.outline.spans
        prompt.features = [None] * len(spans)
        for number, (span, digest) in enumerate(zip(spans, prompt.pictures, strict=True)):
            if span.stop > prompt.read:
                prompt.features[number] = known.get(prompt.adapter, digest)
                if prompt.features[number] is None:
                    wanted.append((prompt, number, digest))
    if not wanted:
        return
    new = {digest: (prompt.encoded, number) for prompt, number, digest in wanted}
    counts = [len(patches_of(encoded, number)) for encoded, number in new.values()]
    seen: dict[bytes, Tensor] = {}
    for members in plan_packs(counts, PATCHES):
        digests = [list(new)[member] for member in members]
        seen |= zip(digests, _looked_at(model, [new[digest] for digest in digests]), strict=True)
    for prompt, number, digest in wanted:
        prompt.features[number] = seen[digest]
        known.put(prompt.adapter, digest, seen[digest])


def _looked_at(
    model: VisionLanguageModel, pictures: Sequence[tuple[Encoded, int]]
) -> Sequence[Tensor]:
    """The features [M, K, W] of each picture, all seen together."""
    patches = [patches_of(encoded, number) for encoded, number in pictures]
    spans = [encoded.outline.spans[number] for encoded, number in pictures]
    device = model.model.embed_tokens.weight.device
    features_MKW = model.see(upload(end_to_end(patches), device), [span.grid for span in spans])
    return torch.split(features_MKW, [span.stop - span.start for span in spans])


def _packed(
    prompts: Sequence[Prompt], chunks: Sequence[Chunk]
) -> tuple[PackedBatch, Tensor | None]:
    """The chunks end to end, with the features of the pictures in them."""
    outlines = [prompt.encoded.outline for prompt in prompts]
    cuts = [slice(chunk.start, chunk.stop) for chunk in chunks]
    lengths = tuple(chunk.stop - chunk.start for chunk in chunks)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    ids_T = np.concatenate([o.ids_T[cut] for o, cut in zip(outlines, cuts, strict=True)])
    positions_3T = np.concatenate(
        [o.positions_3T[:, cut] for o, cut in zip(outlines, cuts, strict=True)], axis=1
    )
    at: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = [np.empty(0, dtype=np.int64)]
    features: list[Tensor] = []
    for prompt, chunk, begin in zip(prompts, chunks, bounds, strict=False):
        for span, seen in zip(prompt.encoded.outline.spans, prompt.features, strict=True):
            start, stop = max(span.start, chunk.start), min(span.stop, chunk.stop)
            if start < stop:
                assert seen is not None, f"a picture of {prompt.encoded.outline.id} is not seen"
                at.append(np.arange(start, stop) - chunk.start + int(begin))
                features.append(seen[start - span.start : stop - span.start])
    none = torch.empty(0, dtype=torch.int64)
    batch = PackedBatch(
        sample_ids=tuple(outline.id for outline in outlines),
        lengths=lengths,
        grids=(),
        ids_T=torch.from_numpy(ids_T.astype(np.int64)),
        positions_3T=torch.from_numpy(positions_3T.astype(np.int64)),
        bounds_S1=torch.from_numpy(bounds.astype(np.int32)),
        patches_ND=torch.empty(0, 0, dtype=torch.uint8),
        visual_at_M=torch.from_numpy(np.concatenate(at)),
        predict_L=none,
        target_L=none,
    )
    return batch, torch.cat(features) if features else None
