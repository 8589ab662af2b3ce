"""ASGI middleware for authentication, limits, logging and internal errors.

It is the outermost layer of the application, so that it covers every path: no body is read before
authentication, even for an unknown path.
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

from finesight.serve.api_errors import ApiError, ClientDisconnectedError, internal_error
from finesight.serve.api_keys import ApiKeys, is_loopback
from finesight.serve.http_protocol import ABORT_STATE_KEY
from finesight.serve.server_limits import ServerLimits
from finesight.serve.server_metrics import ServerMetrics
from finesight.worker_pool import WorkerJobError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

LOGGER = logging.getLogger("finesight.serve")
DRAIN_TIMEOUT_S = 10.0
"""Seconds to receive the rest of a rejected request.

Many clients read a response only after they have sent their request.
"""


MAX_TRACEBACK_FRAMES = 20
"""Number of innermost traceback frames that are logged.

An error that several completions share is raised in each of them, which extends its traceback.
"""


RESERVATION_STATE_KEY = "finesight_reservation"
"""Key of the memory reservation (`ByteReservation`) in the state of a request."""

CLIENT_CLOSED_REQUEST = 499
"""HTTP status, in logs and metrics, of a request whose client disconnected early."""


class ClientStalledError(Exception):
    """Raised when a client does not read its response within the send timeout."""


class ByteReservation:
    """Memory that one request has reserved in a `ByteBudget`. Not thread-safe."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget, self._num_bytes = budget, 0

    def reserve(self, num_bytes: int) -> None:
        """Reserve more bytes for the request.

        Raises:
            ApiError: The bytes of all requests would exceed the budget.
        """
        if self._budget.used_bytes + num_bytes > self._budget.max_bytes:
            raise ApiError(
                503,
                f"request memory is full: {self._budget.used_bytes} bytes in use",
                retry_after_s=2,
            )
        self._budget.used_bytes += num_bytes
        self._num_bytes += num_bytes

    def release(self) -> None:
        """Release all bytes of the request."""
        self._budget.used_bytes -= self._num_bytes
        self._num_bytes = 0


@dataclass(slots=True)
class ByteBudget:
    """Limit on the memory of all requests, and the number of bytes in use."""

    max_bytes: int
    used_bytes: int = 0


def get_reservation(scope: Scope) -> ByteReservation:
    """Return the memory reservation of a request from its ASGI scope."""
    reservation = scope["state"][RESERVATION_STATE_KEY]
    assert isinstance(reservation, ByteReservation), f"unexpected {type(reservation)}"
    return reservation


