"""Route of chat completions: POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple, Unpack

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from finesight.encode.family import ThinkingOptions
from finesight.encode.tokenization import EncodedSample, TextTokenizer
from finesight.errors import UserError, shorten
from finesight.files.worker_pool import WorkerPool
from finesight.infer.inference_service import GenerationStream, InferenceService, ServiceBusyError
from finesight.infer.prediction import Prediction, box_to_dict
from finesight.infer.request import (
    GREEDY_SAMPLING,
    CompletionDelta,
    FinishReason,
    GeneratedToken,
    GenerationOptions,
)
from finesight.samples.frames import ImageSize
from finesight.samples.sample import (
    TOOL_CALL_END,
    TOOL_CALL_START,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    ToolCallPart,
    parse_tool_call,
)
from finesight.serve.api_schema import (
    ApiError,
    ChatCompletionParameters,
    ClientDisconnectedError,
    NamedToolChoice,
    ServerLimits,
    StructuredFormat,
    UnstructuredFormat,
    from_user_error,
)
from finesight.serve.media_sources import FetchFn, FileStore, MediaFetcher
from finesight.serve.preprocessing_jobs import GrammarSpec, MediaFile
from finesight.serve.request_middleware import (
    LOGGER,
    ByteReservation,
    ClientStalledError,
    ServerMetrics,
    get_reservation,
    log_internal_error,
    read_body,
)
from finesight.serve.request_preprocessor import (
    ConstraintFactory,
    ParsedBody,
    RequestPreprocessor,
    WorkerConstraint,
)


@dataclass(slots=True)
class ToolCallParser:
    """Splits a streamed completion into text and tool calls.

    Text that may start a tool call is held back until it is complete.
    """

    tools: Sequence[dict[str, Any]] = ()
    pending: str = ""
    after_call: bool = False

    def add_text(self, delta: str) -> tuple[str, list[ToolCallPart]]:
        """Add generated text. Returns text that can be sent, and complete tool calls."""
        self._set_pending(self.pending + delta)
        text = ""
        calls: list[ToolCallPart] = []
        while TOOL_CALL_START in self.pending:
            before, _, rest = self.pending.partition(TOOL_CALL_START)
            call_text, end_tag, after = rest.partition(TOOL_CALL_END)
            if not end_tag:
                self.pending = self.pending[len(before) :]
                return text + before.rstrip("\n"), calls
            call = parse_tool_call(call_text, self.tools)
            if call is None:  # the text remains in the answer
                text += f"{before}{TOOL_CALL_START}{call_text}{TOOL_CALL_END}"
            else:
                text += before.rstrip("\n")
                calls.append(call)
            self.after_call = call is not None
            self._set_pending(after)
        end = len(self.pending) - _count_partial_tag(self.pending)
        text += self.pending[:end]
        self.pending = self.pending[end:]
        return text, calls

    def flush(self) -> tuple[str, list[ToolCallPart]]:
        """Return the text or tool call that is left at the end of the completion.

        The last tool call may lack its end tag.
        """
        rest = self.pending
        self.pending = ""
        if rest.startswith(TOOL_CALL_START):
            call = parse_tool_call(rest.removeprefix(TOOL_CALL_START), self.tools)
            if call is not None:
                return "", [call]
        return rest, []

    def _set_pending(self, text: str) -> None:
        """Set the text that is held back, without newlines after a tool call."""
        self.pending = text.lstrip("\n") if self.after_call else text
        self.after_call = self.after_call and not self.pending


def _format_tool_call(call: ToolCallPart) -> dict[str, Any]:
    """Return the tool call object of the OpenAI API."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _count_partial_tag(text: str) -> int:
    """Count the last characters of a text that may belong to a tool call.

    These are newlines and a partial start tag.
    """
    for length in range(min(len(TOOL_CALL_START) - 1, len(text)), 0, -1):
        if TOOL_CALL_START.startswith(text[-length:]):
            rest = text[:-length]
            return length + len(rest) - len(rest.rstrip("\n"))
    return len(text) - len(text.rstrip("\n"))


