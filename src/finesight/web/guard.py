"""What stands between the network and Gradio: who may ask, for what, and with how much.

Gradio has routes for far more than this page needs (proxies, run history, sharing), and trusts
paths that a browser names. Only the routes below pass, after the password where there is one, and
only events that the page has. A file that an event names must be one that was uploaded.

Behind a proxy with TLS, the proxy has to pass the Host header on. Headers such as X-Forwarded-Proto
are never read: everybody can send them.
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

from finesight.web.disk_budget import DiskBudget, DiskFull, Reservation
from finesight.web.events import Cancel, Inputs, Reset, parse_event
from finesight.web.limits import IDLE_SECONDS, MESSAGE_BYTES, NAME_BYTES, UPLOAD_BYTES

COOKIE = "finesight"
SIGN_IN = "/sign-in"
STYLE = "/page.css"
JOIN, UPLOAD, FILE = "/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/file="
STREAM = "/gradio_api/queue/data"
ENDS: dict[str, type[BaseModel]] = {
    "/gradio_api/cancel": Cancel,
    "/gradio_api/reset": Reset,
    "/gradio_api/reset/": Reset,
}
"""Routes that end an event, and what they take."""

READ = re.compile(
    r"/|/config/?|/theme\.css|/page\.css|/favicon\.ico|/(?:assets|static|pictures|export)/.+"
    r"|/gradio_api/(?:queue/data|upload_progress|startup-events|info/?|heartbeat/\w+|file=.+)"
)
WRITTEN = re.compile(r"/sign-in|/gradio_api/(?:queue/join|upload|cancel|reset/?)")

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names under which a page that listens on loopback alone is asked for: a foreign name that leads
to it belongs to somebody else's page."""

FORWARDED = (b"forwarded", b"x-forwarded-", b"x-gradio-server")
"""Beginnings of the names of headers by which Gradio would find the page's address."""

DEFAULT_PORTS = {"http": 80, "https": 443}

WRONG_PASSWORD_SECONDS = 1.0

_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-eval'{nonce}; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self';"
    " worker-src 'self' blob:; form-action 'self'; base-uri 'self'; frame-ancestors 'none'"
)
_FILE_POLICY = "default-src 'none'; sandbox"

SignInPage = Callable[[bool, str], str]
"""The page that asks for the password: whether one was wrong, and the browser's languages."""


