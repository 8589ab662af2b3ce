"""Continuous batching: requests join and leave the batch while other sequences decode.

Each step prefills a chunk of the waiting prompts and decodes one token of every running sequence.
On a GPU the next step is launched before the host has read the tokens of the previous step, so the
device does not idle. As a result, a finished sequence decodes one more token, which is
discarded.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from finesight.encode.tokenized_sample import EncodedSample
from finesight.errors import UserError
from finesight.infer.async_copy import AsyncTokens
from finesight.infer.block_manager import (
    BlockHash,
    BlockManager,
    append_tokens,
    compute_block_hashes,
    hash_images,
)
from finesight.infer.kv_cache import get_kv_bytes_per_token
from finesight.infer.model_runner import ModelRunner, PromptState
from finesight.infer.request import EngineEvent, FinishReason, GeneratedToken, GenerationRequest
from finesight.infer.token_sampler import SampledTokens, TokenSampler, sample_tokens
from finesight.model.vlm import VisionLanguageModel

MAX_PREFILL_TOKENS = 8192
"""Maximum number of prompt tokens per prefill step; bounds activation memory including images."""

MAX_MIXED_PREFILL_TOKENS = 2048
"""Maximum number of prompt tokens per step while sequences decode; bounds the decoding latency."""

KV_CACHE_BYTES = 7 << 30
"""Size of the KV cache: 2^18 tokens of Qwen2-VL-2B in bf16."""

GPU_BLOCK_SIZE = 64
"""Tokens per KV-cache block on a GPU."""

CPU_BLOCK_SIZE = 16
"""Tokens per block on CPU, where each step copies the blocks of a sequence."""

MAX_MASK_WAIT_S = 0.05
"""Maximum wait per step for token bitmasks; sequences whose bitmask is late are paused."""

MASK_WAIT_PER_TOKEN_S = 0.002
"""Long-term average wait per token for the bitmasks of one sequence."""


@dataclass(slots=True, eq=False)
class _Sequence:
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
    cache_salt: str
    block_hashes: list[BlockHash]
    num_cached_tokens: int
    sampler: TokenSampler
    batch_index: int | None = None
    num_scheduled: int = 0
    output_ids: list[int] = field(default_factory=list)
    is_finished: bool = False
    logits_V: Tensor | None = None
    mask_wait_budget_s: float = MAX_MASK_WAIT_S


@dataclass(frozen=True, slots=True)
class _PendingTokens:
    """Tokens of one launched step; None for a paused sequence."""

    sequences: list[_Sequence | None]
    async_tokens: AsyncTokens


class Engine:
    """Inference engine for up to `max_num_seqs` concurrent sequences.

    Not thread-safe; `InferenceService` runs it in its own thread.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        end_ids: Sequence[int],
        *,
        max_num_seqs: int,
        num_cache_tokens: int,
        use_cuda_graphs: bool = True,
    ) -> None:
        self.model = model
        self._end_ids = frozenset(end_ids)
        is_cuda = model.model.embed_tokens.weight.is_cuda
        self.block_size = GPU_BLOCK_SIZE if is_cuda else CPU_BLOCK_SIZE
        num_blocks = -(-num_cache_tokens // self.block_size) + 1
        self.block_manager = BlockManager(num_blocks)
        self._runner = ModelRunner(
            model,
            max_num_seqs=max_num_seqs,
            num_blocks=num_blocks,
            block_size=self.block_size,
            use_cuda_graphs=use_cuda_graphs,
        )
        self._max_pending = 1 if is_cuda else 0
        """Number of launched steps whose tokens the host has not read."""
        self._request_ids = itertools.count()
        self._waiting: deque[_Sequence] = deque()
        self._prefilling: list[_Sequence] = []
        self._decoding: list[_Sequence] = []
        self._paused: list[_Sequence] = []
        """Sequences with a late bitmask; they hold KV-cache blocks but no batch row."""
        self._finishing: list[_Sequence] = []
        self._pending: deque[_PendingTokens] = deque()
        self._events: list[EngineEvent] = []

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished."""
        running = self._prefilling or self._decoding or self._paused
        return bool(self._waiting or running or self._pending)

    @property
    def num_running(self) -> int:
        """Number of sequences that hold KV-cache blocks."""
        return len(self._prefilling) + len(self._decoding) + len(self._paused)

    @property
    def num_waiting(self) -> int:
        """Number of queued requests."""
        return len(self._waiting)

    @property
    def num_free_blocks(self) -> int:
        """Number of KV-cache blocks that can be allocated."""
        return self.block_manager.num_free_blocks

    @property
    def num_blocks(self) -> int:
        """Number of usable KV-cache blocks."""
        return self.block_manager.num_blocks - 1

    def get_max_new_tokens(self, prompt: EncodedSample) -> int:
        """Return the maximum completion length of a prompt.

        Raises:
            UserError: The prompt exceeds the KV cache or the model's positions.
        """
        last_position = _get_last_position(
            prompt, self.model.config.decoder.max_position_embeddings
        )
        prompt_length = prompt.tokenized.num_tokens
        capacity = (self.block_manager.num_blocks - 1) * self.block_size
        available = capacity - prompt_length
        if available < 1:
            raise UserError(
                f"the prompt has {prompt_length} tokens",
                where=f"sample {prompt.tokenized.id:.80}",
                expected=f"fewer than {capacity} tokens, the size of the KV cache",
                remedy="shorten the prompt, or use fewer or smaller images",
            )
        return max(
            1, min(available, self.model.config.decoder.max_position_embeddings - 1 - last_position)
        )

    def add_request(self, request: GenerationRequest) -> int:
        """Queue a request and return its id.

        Raises:
            UserError: The request exceeds the KV cache or the model's positions.
        """
        requested, available = request.max_new_tokens, self.get_max_new_tokens(request.prompt)
        assert requested >= 1, f"max_new_tokens is {requested}, less than 1"
        tokenized = request.prompt.tokenized
        num_tokens = tokenized.num_tokens + requested
        if num_tokens > (self.block_manager.num_blocks - 1) * self.block_size:
            raise UserError(
                f"prompt of {tokenized.num_tokens} tokens and max_new_tokens {requested}",
                where=f"sample {tokenized.id:.80}",
                expected=f"max_new_tokens of at most {available}, limited by the KV cache",
                remedy="lower max_new_tokens, shorten the prompt, or use smaller images",
            )
        image_hashes = request.image_hashes
        if image_hashes is None:
            image_hashes = hash_images(request.prompt)
        prefix_key = self.model.config.decoder.prefix_cache_key(tokenized.num_tokens)
        cache_salt = f"{request.adapter_index} {prefix_key}"
        sequence = _Sequence(
            request_id=next(self._request_ids),
            request=request,
            prompt=PromptState(request.prompt, [], request.adapter_index, image_hashes),
            cache_salt=cache_salt,
            block_hashes=compute_block_hashes(tokenized, image_hashes, self.block_size, cache_salt),
            num_cached_tokens=0,
            sampler=TokenSampler(
                request.sampling_params, request.logprobs, request.constraint, tokenized.ids_T
            ),
        )
        self._waiting.append(sequence)
        return sequence.request_id

    def cancel(self, request_id: int) -> None:
        """Finish an unfinished request immediately and release its blocks."""
        for sequence in [*self._waiting, *self._prefilling, *self._decoding, *self._paused]:
            if sequence.request_id == request_id and not sequence.is_finished:
                self._emit_event(sequence, "cancelled")
                return

    def step(self) -> list[EngineEvent]:
        """Run one prefill and decoding step and return the events of completed tokens."""
        with torch.inference_mode():
            self._remove_finished()
            self._resume_paused()
            chunks = self._schedule_prefill(
                MAX_MIXED_PREFILL_TOKENS if self._decoding else MAX_PREFILL_TOKENS
            )
            if chunks:
                self._prefill(chunks)
            if self._decoding:
                self._decode()
            max_pending = self._max_pending if self._decoding else 0
            while len(self._pending) > max_pending:
                self._collect_tokens()
        events, self._events = self._events, []
        return events

    def _schedule_prefill(self, token_budget: int) -> list[tuple[_Sequence, int]]:
        """Select prompts of one adapter in FIFO order, with their chunk ends."""
        while self._waiting and self._try_admit(self._waiting[0], token_budget):
            sequence = self._waiting.popleft()
            self._prefilling.append(sequence)
            if sequence.request.constraint is not None:
                self._run_isolated(sequence, sequence.request.constraint.start)
        chunks: list[tuple[_Sequence, int]] = []
        for sequence in self._prefilling:
            same_adapter = (
                not chunks or sequence.request.adapter_index == chunks[0][0].request.adapter_index
            )
            if token_budget > 0 and same_adapter:
                stop = min(
                    sequence.prompt.num_tokens, sequence.prompt.num_computed_tokens + token_budget
                )
                token_budget -= stop - sequence.prompt.num_computed_tokens
                chunks.append((sequence, stop))
        return chunks

    def _try_admit(self, sequence: _Sequence, token_budget: int) -> bool:
        """Allocate KV-cache blocks for a request if blocks, batch rows and token budget suffice."""
        num_unread = sum(
            other.prompt.num_tokens - other.prompt.num_computed_tokens for other in self._prefilling
        )
        if self.num_running >= self._runner.max_num_seqs or num_unread >= token_budget:
            return False
        max_tokens = sequence.prompt.num_tokens + sequence.request.max_new_tokens
        blocks_needed = -(-max_tokens // self.block_size)
        # The last prompt token is always computed: its logits are not cached.
        reusable_hashes = sequence.block_hashes[
            : (sequence.prompt.num_tokens - 1) // self.block_size
        ]
        block_ids = self.block_manager.acquire_cached(reusable_hashes)
        if blocks_needed - len(block_ids) > self.block_manager.num_free_blocks:
            self.block_manager.release(block_ids)
            return False
        sequence.num_cached_tokens = sequence.prompt.num_computed_tokens = (
            len(block_ids) * self.block_size
        )
        sequence.prompt.block_ids = block_ids + self.block_manager.allocate(
            blocks_needed - len(block_ids)
        )
        return True

    def _prefill(self, chunks: list[tuple[_Sequence, int]]) -> None:
        prompts = [sequence.prompt for sequence, _ in chunks]
        logits_RV = self._runner.prefill(prompts, [stop for _, stop in chunks])
        completed = [sequence for sequence, stop in chunks if stop == sequence.prompt.num_tokens]
        for sequence in completed:
            self.block_manager.cache_blocks(
                sequence.block_hashes, sequence.prompt.block_ids[: len(sequence.block_hashes)]
            )
        if logits_RV is None:
            return
        self._prefilling = [item for item in self._prefilling if item not in completed]
        self._start_decoding(completed, logits_RV)

    def _start_decoding(self, sequences: list[_Sequence], logits_RV: Tensor) -> None:
        """Sample the next token of sequences and add them to the batch."""
        ids_R = logits_RV.argmax(-1)
        sampled = self._sample(logits_RV, sequences, ids_R)
        is_finite_R = logits_RV.isfinite().all(-1)
        for index, sequence in enumerate(sequences):
            if sequence.logits_V is None and not sequence.is_finished:
                sequence.batch_index = len(self._decoding)
                self._decoding.append(sequence)
                id_1 = ids_R[index : index + 1]
                self._runner.start_sequence(
                    sequence.batch_index, sequence.prompt, id_1, sequence.num_scheduled
                )
        self._enqueue_tokens(sequences, AsyncTokens.from_device(ids_R, sampled, is_finite_R))

    def _resume_paused(self) -> None:
        """Resume paused sequences whose bitmask is available; wait if all sequences are paused."""
        is_idle = not (self._waiting or self._prefilling or self._decoding)
        deadline = time.monotonic() + (MAX_MASK_WAIT_S if is_idle else 0.0)
        sequences = [
            sequence
            for sequence in list(self._paused)
            if self._wait_for_bitmask(sequence, deadline - time.monotonic())
        ]
        sequences = [sequence for sequence in sequences if not sequence.is_finished]
        if not sequences:
            return
        self._paused = [item for item in self._paused if item not in sequences]
        logits = [item.logits_V for item in sequences if item.logits_V is not None]
        for sequence in sequences:
            sequence.logits_V = None
        self._start_decoding(sequences, torch.stack(logits))

    def _wait_for_bitmask(self, sequence: _Sequence, timeout_s: float) -> bool:
        """Wait for the bitmask of the next token; an error finishes the sequence."""
        constraint = sequence.request.constraint
        if constraint is None or sequence.is_finished:
            return True
        try:
            return constraint.wait_bitmask(max(0.0, timeout_s))
        except Exception as error:
            self._emit_event(sequence, None, error)
            return True

    def _decode(self) -> None:
        sequences = list(self._decoding)
        max_seq_len = max(
            sequence.prompt.num_tokens + sequence.num_scheduled for sequence in sequences
        )
        logits_RV = self._runner.decode(len(sequences), max_seq_len)
        if any(sequence.sampler.constraint is not None for sequence in sequences):
            # The next bitmask depends on the previous token. The GPU computes meanwhile.
            while self._pending:
                self._collect_tokens()
        ids_R = self._runner.ids_R[: len(sequences)]
        sampled = self._sample(logits_RV, sequences, ids_R)
        self._enqueue_tokens(
            sequences,
            AsyncTokens.from_device(ids_R, sampled, self._runner.is_finite_R[: len(sequences)]),
        )

    def _sample(
        self, logits_RV: Tensor, sequences: Sequence[_Sequence], ids_R: Tensor
    ) -> dict[int, tuple[SampledTokens, int]]:
        """Sample tokens of all rows without pure argmax decoding and write them to `ids_R`.

        Returns:
            Sampler output and the index within it, by batch row.
        """
        deadline = time.monotonic() + MAX_MASK_WAIT_S
        for index, sequence in enumerate(sequences):
            if sequence.sampler.constraint is None or sequence.is_finished:
                continue
            start_time = time.monotonic()
            is_ready = self._wait_for_bitmask(
                sequence, min(sequence.mask_wait_budget_s, deadline - start_time)
            )
            mask_wait_budget_s = (
                sequence.mask_wait_budget_s
                + MASK_WAIT_PER_TOKEN_S
                - (time.monotonic() - start_time)
            )
            sequence.mask_wait_budget_s = min(MAX_MASK_WAIT_S, mask_wait_budget_s)
            if is_ready:
                self._run_isolated(sequence, sequence.sampler.prepare_bitmask)
            else:
                self._pause_sequence(sequence, logits_RV[index])
        row_indices = [
            n
            for n, a in enumerate(sequences)
            if not (a.sampler.is_argmax_only or a.is_finished or a.logits_V is not None)
        ]
        if not row_indices:
            return {}
        rows_S = torch.tensor(row_indices, device=logits_RV.device)
        sampled = sample_tokens(
            logits_RV.index_select(0, rows_S), [sequences[n].sampler for n in row_indices]
        )
        ids_R.index_copy_(0, rows_S, sampled.ids_S)
        return {row: (sampled, index) for index, row in enumerate(row_indices)}

    def _pause_sequence(self, sequence: _Sequence, logits_V: Tensor) -> None:
        """Pause a sequence and store the logits of its next token."""
        sequence.logits_V = logits_V.clone()
        self._paused.append(sequence)
        self._finishing.append(sequence)

    def _enqueue_tokens(self, sequences: list[_Sequence], async_tokens: AsyncTokens) -> None:
        """Queue the tokens of a launched step; sequences at their maximum length stop decoding."""
        scheduled = [None if item.logits_V is not None else item for item in sequences]
        self._pending.append(_PendingTokens(scheduled, async_tokens))
        for sequence in scheduled:
            if sequence is None:
                continue
            sequence.num_scheduled += 1
            if sequence.num_scheduled == sequence.request.max_new_tokens:
                self._finishing.append(sequence)

    def _collect_tokens(self) -> None:
        """Wait for the oldest pending step and emit its events."""
        pending = self._pending.popleft()
        tokens = pending.async_tokens.wait_tokens(
            [None if a is None else a.request.logprobs for a in pending.sequences]
        )
        for sequence, token in zip(pending.sequences, tokens, strict=True):
            if sequence is None or sequence.is_finished:
                continue
            if token is None:
                self._emit_event(sequence, None, _build_overflow_error(self.model))
                continue
            sequence.output_ids.append(token.id)
            if sequence.request.constraint is not None:
                self._run_isolated(
                    sequence, partial(sequence.request.constraint.accept_token, token.id)
                )
                if sequence.is_finished:
                    continue
            finish_reason: FinishReason | None = None
            if token.id in self._end_ids:
                finish_reason = "stop"
            elif len(sequence.output_ids) == sequence.request.max_new_tokens:
                finish_reason = "length"
            self._emit_event(sequence, finish_reason, token=token)

    def _run_isolated(self, sequence: _Sequence, callback: Callable[[], None]) -> None:
        """Run a callback of one sequence; an error finishes this sequence only."""
        try:
            callback()
        except Exception as error:
            self._emit_event(sequence, None, error)

    def _emit_event(
        self,
        sequence: _Sequence,
        finish_reason: FinishReason | None,
        error: Exception | None = None,
        token: GeneratedToken | None = None,
    ) -> None:
        """Emit a token or the end of a sequence; release a finished sequence."""
        self._events.append(
            EngineEvent(
                sequence.request_id, token, finish_reason, error, sequence.num_cached_tokens
            )
        )
        if finish_reason is None and error is None:
            return
        sequence.is_finished = True
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        if sequence in self._paused:
            self._paused.remove(sequence)
        self._finishing.append(sequence)
        self._cache_completed_blocks(sequence)
        self.block_manager.release(sequence.prompt.block_ids)
        sequence.prompt.block_ids = []

    def _cache_completed_blocks(self, sequence: _Sequence) -> None:
        """Cache the blocks of prompt and completion for the next turn of a conversation.

        Keys and values of the last token have not been computed.
        """
        if sequence.output_ids:
            tokenized = append_tokens(sequence.request.prompt.tokenized, sequence.output_ids[:-1])
            block_hashes = compute_block_hashes(
                tokenized, sequence.prompt.image_hashes, self.block_size, sequence.cache_salt
            )
            self.block_manager.cache_blocks(
                block_hashes, sequence.prompt.block_ids[: len(block_hashes)]
            )

    def _remove_finished(self) -> None:
        """Remove finished sequences from the batch; the last row replaces a removed row.

        Must not run between sampling and `_enqueue_tokens`, which identify sequences by row.
        """
        for sequence in self._finishing:
            if sequence.batch_index is None:
                continue
            last_sequence = self._decoding.pop()
            self._runner.remove_sequence(sequence.batch_index, len(self._decoding))
            if last_sequence is not sequence:
                self._decoding[sequence.batch_index] = last_sequence
                last_sequence.batch_index = sequence.batch_index
            sequence.batch_index = None
        self._finishing.clear()


def _build_overflow_error(model: VisionLanguageModel) -> UserError:
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    return UserError(
        f"logits overflow in {dtype}",
        where="precision",
        expected="finite logits; activations of some models exceed 65504, the maximum of fp16",
        remedy="use --precision fp32, or bf16 on a GPU that supports it",
    )


def _get_last_position(prompt: EncodedSample, max_positions: int) -> int:
    tokenized = prompt.tokenized
    last_position = int(tokenized.position_ids_3T.max())
    if last_position >= max_positions:
        raise UserError(
            f"prompt of {tokenized.num_tokens} tokens with last position {last_position}",
            where=f"sample {tokenized.id:.80}",
            expected=f"positions below {max_positions}, the model's max_position_embeddings",
            remedy="shorten the prompt, or use fewer or smaller images",
        )
    return last_position


def compute_cache_capacity(model: VisionLanguageModel, max_bytes: int = KV_CACHE_BYTES) -> int:
    """Return the number of tokens that a KV cache of `max_bytes` holds."""
    return max_bytes // get_kv_bytes_per_token(
        model.config.decoder, model.model.embed_tokens.weight.dtype
    )


def compute_required_tokens(
    model: VisionLanguageModel,
    prompt_lengths: Sequence[int],
    max_new_tokens: int,
    max_num_seqs: int,
) -> int:
    """Return the KV-cache tokens needed for the longest `max_num_seqs` prompts with completions.

    Limited by `compute_cache_capacity`, but sufficient for at least one sequence.
    """
    max_completion = min(max_new_tokens, model.config.decoder.max_position_embeddings)
    # One block more per sequence for its partially filled last block.
    longest_first = sorted(
        (prompt_length + max_completion + GPU_BLOCK_SIZE for prompt_length in prompt_lengths),
        reverse=True,
    )[:max_num_seqs]
    return max(min(sum(longest_first), compute_cache_capacity(model)), longest_first[0])
