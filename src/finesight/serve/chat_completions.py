"""Route of chat completions: POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import functools
import json
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple, Unpack

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from finesight.data.jsonl import LocatedSample
from finesight.data.sample import ImagePart, Message, Sample, TextPart
from finesight.encode.tokenized_sample import EncodedSample
from finesight.errors import UserError
from finesight.infer.inference_service import GenerationStream, InferenceService, ServiceBusyError
from finesight.infer.request import (
    GREEDY_SAMPLING,
    CompletionDelta,
    GenerationOptions,
    TokenUsage,
)
from finesight.serve.api_errors import ApiError, ClientDisconnectedError, from_user_error
from finesight.serve.chat_response import (
    ChoiceBuilder,
    CompletionEnvelope,
    ToolCallParser,
    format_usage,
)
from finesight.serve.chat_schema import (
    ChatCompletionParameters,
    NamedToolChoice,
    StructuredFormat,
    UnstructuredFormat,
)
from finesight.serve.image_sources import FileStore, ImageFetcher
from finesight.serve.message_conversion import get_image_name
from finesight.serve.request_middleware import (
    ClientStalledError,
    get_reservation,
    log_internal_error,
)
from finesight.serve.request_preprocessor import ImageRequest, ParsedBody, RequestPreprocessor
from finesight.serve.server_limits import ServerLimits
from finesight.serve.server_metrics import ServerMetrics
from finesight.serve.worker_constraint import ConstraintFactory, WorkerConstraint
from finesight.serve.worker_jobs import GrammarSpec
from finesight.worker_pool import WorkerPool

ArgTs = TypeVarTuple("ArgTs")
ResultT = TypeVar("ResultT")

ChoiceDelta = tuple[int, CompletionDelta | Exception | None]
"""Index of a choice, and its next text delta.