class _Refused(Exception):
    """A request is answered with this status before its body has been read."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.response = PlainTextResponse(text, status)


@dataclass(slots=True)
class Guard:
    """The page's app behind its rules. `password` None: everybody who reaches it may ask.

    `loopback` refuses other host names, unless there is a password. `uploads` is where Gradio keeps
    what was uploaded, and `budget` the disk space for it. `inputs` are the events of the page, and
    `knows_session` says whether a session has an open stream of events.
    """

    app: ASGIApp
    uploads: Path
    budget: DiskBudget
    inputs: Mapping[int, Inputs]
    knows_session: Callable[[str], bool]
    sign_in_page: SignInPage
    password: str | None = None
    loopback: bool = True
    _pass: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    _trying: dict[str, asyncio.Lock] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            # The page's streams never end by themselves: they are cancelled when the server ends.
            try:
                await self._answer(scope, receive, send)
            except (asyncio.CancelledError, ClientDisconnect):
                return
            except Exception:
                # The server under it is told to be silent, as it complains of those streams.
                traceback.print_exc()
                raise

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _sent(refusal, scope, receive, send)
            return
        scope = {**scope, "headers": [one for one in scope["headers"] if _is_kept_header(*one)]}
        try:
            limited = _limited(receive, MESSAGE_BYTES)
            if path == UPLOAD:
                await self._upload(scope, headers, receive, send)
            elif path == SIGN_IN:
                response = await self._sign_in(scope, headers, limited)
                await _sent(response, scope, receive, send)
            elif path == JOIN:
                await self._join(scope, limited, send)
            elif path in ENDS:
                await self._end(scope, limited, send)
            elif path == "/":
                await self._page(scope, limited, send)
            else:
                private = path.startswith((FILE, "/pictures/", "/export/"))
                policy = _FILE_POLICY if private else _POLICY.format(nonce="")
                await self.app(scope, limited, _with_headers(send, policy))
        except _Refused as refused:
            await _sent(refused.response, scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """Why a request goes no further, by all but its body."""
        method, path = scope["method"], scope["path"]
        if any(len(part.encode(errors="replace")) > NAME_BYTES for part in path.split("/")):
            return PlainTextResponse("not here", 404)
        host = headers.get("host", "")
        if self.loopback and self.password is None and _place(f"//{host}", 0)[0] not in LOOPBACK:
            text = "another host: start the page with a password to reach it under another name"
            return PlainTextResponse(text, 403)
        if method == "POST" and not _is_same_origin(headers.get("origin"), host):
            text = "another origin: a proxy in front of the page has to pass the Host header on"
            return PlainTextResponse(text, 403)
        may_read = method in ("GET", "HEAD") and (READ.fullmatch(path) or path == SIGN_IN)
        if not may_read and not (method == "POST" and WRITTEN.fullmatch(path)):
            return PlainTextResponse("not here", 404)
        if path not in (SIGN_IN, STYLE) and not self._is_known(headers):
            return RedirectResponse("sign-in", 303) if path == "/" else _unknown()
        if path.startswith(FILE) and not self._is_upload(path.removeprefix(FILE)):
            return PlainTextResponse("not here", 404)
        length = headers.get("content-length", "0")
        most = UPLOAD_BYTES if path == UPLOAD else MESSAGE_BYTES
        if not length.isdecimal() or int(length) > most:
            return PlainTextResponse("too much", 413)
        session = QueryParams(scope["query_string"]).get("session_hash", "")
        if path == STREAM and not self.knows_session(session):
            return PlainTextResponse("no such session", 404)
        return None

    def _is_known(self, headers: Headers) -> bool:
        if self.password is None:
            return True
        given = re.search(rf"(?:^|;\s*){COOKIE}=([\w-]+)", headers.get("cookie", ""), re.ASCII)
        return given is not None and hmac.compare_digest(given[1], self._pass)

    def _is_upload(self, name: str) -> bool:
        try:
            path = Path(name).resolve()
            return path.is_relative_to(self.uploads.resolve()) and path.is_file()
        except (OSError, ValueError):
            return False

    async def _sign_in(self, scope: Scope, headers: Headers, receive: Receive) -> Response:
        languages = headers.get("accept-language", "")
        if self.password is None:
            return RedirectResponse("./", 303)
        if scope["method"] != "POST":
            return HTMLResponse(self.sign_in_page(False, languages))
        form = parse_qs((await _body(receive)).decode("utf-8", "replace"))
        given = form.get("password", [""])[0]
        # One after the other for each address, so that guesses on many connections are no faster,
        # and who guesses keeps nobody else out.
        async with self._trying.setdefault(str((scope["client"] or [""])[0]), asyncio.Lock()):
            if not hmac.compare_digest(given.encode(), self.password.encode()):
                await asyncio.sleep(WRONG_PASSWORD_SECONDS)
                return HTMLResponse(self.sign_in_page(True, languages), 401)
        response = RedirectResponse("./", 303)
        is_https = headers.get("origin", "").startswith("https://")
        response.set_cookie(COOKIE, self._pass, httponly=True, samesite="strict", secure=is_https)
        return response

    async def _upload(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        """Take files, with disk space reserved for all of them first.

        Raises _Refused, where Gradio's own answer is that of an error of the server.
        """
        size = int(headers.get("content-length", UPLOAD_BYTES))
        try:
            # In a thread, as all files are looked at.
            reservation = await asyncio.to_thread(self.budget.reserve, size)
        except DiskFull as error:
            raise _Refused(507, "no room for more images") from error
        has_failed = False

        async def sending(message: Message) -> None:
            nonlocal has_failed
            has_failed = has_failed or message.get("status") == 500
            if not has_failed:
                await send(message)

        with reservation:
            received = _counted(_limited(receive, UPLOAD_BYTES), reservation)
            try:
                await self.app(scope, received, _with_headers(sending, _FILE_POLICY))
            except TypeError as error:
                # Raised by Gradio for a field `files` that is no file.
                raise _Refused(422, "no file") from error
            except (_Refused, ClientDisconnect):
                raise
            except Exception:
                if has_failed:
                    await _sent(PlainTextResponse("failed", 500), scope, receive, send)
                raise

    async def _join(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on an event that the page has, with uploads of this page alone."""
        try:
            event, uploads = parse_event(await _body(receive), self.inputs)
        except ValueError:
            await _sent(JSONResponse({"detail": "malformed event"}, 422), scope, receive, send)
            return
        if not all(self._is_upload(upload.path) for upload in uploads):
            await _sent(JSONResponse({"detail": "no upload"}, 403), scope, receive, send)
            return
        await self._pass_on(event, scope, receive, send)

    async def _end(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on the end of an event."""
        try:
            ended = ENDS[scope["path"]].model_validate_json(await _body(receive))
        except ValueError:
            await _sent(JSONResponse({"detail": "malformed event"}, 422), scope, receive, send)
            return
        await self._pass_on(ended, scope, receive, send)

    async def _pass_on(
        self, content: BaseModel, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Hand a request to Gradio with its body as it was understood here."""
        body = content.model_dump_json().encode()
        headers = MutableHeaders(raw=list(scope["headers"]))
        headers["content-length"] = str(len(body))
        headers["content-type"] = "application/json"
        scope = {**scope, "headers": headers.raw}
        await self.app(scope, _replayed(body, receive), _with_headers(send, _FILE_POLICY))

    async def _page(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The page itself, whose own scripts get a number that others do not know."""
        plain = [(key, value) for key, value in scope["headers"] if key != b"accept-encoding"]
        begun: list[Message] = []
        parts: list[bytes] = []

        async def kept(message: Message) -> None:
            if message["type"] == "http.response.start":
                begun.append(message)
            else:
                parts.append(message.get("body", b""))

        await self.app({**scope, "headers": plain}, receive, kept)
        nonce = secrets.token_urlsafe(16)
        # Gradio offers itself for installation as an app, which this page is not.
        page = re.sub(rb'<link rel="manifest"[^>]*>', b"", b"".join(parts))
        page = re.sub(rb"<script(?=[\s>])", b'<script nonce="%s"' % nonce.encode(), page)
        kind = Headers(raw=begun[0]["headers"]).get("content-type")
        response = Response(page, begun[0]["status"], media_type=kind)
        await response(
            scope, receive, _with_headers(send, _POLICY.format(nonce=f" 'nonce-{nonce}'"))
        )


def _unknown() -> Response:
    return PlainTextResponse("sign in first", 401)


async def _sent(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    await response(scope, receive, _with_headers(send, _POLICY.format(nonce="")))


def _with_headers(send: Send, policy: str) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            headers["content-security-policy"] = policy
            headers["x-content-type-options"] = "nosniff"
            # Not no-referrer: with it a browser does not say where the password's form came from.
            headers["referrer-policy"] = "same-origin"
            headers["x-frame-options"] = "DENY"
        await send(message)

    return sending


def _is_kept_header(name: bytes, value: bytes) -> bool:
    """Tell headers apart from those by which a client could forge the address of the page."""
    return not name.lower().startswith(FORWARDED)


def _is_same_origin(origin: str | None, host: str) -> bool:
    """Compare the host and the port of an origin with the Host header.

    Not the scheme: behind a proxy with TLS, the browser's is https. Browsers always send the origin
    of a POST; other programs need not.
    """
    if origin is None:
        return True
    scheme = origin.partition("://")[0]
    port = DEFAULT_PORTS.get(scheme)
    if port is None:
        return False
    place = _place(origin, port)
    return place[0] != "" and place == _place(f"//{host}", port)


def _place(address: str, default_port: int) -> tuple[str, int]:
    """The host and the port of an address; no host where it is malformed."""
    try:
        parts = urlsplit(address)
        port = default_port if parts.port is None else parts.port
    except ValueError:
        return "", default_port
    is_bare = not (parts.path or parts.query or parts.fragment or "@" in parts.netloc)
    return (parts.hostname or "") if is_bare else "", port


def _limited(receive: Receive, most: int) -> Receive:
    """Raise _Refused beyond so many bytes."""
    taken = 0

    async def receiving() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > most:
            raise _Refused(413, "too much")
        return message

    return receiving


def _counted(receive: Receive, reservation: Reservation) -> Receive:
    """Count what has come as written. Raises _Refused if nothing comes for `IDLE_SECONDS`."""

    async def receiving() -> Message:
        try:
            message = await asyncio.wait_for(receive(), IDLE_SECONDS)
        except TimeoutError as error:
            raise _Refused(408, "too slow") from error
        reservation.write(len(message.get("body", b"")))
        return message

    return receiving


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    waiting = [body]

    async def receiving() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return receiving
