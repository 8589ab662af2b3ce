"""Scheduling of requests: admission, KV-cache blocks, prefill chunks and batch rows."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from finesight.encode.tokenized_sample import EncodedSample
from finesight.infer.block_manager import (
    BlockHash,
    BlockManager,
    append_tokens,
    compute_block_hashes,
    hash_images,
)
from finesight.infer.request import GenerationRequest
from finesight.infer.token_sampler import TokenSampler

MAX_PREFILL_TOKENS = 8192
"""Maximum number of prompt tokens per prefill step; bounds activation memory including images."""

MAX_MIXED_PREFILL_TOKENS = 2048
"""Maximum number of prompt tokens per step while sequences decode; bounds the decoding latency."""

MAX_MASK_WAIT_S = 0.05
"""Maximum wait per step for token bitmasks; sequences whose bitmask is late are paused."""

MASK_WAIT_PER_TOKEN_S = 0.002
"""Long-term average wait per token for the bitmasks of one sequence."""


@dataclass(slots=True)
class PromptState:
    """A prompt with its KV-cache blocks.

    Attributes:
        image_hashes: Pixel hash of each visual span.
        num_computed_tokens: Number of prompt tokens in the KV cache.
        features: Vision features that the rest of the prompt needs, by span.
    """

    encoded: EncodedSample
    block_ids: list[int]
    adapter_index: int | None
    image_hashes: tuple[bytes, ...]
    num_computed_tokens: int = 0
    features: list[Tensor | None] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.encoded.tokenized.num_tokens

    @property
    def max_position(self) -> int:
        """Largest position id in any axis; M-RoPE continues from it in all axes."""
        return int(self.encoded.tokenized.position_ids_3T.max())


@dataclass(slots=True, eq=False)
class SequenceState:
    """State of a request.

    Attributes:
        batch_index: Index in the decoding batch; None if the sequence is not decoding.
        num_scheduled: Number of tokens launched on the device; the host knows `len(output_ids)`.
        logits_V: Logits of the next token while the sequence is paused.
        mask_wait_budget_s: Time that steps may still wait for bitmasks of this sequence.
    """

    request_id: int
    request: GenerationRequest
    prompt: PromptState
    sampler: TokenSampler
    cache_salt: str
    block_hashes: list[BlockHash]
    num_cached_tokens: int = 0
    batch_index: int | None = None
    num_scheduled: int = 0
    output_ids: list[int] = field(default_factory=list)
    is_finished: bool = False
    logits_V: Tensor | None = None
    mask_wait_budget_s: float = MAX_MASK_WAIT_S

    @property
    def is_paused(self) -> bool:
        return self.logits_V is not None


class Scheduler:
    """First-come, first-served scheduler of requests; it does not run the model.

    Attributes:
        waiting: Requests without KV-cache blocks.
        prefilling: Sequences whose prompt is not in the KV cache yet.
        decoding: Sequences of the decoding batch, by row.
        paused: Sequences with a late bitmask; they hold KV-cache blocks but no batch row.
    """

    def __init__(self, *, max_num_seqs: int, num_blocks: int, block_size: int) -> None:
        self.block_manager = BlockManager(num_blocks)
        self.waiting: deque[SequenceState] = deque()
        self.prefilling: list[SequenceState] = []
        self.decoding: list[SequenceState] = []
        self.paused: list[SequenceState] = []
        self._leaving: list[SequenceState] = []
        """Sequences that `remove_finished` removes from the batch."""
        self.max_num_seqs, self.block_size = max_num_seqs, block_size
        self._request_ids = itertools.count()

    @property
    def num_running(self) -> int:
        """Number of sequences that hold KV-cache blocks."""
        return len(self.prefilling) + len(self.decoding) + len(self.paused)

    @property
    def token_budget(self) -> int:
        """Maximum number of prompt tokens of the next step."""
        return MAX_MIXED_PREFILL_TOKENS if self.decoding else MAX_PREFILL_TOKENS

    def add_request(self, request: GenerationRequest, cache_salt: str) -> int:
        """Queue a request and return its id."""
        tokenized = request.prompt.tokenized
        image_hashes = request.image_hashes
        if image_hashes is None:
            image_hashes = hash_images(request.prompt)
        sequence = SequenceState(
            request_id=next(self._request_ids),
            request=request,
            prompt=PromptState(request.prompt, [], request.adapter_index, image_hashes),
            sampler=TokenSampler(
                request.sampling_params, request.logprobs, request.constraint, tokenized.ids_T
            ),
            cache_salt=cache_salt,
            block_hashes=compute_block_hashes(tokenized, image_hashes, self.block_size, cache_salt),
        )
        self.waiting.append(sequence)
        return sequence.request_id

    def find_unfinished(self, request_id: int) -> SequenceState | None:
        """Return the sequence of an unfinished request, or None."""
        for sequence in [*self.waiting, *self.prefilling, *self.decoding, *self.paused]:
            if sequence.request_id == request_id and not sequence.is_finished:
                return sequence
        return None

    def admit_next(self) -> SequenceState | None:
        """Admit the next request if blocks, batch rows and token budget suffice."""
        num_unread = sum(
            other.prompt.num_tokens - other.prompt.num_computed_tokens for other in self.prefilling
        )
        has_row = self.num_running < self.max_num_seqs
        if not (self.waiting and has_row and num_unread < self.token_budget):
            return None
        sequence, prompt = self.waiting[0], self.waiting[0].prompt
        max_tokens = prompt.num_tokens + sequence.request.max_new_tokens
        # The last prompt token is always computed: its logits are not cached.
        reusable_hashes = sequence.block_hashes[: (prompt.num_tokens - 1) // self.block_size]
        block_ids = self.block_manager.acquire_cached(reusable_hashes)
        num_new_blocks = -(-max_tokens // self.block_size) - len(block_ids)
        if num_new_blocks > self.block_manager.num_free_blocks:
            self.block_manager.release(block_ids)
            return None
        sequence.num_cached_tokens = prompt.num_computed_tokens = len(block_ids) * self.block_size
        prompt.block_ids = block_ids + self.block_manager.allocate(num_new_blocks)
        self.prefilling.append(self.waiting.popleft())
        return sequence

    def schedule_prefill(self) -> list[tuple[SequenceState, int]]:
        """Select prompts of one adapter in FIFO order, with their chunk ends."""
        token_budget = self.token_budget
        chunks: list[tuple[SequenceState, int]] = []
        for sequence in self.prefilling:
            prompt = sequence.prompt
            if token_budget > 0 and prompt.adapter_index == self.prefilling[0].prompt.adapter_index:
                stop = min(prompt.num_tokens, prompt.num_computed_tokens + token_budget)
                token_budget -= stop - prompt.num_computed_tokens
                chunks.append((sequence, stop))
        return chunks

    def complete_prefill(self, chunks: Sequence[tuple[SequenceState, int]]) -> list[SequenceState]:
        """Cache the blocks of completed prompts and return their sequences."""
        completed = [sequence for sequence, stop in chunks if stop == sequence.prompt.num_tokens]
        for sequence in completed:
            self.block_manager.cache_blocks(
                sequence.block_hashes, sequence.prompt.block_ids[: len(sequence.block_hashes)]
            )
        self.prefilling = [item for item in self.prefilling if item not in completed]
        return completed

    def add_to_batch(self, sequence: SequenceState) -> int:
        """Add a sequence to the decoding batch and return its row."""
        sequence.batch_index = len(self.decoding)
        self.decoding.append(sequence)
        return sequence.batch_index

    def count_scheduled(self, sequences: Iterable[SequenceState]) -> None:
        """Count a launched token of each sequence; stop decoding at the maximum length."""
        for sequence in sequences:
            sequence.num_scheduled += 1
            if sequence.num_scheduled == sequence.request.max_new_tokens:
                self._leaving.append(sequence)

    def pause(self, sequence: SequenceState) -> None:
        """Pause a sequence, which leaves the batch before the next step."""
        self.paused.append(sequence)
        self._leaving.append(sequence)

    def resume(self, sequences: Sequence[SequenceState]) -> None:
        """Resume paused sequences, which `add_to_batch` then adds to the batch."""
        self.paused = [item for item in self.paused if item not in sequences]

    def finish(self, sequence: SequenceState) -> None:
        """Finish a sequence and release its blocks, cached for the next turn of a conversation."""
        prompt = sequence.prompt
        sequence.is_finished = True
        for queue in (self.waiting, self.prefilling, self.paused):
            if sequence in queue:
                queue.remove(sequence)
        self._leaving.append(sequence)
        if sequence.output_ids:
            # Keys and values of the last token have not been computed.
            tokenized = append_tokens(prompt.encoded.tokenized, sequence.output_ids[:-1])
            block_hashes = compute_block_hashes(
                tokenized, prompt.image_hashes, self.block_size, sequence.cache_salt
            )
            self.block_manager.cache_blocks(block_hashes, prompt.block_ids[: len(block_hashes)])
        self.block_manager.release(prompt.block_ids)
        prompt.block_ids = []

    def remove_finished(self) -> list[tuple[int, int]]:
        """Remove finished and paused sequences from the batch; the last row replaces a removed row.

        Must not run between sampling and `Engine._enqueue_tokens`, which identify sequences by row.

        Returns:
            Pairs of a removed row and the last row, in the order of the removals.
        """
        removed_rows = []
        for sequence in self._leaving:
            row = sequence.batch_index
            if row is not None:
                removed_rows.append((row, len(self.decoding) - 1))
                self.decoding[row] = self.decoding[-1]
                self.decoding[row].batch_index = row
                self.decoding.pop()
                sequence.batch_index = None
        self._leaving.clear()
        return removed_rows
