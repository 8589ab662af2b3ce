"""Questions of one request while they are answered: held together, and let go together."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncGenerator, Sequence

from finesight.data.jsonl import Located
from finesight.encode.encoded import Encoded
from finesight.errors import UserError
from finesight.infer.request import Delta, Options, Usage
from finesight.infer.service import Answering, Busy, Service
from finesight.serve.errors import Refused, refused

Grown = tuple[int, Delta | Exception | None]
"""Which answer has grown, and by what: None is its end, an exception what went wrong with it."""


class Asked:
    """The answers to one question. They are asked for in a thread that nobody can stop, so that
    whoever lets go of them does it for those to come as well."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._gone = False
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.answers: list[Answering] = []

    def ask(self, located: Located, options: Sequence[Options], prompt: Encoded) -> None:
        """Ask once for each of the options. Raises Refused where it cannot be answered now."""
        for one in options:
            if self._gone:
                return
            try:
                answering = self._service.ask(located, one, prompt)
            except Busy as error:
                raise Refused(429, error.what, code="rate_limit_exceeded", wait=1) from error
            except UserError as error:
                raise refused(error, "messages", hidden=f"{located.folder}/") from error
            with self._lock:
                self.answers.append(answering)
                if self._gone:
                    answering.cancel()

    def let_go(self) -> None:
        """Nobody waits for the answers any more: those that run end now."""
        with self._lock:
            self._gone = True
            for answering in self.answers:
                answering.cancel()

    @property
    def usages(self) -> list[Usage]:
        """Tokens so far, by answer."""
        return [answering.usage for answering in self.answers]

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta | None]]:
        """What any of the answers grows by, as it comes, and None at the end of each. Whatever
        went wrong with one of them is raised."""
        queue: asyncio.Queue[Grown] = asyncio.Queue()
        tasks = [
            asyncio.create_task(_follow(number, answering, queue))
            for number, answering in enumerate(self.answers)
        ]
        try:
            running = len(tasks)
            while running:
                come = [await queue.get()]
                while not queue.empty():
                    come.append(queue.get_nowait())
                for number, delta in joined(come):
                    if isinstance(delta, UserError):
                        raise Refused(503, delta.what, wait=5) from delta
                    if isinstance(delta, Exception):
                        raise delta
                    running -= delta is None
                    yield number, delta
        finally:
            for task in tasks:
                task.cancel()


def joined(come: Sequence[Grown]) -> list[Grown]:
    """The same with what each answer has grown by in one piece: where clients are many, tokens come
    faster than they can be sent one by one."""
    made: list[Grown] = []
    last: dict[int, tuple[int, Delta]] = {}
    for number, delta in come:
        if not isinstance(delta, Delta):
            made.append((number, delta))
        elif number in last:
            place, before = last[number]
            whole = Delta(before.text + delta.text, before.tokens + delta.tokens)
            made[place], last[number] = (number, whole), (place, whole)
        else:
            last[number] = (len(made), delta)
            made.append((number, delta))
    return made


async def _follow(number: int, answering: Answering, queue: asyncio.Queue[Grown]) -> None:
    try:
        async for delta in answering:
            queue.put_nowait((number, delta))
        assert answering.finish is not None, f"answer {number} has ended for no reason"
    except Exception as error:
        queue.put_nowait((number, error))
    else:
        queue.put_nowait((number, None))
