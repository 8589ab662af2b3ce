"""Thread-safe inference service with continuous batching, used by chat, web UI and API server."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import traceback
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from finesight.encode.family import DEFAULT_THINKING, THINK_END, ThinkingOptions
from finesight.encode.renderer import Renderer
from finesight.encode.tokenization import EncodedSample, TextTokenizer, TokenizedSample
from finesight.errors import UserError, format_count
from finesight.infer.block_manager import hash_images
from finesight.infer.engine import GPU_BLOCK_SIZE, InferenceEngine, create_engine
from finesight.infer.kv_cache import get_kv_bytes_per_token, get_linear_state_bytes
from finesight.infer.model_loader import InferenceModel
from finesight.infer.prediction import Prediction, build_prediction
from finesight.infer.request import (
    CompletionDelta,
    EngineEvent,
    FinishReason,
    GeneratedToken,
    GenerationOptions,
    GenerationRequest,
    TokenUsage,
)
from finesight.model.backend import as_native
from finesight.model.config import DecoderConfig
from finesight.model.vlm import VisionLanguageModel
from finesight.samples.prompt_format import PromptFormat
from finesight.samples.sample import LocatedSample

DEFAULT_MAX_WAITING = 256

CPU_KV_CACHE_BYTES = 1 << 30
GPU_MEMORY_FRACTION = 0.6
"""Fraction of free GPU memory for the KV cache and the states of linear attention layers.

The rest is for the activations of prompts and images.
"""

DEFAULT_MAX_NEW_TOKENS = 4096
"""Maximum completion length of requests without a limit.

The KV cache reserves blocks for the maximum length.
"""

EXPECTED_PROMPT_TOKENS = 1024
"""Expected length of a prompt with an image, for the default number of sequences."""


_REPLACEMENT_CHAR = "�"
"""Decoder output for bytes of an incomplete character."""

_MIN_REDECODED = 8
"""Minimum number of tokens with invalid bytes that are decoded again."""

_MAX_REDECODED = 64
"""Maximum number of tokens with invalid bytes that are decoded again."""

_REASONING_END = THINK_END.strip("\n")


class ServiceBusyError(UserError):
    """Raised when the request queue is full or the service is closing."""


@dataclass(frozen=True, slots=True)
class ServiceStats:
    """Statistics of an inference service: requests, KV-cache blocks and token counts."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    block_size: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    num_completed: int


