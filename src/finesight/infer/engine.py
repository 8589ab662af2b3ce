"""Inference engine with continuous batching.

Requests join and leave the batch while other sequences are decoded. Each step prefills a chunk of
the waiting prompts and decodes one token of every running sequence. On a GPU the next step is
launched before the host has read the tokens of the previous step, so that the device is not idle. A
finished sequence therefore decodes one more token, which is discarded.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from finesight.encode.batch import copy_to_device
from finesight.encode.tokenization import EncodedSample
from finesight.errors import UserError
from finesight.infer.block_manager import BlockManager
from finesight.infer.hf_engine import HfEngine
from finesight.infer.kv_cache import KVCache, get_kv_bytes_per_token
from finesight.infer.model_runner import ModelRunner
from finesight.infer.request import EngineEvent, FinishReason, GeneratedToken, GenerationRequest
from finesight.infer.scheduler import (
    MASK_WAIT_PER_TOKEN_S,
    MAX_MASK_WAIT_S,
    Scheduler,
    SequenceState,
)
from finesight.infer.token_sampler import (
    AsyncTokens,
    SampledLogprobs,
    TokenSampler,
    sample_tokens,
)
from finesight.model.backend import as_native, as_transformers
from finesight.model.backend_model import BackendModel
from finesight.model.vlm import VisionLanguageModel

KV_CACHE_BYTES = 7 << 30
"""Default size of the KV cache in bytes: 2^18 tokens of Qwen2-VL-2B in bf16."""

GPU_BLOCK_SIZE = 64

CPU_BLOCK_SIZE = 16
"""Tokens per KV-cache block on a CPU.

Blocks are small, because each step copies those of a sequence.
"""


class InferenceEngine(Protocol):
    """Interface of the engines of both backends. It is not thread-safe."""

    block_size: int
    """Tokens per KV-cache block; 0 without a KV cache of its own."""

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished, or has events."""

    @property
    def num_running(self) -> int:
        """Number of admitted sequences."""

    @property
    def num_waiting(self) -> int:
        """Number of requests in the queue."""

    @property
    def num_free_blocks(self) -> int:
        """Number of KV-cache blocks that can be allocated."""

    @property
    def num_blocks(self) -> int:
        """Number of KV-cache blocks for sequences."""

    @property
    def max_model_len(self) -> int:
        """Maximum number of prompt and completion tokens of a request."""

    def get_max_new_tokens(self, prompt: EncodedSample) -> int:
        """Return the maximum number of completion tokens for a prompt."""

    def add_request(self, request: GenerationRequest) -> int:
        """Queue a request of at most `get_max_new_tokens` tokens and return its id."""

    def cancel(self, request_id: int) -> None:
        """Cancel a request, unless it is finished."""

    def step(self) -> list[EngineEvent]:
        """Run one step, and return its events."""


