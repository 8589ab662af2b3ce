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
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter, computed_field
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finesight.credentials import Credentials
from finesight.web.chat_html import render_sign_in_page, select_ui_text
from finesight.web.web_sessions import (
    MAX_IMAGE_BYTES,
    MAX_MESSAGE_CHARS,
    MAX_NEW_TOKENS,
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    DiskBudget,
    DiskFullError,
    DiskReservation,
)

SESSION_COOKIE = "finesight"
BROWSER_COOKIE, BROWSER_COOKIE_AGE_S = "finesight-browser", 30 * 24 * 3600
"""Name and lifetime of the cookie with the secret ID of a browser, which owns conversations."""
BROWSER_ID = re.compile(r"[A-Za-z0-9_-]{43}")
VIEW_PATH_PREFIX = "/view/"
"""Prefix of report pages, which the page may embed."""
SIGN_IN_PATH = "/sign-in"
STYLE_PATH = "/page.css"
QUEUE_JOIN_PATH, STREAM_PATH = "/gradio_api/queue/join", "/gradio_api/queue/data"
UPLOAD_PATH, FILE_PATH_PREFIX = "/gradio_api/upload", "/gradio_api/file="
GET_ROUTES = re.compile(
    r"/|/sign-in|/config/?|/theme\.css|/page\.css|/favicon\.ico|/(?:assets|static|images|export)/.+"
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
    " worker-src 'self' blob:; frame-src 'self'; form-action 'self'; base-uri 'self';"
    " frame-ancestors 'none'"
)
_FILE_POLICY = "default-src 'none'; sandbox"
_VIEW_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:;"
    " frame-ancestors 'self'; sandbox allow-scripts allow-downloads"
)
"""Policy of a report page, which runs its own script without access to this server."""

MAX_UPLOAD_BYTES = 8 * MAX_IMAGE_BYTES

MAX_MESSAGE_BYTES = 1 << 20

MAX_NAME_BYTES = 255

MAX_SIGN_IN_BYTES = 16 << 10

UPLOAD_IDLE_TIMEOUT_S = 30
"""Seconds without data after which a request is rejected.

A stalled upload would keep its reserved disk space.
"""

SIGNED_IN_KEY = "finesight_signed_in"
"""Key of the ASGI state whose value is a function that ends the limits of unknown clients."""

NONCE_KEY = "finesight_nonce"
"""Key of the nonce of the content security policy in the ASGI scope."""

EventId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Upload(BaseModel, frozen=True):
    """Reference to an uploaded file in a message, by its path on the server."""

    path: str

    @computed_field
    def meta(self) -> dict[str, str]:
        """Marker by which Gradio recognizes a file."""
        return {"_type": "gradio.FileData"}


class Question(BaseModel, frozen=True):
    """Message of the user: a text and uploaded images."""

    text: str = ""
    files: list[Upload] = []


MaxTokens = Annotated[FiniteFloat, Field(ge=1, le=MAX_NEW_TOKENS)]
Temperature = Annotated[FiniteFloat, Field(ge=0, le=MAX_TEMPERATURE)]

TopP = Annotated[FiniteFloat, Field(gt=0, le=1)]
TopK = Annotated[FiniteFloat, Field(ge=0, le=MAX_TOP_K)]
RepetitionPenalty = Annotated[FiniteFloat, Field(ge=1, le=MAX_REPETITION_PENALTY)]
Seed = FiniteFloat | None
"""Value of the seed field, which the page checks: browsers send any number, and an empty field."""
MessageText = Annotated[str, Field(max_length=MAX_MESSAGE_CHARS)]
Token = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{0,64}$")]


class ChatAction(BaseModel, frozen=True):
    """Action of a button within the HTML of the page.

    Attributes:
        token: Conversation to open, rename or delete.
        index: Turn to edit.
        text: New title, or new text of the message.
    """

    kind: Literal["open", "rename", "delete", "edit"]
    token: Token = ""
    index: Annotated[int, Field(ge=0, le=10_000)] = 0
    text: MessageText = ""


Inputs = TypeAdapter[Any]

EMPTY_INPUT: Inputs = TypeAdapter(tuple[()])
TOKEN_INPUT: Inputs = TypeAdapter(tuple[Token])
_SETTINGS: Any = (
    *(bool, bool, MaxTokens, Temperature, TopP, TopK, RepetitionPenalty, Seed, MessageText),
)
"""Types of the fields of `ChatSettings`, in their order."""
REGENERATE_INPUT: Inputs = TypeAdapter(tuple[_SETTINGS])
QUESTION_INPUT: Inputs = TypeAdapter(tuple[(Question, *_SETTINGS)])
ACTION_INPUT: Inputs = TypeAdapter(tuple[(ChatAction, *_SETTINGS)])