None instead of a delta marks the end of the choice. An exception means that the choice failed.
"""

SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    # Disable buffering in proxies.
    "x-accel-buffering": "no",
}


class GenerationGroup:
    """Generations of one request, one for each choice (`n` in the OpenAI API).

    `submit` runs in a thread that cannot be interrupted. If `cancel` is called meanwhile,
    generations that `submit` still adds are canceled as well.
    """

    def __init__(self, service: InferenceService) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._is_cancelled = False
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.streams: list[GenerationStream] = []

    def submit(
        self,
        located_sample: LocatedSample,
        options: Sequence[GenerationOptions],
        prompt: EncodedSample,
    ) -> None:
        """Submit one generation per choice, all with the same prompt and images.

        Raises:
            ApiError: The inference service is busy, or the request is invalid.
        """
        for choice_options in options:
            if self._is_cancelled:
                return
            try:
                stream = self._service.submit(located_sample, choice_options, prompt)
            except ServiceBusyError as error:
                raise ApiError(
                    429, error.what, code="rate_limit_exceeded", retry_after_s=1
                ) from error
            except UserError as error:
                raise from_user_error(
                    error, "messages", hidden_path=f"{located_sample.folder}/"
                ) from error
            with self._lock:
                self.streams.append(stream)
                if self._is_cancelled:
                    stream.cancel()

    def cancel(self) -> None:
        """Cancel all generations, including those that are submitted later."""
        with self._lock:
            self._is_cancelled = True
            for stream in self.streams:
                stream.cancel()

    @property
    def usages(self) -> list[TokenUsage]:
        """Token usage of each choice so far."""
        return [stream.usage for stream in self.streams]

    async def iter_deltas(self) -> AsyncGenerator[tuple[int, CompletionDelta | None]]:
        """Yield (choice index, text delta) pairs of all choices as tokens arrive.

        A delta of None marks the end of a choice. The first error of any choice is raised.
        """
        queue: asyncio.Queue[ChoiceDelta] = asyncio.Queue()
        tasks = [
            asyncio.create_task(_forward_deltas(choice_index, stream, queue))
            for choice_index, stream in enumerate(self.streams)
        ]
        try:
            num_running = len(tasks)
            while num_running:
                received = [await queue.get()]
                while not queue.empty():
                    received.append(queue.get_nowait())
                for choice_index, delta in merge_deltas(received):
                    if isinstance(delta, UserError):
                        raise ApiError(503, delta.what, retry_after_s=5) from delta
                    if isinstance(delta, Exception):
                        raise delta
                    num_running -= delta is None
                    yield choice_index, delta
        finally:
            for task in tasks:
                task.cancel()


def merge_deltas(deltas: Sequence[ChoiceDelta]) -> list[ChoiceDelta]:
    """Merge the text deltas of each choice that have arrived together.

    With many clients, tokens arrive faster than single deltas can be sent.
    """
    merged: list[ChoiceDelta] = []
    last_by_choice: dict[int, tuple[int, CompletionDelta]] = {}
    for choice_index, delta in deltas:
        if not isinstance(delta, CompletionDelta):
            merged.append((choice_index, delta))
        elif choice_index in last_by_choice:
            position, previous = last_by_choice[choice_index]
            combined = CompletionDelta(previous.text + delta.text, previous.tokens + delta.tokens)
            merged[position], last_by_choice[choice_index] = (
                (choice_index, combined),
                (position, combined),
            )
        else:
            last_by_choice[choice_index] = (len(merged), delta)
            merged.append((choice_index, delta))
    return merged


async def _forward_deltas(
    choice_index: int, stream: GenerationStream, queue: asyncio.Queue[ChoiceDelta]
) -> None:
    try:
        async for delta in stream:
            queue.put_nowait((choice_index, delta))
        assert stream.finish_reason is not None, (
            f"choice {choice_index} ended without a finish reason"
        )
    except Exception as error:
        queue.put_nowait((choice_index, error))
    else:
        queue.put_nowait((choice_index, None))


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
    fetcher: ImageFetcher
    store: FileStore
    folder: Path
    active_requests: set[GenerationGroup] = field(default_factory=set)

    @functools.cached_property
    def executor(self) -> ThreadPoolExecutor:
        """Threads that wait for the preprocessing of requests."""
        return ThreadPoolExecutor(self.limits.num_reader_threads, "finesight-serve")

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

    async def create_chat_completion(self, request: Request) -> Response:
        """Complete a chat, as a single response or as a stream.

        Raises:
            ApiError: The request is invalid or exceeds a limit.
            ClientDisconnectedError: The client disconnected.
        """
        start_time = asyncio.get_running_loop().time()
        body_slot = await _read_body(request)
        with ExitStack() as stack:
            if len(self.active_requests) >= self.limits.max_requests:
                raise ApiError(
                    429,
                    f"the queue is full: {len(self.active_requests)} active requests",
                    code="rate_limit_exceeded",
                    retry_after_s=2,
                )
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            deadline = time.monotonic() + self.limits.request_timeout_s
            preprocessor = RequestPreprocessor(
                self.worker_pool, self.limits, self.image_formats, folder, deadline
            )
            generations = GenerationGroup(self.service)
            completion = ActiveCompletion(
                self, generations, preprocessor, start_time, request.receive
            )
            self.active_requests.add(generations)
            stack.callback(completion.close)
            disconnect_task = asyncio.create_task(completion.watch_disconnect())
            stack.callback(disconnect_task.cancel)
            await completion.start(body_slot, request)
            if not completion.chat_request.stream:
                return await completion.build_response()
            return ChatCompletionStreamResponse(completion, stack.pop_all())
        raise AssertionError("the exit stack suppressed an error")


@dataclass(slots=True)
class ActiveCompletion:
    """Chat completion request from its admission to the end of its response.

    `start_time` is on the clock of the event loop. `start` sets `chat_request`. `constraints` has
    None for each choice without structured output.
    """

    handler: ChatCompletionsHandler
    generations: GenerationGroup
    preprocessor: RequestPreprocessor
    start_time: float
    receive: Receive
    constraints: list[WorkerConstraint | None] = field(default_factory=list)
    chat_request: ChatCompletionParameters = field(init=False)

    @property
    def deadline(self) -> float:
        """Time at which the request is canceled, on the event-loop clock."""
        return self.start_time + self.handler.limits.request_timeout_s

    async def start(self, body_slot: list[NDArray[np.uint8]], request: Request) -> None:
        """Preprocess the request and submit it to the inference service.

        Args:
            body_slot: List with the request body. It is cleared after parsing to release memory.
            request: Request with the key owner and the memory reservation in its state.

        Raises:
            ApiError: The request is invalid, exceeds a limit or timed out.
            ClientDisconnectedError: The client disconnected.
        """
        handler, reservation = self.handler, get_reservation(request.scope)
        try:
            async with asyncio.timeout_at(self.deadline):
                parsed_body, prompt = await handler.run_in_thread(self._parse_and_encode, body_slot)
                reservation.release()
                for image in parsed_body.images:
                    await self._fetch_image(image, request.state.owner)
                if prompt is None:
                    prompt = await handler.run_in_thread(
                        self.preprocessor.encode, parsed_body, handler.service.max_model_len
                    )
                reservation.reserve(prompt.patches_ND.nbytes)
                sample = _build_image_sample(parsed_body, self.preprocessor.folder)
                await handler.run_in_thread(
                    self._submit, sample, prompt, executor=handler.submit_executor
                )
        except TimeoutError as error:
            raise self._timeout_error() from error

    async def watch_disconnect(self) -> None:
        """Wait until the client disconnects, then cancel the request."""
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.close()

    def close(self) -> None:
        """Cancel the preprocessing, the generations and the constraints of this request."""
        self.handler.active_requests.discard(self.generations)
        self.generations.cancel()
        self.preprocessor.cancel()
        for constraint in self.constraints:
            if constraint is not None:
                constraint.close()

    async def build_response(self) -> Response:
        """Wait for all choices and return them as a single response.

        Raises:
            ApiError: The request timed out.
            ClientDisconnectedError: The client disconnected.
        """
        choices = self._build_choices()
        try:
            async with (
                asyncio.timeout_at(self.deadline),
                aclosing(self._iter_choice_chunks(choices)) as chunks,
            ):
                async for _ in chunks:
                    pass
        except TimeoutError as error:
            raise self._timeout_error() from error
        if any(choice.finish_reason == "cancelled" for choice in choices):
            raise ClientDisconnectedError
        return JSONResponse(
            self._build_envelope().build_response(choices, format_usage(self.generations.usages))
        )

    async def send_stream(self, send: Send) -> None:
        """Send the completion as server-sent events. An error is sent as the last event."""
        try:
            async with asyncio.timeout_at(self.deadline), aclosing(self._iter_chunks()) as chunks:
                async for chunk in chunks:
                    await send(_format_sse_event(chunk))
        except TimeoutError:
            await send(_format_sse_event(self._timeout_error().body))
        except ApiError as api_error:
            await send(_format_sse_event(api_error.body))
        except ClientStalledError:
            raise
        except Exception as error:
            await send(_format_sse_event(log_internal_error(error).body))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _iter_chunks(self) -> AsyncGenerator[dict[str, Any]]:
        envelope, choices = self._build_envelope(), self._build_choices()
        for choice in choices:
            yield envelope.build_chunk([choice.build_first_chunk()])
        async with aclosing(self._iter_choice_chunks(choices)) as choice_chunks:
            async for chunk in choice_chunks:
                yield envelope.build_chunk([chunk])
        options = self.chat_request.stream_options
        if options is not None and options.include_usage:
            yield envelope.build_chunk([], format_usage(self.generations.usages))

    async def _iter_choice_chunks(
        self, choices: list[ChoiceBuilder]
    ) -> AsyncGenerator[dict[str, Any]]:
        """Yield stream chunks of all choices as tokens arrive, and append them to `choices`."""
        is_first = True
        async with aclosing(self.generations.iter_deltas()) as deltas:
            async for choice_index, delta in deltas:
                choice, stream = choices[choice_index], self.generations.streams[choice_index]
                if is_first:
                    seconds = asyncio.get_running_loop().time() - self.start_time
                    self.handler.metrics.record_first_token(seconds)
                    is_first = False
                if delta is not None:
                    chunk = choice.add_delta(delta)
                    if chunk is not None:
                        yield chunk
                    continue
                assert stream.finish_reason is not None, (
                    f"choice {choice_index} continues after its end"
                )
                self._check_constraint(choice_index)
                self.handler.metrics.record_completion(stream.finish_reason, stream.usage)
                for chunk in choice.finish(stream.finish_reason, stream.build_prediction()):
                    yield chunk

    def _parse_and_encode(
        self, body: list[NDArray[np.uint8]]
    ) -> tuple[ParsedBody, EncodedSample | None]:
        """Parse the request body, and encode the prompt if the body contains all images.

        Both steps run in one call, so that a request waits for a thread only once.
        """
        parsed_body = self.preprocessor.parse_body(body[0], self.handler.service.max_model_len)
        body.clear()
        self._set_chat_request(parsed_body.chat_request)
        if any(image.is_remote for image in parsed_body.images):
            return parsed_body, None
        return parsed_body, self.preprocessor.encode(
            parsed_body, self.handler.service.max_model_len
        )

    async def _fetch_image(self, image: ImageRequest, owner: str) -> None:
        """Link an uploaded file to the folder of the request, or fetch an image URL.

        A worker process checks the content of the file later.
        """
        folder = self.preprocessor.folder
        path = folder / get_image_name(image.image_number)
        try:
            if image.file_id is not None:
                self.handler.store.link(owner, image.file_id, path)
            elif image.url is not None:
                with open(path, "xb") as file:
                    await self.handler.fetcher.fetch(image.url, file)
        except UserError as error:
            raise from_user_error(error, image.param, hidden_path=f"{folder}/") from error
        except ApiError as error:
            error.param = image.param
            raise

    def _set_chat_request(self, chat_request: ChatCompletionParameters) -> None:
        """Set the request parameters. Raises ApiError if the model is unknown."""
        names = self.handler.service.model_names
        if chat_request.model not in names:
            raise ApiError(
                404,
                f"unknown model {chat_request.model[:80]!r}; expected {' or '.join(names)}",
                "model",
                "model_not_found",
            )
        self.chat_request = chat_request

    def _submit(self, located_sample: LocatedSample, prompt: EncodedSample) -> None:
        """Submit one generation per choice to the inference service."""
        factory, grammar = self.handler.constraint_factory, self._get_grammar_spec()
        if grammar is not None and not factory.is_accepted(grammar[0]):
            self.preprocessor.check_grammar(*grammar)
            factory.mark_accepted(grammar[0])
        options = []
        for choice_index in range(self.chat_request.n or 1):
            constraint = None if grammar is None else factory.create(grammar[0])
            self.constraints.append(constraint)
            options.append(self._build_options(choice_index, constraint))
        self.generations.submit(located_sample, options, prompt)

    def _check_constraint(self, choice_index: int) -> None:
        constraint = self.constraints[choice_index]
        if constraint is not None and constraint.has_failed:
            raise ApiError(
                400,
                f"the schema of choice {choice_index} exceeds a limit; simplify the schema",
                "response_format",
            )

    def _build_options(
        self, choice_index: int, constraint: WorkerConstraint | None
    ) -> GenerationOptions:
        """Build the generation options of a choice. Raise ApiError for an invalid parameter."""
        chat_request = self.chat_request
        settings: dict[str, Any] = {
            "temperature": chat_request.temperature,
            "top_p": chat_request.top_p,
            "top_k": chat_request.top_k,
            "repetition_penalty": chat_request.repetition_penalty,
            "seed": None if chat_request.seed is None else chat_request.seed + choice_index,
        }
        try:
            sampling_params = replace(
                GREEDY_SAMPLING, **{k: v for k, v in settings.items() if v is not None}
            )
        except UserError as error:
            raise from_user_error(error) from error
        return GenerationOptions(
            max_new_tokens=chat_request.max_new_tokens,
            sampling_params=sampling_params,
            stop_strings=chat_request.stop_strings,
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
        tool_choice = self.chat_request.tool_choice
        tools = {
            tool.function.name: tool.function.parameters for tool in self.chat_request.tools or []
        }
        if tool_choice not in (None, "none") and not tools:
            raise ApiError(400, f"tool_choice {tool_choice!r:.80} without tools", "tool_choice")
        if isinstance(tool_choice, NamedToolChoice):
            name = tool_choice.function.name
            if name not in tools:
                raise ApiError(400, f"unknown tool {name[:80]!r}", "tool_choice")
            tools = {name: tools[name]}
        is_structured = not isinstance(response_format, UnstructuredFormat | None)
        if isinstance(tool_choice, NamedToolChoice) or tool_choice == "required":
            if is_structured:
                raise ApiError(
                    400, f"tool_choice {tool_choice!r:.80} with a response_format", "tool_choice"
                )
            return ("calls", (list(tools.items()),)), "tools"
        if isinstance(response_format, UnstructuredFormat | None):
            return None
        args = (
            (response_format.json_schema.schema_,)
            if isinstance(response_format, StructuredFormat)
            else ()
        )
        return (response_format.type, args), "response_format"

    def _build_choices(self) -> list[ChoiceBuilder]:
        tokenizer = self.handler.service.renderer.tokenizer
        has_tools = bool(self.chat_request.tools) and self.chat_request.tool_choice != "none"
        with_logprobs = bool(self.chat_request.logprobs)
        return [
            ChoiceBuilder(n, tokenizer, with_logprobs, ToolCallParser() if has_tools else None)
            for n in range(len(self.generations.streams))
        ]

    def _build_envelope(self) -> CompletionEnvelope:
        return CompletionEnvelope(self.generations.id, self.chat_request.model)

    def _timeout_error(self) -> ApiError:
        return ApiError(
            504,
            f"timeout: no complete answer within {self.handler.limits.request_timeout_s:g} seconds",
            code="timeout",
        )


class ChatCompletionStreamResponse(Response):
    """Streaming response. At its end, it releases the resources of the request."""

    def __init__(self, completion: ActiveCompletion, stack: ExitStack) -> None:
        super().__init__()
        self._completion, self._stack = completion, stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the headers and the stream (ASGI)."""
        headers = [(name.encode(), value.encode()) for name, value in SSE_HEADERS.items()]
        with self._stack:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._completion.send_stream(send)


async def _read_body(request: Request) -> list[NDArray[np.uint8]]:
    """Read the request body into a list with one element.

    The list allows the caller to release the body. Starlette would retain it.
    """
    chunks = [chunk async for chunk in request.stream()]
    return [np.frombuffer(b"".join(chunks), dtype=np.uint8)]


def _build_image_sample(body: ParsedBody, folder: Path) -> LocatedSample:
    """Build a sample with the images of a request.

    The inference service needs their sizes to parse bounding boxes in completions.
    """
    images = [ImagePart(image=get_image_name(image.image_number)) for image in body.images]
    message = Message(role="user", content=(*images, TextPart(text="")))
    return LocatedSample(Sample(id="request", messages=(message,)), folder)


def _format_sse_event(data: dict[str, Any]) -> dict[str, Any]:
    """Format JSON data as a server-sent event in an ASGI message."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    body = f"data: {text}\n\n".encode("utf-8", "replace")
    return {"type": "http.response.body", "body": body, "more_body": True}