class RequestMiddleware:
    """ASGI middleware that authenticates requests and applies the limits of the server."""

    def __init__(
        self, app: AsgiApp, api_keys: ApiKeys, limits: ServerLimits, metrics: ServerMetrics
    ) -> None:
        self._app, self._api_keys, self._limits, self._metrics = app, api_keys, limits, metrics
        self._budget = ByteBudget(limits.max_total_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", f"unexpected connection type {scope['type']}"
        scope["state"][RESERVATION_STATE_KEY] = reservation = ByteReservation(self._budget)
        exchange = RequestExchange(scope, receive, send, self._limits, reservation)
        start_time = time.monotonic()
        try:
            try:
                scope["state"]["owner"] = self._authenticate(scope)
                exchange.check_content_length()
                await self._app(scope, exchange.receive, exchange.send)
            except ApiError as refusal:
                await exchange.send_error(refusal)
        except ClientStalledError:
            exchange.abort()
        except ClientDisconnectedError:
            exchange.status = exchange.status or CLIENT_CLOSED_REQUEST
        except Exception as error:
            await exchange.send_error(log_internal_error(error))
        finally:
            reservation.release()
            seconds = time.monotonic() - start_time
            # The route template, since a path may contain client data.
            route = scope.get("route")
            path = "none" if route is None else str(route.path)
            self._metrics.record_request(path, exchange.status, seconds)
            LOGGER.info("%s %s %d %.3f s", scope["method"][:8], path, exchange.status, seconds)

    def _authenticate(self, scope: Scope) -> str:
        """Return the owner name of the API key of a request.

        Raises:
            ApiError: The API key is missing or wrong, or a server without keys receives a
                cross-site request of a browser.
        """
        headers = _read_headers(scope)
        owner = self._api_keys.authenticate(headers.get("authorization"))
        if owner is None:
            raise ApiError(
                401,
                "wrong or missing API key; expected Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if not self._api_keys:
            # A foreign host name may resolve to this machine (DNS rebinding).
            origin_and_host = (
                headers.get("origin", "http://localhost"),
                f"//{headers.get('host', '')}",
            )
            if not all(is_loopback(_parse_host(url)) for url in origin_and_host):
                raise ApiError(403, "without API keys, only local requests are accepted")
        return owner


class RequestExchange:
    """HTTP request and its response, with limits on size and time."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        limits: ServerLimits,
        reservation: ByteReservation,
    ) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._limits, self._reservation = limits, reservation
        self._deadline = asyncio.get_running_loop().time() + limits.body_timeout_s
        self._body_complete = self._response_complete = False
        self._body_bytes = 0
        self.status = 0

    def check_content_length(self) -> None:
        """Raise ApiError if the `Content-Length` header exceeds the body limit."""
        length = _read_headers(self._scope).get("content-length", "0")
        if not length.isdecimal() or int(length) > self._limits.max_body_bytes:
            raise self._body_too_large_error(length)

    async def receive(self) -> Message:
        """Return the next ASGI message of the request body.

        Raises:
            ApiError: The body is too large or too slow.
            ClientDisconnectedError: The client disconnected before the body was complete.
        """
        if self._body_complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise ApiError(
                408, f"the body was not complete within {self._limits.body_timeout_s:g} seconds"
            ) from error
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        num_bytes = len(message.get("body", b""))
        self._body_complete = not message.get("more_body", False)
        self._body_bytes += num_bytes
        self._reservation.reserve(num_bytes)
        if self._body_bytes > self._limits.max_body_bytes:
            raise self._body_too_large_error(str(self._body_bytes))
        return message

    async def send(self, message: Message) -> None:
        """Send an ASGI message of the response.

        Raises:
            ClientStalledError: The client did not read the response within the send timeout.
        """
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif not message.get("more_body", False):
            self._response_complete = True
        try:
            async with asyncio.timeout(self._limits.send_timeout_s):
                await self._send(message)
        except TimeoutError as error:
            raise ClientStalledError from error

    async def send_error(self, api_error: ApiError) -> None:
        """Send an error response, or close the connection if a response has started."""
        if self.status:
            if not self._response_complete:
                self.abort()
            return
        body = json.dumps(api_error.body).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **api_error.response_headers,
        }
        start = {
            "type": "http.response.start",
            "status": api_error.status,
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        }
        with contextlib.suppress(ClientStalledError):
            await self.send(start)
            await self.send({"type": "http.response.body", "body": body, "more_body": True})
            if api_error.status != 408:
                await self._drain_body()
            await self.send({"type": "http.response.body", "body": b""})

    def abort(self) -> None:
        """Close the connection of the client immediately, without a response."""
        self._scope["state"].get(ABORT_STATE_KEY, lambda: None)()

    def _body_too_large_error(self, size: str) -> ApiError:
        return ApiError(
            413, f"the body has {size[:20]} bytes; expected at most {self._limits.max_body_bytes}"
        )

    async def _drain_body(self) -> None:
        """Receive and discard the rest of a request body.

        Many clients read a response only after they have sent their request.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                while not self._body_complete:
                    message = await self._receive()
                    self._body_complete = not message.get("more_body", False)


def _read_headers(scope: Scope) -> dict[str, str]:
    """Return the request headers by lower-case name. The last duplicate counts."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _parse_host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # invalid address in brackets
        return ""


def log_internal_error(error: Exception) -> ApiError:
    """Log an internal error and return the response for the client.

    Only the traceback is logged, because the error message may quote client data.
    """
    traceback_text = "".join(traceback.format_tb(error.__traceback__, limit=-MAX_TRACEBACK_FRAMES))
    error_name = type(error).__name__
    if isinstance(error, WorkerJobError):
        error_name, traceback_text = error.error_name, error.traceback_text
    LOGGER.error("%s (message not logged)\n%s", error_name, traceback_text)
    return internal_error()