class Event(BaseModel, frozen=True):
    """Event that the page sends to Gradio, without fields that are not used."""

    fn_index: int
    session_hash: EventId
    trigger_id: Annotated[int, Field(ge=0, le=2**31)] | None = None
    data: list[Any]


class Cancel(BaseModel, frozen=True):
    """Request to cancel a running event."""

    fn_index: int
    session_hash: EventId
    event_id: EventId


class Reset(BaseModel, frozen=True):
    """Request to reset the iterator of an event."""

    event_id: EventId


def parse_event(body: bytes, inputs: Mapping[int, Inputs]) -> tuple[Event, list[Upload]]:
    """Validate an event from the browser, given as JSON text, and list its uploaded files.

    Raises:
        ValueError: The event is invalid, or its number is not in `inputs`.
    """
    event = Event.model_validate_json(body)
    if event.fn_index not in inputs:
        raise ValueError(f"unknown event {event.fn_index}")
    adapter = inputs[event.fn_index]
    checked = adapter.validate_python(event.data)
    files = [item.files if isinstance(item, Question) else item for item in checked]
    uploads = [file for group in files if isinstance(group, list) for file in group]
    return event.model_copy(update={"data": adapter.dump_python(checked, mode="json")}), uploads


END_EVENT_ROUTES: dict[str, type[BaseModel]] = {
    "/gradio_api/cancel": Cancel,
    "/gradio_api/reset": Reset,
    "/gradio_api/reset/": Reset,
}
"""Routes that end a running event, with the types of their request bodies."""


