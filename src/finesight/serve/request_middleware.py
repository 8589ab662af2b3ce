"""ASGI middleware for API keys, limits, metrics, logging and internal errors.

It is the outermost layer of the application, so that it covers every path: no body is read before
authentication, even for an unknown path.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
)
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finesight.credentials import Credentials, read_secret_file
from finesight.errors import UserError
from finesight.files.worker_pool import WorkerJobError
from finesight.infer.inference_service import InferenceService
from finesight.infer.request import TokenUsage
from finesight.serve.api_schema import (
    ApiError,
    ClientDisconnectedError,
    ServerLimits,
    internal_error,
)
from finesight.serve.http_protocol import ABORT_STATE_KEY, SIGNED_IN_KEY, is_loopback

LOGGER = logging.getLogger("finesight.serve")
API_KEY_VARIABLE = "FINESIGHT_KEY"
LABEL_STUDIO_PATH = "/label-studio"
"""Path of the ML backend, for which Label Studio can only send basic authentication."""

GENERATE_KEY_COMMAND = "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
MIN_KEY_LENGTH = 16

DRAIN_TIMEOUT_S = 10.0
"""Seconds without data after which the rest of a rejected request is no longer received.

Many clients read a response only after they have sent their request. Without API key, it is the
time limit for the complete rest.
"""

MAX_TRACEBACK_FRAMES = 20
"""Number of innermost traceback frames that are logged.

An error that several completions share is raised in each of them, which extends its traceback.
"""

RESERVATION_STATE_KEY = "finesight_reservation"

CLIENT_CLOSED_REQUEST = 499
"""HTTP status, in logs and metrics, of a request whose client disconnected early."""

LATENCY_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServerMetrics:
    """Prometheus metrics of requests and of the inference service, without client data."""

    def __init__(self, service: InferenceService) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        counter = partial(Counter, namespace="finesight", registry=registry)
        histogram = partial(
            Histogram, namespace="finesight", buckets=LATENCY_BUCKETS_S, registry=registry
        )
        self._requests = counter("requests", "Requests by route and status.", ["route", "status"])
        self._request_seconds = histogram(
            "request_seconds", "Duration of requests by route.", ["route"]
        )
        self._tokens = counter("tokens", "Tokens by kind: prompt, cached, completion.", ["kind"])
        self._completions = counter(
            "completions", "Completions by finish reason.", ["finish_reason"]
        )
        self.time_to_first_token = histogram("time_to_first_token_seconds", "Time to first token.")
        gauges: dict[str, Callable[[], int]] = {
            "requests_running": lambda: service.get_stats().num_running,
            "requests_waiting": lambda: service.get_stats().num_waiting,
            "kv_cache_blocks_free": lambda: service.get_stats().num_free_blocks,
            "kv_cache_blocks": lambda: service.get_stats().num_blocks,
        }
        for name, get_value in gauges.items():
            description = f"Current {name.replace('_', ' ')}."
            gauge = Gauge(name, description, namespace="finesight", registry=registry)
            gauge.set_function(get_value)

    def record_request(self, route: str, status: int, seconds: float) -> None:
        """Record a complete response for a route template, such as `/v1/files/{name}`."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def record_completion(self, finish_reason: str, usage: TokenUsage) -> None:
        """Record a finished completion, its finish reason and its token usage."""
        self._completions.labels(finish_reason).inc()
        self._tokens.labels("prompt").inc(usage.prompt_tokens)
        self._tokens.labels("cached").inc(usage.cached_tokens)
        self._tokens.labels("completion").inc(usage.completion_tokens)


class ApiKeys(Credentials):
    """Authenticates clients by API key. Without keys, every client is accepted."""

    def authenticate(self, authorization: str | None, *, accept_basic: bool = False) -> str | None:
        """Return the owner name of the key in an Authorization header, or None if it is invalid.

        Args:
            accept_basic: Accept the key as password of basic authentication, with any user name.
        """
        if not self:
            return "everyone"
        scheme, _, key = (authorization or "").partition(" ")
        if accept_basic and scheme.lower() == "basic":
            with contextlib.suppress(ValueError):
                key = base64.b64decode(key, validate=True).decode().partition(":")[2]
                scheme = "bearer"
        owner = self.find_owner(key.strip())
        return owner if scheme.lower() == "bearer" else None