@dataclass(slots=True)
class ChoiceBuilder:
    """Builds one choice of a response from the text deltas of its generation."""

    index: int
    tokenizer: TextTokenizer
    with_logprobs: bool
    tool_call_parser: ToolCallParser | None
    text: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prediction: Prediction | None = None

    def add_delta(self, delta: CompletionDelta) -> dict[str, Any] | None:
        """Append a text delta and return a stream chunk, or None if all text is held back."""
        text = delta.text
        calls: list[ToolCallPart] = []
        if self.tool_call_parser is not None:
            text, calls = self.tool_call_parser.add_text(delta.text)
        return self._append(text, calls, delta.tokens, delta.reasoning)

    def finish(self, finish_reason: FinishReason, prediction: Prediction) -> list[dict[str, Any]]:
        """Return the last stream chunks: text that was held back, if any, and finish reason."""
        text = ""
        calls: list[ToolCallPart] = []
        if self.tool_call_parser is not None:
            text, calls = self.tool_call_parser.flush()
        remaining_chunk = self._append(text, calls, ())
        self.finish_reason = finish_reason
        self.prediction = prediction
        last_chunk = self._build_chunk(self._get_extra_fields())
        last_chunk["finish_reason"] = self.openai_finish_reason
        if remaining_chunk is None:
            return [last_chunk]
        return [remaining_chunk, last_chunk]

    @property
    def openai_finish_reason(self) -> str:
        """Finish reason in the OpenAI API: `stop`, `length` or `tool_calls`."""
        if self.tool_calls and self.finish_reason == "stop":
            return "tool_calls"
        return "length" if self.finish_reason == "length" else "stop"

    def to_dict(self) -> dict[str, Any]:
        """Return the complete choice with its message, for a response without streaming."""
        content = self.text if self.text or not self.tool_calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        if self.prediction is not None and self.prediction.reasoning is not None:
            message["reasoning_content"] = self.prediction.reasoning
        return {
            "index": self.index,
            "message": message | self._get_extra_fields(),
            "finish_reason": self.openai_finish_reason,
            "logprobs": {"content": self.logprobs, "refusal": None} if self.with_logprobs else None,
        }

    def build_first_chunk(self) -> dict[str, Any]:
        """Return the first stream chunk of the choice, which contains the role."""
        return self._build_chunk({"role": "assistant", "content": ""})

    def _get_extra_fields(self) -> dict[str, Any]:
        """Return `boxes` and `raw_text`, which extend the OpenAI API."""
        prediction = self.prediction
        if prediction is None:
            return {}
        boxes = [box_to_dict(box) for box in prediction.boxes]
        return {"boxes": boxes, "raw_text": prediction.raw_text}

    def _append(
        self,
        text: str,
        calls: Sequence[ToolCallPart],
        tokens: Sequence[GeneratedToken],
        reasoning: str = "",
    ) -> dict[str, Any] | None:
        logprobs: list[dict[str, Any]] = []
        if self.with_logprobs:
            logprobs = list(map(self._format_logprob, tokens))
        if not text and not calls and not logprobs and not reasoning:
            return None
        delta: dict[str, Any] = {}
        if reasoning:
            delta["reasoning_content"] = reasoning
        if text:
            delta["content"] = text
        if calls:
            formatted = list(map(_format_tool_call, calls))
            first = len(self.tool_calls)
            delta["tool_calls"] = [{"index": n, **c} for n, c in enumerate(formatted, first)]
            self.tool_calls += formatted
        self.text += text
        self.logprobs += logprobs
        chunk = self._build_chunk(delta)
        if self.with_logprobs:
            chunk["logprobs"] = {"content": logprobs, "refusal": None}
        return chunk

    def _build_chunk(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "finish_reason": None, "logprobs": None}

    def _format_logprob(self, token: GeneratedToken) -> dict[str, Any]:
        assert token.logprob is not None, f"token {token.id} has no log probability"
        entries = []
        for token_id, logprob in ((token.id, token.logprob), *token.top_logprobs):
            token_bytes = self.tokenizer.id_to_bytes(token_id)
            text = token_bytes.decode(errors="replace")
            # JSON has no infinity, the log probability of an excluded token.
            bounded = max(logprob, -9999.0)
            entries.append({"token": text, "logprob": bounded, "bytes": list(token_bytes)})
        return {**entries[0], "top_logprobs": entries[1:]}