class Engine:
    """Inference engine for up to `max_num_seqs` concurrent sequences.

    `Scheduler` selects the sequences of a step, `ModelRunner` computes their logits, and the engine
    samples the tokens. Not thread-safe; `InferenceService` runs it in its own thread.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        end_ids: Sequence[int],
        *,
        max_num_seqs: int,
        num_cache_tokens: int,
        use_cuda_graphs: bool = True,
        matches_training: bool = False,
        num_snapshots: int = 0,
    ) -> None:
        """Create an engine without requests.

        Args:
            matches_training: Whether tokens have the log-probabilities of the trainer, for models
                with `match_decoding`.
            num_snapshots: Number of prompts whose linear attention states are kept for requests
                with equal prompts.
        """
        self.model = model
        self._end_ids = frozenset(end_ids)
        self._num_cache_tokens = num_cache_tokens
        weight = model.model.embed_tokens.weight
        self.block_size = CPU_BLOCK_SIZE
        self._max_pending = 0
        """Maximum number of launched steps whose tokens the host has not read."""
        if weight.is_cuda:
            self.block_size = GPU_BLOCK_SIZE
            self._max_pending = 1
        num_blocks = -(-num_cache_tokens // self.block_size) + 1
        cache = KVCache(
            model.config.decoder,
            num_blocks=num_blocks,
            block_size=self.block_size,
            max_num_seqs=max_num_seqs,
            dtype=weight.dtype,
            device=weight.device,
            matches_training=matches_training,
            num_snapshots=num_snapshots,
        )
        self._scheduler = Scheduler(
            max_num_seqs=max_num_seqs,
            num_blocks=num_blocks,
            block_size=self.block_size,
            has_linear_states=cache.linear_states is not None,
            num_snapshots=num_snapshots,
        )
        self._runner = ModelRunner(model, cache, use_cuda_graphs)
        self._pending: deque[tuple[list[SequenceState | None], AsyncTokens]] = deque()
        """Tokens of launched steps that the host has not read, with the sequence of each batch row;
        None for a paused sequence."""
        self._events: list[EngineEvent] = []

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished or its tokens have not been read."""
        return bool(self.num_waiting or self.num_running or self._pending)

    @property
    def num_running(self) -> int:
        """Number of admitted sequences, which hold KV-cache blocks."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._scheduler.waiting)

    @property
    def num_free_blocks(self) -> int:
        """Number of KV-cache blocks that can be allocated."""
        return self._scheduler.block_manager.num_free_blocks

    @property
    def num_blocks(self) -> int:
        """Number of KV-cache blocks for sequences, without the reserved block."""
        return self._scheduler.block_manager.num_blocks - 1

    @property
    def max_model_len(self) -> int:
        """Maximum number of prompt and completion tokens of a request."""
        return min(self._num_cache_tokens, self.model.max_position_embeddings)

    def clear_caches(self) -> None:
        """Clear the prefix cache and the image-feature cache after the weights have changed."""
        assert not self.has_work, "the engine has unfinished requests"
        slots = self._scheduler.block_manager.snapshot_slots
        self._scheduler.block_manager = BlockManager(self.num_blocks + 1, slots)
        self._runner.feature_cache.clear()

    def get_max_new_tokens(self, prompt: EncodedSample) -> int:
        """Return the maximum number of completion tokens for a prompt.

        The size of the KV cache and the model's `max_position_embeddings` limit it.
        """
        max_positions = self.model.max_position_embeddings
        last_position = int(prompt.tokenized.position_ids_3T.max())
        prompt_length = prompt.tokenized.num_tokens
        capacity = self.num_blocks * self.block_size
        what = expected = ""
        if last_position >= max_positions:
            what = f"prompt of {prompt_length} tokens with last position {last_position}"
            expected = f"positions below {max_positions}, the model's max_position_embeddings"
        elif prompt_length >= capacity:
            what = f"the prompt has {prompt_length} tokens"
            expected = f"fewer than {capacity} tokens, the size of the KV cache"
        if what:
            where = f"sample {prompt.tokenized.id:.80}"
            remedy = "shorten the prompt, or use fewer or smaller images"
            raise UserError(what, where=where, expected=expected, remedy=remedy)
        return max(1, min(capacity - prompt_length, max_positions - 1 - last_position))

    def add_request(self, request: GenerationRequest) -> int:
        """Queue a request of at most `get_max_new_tokens` tokens and return its id."""
        tokenized = request.prompt.tokenized
        requested = request.max_new_tokens
        available = self.num_blocks * self.block_size - tokenized.num_tokens
        assert 1 <= requested <= available, f"max_new_tokens is {requested}, not 1 to {available}"
        prefix_key = self.model.config.decoder.prefix_cache_key(tokenized.num_tokens)
        cache_salt = f"{request.adapter_index} {prefix_key}"
        return self._scheduler.add_request(request, cache_salt)

    def cancel(self, request_id: int) -> None:
        """Cancel a request and release its KV-cache blocks.

        Has no effect if the request is finished.
        """
        sequence = self._scheduler.find_unfinished(request_id)
        if sequence is not None:
            self._emit_event(sequence, "cancelled")

    def step(self) -> list[EngineEvent]:
        """Run one prefill and decoding step, and return the events of completed tokens.

        On a GPU, the host reads the tokens of a step during the next one.
        """
        with torch.inference_mode():
            for batch_index, last_index in self._scheduler.remove_finished():
                self._runner.remove_sequence(batch_index, last_index)
            self._resume_paused()
            while (sequence := self._scheduler.admit_next()) is not None:
                if sequence.prompt.snapshot_slot:
                    pair = sequence.prompt.snapshot_slot, sequence.prompt.state_slot
                    self._runner.copy_states([pair])
                if sequence.request.constraint is not None:
                    self._run_isolated(sequence, sequence.request.constraint.start)
            if chunks := self._scheduler.schedule_prefill():
                self._prefill(chunks)
            if self._scheduler.decoding:
                self._decode()
            max_pending = self._max_pending if self._scheduler.decoding else 0
            while len(self._pending) > max_pending:
                self._collect_tokens()
        events = self._events
        self._events = []
        return events

    def _prefill(self, chunks: Sequence[tuple[SequenceState, int]]) -> None:
        """Process chunks of prompts, and start to decode the prompts that are then complete."""
        prompts = [sequence.prompt for sequence, _ in chunks]
        stops = [stop for _, stop in chunks]
        logits_RV = self._runner.prefill(prompts, stops)
        self._runner.copy_states(self._scheduler.allocate_snapshots(chunks))
        completed = self._scheduler.complete_prefill(chunks)
        if logits_RV is not None:
            self._start_decoding(completed, logits_RV)

    def _start_decoding(self, sequences: list[SequenceState], logits_RV: Tensor) -> None:
        """Sample the first or next token of sequences and add them to the decoding batch."""
        ids_R = logits_RV.argmax(-1)
        sampled = self._sample(logits_RV, sequences, ids_R)
        is_finite_R = logits_RV.isfinite().all(-1)
        for index, sequence in enumerate(sequences):
            if not (sequence.is_paused or sequence.is_finished):
                row = self._scheduler.add_to_batch(sequence)
                id_1 = ids_R[index : index + 1]
                self._runner.start_sequence(row, sequence.prompt, id_1, sequence.num_scheduled)
        self._enqueue_tokens(sequences, AsyncTokens.from_device(ids_R, is_finite_R, *sampled))

    def _resume_paused(self) -> None:
        """Resume paused sequences whose token bitmask has been computed.

        If all sequences are paused, wait up to `MAX_MASK_WAIT_S` for a bitmask.
        """
        scheduler = self._scheduler
        deadline = time.monotonic()
        if not (scheduler.waiting or scheduler.prefilling or scheduler.decoding):
            deadline += MAX_MASK_WAIT_S
        ready: list[SequenceState] = []
        # A failed computation removes its sequence from the paused ones.
        for sequence in list(scheduler.paused):
            is_ready = self._wait_for_bitmask(sequence, deadline - time.monotonic())
            if is_ready and not sequence.is_finished:
                ready.append(sequence)
        if not ready:
            return
        scheduler.paused = [item for item in scheduler.paused if item not in ready]
        logits = [item.logits_V for item in ready if item.logits_V is not None]
        for sequence in ready:
            sequence.logits_V = None
        self._start_decoding(ready, torch.stack(logits))

    def _wait_for_bitmask(self, sequence: SequenceState, timeout_s: float) -> bool:
        """Wait until the token bitmask of a constrained sequence is available.

        Returns False after a timeout. A failed computation finishes the sequence with the error.
        """
        constraint = sequence.request.constraint
        if constraint is None or sequence.is_finished:
            return True
        try:
            return constraint.wait_bitmask(max(0.0, timeout_s))
        except Exception as error:
            self._emit_event(sequence, None, error)
            return True

    def _decode(self) -> None:
        sequences = list(self._scheduler.decoding)
        max_seq_len = max(item.prompt.num_tokens + item.num_scheduled for item in sequences)
        logits_RV = self._runner.decode(len(sequences), max_seq_len)
        if any(sequence.request.constraint is not None for sequence in sequences):
            # The next bitmask depends on the previous token. The GPU computes meanwhile.
            while self._pending:
                self._collect_tokens()
        ids_R = self._runner.ids_R[: len(sequences)]
        sampled = self._sample(logits_RV, sequences, ids_R)
        is_finite_R = self._runner.is_finite_R[: len(sequences)]
        self._enqueue_tokens(sequences, AsyncTokens.from_device(ids_R, is_finite_R, *sampled))

    def _sample(
        self, logits_RV: Tensor, sequences: Sequence[SequenceState], ids_R: Tensor
    ) -> tuple[SampledLogprobs | None, list[int]]:
        """Sample tokens of sequences that need more than an argmax.

        The tokens are written to `ids_R`. Sequences without sampling, log probabilities or a
        constraint keep the argmax. Sequences whose bitmask is late are paused.

        Returns:
            Log probabilities, if requested, and the batch row of each.
        """
        deadline = time.monotonic() + MAX_MASK_WAIT_S
        for index, sequence in enumerate(sequences):
            if sequence.request.constraint is None or sequence.is_finished:
                continue
            start_time = time.monotonic()
            is_ready = self._wait_for_bitmask(
                sequence, min(sequence.mask_wait_budget_s, deadline - start_time)
            )
            wait_s = time.monotonic() - start_time
            budget_s = sequence.mask_wait_budget_s + MASK_WAIT_PER_TOKEN_S - wait_s
            sequence.mask_wait_budget_s = min(MAX_MASK_WAIT_S, budget_s)
            if is_ready:
                self._run_isolated(sequence, sequence.sampler.prepare_bitmask)
            else:
                sequence.logits_V = logits_RV[index].clone()
                self._scheduler.pause(sequence)
        row_indices: list[int] = []
        samplers: list[TokenSampler] = []
        for index, sequence in enumerate(sequences):
            if not (sequence.sampler.is_argmax_only or sequence.is_finished or sequence.is_paused):
                row_indices.append(index)
                samplers.append(sequence.sampler)
        if not row_indices:
            return None, []
        rows_S = copy_to_device(np.array(row_indices), logits_RV.device)
        ids_S, logprobs = sample_tokens(logits_RV.index_select(0, rows_S), samplers)
        ids_R.index_copy_(0, rows_S, ids_S)
        return logprobs, row_indices

    def _enqueue_tokens(self, sequences: list[SequenceState], async_tokens: AsyncTokens) -> None:
        """Queue the tokens of a launched step until the host reads them.

        Sequences that reach their maximum length leave the batch.
        """
        scheduled = [None if item.is_paused else item for item in sequences]
        self._pending.append((scheduled, async_tokens))
        self._scheduler.count_scheduled([item for item in scheduled if item is not None])

    def _collect_tokens(self) -> None:
        """Wait for the tokens of the oldest launched step and emit their events."""
        sequences, async_tokens = self._pending.popleft()
        num_logprobs = [None if one is None else one.request.logprobs for one in sequences]
        tokens = async_tokens.wait_tokens(num_logprobs)
        for sequence, token in zip(sequences, tokens, strict=True):
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

    def _run_isolated(self, sequence: SequenceState, callback: Callable[[], None]) -> None:
        """Run a callback of one sequence; an exception finishes only this sequence."""
        try:
            callback()
        except Exception as error:
            self._emit_event(sequence, None, error)

    def _emit_event(
        self,
        sequence: SequenceState,
        finish_reason: FinishReason | None,
        error: Exception | None = None,
        token: GeneratedToken | None = None,
    ) -> None:
        """Emit an event with a token or the end of a sequence.

        A finished sequence releases its KV-cache blocks.
        """
        self._events.append(
            EngineEvent(
                sequence.request_id, token, finish_reason, error, sequence.num_cached_tokens
            )
        )
        if finish_reason is not None or error is not None:
            self._scheduler.finish(sequence)


def _build_overflow_error(model: VisionLanguageModel) -> UserError:
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    return UserError(
        f"logits overflow in {dtype}",
        where="precision",
        expected="finite logits; activations of some models exceed 65504, the maximum of fp16",
        remedy="use --precision fp32, or bf16 on a GPU that supports it",
    )


def compute_required_tokens(
    model: VisionLanguageModel,
    prompt_lengths: Sequence[int],
    max_new_tokens: int,
    memory_share: float = 0.0,
) -> int:
    """Return the required size of a KV cache in tokens.

    The cache fits the prompts with their completions, up to `KV_CACHE_BYTES` or a share of the GPU
    memory, and always at least one sequence.
    """
    max_completion = min(max_new_tokens, model.max_position_embeddings)
    # One block more per sequence for its partially filled last block.
    lengths = [length + max_completion + GPU_BLOCK_SIZE for length in prompt_lengths]
    weight = model.model.embed_tokens.weight
    max_bytes = KV_CACHE_BYTES
    if weight.is_cuda:
        _, total_memory = torch.cuda.mem_get_info(weight.device)
        max_bytes = max(max_bytes, int(memory_share * total_memory))
    capacity = max_bytes // get_kv_bytes_per_token(model.config.decoder, weight.dtype)
    return max(min(sum(lengths), capacity), *lengths)


def create_engine(
    model: BackendModel,
    end_ids: Sequence[int],
    max_num_seqs: int,
    num_cache_tokens: int,
    on_progress: Callable[[int], None] | None = None,
) -> InferenceEngine:
    """Create the engine of the model's backend.

    Args:
        num_cache_tokens: Size of the KV cache, for native models.
        on_progress: Called with 0 for each token of a family without native code.
    """
    if not model.capabilities.batches:
        return HfEngine(as_transformers(model), end_ids, on_progress)
    return Engine(
        as_native(model), end_ids, max_num_seqs=max_num_seqs, num_cache_tokens=num_cache_tokens
    )


def build_engine(
    model: BackendModel,
    end_ids: Sequence[int],
    prompt_lengths: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> InferenceEngine:
    """Build an engine whose KV cache suits the given prompts.

    Args:
        batch_size: Maximum number of concurrent sequences.
        on_progress: See `create_engine`.
    """
    lengths = sorted(prompt_lengths or [1], reverse=True)[: max(1, batch_size)]
    num_cache_tokens = 0
    if model.capabilities.batches:
        num_cache_tokens = compute_required_tokens(as_native(model), lengths, max_new_tokens)
    return create_engine(model, end_ids, len(lengths), num_cache_tokens, on_progress)
