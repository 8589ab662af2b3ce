"""Scheduler of the inference engine.

It admits requests, allocates KV-cache blocks, splits prompts into prefill chunks and assigns rows
of the decoding batch.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from finesight.encode.tokenization import EncodedSample
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
"""Maximum number of prompt tokens per prefill step.

It limits the activation memory, including that of images.
"""

MAX_MIXED_PREFILL_TOKENS = 2048
"""Maximum number of prompt tokens per step while other sequences decode.

It limits the decoding latency of these sequences.
"""

MAX_MASK_WAIT_S = 0.05
"""Maximum seconds per step that the engine waits for token bitmasks.

A constrained sequence whose bitmask is late is paused.
"""

MASK_WAIT_PER_TOKEN_S = 0.002
"""Average seconds per token that the engine may wait for the bitmasks of one sequence."""


@dataclass(slots=True)
class PromptState:
    """A prompt and its KV-cache blocks.

    Attributes:
        features: Vision features of each image or video that the rest of the prompt needs; None for
            others.
        state_slot: Slot of the linear attention states; 0 without a slot.
        snapshot_slot: Slot of the states at the end of the reused blocks; 0 without one.
    """

    encoded: EncodedSample
    block_ids: list[int]
    adapter_index: int | None
    image_hashes: tuple[bytes, ...]
    num_computed_tokens: int = 0
    features: list[Tensor | None] = field(default_factory=list)
    state_slot: int = 0
    snapshot_slot: int = 0

    @property
    def num_tokens(self) -> int:
        return self.encoded.tokenized.num_tokens

    @property
    def max_position(self) -> int:
        """Largest position id of the prompt in any axis.

        The M-RoPE positions of the completion continue from it in all axes.
        """
        return int(self.encoded.tokenized.position_ids_3T.max())


@dataclass(slots=True, eq=False)
class SequenceState:
    """State of a request from the queue to its end.

    Attributes:
        cache_salt: Part of the block hashes. Blocks are shared only between requests with the same
            salt.
        block_hashes: Hashes of the full prompt blocks, for prefix caching.
        num_cached_tokens: Number of prompt tokens that were found in the prefix cache.
        batch_index: Row in the decoding batch; None if the sequence is not decoding.
        num_scheduled: Number of tokens launched on the device, including those that the host has
            not read.
        output_ids: Completion tokens that the host has read.
        logits_V: Logits of the next token while the sequence is paused; else None.
        mask_wait_budget_s: Seconds that the next step may wait for the bitmask of this sequence.
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
    """First-come, first-served scheduler of requests.

    It decides which sequences a step processes, but does not run the model.

    Attributes:
        prefilling: Sequences whose prompt is not completely in the KV cache yet.
        paused: Sequences with a late bitmask, which hold KV-cache blocks but no batch row.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        num_blocks: int,
        block_size: int,
        has_linear_states: bool = False,
        num_snapshots: int = 0,
    ) -> None:
        """Create a scheduler without requests.

        With `has_linear_states`, each sequence has a slot for its linear attention states. Equal
        prompts then share blocks if there are slots for snapshots of the states.
        """
        first_slot = max_num_seqs + 1
        snapshot_slots = range(first_slot, first_slot + num_snapshots)
        self.block_manager = BlockManager(num_blocks, snapshot_slots)
        self.waiting: deque[SequenceState] = deque()
        self.prefilling: list[SequenceState] = []
        self.decoding: list[SequenceState] = []
        self.paused: list[SequenceState] = []
        self._leaving: list[SequenceState] = []
        """Sequences that `remove_finished` will remove from the decoding batch."""
        self.max_num_seqs = max_num_seqs
        self.block_size = block_size
        self._request_ids = itertools.count()
        self._has_linear_states = has_linear_states
        self._free_state_slots = list(range(max_num_seqs, 0, -1))

    @property
    def num_running(self) -> int:
        """Number of admitted sequences, which hold KV-cache blocks."""
        return len(self.prefilling) + len(self.decoding) + len(self.paused)

    @property
    def token_budget(self) -> int:
        """Maximum number of prompt tokens in the next step."""
        return MAX_MIXED_PREFILL_TOKENS if self.decoding else MAX_PREFILL_TOKENS

    def add_request(self, request: GenerationRequest, cache_salt: str) -> int:
        """Add a request to the queue and return its id.

        Blocks are shared only between requests with the same `cache_salt`.
        """
        image_hashes = request.image_hashes
        if image_hashes is None:
            image_hashes = hash_images(request.prompt)
        block_hashes: list[BlockHash] = []
        if self.block_manager.snapshot_slots or not self._has_linear_states:
            block_hashes = compute_block_hashes(
                request.prompt.tokenized, image_hashes, self.block_size, cache_salt
            )
        sequence = SequenceState(
            request_id=next(self._request_ids),
            request=request,
            prompt=PromptState(request.prompt, [], request.adapter_index, image_hashes),
            sampler=TokenSampler(request),
            cache_salt=cache_salt,
            block_hashes=block_hashes,
        )
        self.waiting.append(sequence)
        return sequence.request_id

    def find_unfinished(self, request_id: int) -> SequenceState | None:
        """Return the sequence with a request id; None if it is finished or unknown."""
        queues = self.waiting, self.prefilling, self.decoding, self.paused
        for sequence in itertools.chain(*queues):
            if sequence.request_id == request_id and not sequence.is_finished:
                return sequence
        return None

    def admit_next(self) -> SequenceState | None:
        """Admit the next request and allocate KV-cache blocks for its maximum length.

        Blocks of a cached prefix are reused. Returns None without a request, or with too few
        blocks, batch rows or prefill tokens.
        """
        num_unread = sum(
            other.prompt.num_tokens - other.prompt.num_computed_tokens for other in self.prefilling
        )
        has_row = self.num_running < self.max_num_seqs
        # A sequence that has left the batch holds its slot until the host has read its last token.
        has_slot = bool(self._free_state_slots) or not self._has_linear_states
        has_capacity = has_row and has_slot and num_unread < self.token_budget
        if not (self.waiting and has_capacity):
            return None
        sequence = self.waiting[0]
        prompt = sequence.prompt
        # An equal prompt in progress is computed once, and its blocks are reused afterwards.
        hashes = sequence.block_hashes
        if hashes and any(other.block_hashes == hashes for other in self.prefilling):
            return None
        max_tokens = prompt.num_tokens + sequence.request.max_new_tokens
        # The last prompt token is always computed: its logits are not cached.
        reusable_hashes = sequence.block_hashes[: self._count_shared_blocks(sequence)]
        if self._has_linear_states:
            prompt.snapshot_slot = self.block_manager.find_snapshot(reusable_hashes)
        is_reusable = bool(prompt.snapshot_slot) or not self._has_linear_states
        block_ids = self.block_manager.acquire_cached(reusable_hashes if is_reusable else ())
        num_new_blocks = -(-max_tokens // self.block_size) - len(block_ids)
        if num_new_blocks > self.block_manager.num_free_blocks:
            self.block_manager.release(block_ids)
            return None
        sequence.num_cached_tokens = prompt.num_computed_tokens = len(block_ids) * self.block_size
        prompt.block_ids = block_ids + self.block_manager.allocate(num_new_blocks)
        if self._has_linear_states:
            prompt.state_slot = self._free_state_slots.pop()
        self.prefilling.append(self.waiting.popleft())
        return sequence

    def _count_shared_blocks(self, sequence: SequenceState) -> int:
        """Return the number of blocks before the last token of a prompt."""
        return (sequence.prompt.num_tokens - 1) // self.block_size

    def schedule_prefill(self) -> list[tuple[SequenceState, int]]:
        """Select the prompt chunks of the next prefill step, first come, first served.

        All selected prompts use the same adapter. Prompts are divided at the ends of blocks, those
        that wait more than once where a snapshot of the linear attention states can be taken.
        """
        token_budget = self.token_budget
        chunks: list[tuple[SequenceState, int]] = []
        for sequence in self.prefilling:
            prompt = sequence.prompt
            start = prompt.num_computed_tokens
            # With a budget below one block, a prompt would otherwise never be computed.
            num_blocks = max(token_budget // self.block_size, 0 if chunks else 1)
            if num_blocks and prompt.adapter_index == self.prefilling[0].prompt.adapter_index:
                stop = min(prompt.num_tokens, start + num_blocks * self.block_size)
                end = self._count_shared_blocks(sequence) * self.block_size
                if start < end < stop and self._is_repeated(sequence):
                    stop = end
                token_budget -= stop - start
                chunks.append((sequence, stop))
        return chunks

    def _is_repeated(self, sequence: SequenceState) -> bool:
        """Return whether a waiting prompt needs a snapshot of this one."""
        hashes = sequence.block_hashes
        if not self._has_linear_states or not hashes:
            return False
        return any(other.block_hashes == hashes for other in self.waiting)

    def allocate_snapshots(
        self, chunks: Sequence[tuple[SequenceState, int]]
    ) -> list[tuple[int, int]]:
        """Return pairs of slots: the states of a processed chunk and their snapshot."""
        pairs = []
        for sequence, stop in chunks:
            count = self._count_shared_blocks(sequence)
            if count and stop == count * self.block_size and self._is_repeated(sequence):
                slot = self.block_manager.allocate_snapshot(sequence.block_hashes[count - 1])
                pairs.append((sequence.prompt.state_slot, slot))
        return pairs

    def complete_prefill(self, chunks: Sequence[tuple[SequenceState, int]]) -> list[SequenceState]:
        """Return the sequences whose prompt is complete.

        Their full prompt blocks are added to the prefix cache.
        """
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

    def count_scheduled(self, sequences: Sequence[SequenceState]) -> None:
        """Count one launched token per sequence.

        Sequences that reach their maximum length leave the batch before the next step.
        """
        for sequence in sequences:
            sequence.num_scheduled += 1
            if sequence.num_scheduled == sequence.request.max_new_tokens:
                self._leaving.append(sequence)

    def pause(self, sequence: SequenceState) -> None:
        """Pause a sequence with a late bitmask.

        It leaves the decoding batch before the next step.
        """
        self.paused.append(sequence)
        self._leaving.append(sequence)

    def finish(self, sequence: SequenceState) -> None:
        """Finish a sequence and release its KV-cache blocks.

        Full blocks stay in the prefix cache for the next turn of a conversation.
        """
        prompt = sequence.prompt
        sequence.is_finished = True
        for queue in (self.waiting, self.prefilling, self.paused):
            if sequence in queue:
                queue.remove(sequence)
        self._leaving.append(sequence)
        if prompt.state_slot:
            self._free_state_slots.append(prompt.state_slot)
            prompt.state_slot = 0
        if sequence.output_ids and not self._has_linear_states:
            # Keys and values of the last token have not been computed.
            tokenized = append_tokens(prompt.encoded.tokenized, sequence.output_ids[:-1])
            block_hashes = compute_block_hashes(
                tokenized, prompt.image_hashes, self.block_size, sequence.cache_salt
            )
            self.block_manager.cache_blocks(block_hashes, prompt.block_ids[: len(block_hashes)])
        self.block_manager.release(prompt.block_ids)
        prompt.block_ids = []

    def remove_finished(self) -> list[tuple[int, int]]:
        """Remove finished and paused sequences from the decoding batch.

        The sequence in the last row takes the row of a removed one. Must not run between sampling
        and `Engine._enqueue_tokens`, which identify sequences by row.

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
