"""POST /v1/chat/completions: from a request to its answers, whole or as they grow."""

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

from finesight.data.jsonl import Located
from finesight.data.sample import ImagePart, Message, Sample, TextPart
from finesight.encode.encoded import Encoded
from finesight.errors import UserError
from finesight.infer.request import GREEDY, Options
from finesight.infer.service import Service
from finesight.serve.answers import Choice, Frame, used
from finesight.serve.asked import Asked
from finesight.serve.constraints import Constraints, WorkerConstraint
from finesight.serve.conversation import image_name
from finesight.serve.errors import ClientGone, Refused, refused
from finesight.serve.fetch import Fetcher
from finesight.serve.guard import (
    ByteReservation,
    Receive,
    Scope,
    Send,
    Stalled,
    logged,
    reservation_of,
)
from finesight.serve.limits import Limits
from finesight.serve.media import Media
from finesight.serve.metrics import Metrics
from finesight.serve.pool import Pool
from finesight.serve.preparation import Body, Preparation
from finesight.serve.schema import NamedTool, Parameters
from finesight.serve.store import Store
from finesight.serve.tools import Splitter
from finesight.serve.worker_jobs import Spec
from finesight.worker_pool import WorkerPool

STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    # Proxies that gather what they pass on would make one piece of it.
    "x-accel-buffering": "no",
}


@dataclass(frozen=True, slots=True)
class Desk:
    """What questions are answered with; `folder` holds a folder for each while it is answered."""

    service: Service
    workers: WorkerPool
    constraints: Constraints
    formats: Sequence[str]
    limits: Limits
    metrics: Metrics
    pool: Pool
    askers: Pool
    fetcher: Fetcher
    store: Store
    folder: Path
    open: set[Asked]

    async def complete(self, request: Request) -> Response:
        """Answer a request. Raises Refused where it cannot be, ClientGone where nobody waits."""
        started = asyncio.get_running_loop().time()
        body = await _body(request)
        with ExitStack() as stack:
            asked = self._admitted(stack)
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            deadline = time.monotonic() + self.limits.seconds
            preparation = Preparation(self.workers, self.limits, self.formats, folder, deadline)
            reply = Reply(self, asked, preparation, started, request.receive)
            stack.callback(reply.close)
            watch = asyncio.create_task(reply.watch())
            stack.callback(watch.cancel)
            media = Media(folder, request.scope["state"]["owner"], self.fetcher, self.store)
            await reply.begin(body, media, reservation_of(request.scope))
            if not reply.question.stream:
                return await reply.whole()
            return Streamed(reply, stack.pop_all())
        raise AssertionError("an exit stack held an error back")

    def _admitted(self, stack: ExitStack) -> Asked:
        """A place for a request, given up when the stack is closed."""
        if len(self.open) >= self.limits.requests:
            raise Refused(
                429,
                f"{len(self.open)} questions are answered or wait already",
                code="rate_limit_exceeded",
                wait=2,
            )
        asked = Asked(self.service)
        self.open.add(asked)
        stack.callback(self.open.discard, asked)
        stack.callback(asked.let_go)
        return asked