LARGE_BODY_BYTES = 4 << 20
"""Size from which a body is large."""

MAX_LARGE_BODIES = 2
"""Maximum number of large bodies that workers parse at once.

A worker has a copy of the body, and of the texts and images in it.
"""

ArgTs = TypeVarTuple("ArgTs")
ResultT = TypeVar("ResultT")

MAX_LOGGED_CHARS = 200
"""Maximum number of characters of a template in the log."""

SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    # Disable buffering in proxies.
    "x-accel-buffering": "no",
}
SSE_END = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class ChatCompletionsHandler:
    """Handles chat completion requests with the resources that all requests share.

    `folder` has a subfolder for each active request.
    """

    service: InferenceService
    worker_pool: WorkerPool
    constraint_factory: ConstraintFactory
    image_formats: Sequence[str]
    limits: ServerLimits
    metrics: ServerMetrics
    fetcher: MediaFetcher
    store: FileStore
    folder: Path
    active_requests: set[ActiveCompletion] = field(default_factory=set)
    models_with_other_form: set[str] = field(default_factory=set)

    def log_other_form(self, model: str) -> None:
        """Log once for each model that requests differ from its training questions."""
        if model in self.models_with_other_form:
            return
        self.models_with_other_form.add(model)
        forms = []
        for template in self.service.get_prompt_format(model).templates:
            forms.append(repr(shorten(template.template, MAX_LOGGED_CHARS)))
        LOGGER.warning(
            "questions to %s have another order or white space than those of its training, %s;"
            " answers may be worse",
            model,
            ", ".join(forms),
        )

    @functools.cached_property
    def executor(self) -> ThreadPoolExecutor:
        """Threads that wait for the preprocessing of requests without images."""
        return ThreadPoolExecutor(self.limits.num_reader_threads, "finesight-serve")

    @functools.cached_property
    def media_executor(self) -> ThreadPoolExecutor:
        """Threads that wait for images and videos, for which texts never wait."""
        return ThreadPoolExecutor(self.limits.num_reader_threads, "finesight-media")

    @functools.cached_property
    def large_body_executor(self) -> ThreadPoolExecutor:
        """Threads that wait for the parsing of large bodies."""
        return ThreadPoolExecutor(MAX_LARGE_BODIES, "finesight-bodies")

    @functools.cached_property
    def submit_executor(self) -> ThreadPoolExecutor:
        """Threads that submit requests, since all other threads may be busy."""
        return ThreadPoolExecutor(self.limits.num_reader_threads, "finesight-submit")

    async def run_in_thread(
        self,
        function: Callable[[Unpack[ArgTs]], ResultT],
        *args: *ArgTs,
        executor: ThreadPoolExecutor | None = None,
    ) -> ResultT:
        """Run a function that would block the event loop, by default in `executor`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(executor or self.executor, function, *args)

    async def parse_in_thread(
        self, parse: Callable[[bytearray], ResultT], body: bytearray
    ) -> ResultT:
        """Parse a body in a thread for bodies of its size."""
        executor = self.large_body_executor if len(body) > LARGE_BODY_BYTES else None
        return await self.run_in_thread(parse, body, executor=executor)

    async def create_chat_completion(self, request: Request) -> Response:
        """Complete a chat, as a single response or as a stream.

        Raises:
            ApiError: The request is invalid or exceeds a limit.
            ClientDisconnectedError: The client disconnected.
        """
        start_time = asyncio.get_running_loop().time()
        data = await read_body(request)
        with contextlib.ExitStack() as stack:
            completion = stack.enter_context(self.admit_completion(start_time))
            disconnect_task = asyncio.create_task(completion.watch_disconnect(request.receive))
            stack.callback(disconnect_task.cancel)
            await completion.start(data, request.state.owner, get_reservation(request.scope))
            if not completion.chat_request.stream:
                return await completion.build_response()
            return ChatCompletionStreamResponse(completion, stack.pop_all())
        raise AssertionError("the exit stack suppressed an error")

    def create_preprocessor(
        self, folder: Path | None = None, deadline: float = math.inf
    ) -> RequestPreprocessor:
        """Create the preprocessor of a request, with its own folder if it has files."""
        resources = self.worker_pool, self.limits, self.image_formats
        return RequestPreprocessor(*resources, folder or self.folder, deadline)

    @contextlib.contextmanager
    def admit_completion(
        self, start_time: float, fetch_file: FetchFn | None = None
    ) -> Iterator[ActiveCompletion]:
        """Create a completion, and release its resources at the end of a `with` block.

        Args:
            start_time: Start of the time limit, on the clock of the event loop.
            fetch_file: Writes the content of a URL to a file. By default, only URLs of allowed
                hosts are fetched.

        Raises:
            ApiError: The queue is full.
        """
        if len(self.active_requests) >= self.limits.max_requests:
            raise ApiError(
                429,
                f"the queue is full: {len(self.active_requests)} active requests",
                code="rate_limit_exceeded",
                retry_after_s=2,
            )
        with contextlib.ExitStack() as stack:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            elapsed = asyncio.get_running_loop().time() - start_time
            deadline = time.monotonic() + self.limits.timeout - elapsed
            preprocessor = self.create_preprocessor(folder, deadline)
            fetch_file = fetch_file or self.fetcher.fetch
            completion = ActiveCompletion(self, preprocessor, start_time, fetch_file)
            self.active_requests.add(completion)
            stack.callback(completion.close)
            yield completion


@contextlib.asynccontextmanager
async def limit_time(start_time: float, seconds: float) -> AsyncGenerator[None]:
    """Raise an API error in a `with` block that exceeds the time limit of a request."""
    try:
        async with asyncio.timeout_at(start_time + seconds):
            yield
    except TimeoutError as error:
        raise ApiError(
            504, f"timeout: no complete answer within {seconds:g} seconds", code="timeout"
        ) from error


@contextlib.asynccontextmanager
async def stop_at_disconnect(receive: Receive) -> AsyncGenerator[asyncio.TaskGroup]:
    """Raise ClientDisconnectedError in a `with` block when the client disconnects.

    Yields a group for tasks that end with the block.
    """

    async def watch_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        raise ClientDisconnectedError

    try:
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(watch_disconnect())
            yield group
            watch.cancel()
    except* Exception as errors:
        raise errors.exceptions[0] from None


@dataclass(slots=True, eq=False)
class ActiveCompletion:
    """Chat completion request from its admission to the end of its response.

    `start_time` is on the clock of the event loop. `start` sets `chat_request`. Each choice (`n` in
    the OpenAI API) has a stream, and None or a constraint for structured output. `start` also sets
    `thinking`, with the default mode of the requested model, and the size of each image.
    """

    handler: ChatCompletionsHandler
    preprocessor: RequestPreprocessor
    start_time: float
    fetch_file: FetchFn
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created_at: int = field(default_factory=lambda: int(time.time()))
    streams: list[GenerationStream] = field(default_factory=list)
    constraints: list[WorkerConstraint | None] = field(default_factory=list)
    chat_request: ChatCompletionParameters = field(init=False)
    thinking: ThinkingOptions = field(init=False)
    image_sizes: list[ImageSize] = field(default_factory=list)
    _is_closed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    async def start(self, data: bytearray, owner: str, reservation: ByteReservation) -> None:
        """Preprocess the request of a client and submit it to the inference service.

        The body `data` is cleared after parsing, and its memory reservation is released.

        Raises:
            ApiError: The request is invalid, exceeds a limit or timed out.
            ClientDisconnectedError: The client disconnected.
        """
        handler = self.handler
        folder = self.preprocessor.folder
        max_model_len = handler.service.max_model_len
        async with self._limit_time():
            body, prompt = await handler.parse_in_thread(self._parse_and_encode, data)
            reservation.release()
            for file in body.files:
                await self._fetch_file(file, owner)
            if prompt is None:
                prompt = await handler.run_in_thread(
                    self.preprocessor.encode,
                    body,
                    max_model_len,
                    self.thinking,
                    handler.service.get_prompt_format(self.chat_request.model),
                    executor=handler.media_executor,
                )
            if not self.preprocessor.has_training_form:
                handler.log_other_form(self.chat_request.model)
            reservation.reserve(prompt.patches_ND.nbytes)
            spans = [span for span in prompt.tokenized.spans if span.kind == "image"]
            self.image_sizes = [span.original_size for span in spans]
            # The service needs the image sizes to parse bounding boxes in completions.
            images = [ImagePart(image=str(span.files[0])) for span in spans]
            message = Message(role="user", content=(*images, TextPart(text="")))
            sample = LocatedSample(Sample(id="request", messages=(message,)), folder)
            await handler.run_in_thread(
                self._submit, sample, prompt, executor=handler.submit_executor
            )

    async def watch_disconnect(self, receive: Receive) -> None:
        """Wait until the client disconnects, then cancel the request."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.close()

    def close(self) -> None:
        """Cancel the preprocessing and the generations, including those submitted later."""
        self.handler.active_requests.discard(self)
        with self._lock:
            self._is_closed = True
            for stream in self.streams:
                stream.cancel()
        self.preprocessor.cancel()
        for constraint in self.constraints:
            if constraint is not None:
                constraint.close()

    async def build_response(self) -> Response:
        """Wait for all choices and return them as a single response.

        Raises like `generate_choices`.
        """
        choices = await self.generate_choices()
        message = self._build_object("chat.completion", [choice.to_dict() for choice in choices])
        return JSONResponse(message | {"usage": self._format_usage()})

    async def generate_choices(self) -> list[ChoiceBuilder]:
        """Wait for all choices and return them.

        Raises:
            ApiError: The request timed out.
            ClientDisconnectedError: The client disconnected.
        """
        choices = self._build_choices()
        async with (
            self._limit_time(),
            contextlib.aclosing(self._iter_choice_chunks(choices)) as chunks,
        ):
            async for _ in chunks:
                pass
        if any(choice.finish_reason == "cancelled" for choice in choices):
            raise ClientDisconnectedError
        return choices

    async def send_stream(self, send: Send) -> None:
        """Send the completion as server-sent events. An error is sent as the last event."""
        try:
            async with self._limit_time(), contextlib.aclosing(self._iter_chunks()) as chunks:
                async for chunk in chunks:
                    await send(format_sse_event(chunk))
        except ApiError as api_error:
            await send(format_sse_event(api_error.body))
        except ClientStalledError:
            raise
        except Exception as error:
            await send(format_sse_event(log_internal_error(error).body))
        await send({"type": "http.response.body", "body": SSE_END})

    def _limit_time(self) -> contextlib.AbstractAsyncContextManager[None]:
        return limit_time(self.start_time, self.handler.limits.timeout)

    def _build_object(self, object_type: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Build a response object, or a chunk of a stream, with the fields that all share."""
        header = {"id": self.id, "object": object_type, "created": self.created_at}
        return {**header, "model": self.chat_request.model, "choices": choices}

    def _format_usage(self) -> dict[str, Any]:
        """Format the token usage. The prompt counts once for all choices."""
        usages = [stream.usage for stream in self.streams]
        prompt_tokens = usages[0].prompt_tokens
        completion_tokens = sum(usage.completion_tokens for usage in usages)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usages[0].cached_tokens},
        }

    async def _iter_chunks(self) -> AsyncGenerator[dict[str, Any]]:
        object_type = "chat.completion.chunk"
        choices = self._build_choices()
        for choice in choices:
            yield self._build_object(object_type, [choice.build_first_chunk()])
        async with contextlib.aclosing(self._iter_choice_chunks(choices)) as choice_chunks:
            async for chunk in choice_chunks:
                yield self._build_object(object_type, [chunk])
        options = self.chat_request.stream_options
        if options is not None and options.include_usage:
            yield self._build_object(object_type, []) | {"usage": self._format_usage()}

    async def _iter_choice_chunks(
        self, choices: list[ChoiceBuilder]
    ) -> AsyncGenerator[dict[str, Any]]:
        """Yield stream chunks of all choices as tokens arrive, and append them to `choices`."""
        metrics = self.handler.metrics
        is_first = True
        async with contextlib.aclosing(self._iter_deltas()) as deltas:
            async for choice_index, delta in deltas:
                choice = choices[choice_index]
                stream = self.streams[choice_index]
                if is_first:
                    seconds = asyncio.get_running_loop().time() - self.start_time
                    metrics.time_to_first_token.observe(seconds)
                    is_first = False
                if delta is not None:
                    chunk = choice.add_delta(delta)
                    if chunk is not None:
                        yield chunk
                    continue
                constraint = self.constraints[choice_index]
                reason = stream.finish_reason
                assert reason is not None, f"choice {choice_index} continues after its end"
                if constraint is not None and constraint.has_failed:
                    raise ApiError(
                        400,
                        f"the schema of choice {choice_index} exceeds a limit; simplify the schema",
                        "response_format",
                    )
                metrics.record_completion(reason, stream.usage)
                for chunk in choice.finish(reason, stream.build_prediction()):
                    yield chunk

    async def _iter_deltas(self) -> AsyncGenerator[tuple[int, CompletionDelta | None]]:
        """Yield (choice index, text delta) pairs of all choices as tokens arrive.

        A delta of None marks the end of a choice. The first error of any choice is raised.
        """
        # With a larger queue, streams could not merge tokens that arrive faster than they are sent.
        queue: asyncio.Queue[tuple[int, CompletionDelta | Exception | None]] = asyncio.Queue(1)

        async def forward_deltas(choice_index: int, stream: GenerationStream) -> None:
            try:
                async for delta in stream:
                    await queue.put((choice_index, delta))
            except Exception as error:
                await queue.put((choice_index, error))
            else:
                await queue.put((choice_index, None))

        tasks = [asyncio.create_task(forward_deltas(*pair)) for pair in enumerate(self.streams)]
        try:
            num_running = len(tasks)
            while num_running:
                choice_index, delta = await queue.get()
                if isinstance(delta, UserError):
                    raise ApiError(503, delta.what, retry_after_s=5) from delta
                if isinstance(delta, Exception):
                    raise delta
                num_running -= delta is None
                yield choice_index, delta
        finally:
            for task in tasks:
                task.cancel()

    def _parse_and_encode(self, data: bytearray) -> tuple[ParsedBody, EncodedSample | None]:
        """Parse the request body, and encode the prompt if it has no files.

        Both steps run in one call, so that such a request waits for a thread only once.
        """
        service = self.handler.service
        body = self.preprocessor.parse_body(data, service.max_model_len)
        data.clear()
        names = service.model_names
        name = body.chat_request.model
        if name not in names:
            message = f"unknown model {name[:80]!r}; expected {' or '.join(names)}"
            raise ApiError(404, message, "model", "model_not_found")
        self.chat_request = body.chat_request
        self.thinking = body.chat_request.thinking
        try:
            renderer = service.select_renderer(name, self.thinking)
        except UserError as error:
            raise from_user_error(error, error.where) from error
        self.thinking = replace(self.thinking, enable_thinking=renderer.has_reasoning)
        if body.files:
            return body, None
        prompt_format = service.get_prompt_format(name)
        prompt = self.preprocessor.encode(body, service.max_model_len, self.thinking, prompt_format)
        return body, prompt

    async def _fetch_file(self, media: MediaFile, owner: str) -> None:
        """Add an uploaded file, or that of a URL, to the folder of the request.

        A worker process checks the content of the file later.
        """
        folder = self.preprocessor.folder
        path = folder / media.name
        try:
            if media.file_id is not None:
                link = self.handler.store.link
                await self.handler.run_in_thread(link, owner, media.file_id, path)
            elif media.url is not None:
                with open(path, "xb") as file:
                    await self.fetch_file(media.url, file)
        except UserError as error:
            raise from_user_error(error, media.param, hidden_path=f"{folder}/") from error
        except ApiError as error:
            error.param = media.param
            raise

    def _submit(self, located_sample: LocatedSample, prompt: EncodedSample) -> None:
        """Submit one generation per choice, all with the same prompt and images.

        Raises:
            ApiError: The inference service is busy, or the request is invalid.
            ClientDisconnectedError: `close` was called, which cannot interrupt this thread.
        """
        factory = self.handler.constraint_factory
        grammar = self._get_grammar_spec()
        if grammar is not None:
            check = functools.partial(self.preprocessor.check_grammar, *grammar, self.thinking)
            factory.check_once(grammar[0], check)
        for choice_index in range(self.chat_request.n or 1):
            constraint = None
            if grammar is not None:
                constraint = WorkerConstraint(factory, grammar[0], self.thinking)
            self.constraints.append(constraint)
            if self._is_closed:
                raise ClientDisconnectedError
            try:
                options = self._build_options(choice_index, constraint)
                stream = self.handler.service.submit(located_sample, options, prompt)
            except ServiceBusyError as error:
                raise ApiError(
                    429, error.what, code="rate_limit_exceeded", retry_after_s=1
                ) from error
            except UserError as error:
                hidden_path = f"{located_sample.folder}/"
                raise from_user_error(error, "messages", hidden_path) from error
            with self._lock:
                self.streams.append(stream)
                if self._is_closed:
                    stream.cancel()

    def _build_options(
        self, choice_index: int, constraint: WorkerConstraint | None
    ) -> GenerationOptions:
        chat_request = self.chat_request
        names = {"temperature", "top_p", "top_k", "repetition_penalty", "seed"}
        settings = chat_request.model_dump(include=names, exclude_none=True)
        if "seed" in settings:
            settings["seed"] += choice_index
        if settings.get("top_k") == -1:  # all tokens, as in vLLM
            settings["top_k"] = 0
        try:
            sampling_params = replace(GREEDY_SAMPLING, **settings)
        except UserError as error:
            raise from_user_error(error) from error
        return GenerationOptions(
            max_new_tokens=chat_request.max_new_tokens,
            sampling_params=sampling_params,
            stop_strings=chat_request.stop_strings,
            skip_special_tokens=chat_request.skip_special_tokens is not False,
            logprobs=(chat_request.top_logprobs or 0) if chat_request.logprobs else None,
            constraint=constraint,
            model=chat_request.model,
        )

    def _get_grammar_spec(self) -> tuple[GrammarSpec, str] | None:
        """Return the grammar for structured output, and the request field that requires it.

        Returns None if the completion is not constrained.

        Raises:
            ApiError: `response_format`, `tools` and `tool_choice` are inconsistent.
        """
        response_format = self.chat_request.response_format
        choice = self.chat_request.tool_choice
        is_structured = not isinstance(response_format, UnstructuredFormat | None)
        functions = [tool.function for tool in self.chat_request.tools or []]
        if isinstance(choice, NamedToolChoice):
            functions = [
                function for function in functions if function.name == choice.function.name
            ]
        if choice not in (None, "none") and not functions:
            raise ApiError(400, f"tool_choice {choice!r:.80} without this tool", "tool_choice")
        if isinstance(choice, NamedToolChoice) or choice == "required":
            if is_structured:
                message = f"tool_choice {choice!r:.80} with a response_format"
                raise ApiError(400, message, "tool_choice")
            parameters = {function.name: function.parameters for function in functions}
            return ("calls", (list(parameters.items()),)), "tools"
        if isinstance(response_format, UnstructuredFormat | None):
            return None
        if isinstance(response_format, StructuredFormat):
            return ("json_schema", (response_format.json_schema.schema_,)), "response_format"
        return (response_format.type, ()), "response_format"

    def _build_choices(self) -> list[ChoiceBuilder]:
        tokenizer = self.handler.service.renderer.tokenizer
        can_call = self.chat_request.tool_choice != "none"
        tools = [tool.model_dump() for tool in self.chat_request.tools or [] if can_call]
        with_logprobs = bool(self.chat_request.logprobs)
        return [
            ChoiceBuilder(n, tokenizer, with_logprobs, ToolCallParser(tools) if tools else None)
            for n in range(len(self.streams))
        ]


class ChatCompletionStreamResponse(Response):
    """Streaming response. At its end, it releases the resources of the request."""

    def __init__(self, completion: ActiveCompletion, stack: contextlib.ExitStack) -> None:
        super().__init__()
        self._completion = completion
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the headers and the stream (ASGI)."""
        headers = [(name.encode(), value.encode()) for name, value in SSE_HEADERS.items()]
        with self._stack:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._completion.send_stream(send)


def format_sse_event(data: dict[str, Any]) -> dict[str, Any]:
    """Format JSON data as a server-sent event in an ASGI message."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    body = f"data: {text}\n\n".encode("utf-8", "replace")
    return {"type": "http.response.body", "body": body, "more_body": True}