@dataclass(slots=True)
class AccessMiddleware:
    """ASGI middleware that controls access to the Gradio app of the chat page.

    Attributes:
        knows_session: Returns whether a session ID has an open event stream.
        password: Password of the page. None admits everyone.
        loopback_only: Whether other host names than `LOOPBACK_HOSTS` are rejected if there is no
            password.
        get_routes, post_routes: Patterns of the paths that GET and POST requests may have.
        session_cookie: Name of the cookie. Servers on one host need different names.
        identifies_browsers: Whether browsers get a cookie with a secret ID.
    """

    app: ASGIApp
    upload_folder: Path
    budget: DiskBudget
    inputs: Mapping[int, Inputs]
    knows_session: Callable[[str], bool]
    password: str | None = None
    loopback_only: bool = True
    get_routes: re.Pattern[str] = GET_ROUTES
    post_routes: re.Pattern[str] = POST_ROUTES
    session_cookie: str = SESSION_COOKIE
    identifies_browsers: bool = False
    _session_token: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    _credentials: Credentials = field(init=False)

    def __post_init__(self) -> None:
        self._credentials = Credentials([] if self.password is None else [self.password])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        path, nonce = scope["path"], secrets.token_urlsafe(16)
        policy = _PAGE_POLICY.format(nonce=f" 'nonce-{nonce}'" if path == "/" else "")
        if path.startswith((FILE_PATH_PREFIX, "/images/", "/export/")):
            policy = _FILE_POLICY
        elif path.startswith(VIEW_PATH_PREFIX):
            policy = _VIEW_POLICY
        scope = {**scope, NONCE_KEY: nonce}
        limited_app = RequestBodyLimitMiddleware(self._handle_request, _get_body_limit(path))
        try:
            await limited_app(scope, receive, _add_security_headers(send, policy))
        except (asyncio.CancelledError, ClientDisconnect):
            # Event streams are canceled at shutdown.
            return
        except Exception:
            # The log level of uvicorn hides errors, since it reports canceled streams.
            traceback.print_exc()
            raise

    async def _handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, _limit_idle_time(receive))
        path = scope["path"]
        handlers = {
            UPLOAD_PATH: self._handle_upload,
            SIGN_IN_PATH: self._handle_sign_in,
            "/": self._handle_page,
            **dict.fromkeys((QUEUE_JOIN_PATH, *END_EVENT_ROUTES), self._handle_event),
        }
        response = self._check_request(request)
        if response is None:
            scope["headers"] = [
                (name, value)
                for name, value in scope["headers"]
                # Gradio would derive the URL of the page from these headers.
                if not name.lower().startswith(FORWARDING_HEADER_PREFIXES)
            ]
            if path not in (SIGN_IN_PATH, STYLE_PATH):
                scope.get("state", {}).get(SIGNED_IN_KEY, lambda: None)()
            try:
                if path in handlers:
                    response = await handlers[path](request, send)
                else:
                    await self.app(scope, request.receive, send)
            except HTTPException as error:
                response = PlainTextResponse(error.detail, error.status_code)
        if response is not None:
            await response(scope, receive, send)

    def _check_request(self, request: Request) -> Response | None:
        """Check a request, except for its body, and return a response if it is rejected."""
        method, path, headers = request.method, request.scope["path"], request.headers
        if any(len(part.encode(errors="replace")) > MAX_NAME_BYTES for part in path.split("/")):
            return PlainTextResponse("not found", 404)
        host = headers.get("host", "")
        is_local = _split_host_port(f"//{host}", 0)[0] in LOOPBACK_HOSTS
        if self.loopback_only and self.password is None and not is_local:
            text = "host not allowed: set a password to use another host name"
            return PlainTextResponse(text, 403)
        if method == "POST" and not _is_same_origin(headers.get("origin"), host):
            text = "origin not allowed: a proxy must forward the Host header"
            return PlainTextResponse(text, 403)
        gets = self.get_routes
        routes = {"GET": gets, "HEAD": gets, "POST": self.post_routes}.get(method)
        if routes is None or not routes.fullmatch(path):
            return PlainTextResponse("not found", 404)
        if path == "/favicon.ico":
            return Response(status_code=204)  # browsers request it also before sign-in
        token = request.cookies.get(self.session_cookie, "")
        if (
            path not in (SIGN_IN_PATH, STYLE_PATH)
            and self.password is not None
            and not hmac.compare_digest(token.encode(), self._session_token.encode())
        ):
            if path == "/":
                return RedirectResponse(_add_query("sign-in", request), 303)
            return PlainTextResponse("sign-in required", 401)
        if path.startswith(FILE_PATH_PREFIX) and not self._is_uploaded_file(
            path.removeprefix(FILE_PATH_PREFIX)
        ):
            return PlainTextResponse("not found", 404)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > _get_body_limit(path):
            return PlainTextResponse("request too large", 413)
        session = request.query_params.get("session_hash", "")
        if path == STREAM_PATH and not self.knows_session(session):
            return PlainTextResponse("unknown session", 404)
        return None

    def _is_uploaded_file(self, name: str) -> bool:
        try:
            path = Path(name).resolve()
            return path.is_relative_to(self.upload_folder.resolve()) and path.is_file()
        except (OSError, ValueError):
            return False

    async def _handle_sign_in(self, request: Request, send: Send) -> Response:
        ui_text = select_ui_text(request.headers.get("accept-language", ""))
        if self.password is None:
            return RedirectResponse(_add_query("./", request), 303)
        if request.method != "POST":
            return HTMLResponse(render_sign_in_page(False, ui_text))
        form = parse_qs((await request.body()).decode("utf-8", "replace"))
        password = form.get("password", [""])[0]
        if self._credentials.find_owner(password) is None:
            wait_s = self._credentials.count_wrong(request.client.host if request.client else "")
            page = render_sign_in_page(True, ui_text)
            if wait_s:
                return HTMLResponse(page, 429, {"retry-after": str(wait_s)})
            await asyncio.sleep(FAILED_LOGIN_DELAY_S)
            return HTMLResponse(page, 401)
        response = RedirectResponse(_add_query("./", request), 303)
        is_https = request.headers.get("origin", "").startswith("https://")
        self._set_browser_cookie(request, response, is_secure=is_https)
        response.set_cookie(
            self.session_cookie,
            self._session_token,
            httponly=True,
            samesite="strict",
            secure=is_https,
        )
        return response

    def _set_browser_cookie(self, request: Request, response: Response, *, is_secure: bool) -> None:
        """Give a browser without an ID a new one."""
        if self.identifies_browsers and get_browser_id(request) is None:
            # Lax: a link from another site must not lead to a new ID.
            response.set_cookie(
                BROWSER_COOKIE,
                secrets.token_urlsafe(32),
                max_age=BROWSER_COOKIE_AGE_S,
                httponly=True,
                samesite="lax",
                secure=is_secure,
            )

    async def _handle_upload(self, request: Request, send: Send) -> Response | None:
        """Forward an upload to Gradio after reserving disk space for it."""
        size = int(request.headers.get("content-length", MAX_UPLOAD_BYTES))
        try:
            # In a thread, because all files are counted.
            reservation = await asyncio.to_thread(self.budget.reserve, size)
        except DiskFullError:
            return PlainTextResponse("no disk space for more images", 507)
        has_failed = False

        async def send_unless_failed(message: Message) -> None:
            nonlocal has_failed
            has_failed = has_failed or message.get("status") == 500
            if not has_failed:
                await send(message)

        with reservation:
            received = _count_received(request.receive, reservation)
            try:
                await self.app(request.scope, received, send_unless_failed)
            except TypeError:
                # Gradio raises it if the field `files` is not a file.
                return PlainTextResponse("not a file", 422)
            except ClientDisconnect:
                raise
            except Exception:
                if has_failed:
                    traceback.print_exc()
                    return PlainTextResponse("upload failed", 500)
                raise
        return None

    async def _handle_event(self, request: Request, send: Send) -> Response | None:
        """Forward a valid event, or the end of an event, to Gradio."""
        body, body_type = await request.body(), END_EVENT_ROUTES.get(request.scope["path"])
        content: BaseModel
        uploads: list[Upload] = []
        try:
            if body_type is None:
                content, uploads = parse_event(body, self.inputs)
            else:
                content = body_type.model_validate_json(body)
        except ValueError:
            return JSONResponse({"detail": "malformed event"}, 422)
        if not all(self._is_uploaded_file(upload.path) for upload in uploads):
            return JSONResponse({"detail": "not an uploaded file"}, 403)
        await self._forward(content, request, send)
        return None

    async def _forward(self, content: BaseModel, request: Request, send: Send) -> None:
        """Forward a request to Gradio with its validated body."""
        body = content.model_dump_json().encode()
        headers = MutableHeaders(raw=list(request.scope["headers"]))
        headers["content-length"] = str(len(body))
        headers["content-type"] = "application/json"
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return pending.pop() if pending else await request.receive()

        await self.app({**request.scope, "headers": headers.raw}, receive, send)

    async def _handle_page(self, request: Request, send: Send) -> Response:
        """Serve the chat page with a nonce for its own scripts (content security policy)."""
        headers = [header for header in request.scope["headers"] if header[0] != b"accept-encoding"]
        messages: list[Message] = []

        async def capture_send(message: Message) -> None:
            messages.append(message)

        await self.app({**request.scope, "headers": headers}, request.receive, capture_send)
        start, *chunks = messages
        # Remove the web app manifest of Gradio.
        content = b"".join(chunk.get("body", b"") for chunk in chunks)
        page = re.sub(rb'<link rel="manifest"[^>]*>', b"", content)
        nonce = request.scope[NONCE_KEY].encode()
        page = re.sub(rb"<script(?=[\s>])", b'<script nonce="%s"' % nonce, page)
        content_type = MutableHeaders(raw=start["headers"]).get("content-type")
        response = Response(page, start["status"], media_type=content_type)
        self._set_browser_cookie(request, response, is_secure=False)
        return response