@dataclass(slots=True)
class Reply:
    """One request that is being answered; `forms` is what each answer is held to."""

    desk: Desk
    asked: Asked
    preparation: Preparation
    started: float
    receive: Receive
    forms: list[WorkerConstraint | None] = field(default_factory=list)
    question: Parameters = field(init=False)

    @property
    def deadline(self) -> float:
        """On the clock of the event loop."""
        return self.started + self.desk.limits.seconds

    async def begin(
        self, body: list[NDArray[np.uint8]], media: Media, reservation: ByteReservation
    ) -> None:
        """Read the request and ask the model. Raises Refused and ClientGone.

        `body` is emptied once it is parsed: it may be large.
        """
        run = self.desk.pool.run
        try:
            async with asyncio.timeout_at(self.deadline):
                read, prompt = await run(self._read, body)
                reservation.release()
                for image in read.images:
                    await media.open_media(image)
                if prompt is None:
                    prompt = await run(self.preparation.encode, read, self.desk.service.longest)
                reservation.reserve(prompt.patches_ND.nbytes)
                await self.desk.askers.run(self._ask, _stub(read, media.folder), prompt)
        except TimeoutError as error:
            raise self._late() from error

    async def watch(self) -> None:
        """Give everything up when the client has disconnected."""
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.close()

    def close(self) -> None:
        """End what still runs for this request."""
        self.asked.let_go()
        self.preparation.cancel()
        for form in self.forms:
            if form is not None:
                form.close()

    async def whole(self) -> Response:
        """All of it in one piece. Raises Refused where it takes too long."""
        choices = self._choices()
        try:
            async with asyncio.timeout_at(self.deadline), aclosing(self._grown(choices)) as grown:
                async for _ in grown:
                    pass
        except TimeoutError as error:
            raise self._late() from error
        if any(choice.finish == "cancelled" for choice in choices):
            raise ClientGone
        return JSONResponse(self._frame().whole(choices, used(self.asked.usages)))

    async def stream(self, send: Send) -> None:
        """Send it as server-sent events while it grows; what goes wrong is the last of them."""
        try:
            async with asyncio.timeout_at(self.deadline), aclosing(self._chunks()) as chunks:
                async for chunk in chunks:
                    await send(_event(chunk))
        except TimeoutError:
            await send(_event(self._late().body))
        except Refused as refusal:
            await send(_event(refusal.body))
        except Stalled:
            raise
        except Exception as error:
            await send(_event(logged(error).body))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _chunks(self) -> AsyncGenerator[dict[str, Any]]:
        frame, choices = self._frame(), self._choices()
        for choice in choices:
            yield frame.chunk([choice.opening()])
        async with aclosing(self._grown(choices)) as grown:
            async for chunk in grown:
                yield frame.chunk([chunk])
        options = self.question.stream_options
        if options is not None and options.include_usage:
            yield frame.chunk([], used(self.asked.usages))

    async def _grown(self, choices: list[Choice]) -> AsyncGenerator[dict[str, Any]]:
        """Chunks of the choices, which grow by them."""
        first = True
        async with aclosing(self.asked.deltas()) as deltas:
            async for number, delta in deltas:
                choice, answering = choices[number], self.asked.answers[number]
                if first:
                    seconds = asyncio.get_running_loop().time() - self.started
                    self.desk.metrics.first_token(seconds)
                    first = False
                if delta is not None:
                    chunk = choice.take(delta)
                    if chunk is not None:
                        yield chunk
                    continue
                assert answering.finish is not None, f"answer {number} goes on after its end"
                self._check_form(number)
                self.desk.metrics.answered(answering.finish, answering.usage)
                for chunk in choice.end(answering.finish, answering.prediction()):
                    yield chunk

    def _read(self, body: list[NDArray[np.uint8]]) -> tuple[Body, Encoded | None]:
        """Parse the request, and encode it where all of its images are there: a thread of the pool
        is waited for once."""
        read = self.preparation.read(body[0], self.desk.service.longest)
        body.clear()
        self._set_question(read.question)
        if any(image.remote for image in read.images):
            return read, None
        return read, self.preparation.encode(read, self.desk.service.longest)

    def _set_question(self, question: Parameters) -> None:
        """Set the parameters. Raises Refused for a model that is not there."""
        names = self.desk.service.names
        if question.model not in names:
            raise Refused(
                404,
                f"no model {question.model[:80]!r}: expected {' or '.join(names)}",
                "model",
                "model_not_found",
            )
        self.question = question

    def _ask(self, located: Located, prompt: Encoded) -> None:
        """In a thread: not of those that read requests, which others may keep busy."""
        constraints, found = self.desk.constraints, self._grammar()
        if found is not None and not constraints.is_accepted(found[0]):
            self.preparation.check_grammar(*found)
            constraints.accept(found[0])
        for _ in range(self.question.n or 1):
            self.forms.append(None if found is None else constraints.create(found[0]))
        options = [self._options(number, form) for number, form in enumerate(self.forms)]
        self.asked.ask(located, options, prompt)

    def _check_form(self, number: int) -> None:
        form = self.forms[number]
        if form is not None and form.failed:
            raise Refused(
                400,
                f"the schema of answer {number} is too large to follow: make it simpler",
                "response_format",
            )

    def _options(self, number: int, form: WorkerConstraint | None) -> Options:
        """How the `number`-th answer is chosen. Raises Refused."""
        question = self.question
        given: dict[str, Any] = {
            "temperature": question.temperature,
            "top_p": question.top_p,
            "top_k": question.top_k,
            "repetition_penalty": question.repetition_penalty,
            "seed": None if question.seed is None else question.seed + number,
        }
        try:
            sampling = replace(GREEDY, **{k: v for k, v in given.items() if v is not None})
        except UserError as error:
            raise refused(error) from error
        return Options(
            max_new_tokens=question.longest,
            sampling=sampling,
            stop=question.stops,
            logprobs=(question.top_logprobs or 0) if question.logprobs else None,
            constraint=form,
            model=question.model,
        )

    def _grammar(self) -> tuple[Spec, str] | None:
        """What the answer is held to, and the field that says so. Raises Refused."""
        shape, choice = self.question.response_format, self.question.tool_choice
        tools = {tool.function.name: tool.function.parameters for tool in self.question.tools or []}
        if choice not in (None, "none") and not tools:
            raise Refused(400, f"tool_choice {choice!r:.80} without tools", "tool_choice")
        called = isinstance(choice, NamedTool) or choice == "required"
        if isinstance(choice, NamedTool):
            if choice.function.name not in tools:
                raise Refused(400, f"no tool {choice.function.name[:80]!r}", "tool_choice")
            tools = {choice.function.name: tools[choice.function.name]}
        shaped = shape is not None and shape.type != "text"
        if called and shaped:
            raise Refused(400, f"tool_choice {choice!r:.80} with a response_format", "tool_choice")
        if called:
            return ("calls", (list(tools.items()),)), "tools"
        if shape is None or shape.type == "text":
            return None
        if shape.type != "json_schema":
            return (shape.type, ()), "response_format"
        if shape.json_schema is None:
            raise Refused(400, f"{shape.type} without json_schema", "response_format")
        return ("json_schema", (shape.json_schema.schema_,)), "response_format"

    def _choices(self) -> list[Choice]:
        tokenizer = self.desk.service.renderer.tokenizer
        with_tools = bool(self.question.tools) and self.question.tool_choice != "none"
        return [
            Choice(n, tokenizer, bool(self.question.logprobs), Splitter() if with_tools else None)
            for n in range(len(self.asked.answers))
        ]

    def _frame(self) -> Frame:
        return Frame(self.asked.id, self.question.model)

    def _late(self) -> Refused:
        return Refused(
            504, f"no answer within {self.desk.limits.seconds:g} seconds", code="timeout"
        )


class Streamed(Response):
    """An answer that is sent while it grows; `stack` is closed at its end."""

    def __init__(self, reply: Reply, stack: ExitStack) -> None:
        super().__init__()
        self._reply, self._stack = reply, stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, as ASGI has it."""
        headers = [(name.encode(), value.encode()) for name, value in STREAM.items()]
        with self._stack:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._reply.stream(send)


async def _body(request: Request) -> list[NDArray[np.uint8]]:
    """The body, in a list from which it can be taken: Starlette would keep it."""
    pieces = [piece async for piece in request.stream()]
    return [np.frombuffer(b"".join(pieces), dtype=np.uint8)]


def _stub(body: Body, folder: Path) -> Located:
    """The images of a request as a sample, to read boxes of its answer for."""
    images = [ImagePart(image=image_name(image.number)) for image in body.images]
    message = Message(role="user", content=(*images, TextPart(text="")))
    return Located(Sample(id="question", messages=(message,)), folder)


def _event(data: dict[str, Any]) -> dict[str, Any]:
    """A server-sent event as ASGI passes it on."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    body = f"data: {text}\n\n".encode("utf-8", "replace")
    return {"type": "http.response.body", "body": body, "more_body": True}
