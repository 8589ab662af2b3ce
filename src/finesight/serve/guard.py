"""What stands before every route: keys, sizes, times, and errors that tell nothing.

It is the outermost layer and not a dependency of routes, so that nothing is reached without it:
no body is read before the key has been seen, also not for a path that does not exist.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from finesight.serve.connection import ABORT
from finesight.serve.errors import ClientGone, Refused, broken
from finesight.serve.keys import Keys, is_loopback
from finesight.serve.limits import Limits
from finesight.serve.metrics import Metrics
from finesight.worker_pool import WorkerFault

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOG = logging.getLogger("finesight.serve")
DRAINED_SECONDS = 10.0
"""For a client that is refused to send the rest, without which it would not read the answer."""


FRAMES = 20
"""Of a fault, the innermost ones: one that many answers share has been raised in each of them."""


RESERVATION = "finesight_reservation"
"""Key of the `ByteReservation` in the state of a request."""

GONE = 499
"""Status, in logs and figures alone, of a request whose client disconnected before its answer."""


class Stalled(Exception):
    """A client takes nothing of its answer."""


class ByteReservation:
    """Bytes of a `ByteBudget` that one request has reserved. Not thread-safe."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget, self._size = budget, 0

    def reserve(self, size: int) -> None:
        """Reserve more bytes. Raises Refused if they exceed the budget."""
        if self._budget.used + size > self._budget.most:
            raise Refused(503, f"requests hold {self._budget.used} bytes already", wait=2)
        self._budget.used += size
        self._size += size

    def release(self) -> None:
        """Release all bytes."""
        self._budget.used -= self._size
        self._size = 0


@dataclass(slots=True)
class ByteBudget:
    """Limit of the bytes of all requests together, and the number in use."""

    most: int
    used: int = 0


def reservation_of(scope: Scope) -> ByteReservation:
    """Return the reservation of a request."""
    found = scope["state"][RESERVATION]
    assert isinstance(found, ByteReservation), f"{RESERVATION} is a {type(found)}"
    return found


class Guard:
    """The application within the limits, for those who have a key."""

    def __init__(self, app: App, keys: Keys, limits: Limits, metrics: Metrics) -> None:
        self._app, self._keys, self._limits, self._metrics = app, keys, limits, metrics
        self._budget = ByteBudget(limits.bodies_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", f"a connection of the type {scope['type']}"
        scope["state"][RESERVATION] = reservation = ByteReservation(self._budget)
        passing = Passing(scope, receive, send, self._limits, reservation)
        started = time.monotonic()
        try:
            try:
                scope["state"]["owner"] = self._admitted(scope)
                passing.check_length()
                await self._app(scope, passing.receive, passing.send)
            except Refused as refusal:
                await passing.refuse(refusal)
        except Stalled:
            passing.abort()
        except ClientGone:
            passing.status = passing.status or GONE
        except Exception as error:
            await passing.refuse(logged(error))
        finally:
            reservation.release()
            seconds = time.monotonic() - started
            # The route as it is declared: a path may hold anything.
            route = scope.get("route")
            path = "none" if route is None else str(route.path)
            self._metrics.request(path, passing.status, seconds)
            LOG.info("%s %s %d %.3f s", scope["method"][:8], path, passing.status, seconds)

    def _admitted(self, scope: Scope) -> str:
        """Who asks. Raises Refused for someone without a key, and where none is needed for what
        a page of another site has a browser send."""
        headers = _headers(scope)
        owner = self._keys.owner(headers.get("authorization"))
        if owner is None:
            raise Refused(
                401,
                "a wrong key or none: expected Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if not self._keys:
            # A name of theirs may lead a browser here; neither then says that it is this machine.
            places = headers.get("origin", "http://localhost"), f"//{headers.get('host', '')}"
            if not all(is_loopback(_host(place)) for place in places):
                raise Refused(403, "without a key, requests to and from this machine alone")
        return owner


class Passing:
    """A request on its way in, counted and timed, and its answer on the way out."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        limits: Limits,
        reservation: ByteReservation,
    ) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._limits, self._reservation = limits, reservation
        self._deadline = asyncio.get_running_loop().time() + limits.body_seconds
        self._whole = self._complete = False
        self._received = 0
        self.status = 0

    def check_length(self) -> None:
        """Raise Refused for a body that is announced to be too large."""
        length = _headers(self._scope).get("content-length", "0")
        if not length.isdecimal() or int(length) > self._limits.body_bytes:
            raise self._too_large(length)

    async def receive(self) -> Message:
        """The next piece of the body. Raises Refused for one too many, or too late, ClientGone
        where the client disconnects in the middle."""
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise Refused(
                408, f"the body was not there within {self._limits.body_seconds:g} seconds"
            ) from error
        if message["type"] == "http.disconnect":
            raise ClientGone
        size = len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        self._received += size
        self._reservation.reserve(size)
        if self._received > self._limits.body_bytes:
            raise self._too_large(str(self._received))
        return message

    async def send(self, message: Message) -> None:
        """Pass a piece of the answer on. Raises Stalled when the client takes nothing."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif not message.get("more_body", False):
            self._complete = True
        try:
            async with asyncio.timeout(self._limits.stalled_seconds):
                await self._send(message)
        except TimeoutError as error:
            raise Stalled from error

    async def refuse(self, refusal: Refused) -> None:
        """Answer with an error, where no answer has begun; else end the connection."""
        if self.status:
            if not self._complete:
                self.abort()
            return
        body = json.dumps(refusal.body).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **refusal.extra_headers,
        }
        start = {
            "type": "http.response.start",
            "status": refusal.status,
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        }
        with contextlib.suppress(Stalled):
            await self.send(start)
            await self.send({"type": "http.response.body", "body": body, "more_body": True})
            if refusal.status != 408:
                await self._drain()
            await self.send({"type": "http.response.body", "body": b""})

    def abort(self) -> None:
        """Close the connection, whatever was not taken yet."""
        self._scope["state"].get(ABORT, lambda: None)()

    def _too_large(self, size: str) -> Refused:
        return Refused(413, f"a body of {size[:20]} bytes: at most {self._limits.body_bytes}")

    async def _drain(self) -> None:
        """Pass over the rest of a body: a client may read its answer only when all is sent."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAINED_SECONDS):
                while not self._whole:
                    message = await self._receive()
                    self._whole = not message.get("more_body", False)


def _headers(scope: Scope) -> dict[str, str]:
    """Headers by their names in small letters; of several alike the last one."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _host(place: str) -> str:
    try:
        return urlsplit(place).hostname or ""
    except ValueError:  # an address in brackets that is none
        return ""


def logged(error: Exception) -> Refused:
    """Our own fault, for the client; where it is stands in the log. Its message may quote what a
    client sent, so it is left out."""
    frames = "".join(traceback.format_tb(error.__traceback__, limit=-FRAMES))
    kind = type(error).__name__
    if isinstance(error, WorkerFault):
        kind, frames = error.kind, error.frames
    LOG.error("%s, whose message is not logged\n%s", kind, frames)
    return broken()
