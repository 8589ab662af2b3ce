"""Greedy generation in batches, through the same modules as training.

Prompts are packed end to end and run once (prefill), filling a key/value cache; then every
sequence grows by one token a step. On a GPU a step is recorded as a CUDA graph: a row of a few
tokens takes longer to launch its kernels than to run them. Shapes: R rows (sequences), V
vocabulary, W model width.

There is no repetition penalty and no setting for one: it lowers the odds of every token that the
prompt or the answer holds already, and so damages exactly what repeats rightly, digits of boxes
and commands of formulas. Qwen2.5-VL's generation config asks for 1.05; it is not read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from finesight.encode.encoded import Encoded, Outline
from finesight.encode.pack import pack, plan_packs
from finesight.errors import UserError
from finesight.infer.cache import KeyValueCache, PrefillAttention, StepAttention
from finesight.model.attention import Segments
from finesight.model.network import VisionLanguageModel

PREFILL_TOKENS = 8192
"""Prompt tokens run at once: bounds the memory of activations, pictures included."""

CACHE_BYTES = 7 << 30
"""Of the cache of one batch, padding included: 2^18 tokens of Qwen2-VL-2B in bf16, of others fewer
or more."""

EVEN = 256
"""On a GPU a step reads so many places of the cache or a multiple: as many serve one recording."""

STRIDE = 8
"""The same elsewhere."""


Grow = Callable[[Tensor, int], Tensor]
"""A step on the device: ids [R] and how many places to read, to logits [R, V]."""


class Session:
    """Sequences that grow together: a cache, and what the next step needs to know of each row."""

    def __init__(
        self,
        model: VisionLanguageModel,
        prompts: Sequence[Encoded],
        max_new_tokens: int,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        self._model = model
        self._prefill_tokens = prefill_tokens
        weight = model.model.embed_tokens.weight
        language = model.geometry.language
        # M-RoPE goes on from the largest position of any row, in all three rows alike.
        ends = [_last_position(prompt.outline, language.positions) for prompt in prompts]
        self._device = weight.device
        self._cache = KeyValueCache(
            layers=language.depth,
            rows=len(prompts),
            # The last token is never fed back, so its keys need no room.
            room=max(prompt.outline.tokens for prompt in prompts) + max_new_tokens - 1,
            heads=language.kv_heads,
            width=language.head_width,
            dtype=weight.dtype,
            device=self._device,
        )
        self._position_R = torch.tensor(ends, device=self._device)
        self._recorded = Recorded() if model.recordable else None
        self._prompts = prompts

    def prefill(self) -> Tensor:
        """Run all prompts; logits [R, V] of the token after each."""
        lengths = [prompt.outline.tokens for prompt in self._prompts]
        order: list[int] = []
        logits: list[Tensor] = []
        for rows in plan_packs(lengths, self._prefill_tokens):
            batch = pack([self._prompts[row] for row in rows]).to(self._device)
            segments = Segments(batch.lengths, batch.bounds_S1, max(batch.lengths))
            attention = PrefillAttention(self._cache, rows, segments)
            h_SW = self._model.read(batch, attention, batch.bounds_S1[1:].long() - 1)
            logits.append(self._model.logits(self._model.normed(h_SW)))
            order += rows
        in_order = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(logits)[torch.tensor(in_order, device=self._device)]

    def step(self, ids_R: Tensor) -> Tensor:
        """Append one token to every row; logits [R, V] of the one after it, until the next step."""
        if self._recorded is None:
            return self._grow(ids_R, self._cache.grown(STRIDE))
        return self._recorded.run(self._grow, ids_R, self._cache.grown(EVEN))

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Go on with these rows only; returns which old row each new one is."""
        order = self._cache.keep(rows)
        self._position_R = self._position_R[torch.tensor(order, device=self._device)]
        if self._recorded is not None:
            self._recorded = Recorded()
        return order

    def _grow(self, ids_R: Tensor, seen: int) -> Tensor:
        """What a step does on the device, in place but for the logits."""
        self._position_R += 1
        positions_3R = self._position_R.expand(3, -1)
        h_RW = self._model.step(ids_R, positions_3R, StepAttention(self._cache, seen))
        return self._model.logits(self._model.normed(h_RW))


