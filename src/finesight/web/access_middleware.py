"""ASGI middleware in front of the Gradio chat UI: authentication, allowed routes and limits.

Gradio has routes that the chat page does not need (proxies, run history, sharing), and it trusts
file paths in browser events. The middleware only forwards the routes below, after authentication if
a password is set, and only events of the page whose files have been uploaded.

A TLS proxy must forward the Host header. Headers such as X-Forwarded-Proto are never read, because
any client can send them.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import ClientDisconnect
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finesight.web.disk_budget import DiskBudget, DiskFullError, DiskReservation
from finesight.web.events import Cancel, Inputs, Reset, parse_event
from finesight.web.web_limits import (
    MAX_MESSAGE_BYTES,
    MAX_NAME_BYTES,
    MAX_UPLOAD_BYTES,
    UPLOAD_IDLE_TIMEOUT_S,
)

SESSION_COOKIE = "finesight"
SIGN_IN_PATH = "/sign-in"
STYLE_PATH = "/page.css"
QUEUE_JOIN_PATH, UPLOAD_PATH, FILE_PATH_PREFIX = (
    "/gradio_api/queue/join",
    "/gradio_api/upload",
    "/gradio_api/file=",
)
STREAM_PATH = "/gradio_api/queue/data"
END_EVENT_ROUTES: dict[str, type[BaseModel]] = {
    "/gradio_api/cancel": Cancel,
    "/gradio_api/reset": Reset,
    "/gradio_api/reset/": Reset,
}
"""Routes that end a running event, with the types of their request bodies."""

GET_ROUTES = re.compile(
    r"/|/config/?|/theme\.css|/page\.css|/favicon\.ico|/(?:assets|static|images|export)/.+"
    r"|/gradio_api/(?:queue/data|upload_progress|startup-events|info/?|heartbeat/\w+|file=.+)"
)
POST_ROUTES = re.compile(r"/sign-in|/gradio_api/(?:queue/join|upload|cancel|reset/?)")

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
"""Allowed host names of a page that only this machine can reach.

Other names that resolve to this machine are rejected, which prevents DNS rebinding.
"""

FORWARDING_HEADER_PREFIXES = (b"forwarded", b"x-forwarded-", b"x-gradio-server")
"""Prefixes of request headers from which Gradio would derive the URL of the page."""

DEFAULT_PORTS = {"http": 80, "https": 443}

FAILED_LOGIN_DELAY_S = 1.0

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-eval'{nonce}; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self';"
    " worker-src 'self' blob:; form-action 'self'; base-uri 'self'; frame-ancestors 'none'"
)
_FILE_POLICY = "default-src 'none'; sandbox"

RenderSignIn = Callable[[bool, str], str]
"""Function that renders the sign-in page.

Its arguments are whether the last password was wrong, and the Accept-Language header.
"""


class _RequestRejected(Exception):
    """Raised to reject a request before its body has been read completely."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.response = PlainTextResponse(text, status)