def read_api_keys(file: Path | None) -> list[str]:
    """Read API keys, one per line, from a file or the environment variable `FINESIGHT_KEY`.

    Blank lines and lines that start with # are ignored.
    """
    where, remedy = str(file or API_KEY_VARIABLE), f"Generate a key: {GENERATE_KEY_COMMAND}"
    expected = "a text file with one API key per line"
    try:
        text = read_secret_file(file) if file else os.environ.get(API_KEY_VARIABLE, "")
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot be read ({error})", where=where, expected=expected, remedy="Correct the path."
        ) from error
    keys = [line.strip() for line in text.splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    for key_number, key in enumerate(keys, 1):
        # HTTP headers have the same restriction.
        if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
            what = f"API key {key_number} is invalid ({len(key)} characters)"
            expected = f"at least {MIN_KEY_LENGTH} printable ASCII characters without spaces"
            raise UserError(what, where=where, expected=expected, remedy=remedy)
    if file is not None and not keys:
        what = f"no API key in {len(text.splitlines())} lines"
        raise UserError(what, where=where, expected=expected, remedy=remedy)
    return keys


def check_exposure(host: str, keys: Sequence[str], proxies: Sequence[str] = ()) -> None:
    """Raise UserError if other machines could reach the server without an API key.

    They reach a loopback address through a trusted proxy.
    """
    if not keys and (proxies or not is_loopback(host)):
        option, other = "--host", "the host 127.0.0.1"
        if is_loopback(host):
            option, other = "--trusted-proxy", "no --trusted-proxy"
        command = f"(umask 077; {GENERATE_KEY_COMMAND} > keys.txt)"
        raise UserError(
            f"other machines can reach {host}, but there is no API key",
            where=option,
            expected=f"an API key in --key-file or {API_KEY_VARIABLE}, or {other}",
            remedy=f"Run {command}, then use --key-file keys.txt.",
        )


class ClientStalledError(Exception):
    """Raised when a client does not read its response within the send timeout."""


@dataclass(slots=True)
class ByteBudget:
    """Limit on the memory of all requests, and the number of bytes in use."""

    max_bytes: int
    used_bytes: int = 0


@dataclass(slots=True)
class ByteReservation:
    """Memory that one request has reserved in a `ByteBudget`. Not thread-safe."""

    budget: ByteBudget
    num_bytes: int = 0

    def reserve(self, num_bytes: int) -> None:
        """Reserve more bytes. Raises ApiError if all requests would exceed the budget."""
        used_bytes = self.budget.used_bytes
        if used_bytes + num_bytes > self.budget.max_bytes:
            message = f"request memory is full: {used_bytes} bytes in use"
            raise ApiError(503, message, retry_after_s=2)
        self.budget.used_bytes += num_bytes
        self.num_bytes += num_bytes

    def release(self) -> None:
        """Release all bytes of the request."""
        self.budget.used_bytes -= self.num_bytes
        self.num_bytes = 0


def get_reservation(scope: Scope) -> ByteReservation:
    """Return the memory reservation of a request from its ASGI scope."""
    reservation = scope["state"][RESERVATION_STATE_KEY]
    assert isinstance(reservation, ByteReservation), f"unexpected {type(reservation)}"
    return reservation


async def read_body(request: Request) -> bytearray:
    """Read the body of a request into one buffer, which is cleared after an error."""
    buffer = bytearray()
    try:
        async for chunk in request.stream():
            buffer += chunk
    except BaseException:
        # The traceback would retain them until the client has received the error.
        buffer.clear()
        get_reservation(request.scope).release()
        raise
    return buffer


class RequestMiddleware:
    """ASGI middleware that authenticates requests and applies the limits of the server."""

    def __init__(
        self, app: ASGIApp, api_keys: ApiKeys, limits: ServerLimits, metrics: ServerMetrics
    ) -> None:
        self.app, self._api_keys, self._limits, self._metrics = app, api_keys, limits, metrics
        self.budget = ByteBudget(limits.max_total_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", f"unexpected connection type {scope['type']}"
        scope["state"][RESERVATION_STATE_KEY] = reservation = ByteReservation(self.budget)
        exchange = RequestExchange(scope, receive, send, self._limits, reservation)
        start_time = time.monotonic()
        try:
            try:
                scope["state"]["owner"] = self._authenticate(scope)
                scope["state"].get(SIGNED_IN_KEY, lambda: None)()
                exchange.check_body_size(Headers(scope=scope).get("content-length", "0"))
                await self.app(scope, exchange.receive, exchange.send)
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
            ApiError: The API key is missing or wrong, too many were wrong, or a server without keys
                receives a cross-site request of a browser.
        """
        headers = Headers(scope=scope)
        is_label_studio = scope["path"].startswith(f"{LABEL_STUDIO_PATH}/")
        owner = self._api_keys.authenticate(
            headers.get("authorization"), accept_basic=is_label_studio
        )
        if owner is None:
            address = (scope.get("client") or ("",))[0]
            if "authorization" in headers and (wait_s := self._api_keys.count_wrong(address)):
                raise ApiError(429, "too many wrong API keys", retry_after_s=wait_s)
            message = "wrong or missing API key; expected Authorization: Bearer KEY"
            challenge = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=challenge)
        if not self._api_keys:
            # A foreign host name may resolve to this machine (DNS rebinding).
            urls = headers.get("origin", "http://localhost"), f"//{headers.get('host', '')}"
            try:
                is_local = all(is_loopback(urlsplit(url).hostname or "") for url in urls)
            except ValueError:  # invalid address in brackets
                is_local = False
            if not is_local:
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
        headers = Headers(scope=scope)
        has_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        self._body_complete, self._response_complete = not has_body, False
        self._body_bytes = 0
        self.status = 0

    def check_body_size(self, length: str) -> None:
        """Raise ApiError if a number of bytes exceeds the body limit, or is no number."""
        limit = self._limits.max_body_bytes
        if not length.isdecimal() or int(length) > limit:
            raise ApiError(413, f"the body has {length[:20]} bytes; expected at most {limit}")

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
            seconds = self._limits.body_timeout_s
            raise ApiError(408, f"the body was not complete within {seconds:g} seconds") from error
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        num_bytes = len(message.get("body", b""))
        self._body_complete = not message.get("more_body", False)
        self._body_bytes += num_bytes
        self._reservation.reserve(num_bytes)
        self.check_body_size(str(self._body_bytes))
        return message

    async def send(self, message: Message) -> None:
        """Send an ASGI message. Raises ClientStalledError after the send timeout.

        If the response ends before the request body, the rest of the body is received first: the
        system resets a connection that is closed with unread data, and the response is lost.
        """
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if not self._body_complete:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
        elif is_last and not self._body_complete:
            await self._send_in_time({**message, "more_body": True})
            await self._drain()
            message = {"type": "http.response.body", "body": b""}
        self._response_complete = is_last
        await self._send_in_time(message)

    async def _send_in_time(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._limits.send_timeout_s):
                await self._send(message)
        except TimeoutError as error:
            raise ClientStalledError from error

    async def _drain(self) -> None:
        """Receive and discard the rest of the request body, within time limits."""
        self._reservation.release()
        is_client = "owner" in self._scope["state"]
        end = asyncio.get_running_loop().time() + DRAIN_TIMEOUT_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._deadline if is_client else end):
                while not self._body_complete:
                    message = await asyncio.wait_for(self._receive(), DRAIN_TIMEOUT_S)
                    self._body_complete = not message.get("more_body", False)

    async def send_error(self, api_error: ApiError) -> None:
        """Send an error response, or close the connection if a response has started."""
        if self.status:
            if not self._response_complete:
                self.abort()
            return
        response = JSONResponse(api_error.body, api_error.status, api_error.response_headers)
        with contextlib.suppress(ClientStalledError):
            await response(self._scope, self._receive, self.send)

    def abort(self) -> None:
        """Close the connection of the client immediately, without a response."""
        self._scope["state"].get(ABORT_STATE_KEY, lambda: None)()


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
