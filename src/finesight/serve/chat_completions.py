"""Route of chat completions: POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray

from finesight.data.jsonl import LocatedSample
from finesight.data.sample import ImagePart, Message, Sample, TextPart
from finesight.encode.tokenized_sample import EncodedSample
from finesight.errors import UserError
from finesight.infer.inference_service import InferenceService
from finesight.infer.request import GREEDY_SAMPLING, GenerationOptions
from finesight.serve.api_errors import ApiError, ClientDisconnectedError, from_user_error
from finesight.serve.chat_response import ChoiceBuilder, CompletionEnvelope, format_usage
from finesight.serve.chat_schema import ChatCompletionParameters, NamedToolChoice
from finesight.serve.file_store import FileStore
from finesight.serve.generation_group import GenerationGroup
from finesight.serve.image_fetcher import ImageFetcher
from finesight.serve.media_loader import MediaLoader
from finesight.serve.message_conversion import get_image_name
from finesight.serve.request_middleware import (
    ByteReservation,
    ClientStalledError,
    Receive,
    Scope,
    Send,
    get_reservation,
    log_internal_error,
)
from finesight.serve.request_preprocessor import ParsedBody, RequestPreprocessor
from finesight.serve.server_limits import ServerLimits
from finesight.serve.server_metrics import ServerMetrics
from finesight.serve.thread_pool import ThreadPool
from finesight.serve.tool_calls import ToolCallParser
from finesight.serve.worker_constraint import ConstraintFactory, WorkerConstraint
from finesight.serve.worker_jobs import GrammarSpec
from finesight.worker_pool import WorkerPool

SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    # Disable buffering in proxies.
    "x-accel-buffering": "no",
}


@dataclass(frozen=True, slots=True)
class ChatCompletionsHandler:
    """Handles chat completion requests with the resources that all requests share.

    Attributes:
        service: Inference service that generates completions.
        worker_pool: Worker processes that preprocess requests.
        constraint_factory: Creates decoding constraints for structured output.
        image_formats: Accepted image formats.
        limits: Limits of the server.
        metrics: Metrics of the server.
        thread_pool: Threads that wait for the preprocessing of requests.
        submit_pool: Threads that submit requests to the service.
        fetcher: Fetches images from the web.
        store: Files that clients have uploaded.
        folder: Folder with a subfolder for each active request.
        active_requests: Generations of all admitted requests.
    """

    service: InferenceService
    worker_pool: WorkerPool
    constraint_factory: ConstraintFactory
    image_formats: Sequence[str]
    limits: ServerLimits
    metrics: ServerMetrics
    thread_pool: ThreadPool
    submit_pool: ThreadPool
    fetcher: ImageFetcher
    store: FileStore
    folder: Path
    active_requests: set[GenerationGroup]

    async def create_chat_completion(self, request: Request) -> Response:
        """Complete a chat, as a single response or as a stream.

        Raises:
            ApiError: The request is invalid or exceeds a limit.
            ClientDisconnectedError: The client disconnected.
        """
        start_time = asyncio.get_running_loop().time()
        body_slot = await _read_body(request)
        with ExitStack() as stack:
            generations = self._admit_request(stack)
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            deadline = time.monotonic() + self.limits.request_timeout_s
            preprocessor = RequestPreprocessor(
                self.worker_pool, self.limits, self.image_formats, folder, deadline
            )
            completion = ActiveCompletion(
                self, generations, preprocessor, start_time, request.receive
            )
            stack.callback(completion.close)
            disconnect_task = asyncio.create_task(completion.watch_disconnect())
            stack.callback(disconnect_task.cancel)
            media_loader = MediaLoader(
                folder, request.scope["state"]["owner"], self.fetcher, self.store
            )
            await completion.start(body_slot, media_loader, get_reservation(request.scope))
            if not completion.chat_request.stream:
                return await completion.build_response()
            return ChatCompletionStreamResponse(completion, stack.pop_all())
        raise AssertionError("the exit stack suppressed an error")

    def _admit_request(self, stack: ExitStack) -> GenerationGroup:
        """Admit a request, or raise ApiError if the queue is full.

        The request counts as active until the stack is closed.
        """
        if len(self.active_requests) >= self.limits.max_requests:
            raise ApiError(
                429,
                f"the queue is full: {len(self.active_requests)} active requests",
                code="rate_limit_exceeded",
                retry_after_s=2,
            )
        generations = GenerationGroup(self.service)
        self.active_requests.add(generations)
        stack.callback(self.active_requests.discard, generations)
        stack.callback(generations.cancel)
        return generations


@dataclass(slots=True)
class ActiveCompletion:
    """Chat completion request from its admission to the end of its response.

    Attributes:
        handler: Resources that all requests share.
        generations: Generations of the request, one per choice.
        preprocessor: Preprocesses the request in worker processes.
        start_time: Arrival time on the event-loop clock.
        receive: ASGI function that reports the disconnection of the client.
        constraints: Decoding constraint of each choice. None without structured output.
        chat_request: Parameters of the request, set by `start`.
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

    async def start(
        self,
        body_slot: list[NDArray[np.uint8]],
        media_loader: MediaLoader,
        reservation: ByteReservation,
    ) -> None:
        """Preprocess the request and submit it to the inference service.

        Args:
            body_slot: List with the request body. It is cleared after parsing to release memory.
            media_loader: Loads images that are not in the body.
            reservation: Memory reservation of the request.

        Raises:
            ApiError: The request is invalid, exceeds a limit or timed out.
            ClientDisconnectedError: The client disconnected.
        """
        run_in_thread = self.handler.thread_pool.run
        try:
            async with asyncio.timeout_at(self.deadline):
                parsed_body, prompt = await run_in_thread(self._parse_and_encode, body_slot)
                reservation.release()
                for image in parsed_body.images:
                    await media_loader.fetch_image(image)
                if prompt is None:
                    prompt = await run_in_thread(
                        self.preprocessor.encode, parsed_body, self.handler.service.max_model_len
                    )
                reservation.reserve(prompt.patches_ND.nbytes)
                await self.handler.submit_pool.run(
                    self._submit, _build_image_sample(parsed_body, media_loader.folder), prompt
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
        """Submit one generation per choice to the inference service.

        Runs in `submit_pool`, since all threads that preprocess requests may be busy.
        """
        constraint_factory, grammar = self.handler.constraint_factory, self._get_grammar_spec()
        if grammar is not None and not constraint_factory.is_accepted(grammar[0]):
            self.preprocessor.check_grammar(*grammar)
            constraint_factory.mark_accepted(grammar[0])
        for _ in range(self.chat_request.n or 1):
            self.constraints.append(
                None if grammar is None else constraint_factory.create(grammar[0])
            )
        options = [
            self._build_options(choice_index, constraint)
            for choice_index, constraint in enumerate(self.constraints)
        ]
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
        """Build the generation options of one choice.

        Raises:
            ApiError: A sampling parameter is invalid.
        """
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
        response_format, tool_choice = (
            self.chat_request.response_format,
            self.chat_request.tool_choice,
        )
        tools = {
            tool.function.name: tool.function.parameters for tool in self.chat_request.tools or []
        }
        if tool_choice not in (None, "none") and not tools:
            raise ApiError(400, f"tool_choice {tool_choice!r:.80} without tools", "tool_choice")
        requires_tool_call = isinstance(tool_choice, NamedToolChoice) or tool_choice == "required"
        if isinstance(tool_choice, NamedToolChoice):
            if tool_choice.function.name not in tools:
                raise ApiError(
                    400, f"unknown tool {tool_choice.function.name[:80]!r}", "tool_choice"
                )
            tools = {tool_choice.function.name: tools[tool_choice.function.name]}
        has_response_format = response_format is not None and response_format.type != "text"
        if requires_tool_call and has_response_format:
            raise ApiError(
                400, f"tool_choice {tool_choice!r:.80} with a response_format", "tool_choice"
            )
        if requires_tool_call:
            return ("calls", (list(tools.items()),)), "tools"
        if response_format is None or response_format.type == "text":
            return None
        if response_format.type != "json_schema":
            return (response_format.type, ()), "response_format"
        if response_format.json_schema is None:
            raise ApiError(400, f"{response_format.type} without json_schema", "response_format")
        return ("json_schema", (response_format.json_schema.schema_,)), "response_format"

    def _build_choices(self) -> list[ChoiceBuilder]:
        tokenizer = self.handler.service.renderer.tokenizer
        parses_tool_calls = (
            bool(self.chat_request.tools) and self.chat_request.tool_choice != "none"
        )
        return [
            ChoiceBuilder(
                n,
                tokenizer,
                bool(self.chat_request.logprobs),
                ToolCallParser() if parses_tool_calls else None,
            )
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