class IncrementalDetokenizer:
    """Incremental detokenizer of one completion, up to an end token or a stop string.

    A token may end within a character or within a stop string. Text is emitted only when later
    tokens cannot change it. Each call decodes only the tokens since the last emitted text and the
    tokens before them that affect spacing. With `is_thinking`, the completion starts within the
    reasoning, whose text `take_reasoning` returns.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        end_ids: Collection[int],
        stop_strings: Sequence[str],
        is_thinking: bool,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._stop_strings = tuple(stop_strings)
        self._skip_special_tokens = skip_special_tokens
        self._in_reasoning = is_thinking
        self._strips_newlines = is_thinking
        self._new_reasoning = ""
        self._token_ids: list[int] = []
        self._prefix_offset = 0
        self._read_offset = 0
        self._num_emitted_chars = 0
        self._pending = ""
        self.text = ""
        """All emitted text."""
        self.has_stopped = False
        """Return whether a stop string was found."""

    def add_token(self, token: int) -> str:
        """Add a token and return the new text that later tokens cannot change."""
        if token in self._end_ids or self.has_stopped:
            return ""
        self._token_ids.append(token)
        return self._emit(self._decode_new_text(is_last=False), is_last=False)

    def flush(self) -> str:
        """Return the remaining withheld text at the end of the completion."""
        return self._emit(self._decode_new_text(is_last=True), is_last=True)

    def take_reasoning(self) -> str:
        """Return the new text of the reasoning since the last call."""
        reasoning = self._new_reasoning
        self._new_reasoning = ""
        return reasoning

    def _decode_new_text(self, *, is_last: bool) -> str:
        """Return the newly decoded text, without an incomplete last character."""
        decoded = self._decode(self._token_ids[self._prefix_offset :])
        complete = decoded if is_last else decoded.removesuffix(_REPLACEMENT_CHAR)
        new_text = complete[self._num_emitted_chars :]
        if complete == decoded:
            self._prefix_offset = self._read_offset
            self._read_offset = len(self._token_ids)
            self._num_emitted_chars = len(self._decode(self._token_ids[self._prefix_offset :]))
        else:
            self._num_emitted_chars = len(complete)
            self._drop_invalid_prefix(decoded)
        return new_text

    def _drop_invalid_prefix(self, decoded: str) -> None:
        """Stop decoding old tokens with invalid bytes again if the text is unaffected."""
        split_at = len(self._token_ids) - _MIN_REDECODED
        if split_at - self._prefix_offset < _MAX_REDECODED:
            return
        head = self._decode(self._token_ids[self._prefix_offset : split_at])
        tail = self._decode(self._token_ids[split_at:])
        if head + tail == decoded:
            self._num_emitted_chars -= len(head)
            self._prefix_offset = self._read_offset = split_at

    def _decode(self, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)

    def _emit(self, new_text: str, *, is_last: bool) -> str:
        if self.has_stopped:
            return ""
        self._pending += new_text
        self._split_reasoning(is_last=is_last)
        if self._in_reasoning:
            return ""
        end = len(self._pending)
        for text in self._stop_strings:
            position = self._pending.find(text)
            if position >= 0:
                self.has_stopped = True
                end = min(end, position)
        if not is_last and not self.has_stopped:
            end -= _count_partial(self._pending, self._stop_strings)
        emitted = self._pending[:end]
        # As in the API of OpenAI, an answer ends before the stop string.
        self._pending = "" if self.has_stopped else self._pending[end:]
        self.text += emitted
        return emitted

    def _split_reasoning(self, *, is_last: bool) -> None:
        """Move pending text before the end of the reasoning to the new reasoning.

        Newlines at the start and end of the reasoning and at the start of the answer are removed.
        """
        self._strip_first_newlines()
        if not self._in_reasoning:
            return
        text, end_marker, after = self._pending.partition(_REASONING_END)
        if end_marker or is_last:
            self._new_reasoning += text.rstrip("\n")
            self._in_reasoning = not end_marker
            self._pending = after
            self._strips_newlines = True
            self._strip_first_newlines()
            return
        num_held = _count_partial(text, [_REASONING_END])
        end = len(text[: len(text) - num_held].rstrip("\n"))
        self._new_reasoning += text[:end]
        self._pending = text[end:]

    def _strip_first_newlines(self) -> None:
        if self._strips_newlines:
            self._pending = self._pending.lstrip("\n")
            self._strips_newlines = not self._pending


def _count_partial(text: str, markers: Sequence[str]) -> int:
    """Return the length of the longest suffix of a text that may start one of the markers."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker), len(text) + 1)):
            if text.endswith(marker[:length]):
                longest = max(longest, length)
    return longest