def get_browser_id(request: Request) -> str | None:
    """Return the secret ID in the cookie of a browser; None without a valid one."""
    value = request.cookies.get(BROWSER_COOKIE, "")
    return value if BROWSER_ID.fullmatch(value) else None


def _add_query(path: str, request: Request) -> str:
    """Return a path with the query of a request, which the sign-in keeps."""
    query = request.scope["query_string"].decode("latin-1")
    return f"{path}?{query}" if query else path


def _get_body_limit(path: str) -> int:
    limits = {UPLOAD_PATH: MAX_UPLOAD_BYTES, SIGN_IN_PATH: MAX_SIGN_IN_BYTES}
    return limits.get(path, MAX_MESSAGE_BYTES)


def _add_security_headers(send: Send, policy: str) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            headers["content-security-policy"] = policy
            headers["x-content-type-options"] = "nosniff"
            # With no-referrer, browsers would omit the origin of the sign-in form.
            headers["referrer-policy"] = "same-origin"
            headers["x-frame-options"] = "SAMEORIGIN" if policy == _VIEW_POLICY else "DENY"
        await send(message)

    return send_with_headers


def _is_same_origin(origin: str | None, host: str) -> bool:
    """Return whether the host and port of an origin equal those of the Host header.

    The scheme may differ, because a TLS proxy changes it. A missing origin is accepted: browsers
    always send the origin of a POST request, other programs need not.
    """
    if origin is None:
        return True
    port = DEFAULT_PORTS.get(origin.partition("://")[0])
    if port is None:
        return False
    address = _split_host_port(origin, port)
    return address[0] != "" and address == _split_host_port(f"//{host}", port)


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


def _limit_idle_time(receive: Receive) -> Receive:
    """Raise HTTPException if no data of a request arrives within the idle timeout."""
    is_complete = False

    async def receive_limited() -> Message:
        nonlocal is_complete
        if is_complete:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), UPLOAD_IDLE_TIMEOUT_S)
        except TimeoutError as error:
            raise HTTPException(408, "request timeout") from error
        is_complete = not message.get("more_body", False)
        return message

    return receive_limited


def _count_received(receive: Receive, reservation: DiskReservation) -> Receive:
    """Wrap an ASGI receive function to count the received bytes as written to the disk."""

    num_unwritten = 0

    async def receive_counted() -> Message:
        nonlocal num_unwritten
        # Gradio requests the next message after it has written the previous one.
        reservation.write(num_unwritten)
        message = await receive()
        num_unwritten = len(message.get("body", b""))
        return message

    return receive_counted