@dataclass(slots=True)
class AccessMiddleware:
    """ASGI middleware that controls access to the Gradio app of the chat page.

    Attributes:
        app: Gradio app.
        upload_folder: Folder in which Gradio stores uploaded files.
        budget: Disk space for uploads and chats.
        inputs: Input types of the events of the page, by event number.
        knows_session: Returns whether a session ID has an open event stream.
        render_sign_in: Renders the sign-in page.
        password: Password of the page. None admits everyone.
        loopback_only: Whether other host names than `LOOPBACK_HOSTS` are rejected if there is no
            password.
    """

    app: ASGIApp
    upload_folder: Path
    budget: DiskBudget
    inputs: Mapping[int, Inputs]
    knows_session: Callable[[str], bool]
    render_sign_in: RenderSignIn
    password: str | None = None
    loopback_only: bool = True
    _session_token: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    _login_locks: dict[str, asyncio.Lock] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            # Event streams are canceled at shutdown.
            try:
                await self._handle_request(scope, receive, send)
            except (asyncio.CancelledError, ClientDisconnect):
                return
            except Exception:
                # The log level of uvicorn hides errors, since it reports canceled streams.
                traceback.print_exc()
                raise

    async def _handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        rejection = self._check_request(scope, headers)
        if rejection is not None:
            await _send_response(rejection, scope, receive, send)
            return
        scope = {
            **scope,
            "headers": [header for header in scope["headers"] if _is_forwardable_header(*header)],
        }
        try:
            limited_receive = _limit_body(receive, MAX_MESSAGE_BYTES)
            if path == UPLOAD_PATH:
                await self._handle_upload(scope, headers, receive, send)
            elif path == SIGN_IN_PATH:
                response = await self._handle_sign_in(scope, headers, limited_receive)
                await _send_response(response, scope, receive, send)
            elif path == QUEUE_JOIN_PATH:
                await self._handle_queue_join(scope, limited_receive, send)
            elif path in END_EVENT_ROUTES:
                await self._handle_event_end(scope, limited_receive, send)
            elif path == "/":
                await self._handle_page(scope, limited_receive, send)
            else:
                is_private = path.startswith((FILE_PATH_PREFIX, "/images/", "/export/"))
                policy = _FILE_POLICY if is_private else _PAGE_POLICY.format(nonce="")
                await self.app(scope, limited_receive, _add_security_headers(send, policy))
        except _RequestRejected as rejection_error:
            await _send_response(rejection_error.response, scope, receive, send)

    def _check_request(self, scope: Scope, headers: Headers) -> Response | None:
        """Check a request, except for its body, and return a response if it is rejected."""
        method, path = scope["method"], scope["path"]
        if any(len(part.encode(errors="replace")) > MAX_NAME_BYTES for part in path.split("/")):
            return PlainTextResponse("not found", 404)
        host = headers.get("host", "")
        if (
            self.loopback_only
            and self.password is None
            and _split_host_port(f"//{host}", 0)[0] not in LOOPBACK_HOSTS
        ):
            text = "host not allowed: set a password to use another host name"
            return PlainTextResponse(text, 403)
        if method == "POST" and not _is_same_origin(headers.get("origin"), host):
            text = "origin not allowed: a proxy must forward the Host header"
            return PlainTextResponse(text, 403)
        is_readable = method in ("GET", "HEAD") and (
            GET_ROUTES.fullmatch(path) or path == SIGN_IN_PATH
        )
        if not is_readable and not (method == "POST" and POST_ROUTES.fullmatch(path)):
            return PlainTextResponse("not found", 404)
        if path not in (SIGN_IN_PATH, STYLE_PATH) and not self._is_authenticated(headers):
            return RedirectResponse("sign-in", 303) if path == "/" else _unauthorized_response()
        if path.startswith(FILE_PATH_PREFIX) and not self._is_uploaded_file(
            path.removeprefix(FILE_PATH_PREFIX)
        ):
            return PlainTextResponse("not found", 404)
        length = headers.get("content-length", "0")
        max_bytes = MAX_UPLOAD_BYTES if path == UPLOAD_PATH else MAX_MESSAGE_BYTES
        if not length.isdecimal() or int(length) > max_bytes:
            return PlainTextResponse("request too large", 413)
        session = QueryParams(scope["query_string"]).get("session_hash", "")
        if path == STREAM_PATH and not self.knows_session(session):
            return PlainTextResponse("unknown session", 404)
        return None

    def _is_authenticated(self, headers: Headers) -> bool:
        if self.password is None:
            return True
        cookie_match = re.search(
            rf"(?:^|;\s*){SESSION_COOKIE}=([\w-]+)", headers.get("cookie", ""), re.ASCII
        )
        return cookie_match is not None and hmac.compare_digest(
            cookie_match[1], self._session_token
        )

    def _is_uploaded_file(self, name: str) -> bool:
        try:
            path = Path(name).resolve()
            return path.is_relative_to(self.upload_folder.resolve()) and path.is_file()
        except (OSError, ValueError):
            return False

    async def _handle_sign_in(self, scope: Scope, headers: Headers, receive: Receive) -> Response:
        languages = headers.get("accept-language", "")
        if self.password is None:
            return RedirectResponse("./", 303)
        if scope["method"] != "POST":
            return HTMLResponse(self.render_sign_in(False, languages))
        form = parse_qs((await _read_body(receive)).decode("utf-8", "replace"))
        password = form.get("password", [""])[0]
        # Serialized per client address: more connections do not speed up password guessing,
        # and other clients are not delayed.
        async with self._login_locks.setdefault(str((scope["client"] or [""])[0]), asyncio.Lock()):
            if not hmac.compare_digest(password.encode(), self.password.encode()):
                await asyncio.sleep(FAILED_LOGIN_DELAY_S)
                return HTMLResponse(self.render_sign_in(True, languages), 401)
        response = RedirectResponse("./", 303)
        is_https = headers.get("origin", "").startswith("https://")
        response.set_cookie(
            SESSION_COOKIE, self._session_token, httponly=True, samesite="strict", secure=is_https
        )
        return response

    async def _handle_upload(
        self, scope: Scope, headers: Headers, receive: Receive, send: Send
    ) -> None:
        """Forward an upload to Gradio after reserving disk space for it.

        Raises:
            _RequestRejected: The disk space is exhausted, or the form field is not a file.
        """
        size = int(headers.get("content-length", MAX_UPLOAD_BYTES))
        try:
            # In a thread, because all files are counted.
            reservation = await asyncio.to_thread(self.budget.reserve, size)
        except DiskFullError as error:
            raise _RequestRejected(507, "no disk space for more images") from error
        has_failed = False

        async def send_unless_failed(message: Message) -> None:
            nonlocal has_failed
            has_failed = has_failed or message.get("status") == 500
            if not has_failed:
                await send(message)

        with reservation:
            received = _count_received(_limit_body(receive, MAX_UPLOAD_BYTES), reservation)
            try:
                await self.app(
                    scope, received, _add_security_headers(send_unless_failed, _FILE_POLICY)
                )
            except TypeError as error:
                # Gradio raises it if the field `files` is not a file.
                raise _RequestRejected(422, "not a file") from error
            except (_RequestRejected, ClientDisconnect):
                raise
            except Exception:
                if has_failed:
                    await _send_response(
                        PlainTextResponse("upload failed", 500), scope, receive, send
                    )
                raise

    async def _handle_queue_join(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward an event of the page to Gradio if its files have been uploaded."""
        try:
            event, uploads = parse_event(await _read_body(receive), self.inputs)
        except ValueError:
            await _send_response(
                JSONResponse({"detail": "malformed event"}, 422), scope, receive, send
            )
            return
        if not all(self._is_uploaded_file(upload.path) for upload in uploads):
            await _send_response(
                JSONResponse({"detail": "not an uploaded file"}, 403), scope, receive, send
            )
            return
        await self._forward(event, scope, receive, send)

    async def _handle_event_end(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request that ends a running event to Gradio."""
        try:
            content = END_EVENT_ROUTES[scope["path"]].model_validate_json(await _read_body(receive))
        except ValueError:
            await _send_response(
                JSONResponse({"detail": "malformed event"}, 422), scope, receive, send
            )
            return
        await self._forward(content, scope, receive, send)

    async def _forward(
        self, content: BaseModel, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Forward a request to Gradio with its validated body."""
        body = content.model_dump_json().encode()
        headers = MutableHeaders(raw=list(scope["headers"]))
        headers["content-length"] = str(len(body))
        headers["content-type"] = "application/json"
        scope = {**scope, "headers": headers.raw}
        await self.app(
            scope, _replay_body(body, receive), _add_security_headers(send, _FILE_POLICY)
        )

    async def _handle_page(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the chat page with a nonce for its own scripts (content security policy)."""
        request_headers = [
            (key, value) for key, value in scope["headers"] if key != b"accept-encoding"
        ]
        start_messages: list[Message] = []
        chunks: list[bytes] = []

        async def capture_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                start_messages.append(message)
            else:
                chunks.append(message.get("body", b""))

        await self.app({**scope, "headers": request_headers}, receive, capture_send)
        nonce = secrets.token_urlsafe(16)
        # Remove the web app manifest of Gradio.
        page = re.sub(rb'<link rel="manifest"[^>]*>', b"", b"".join(chunks))
        page = re.sub(rb"<script(?=[\s>])", b'<script nonce="%s"' % nonce.encode(), page)
        content_type = Headers(raw=start_messages[0]["headers"]).get("content-type")
        response = Response(page, start_messages[0]["status"], media_type=content_type)
        await response(
            scope,
            receive,
            _add_security_headers(send, _PAGE_POLICY.format(nonce=f" 'nonce-{nonce}'")),
        )


def _unauthorized_response() -> Response:
    return PlainTextResponse("sign-in required", 401)


async def _send_response(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    await response(scope, receive, _add_security_headers(send, _PAGE_POLICY.format(nonce="")))


def _add_security_headers(send: Send, policy: str) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            headers["content-security-policy"] = policy
            headers["x-content-type-options"] = "nosniff"
            # With no-referrer, browsers would omit the origin of the sign-in form.
            headers["referrer-policy"] = "same-origin"
            headers["x-frame-options"] = "DENY"
        await send(message)

    return send_with_headers


def _is_forwardable_header(name: bytes, value: bytes) -> bool:
    """Return whether a header may be forwarded to Gradio.

    Headers from which Gradio would derive the URL of the page are not forwarded.
    """
    return not name.lower().startswith(FORWARDING_HEADER_PREFIXES)


def _is_same_origin(origin: str | None, host: str) -> bool:
    """Return whether the host and port of an origin equal those of the Host header.

    The scheme may differ, because a TLS proxy changes it. A missing origin is accepted: browsers
    always send the origin of a POST request, other programs need not.
    """
    if origin is None:
        return True
    scheme = origin.partition("://")[0]
    port = DEFAULT_PORTS.get(scheme)
    if port is None:
        return False
    origin_address = _split_host_port(origin, port)
    return origin_address[0] != "" and origin_address == _split_host_port(f"//{host}", port)


def _split_host_port(address: str, default_port: int) -> tuple[str, int]:
    """Return the host and port of a URL.

    The host of a malformed URL is empty. A path, a query or a user name makes the URL malformed.
    """
    try:
        parts = urlsplit(address)
        port = default_port if parts.port is None else parts.port
    except ValueError:
        return "", default_port
    is_bare = not (parts.path or parts.query or parts.fragment or "@" in parts.netloc)
    return (parts.hostname or "") if is_bare else "", port


def _limit_body(receive: Receive, max_bytes: int) -> Receive:
    """Wrap an ASGI receive function to raise _RequestRejected if the body is too large."""
    num_bytes = 0

    async def receive_limited() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise _RequestRejected(413, "request too large")
        return message

    return receive_limited


def _count_received(receive: Receive, reservation: DiskReservation) -> Receive:
    """Wrap an ASGI receive function to count the received bytes as written to the disk.

    The wrapped function raises _RequestRejected if no data arrives within the idle timeout.
    """

    async def receive_counted() -> Message:
        try:
            message = await asyncio.wait_for(receive(), UPLOAD_IDLE_TIMEOUT_S)
        except TimeoutError as error:
            raise _RequestRejected(408, "upload timeout") from error
        reservation.write(len(message.get("body", b"")))
        return message

    return receive_counted


async def _read_body(receive: Receive) -> bytes:
    chunks = []
    while True:
        message = await receive()
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def _replay_body(body: bytes, receive: Receive) -> Receive:
    pending = [body]

    async def receive_replayed() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return receive_replayed