class GenerationStream:
    """Streamed completion of one request.

    Iterate over it once, synchronously or asynchronously, to receive deltas. Errors of the request
    are raised by the iteration.
    """

    def __init__(
        self,
        service: InferenceService,
        located_sample: LocatedSample,
        tokenized: TokenizedSample,
        options: GenerationOptions,
        image_index: int | None = None,
    ) -> None:
        renderer = service.renderer
        self._service = service
        self._located_sample = located_sample
        self._tokenized = tokenized
        self._image_index = image_index
        self._detokenizer = IncrementalDetokenizer(
            renderer.tokenizer,
            renderer.end_ids,
            options.stop_strings,
            tokenized.is_thinking,
            options.skip_special_tokens,
        )
        self._deltas: deque[CompletionDelta] = deque()
        self._changed = threading.Condition()
        self._wake: Callable[[], None] | None = None
        self._error: Exception | None = None
        self._num_cached_tokens = 0
        self.output_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        """Reason why generation ended; None while it is running."""

    def __iter__(self) -> Iterator[CompletionDelta]:
        while (delta := self._wait_for_delta()) is not None:
            yield delta

    async def __aiter__(self) -> AsyncIterator[CompletionDelta]:
        """Yield deltas. Those that have arrived together are merged."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def wake() -> None:
            # A closed event loop has no waiting consumer.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._wake = wake
        while True:
            changed.clear()
            # Read before the deltas, so that no delta before the end is missed.
            is_finished = self._is_finished
            arrived = [self._deltas.popleft() for _ in range(len(self._deltas))]
            if arrived:
                text = "".join(delta.text for delta in arrived)
                tokens = tuple(chain.from_iterable(delta.tokens for delta in arrived))
                reasoning = "".join(delta.reasoning for delta in arrived)
                yield CompletionDelta(text, tokens, reasoning)
            if is_finished:
                self._wait_for_delta()
                return
            await changed.wait()

    @property
    def _is_finished(self) -> bool:
        return self.finish_reason is not None or self._error is not None

    def _wait_for_delta(self) -> CompletionDelta | None:
        with self._changed:
            self._changed.wait_for(lambda: self._deltas or self._is_finished)
        if self._deltas:
            return self._deltas.popleft()
        if self._error is not None:
            raise self._error
        return None

    def cancel(self) -> None:
        """Cancel the request and release its KV-cache blocks."""
        service = self._service
        with service._lock:
            service._cancelled.append(self)
            service._lock.notify_all()

    @property
    def text(self) -> str:
        """Text emitted so far."""
        return self._detokenizer.text

    @property
    def usage(self) -> TokenUsage:
        """Token counts so far; `cached_tokens` is set at the end."""
        return TokenUsage(self._tokenized.num_tokens, self._num_cached_tokens, len(self.output_ids))

    def build_prediction(self) -> Prediction:
        """Build the prediction of the finished completion, truncated at a stop string."""
        assert self.finish_reason is not None, "the completion has not ended"
        inputs = self._located_sample, self._tokenized, self.output_ids, self._image_index
        prediction = build_prediction(self._service.renderer, *inputs)
        if not self._detokenizer.has_stopped:
            return prediction
        return replace(prediction, answer=self.text, finish_reason="stop")

    def _handle_event(self, event: EngineEvent) -> bool:
        """Process an engine event in the service thread.

        Returns:
            True if a stop string was found before the engine ended the request. The caller then
            cancels the request, because the engine does not detect stop strings.
        """
        text = ""
        tokens: tuple[GeneratedToken, ...] = ()
        if event.token is not None:
            self.output_ids.append(event.token.id)
            text = self._detokenizer.add_token(event.token.id)
            tokens = (event.token,)
        finish_reason = "stop" if self._detokenizer.has_stopped else event.finish_reason
        if finish_reason is not None:
            text += self._detokenizer.flush()
            self._num_cached_tokens = event.num_cached_tokens
        reasoning = self._detokenizer.take_reasoning()
        with self._changed:
            if text or tokens or reasoning:
                self._deltas.append(CompletionDelta(text, tokens, reasoning))
            self.finish_reason = finish_reason
            self._error = event.error
            self._changed.notify_all()
            wake = self._wake
        if wake is not None:
            wake()
        return self._detokenizer.has_stopped and event.finish_reason is None

    def _fail(self, error: Exception) -> None:
        """End the stream with an error of the service."""
        if isinstance(error, torch.OutOfMemoryError):
            error = UserError(
                "out of GPU memory",
                where="model",
                expected="enough memory for the images and prompts of one prefill step",
                remedy="use smaller images, or a smaller KV cache",
            )
        self._handle_event(EngineEvent(0, error=error))


class InferenceService:
    """Runs one model in a background thread and streams completions.

    Args:
        max_num_seqs: Maximum number of concurrent sequences. Each has states in the linear
            attention layers, whose memory is allocated in advance.
        kv_cache_bytes: Size of the KV cache, without these states. Default: see
            `compute_kv_cache_bytes`.
        encode_prompt: Encodes prompts of `submit`, in worker processes if their images are
            untrusted. Default: in the calling thread.
    """

    def __init__(
        self,
        inference_model: InferenceModel,
        *,
        max_num_seqs: int,
        max_waiting: int = DEFAULT_MAX_WAITING,
        kv_cache_bytes: int | None = None,
        encode_prompt: Callable[[LocatedSample, ThinkingOptions], EncodedSample] | None = None,
    ) -> None:
        model = inference_model.model
        self.renderer: Renderer = inference_model.renderer
        prompt_format = inference_model.get_prompt_format()
        self.system_prompt = prompt_format.get_system_prompt(prompt_format.usual_num_images)
        """System prompt of conversations without one; None for a chat template without it.

        It is that of the training samples, or else of the recipe or the chat template.
        """
        if self.system_prompt is None:
            self.system_prompt = self.renderer.system_prompt
        self._encode_prompt = encode_prompt or (
            lambda sample, thinking: self.renderer.with_thinking(thinking).encode_prompt(sample)
        )
        self._model = model
        self._adapters = inference_model.adapters
        self._thinking_modes = inference_model.thinking_modes
        self.manifest = inference_model.manifest
        self._inference_model = inference_model
        self._max_waiting = max_waiting
        self._max_num_seqs = max_num_seqs
        self._num_cache_tokens = 0
        if model.capabilities.batches:
            self._num_cache_tokens = _count_cache_tokens(
                as_native(model), kv_cache_bytes, max_num_seqs
            )
        self._engine = self._create_engine(max_num_seqs, self._num_cache_tokens)
        self.max_model_len = self._engine.max_model_len
        """Maximum number of prompt and completion tokens of a request."""
        self._lock = threading.Condition()
        self._new_requests: list[tuple[GenerationStream, GenerationRequest]] = []
        self._cancelled: list[GenerationStream] = []
        self._streams: dict[int, GenerationStream] = {}
        self._is_closing = False
        self._cancels_all = False
        self._counts = Counter[str]()
        self._thread = threading.Thread(target=self._run, name="finesight-inference", daemon=True)
        self._thread.start()

    @property
    def model_names(self) -> tuple[str, ...]:
        """Model names that `GenerationOptions.model` accepts; the first is the default."""
        return tuple(self._adapters)

    def get_prompt_format(self, model: str | None = None) -> PromptFormat:
        """Return the form of questions to a model, by default to the first one."""
        return self._inference_model.get_prompt_format(model)

    @property
    def default_thinking(self) -> bool | None:
        """Thinking mode of the default model; None if its chat template has only one mode."""
        if not self.renderer.has_thinking_modes:
            return None
        return self.select_renderer(None, DEFAULT_THINKING).has_reasoning

    def submit(
        self,
        located_sample: LocatedSample,
        options: GenerationOptions,
        prompt: EncodedSample | None = None,
        image_index: int | None = None,
    ) -> GenerationStream:
        """Queue a request for the completion of a sample's prompt and return its stream.

        Args:
            located_sample: Sample whose turns, except a final assistant turn, are the prompt.
            prompt: Encoded prompt. If None, the prompt, including images, is encoded before the
                method returns.
            image_index: Index of the image that predicted boxes refer to. If None, that of the
                boxes in a final assistant turn, or else the first image.

        Raises:
            UserError: The sample is invalid, the prompt is too long, or the model is unknown.
            CorruptImageError: An image cannot be read.
            ServiceBusyError: The queue is full or the service is closing.
        """
        adapter_index = self._resolve_adapter(options.model)
        self._check_queue()
        if prompt is None:
            thinking = self._select_thinking(options.model, options.thinking)
            prompt = self._encode_prompt(located_sample, thinking)
        with self._lock:
            available = self._engine.get_max_new_tokens(prompt)
        max_new_tokens = options.max_new_tokens
        if max_new_tokens is None:
            max_new_tokens = min(DEFAULT_MAX_NEW_TOKENS, available)
        if not 1 <= max_new_tokens <= available:
            raise UserError(
                f"{max_new_tokens} with a prompt of {prompt.tokenized.num_tokens} tokens",
                where="max_new_tokens",
                expected=f"1 to {available}, limited by the KV cache and the model's positions",
                remedy="lower max_new_tokens, shorten the prompt, or use smaller images",
            )
        stream = GenerationStream(self, located_sample, prompt.tokenized, options, image_index)
        request = GenerationRequest(
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            sampling_params=options.sampling_params,
            logprobs=options.logprobs,
            constraint=options.constraint,
            adapter_index=adapter_index,
            image_hashes=hash_images(prompt),
        )
        with self._lock:
            self._check_queue()
            self._new_requests.append((stream, request))
            self._lock.notify_all()
        return stream

    @property
    def is_alive(self) -> bool:
        """True while the service accepts requests."""
        return not self._is_closing and self._thread.is_alive()

    def get_stats(self) -> ServiceStats:
        """Return the current request, KV-cache and token statistics."""
        with self._lock:
            engine = self._engine
            counts = self._counts
            return ServiceStats(
                num_running=engine.num_running,
                num_waiting=engine.num_waiting + len(self._new_requests),
                num_free_blocks=engine.num_free_blocks,
                num_blocks=engine.num_blocks,
                block_size=engine.block_size,
                prompt_tokens=counts["prompt"],
                cached_tokens=counts["cached"],
                completion_tokens=counts["completion"],
                num_completed=counts["requests"],
            )

    def close(self, wait_for_running: bool = False) -> None:
        """Reject new requests, wait for running requests and stop the thread.

        Args:
            wait_for_running: Whether to finish running requests instead of cancelling them.
        """
        with self._lock:
            self._is_closing = True
            self._cancels_all = self._cancels_all or not wait_for_running
            self._lock.notify_all()
        self._thread.join()

    def select_renderer(self, model_name: str | None, thinking: ThinkingOptions) -> Renderer:
        """Return the renderer in the given thinking mode, or else in that of the model's training.

        Raises:
            UserError: The chat template does not define this mode or reasoning effort.
        """
        return self.renderer.with_thinking(self._select_thinking(model_name, thinking))

    def _select_thinking(
        self, model_name: str | None, thinking: ThinkingOptions
    ) -> ThinkingOptions:
        name = self.model_names[0] if model_name is None else model_name
        if thinking == DEFAULT_THINKING and name in self._thinking_modes:
            return ThinkingOptions(enable_thinking=self._thinking_modes[name])
        return thinking

    def _resolve_adapter(self, model_name: str | None) -> int | None:
        if model_name is not None and model_name not in self._adapters:
            raise UserError(
                f"unknown model {model_name!r:.80}",
                where="model",
                expected=" or ".join(self.model_names),
                remedy="choose one of these, or omit it",
            )
        return self._adapters[self.model_names[0] if model_name is None else model_name]

    def _check_queue(self) -> None:
        with self._lock:
            num_open = len(self._new_requests) + len(self._streams)
        limit = self._max_num_seqs + self._max_waiting
        if not self.is_alive:
            what = "the service accepts no more requests"
            expected = "a running service"
        elif num_open >= limit:
            what = f"{num_open} requests are running or waiting"
            expected = f"fewer than {limit}"
        else:
            return
        raise ServiceBusyError(what, where="queue", expected=expected, remedy="retry later")

    def _create_engine(self, max_num_seqs: int, num_cache_tokens: int) -> InferenceEngine:
        return create_engine(self._model, self.renderer.end_ids, max_num_seqs, num_cache_tokens)

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (
                    self._new_requests
                    or self._cancelled
                    or self._is_closing
                    or self._engine.has_work
                ):
                    self._lock.wait()
                cancelled = self._cancelled
                self._cancelled = []
                is_idle = not (self._new_requests or cancelled or self._engine.has_work)
                if self._is_closing and is_idle:
                    return
                self._add_requests()
            try:
                self._cancel_requests(cancelled)
                for event in self._engine.step():
                    self._dispatch_event(event)
            except Exception as error:
                if not self._replace_engine(error):
                    return

    def _add_requests(self) -> None:
        for stream, request in self._new_requests:
            try:
                self._streams[self._engine.add_request(request)] = stream
            except Exception as error:
                stream._fail(error)
        self._new_requests = []

    def _cancel_requests(self, cancelled: list[GenerationStream]) -> None:
        if self._cancels_all:
            cancelled = [*self._streams.values()]
        for stream in cancelled:
            for request_id, other in self._streams.items():
                if other is stream:
                    self._engine.cancel(request_id)

    def _dispatch_event(self, event: EngineEvent) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:
            return
        self._counts["completion"] += event.token is not None
        # A consumer that sees the end of a stream may submit the next request.
        with self._lock:
            if stream._handle_event(event):
                self._engine.cancel(event.request_id)
            if stream._is_finished:
                del self._streams[event.request_id]
        if stream._is_finished:
            self._counts["requests"] += 1
            self._counts["prompt"] += stream.usage.prompt_tokens
            self._counts["cached"] += stream.usage.cached_tokens

    def _replace_engine(self, error: Exception) -> bool:
        """Fail all running requests and replace the engine, whose state is undefined.

        Returns:
            False if no engine can be created. All queued requests have then failed, too.
        """
        with self._lock:
            for stream in self._streams.values():
                stream._fail(error)
            self._streams.clear()
        # The traceback references the old KV cache; release it before allocating a new one.
        traceback.clear_frames(error.__traceback__)
        with self._lock:
            try:
                self._engine = self._create_engine(1, 1)
                self._engine = self._create_engine(self._max_num_seqs, self._num_cache_tokens)
            except Exception as retry_error:
                self._is_closing = True
                for stream, _ in self._new_requests:
                    stream._fail(retry_error)
                self._new_requests = []
                return False
        return True


def fit_num_seqs(inference_model: InferenceModel, max_num_seqs: int) -> int:
    """Return the number of concurrent sequences that fit into GPU memory, up to `max_num_seqs`.

    With linear attention, the memory of `GPU_MEMORY_FRACTION` contains the states of each sequence
    and its blocks in the KV cache, with `EXPECTED_PROMPT_TOKENS` and `DEFAULT_MAX_NEW_TOKENS`.
    """
    if not inference_model.model.capabilities.batches:
        return max_num_seqs
    model = as_native(inference_model.model)
    weight = model.model.embed_tokens.weight
    if weight.device.type != "cuda" or model.config.decoder.linear_attention is None:
        return max_num_seqs
    free_bytes = torch.cuda.mem_get_info(weight.device)[0]
    return compute_num_seqs(model.config.decoder, weight.dtype, free_bytes, max_num_seqs)


def _count_cache_tokens(
    model: VisionLanguageModel, kv_cache_bytes: int | None, max_num_seqs: int
) -> int:
    """Return the size of the KV cache in tokens, by default that of the free GPU memory."""
    config = model.config.decoder
    weight = model.model.embed_tokens.weight
    if kv_cache_bytes is None and weight.is_cuda:
        free_bytes = torch.cuda.mem_get_info(weight.device)[0]
        kv_cache_bytes = compute_kv_cache_bytes(config, weight.dtype, free_bytes, max_num_seqs)
    kv_cache_bytes = kv_cache_bytes or CPU_KV_CACHE_BYTES
    return min(
        kv_cache_bytes // get_kv_bytes_per_token(config, weight.dtype),
        max_num_seqs * config.max_position_embeddings,
    )


def compute_num_seqs(
    config: DecoderConfig, dtype: torch.dtype, free_bytes: int, max_num_seqs: int
) -> int:
    """Return the number of sequences of `fit_num_seqs` for `free_bytes` of free GPU memory."""
    bytes_per_seq = get_linear_state_bytes(config, dtype, 0)
    # One further slot of states is reserved.
    budget = int(free_bytes * GPU_MEMORY_FRACTION) - bytes_per_seq
    num_tokens = EXPECTED_PROMPT_TOKENS + DEFAULT_MAX_NEW_TOKENS
    bytes_per_seq += num_tokens * get_kv_bytes_per_token(config, dtype)
    return max(1, min(max_num_seqs, budget // bytes_per_seq))


def compute_kv_cache_bytes(
    config: DecoderConfig, dtype: torch.dtype, free_bytes: int, max_num_seqs: int
) -> int:
    """Return the size of the KV cache on a GPU with `free_bytes` of free memory.

    The KV cache and the states of linear attention layers together take `GPU_MEMORY_FRACTION`.

    Raises:
        UserError: The states leave less than one block per sequence to the KV cache.
    """
    budget = int(free_bytes * GPU_MEMORY_FRACTION)
    state_bytes = get_linear_state_bytes(config, dtype, max_num_seqs)
    bytes_per_seq = get_linear_state_bytes(config, dtype, 0)
    block_bytes = GPU_BLOCK_SIZE * get_kv_bytes_per_token(config, dtype)
    if state_bytes and budget < state_bytes + max_num_seqs * block_bytes:
        max_possible = max(0, (budget - bytes_per_seq) // (bytes_per_seq + block_bytes))
        sequences = format_count(max_possible, "sequence")
        expected = f"at most {sequences}, with {bytes_per_seq / 1e6:.0f} MB each"
        if not max_possible:
            expected = f"more memory: one sequence needs {bytes_per_seq / 1e6:.0f} MB"
        raise UserError(
            f"{max_num_seqs} sequences need {state_bytes / 1e9:.2f} GB for the states of linear "
            f"attention layers, and {budget / 1e9:.2f} GB are available for them and the KV cache",
            where="GPU memory",
            expected=expected,
            remedy="set a lower --max-num-seqs of serve, quantize the weights with "
            "--weight-format, or stop other programs on the GPU",
        )
    return budget - state_bytes