class Recorded:
    """A step as CUDA graphs, one for each number of places that it reads of the cache.

    The first step is launched as it is: what it needs has to be set up before it can be recorded.
    The step is handed over with each call and not kept: a session would keep itself alive, and its
    cache with it.
    """

    def __init__(self) -> None:
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._ids_R: Tensor | None = None

    def run(self, grow: Grow, ids_R: Tensor, seen: int) -> Tensor:
        """The logits, which the next step overwrites."""
        if self._ids_R is None:
            self._ids_R = ids_R.clone()
            return grow(ids_R, seen)
        self._ids_R.copy_(ids_R)
        if seen not in self._graphs:
            self._graphs[seen] = self._record(grow, self._ids_R, seen)
        graph, logits_RV = self._graphs[seen]
        graph.replay()
        return logits_RV

    def _record(self, grow: Grow, ids_R: Tensor, seen: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Not by torch.cuda.graph: it gives all cached memory back first, which costs more than the
        # recording.
        graph, stream = torch.cuda.CUDAGraph(), _recording_stream(ids_R.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                logits_RV = grow(ids_R, seen)
            except BaseException:
                # While a recording is open, the device refuses everything else. One that the error
                # has spoiled is closed with an error of its own, which says nothing more.
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph, logits_RV


@lru_cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _last_position(outline: Outline, limit: int) -> int:
    last = int(outline.positions_3T.max())
    if last >= limit:
        raise UserError(
            f"the prompt has {outline.tokens} tokens and ends at position {last}",
            where=f"sample {outline.id:.80}",
            expected=f"positions below {limit}, the model's max_position_embeddings",
            remedy="ask with less text, or with fewer or smaller pictures",
        )
    return last


def cache_tokens(model: VisionLanguageModel) -> int:
    """How many tokens of this model the cache of one batch may hold."""
    language = model.geometry.language
    numbers = 2 * language.depth * language.kv_heads * language.head_width
    return CACHE_BYTES // (numbers * model.model.embed_tokens.weight.itemsize)


def plan_batches(
    lengths: Sequence[int], batch: int, max_new_tokens: int, most: int
) -> list[list[int]]:
    """Indices of the prompts that run together, at most `batch` of them with a cache of at most
    `most` tokens, longest first: a machine that is too small fails at once and not at the end."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches:
            room = lengths[batches[-1][0]] + max_new_tokens
            fits = (len(batches[-1]) + 1) * room <= most
            if fits and len(batches[-1]) < batch:
                batches[-1].append(i)
                continue
        batches.append([i])
    return batches


@torch.no_grad()
def generate(
    model: VisionLanguageModel,
    prompts: Sequence[Encoded],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    ended: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The most probable next token, again and again: the token ids of each answer.

    An answer ends with one of `end_ids`, which is part of it, or after `max_new_tokens` (at least
    1). All prompts run at once; the answers do not depend on which ran together (but for
    rounding). `ended` is told after each token how many answers ended with it, often 0: what it
    raises stops the generation. Raises UserError for a prompt beyond the model's positions and
    for numbers that overflow.
    """
    assert max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}, less than 1"
    session = Session(model, prompts, max_new_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    owner = list(range(len(prompts)))
    running = set(owner)
    logits_RV = session.prefill()
    if not logits_RV.isfinite().all():
        dtype = str(logits_RV.dtype).removeprefix("torch.")
        raise UserError(
            f"the model's numbers overflow in {dtype}",
            where="precision",
            expected="finite logits; fp16 ends at 65504, and some models go beyond it",
            remedy="use --precision fp32, or bf16 on a card that computes in it",
        )
    while True:
        next_R = logits_RV.argmax(dim=-1)
        # The one wait for the device in a step. A row whose sequence has ended grows on unread
        # until enough have ended to make moving the others together worthwhile.
        before = len(running)
        for row, token in enumerate(next_R.tolist()):
            if owner[row] in running:
                answer = answers[owner[row]]
                answer.append(token)
                if token in end_ids or len(answer) == max_new_tokens:
                    running.remove(owner[row])
        if ended is not None:
            ended(before - len(running))
        if not running:
            return answers
        if 4 * len(running) <= 3 * len(owner):
            order = session.keep([row for row, who in enumerate(owner) if who in running])
            owner = [owner[row] for row in order]
            next_R = next_R[torch.tensor(order, device=next_R.device)]
        logits_RV = session.step(next_R)
