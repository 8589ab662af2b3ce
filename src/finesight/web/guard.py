"""What stands between the network and Gradio: who may ask, for what, and with how much.

Gradio has routes for far more than this page needs (proxies, run history, sharing), and trusts
paths that a browser names. Only the routes below pass, after the password where there is one, and a
file that a message names must be one that was uploaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import re
import secrets
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finesight.web.limits import FOLDER_BYTES, MESSAGE_BYTES, UPLOAD_BYTES, UPLOAD_SECONDS

COOKIE = "finesight"
SIGN_IN = "/sign-in"
STYLE = "/page.css"
JOIN, UPLOAD, FILE = "/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/file="

READ = re.compile(
    r"/|/config/?|/theme\.css|/page\.css|/favicon\.ico|/(?:assets|static|pictures|export)/.+"
    r"|/gradio_api/(?:queue/data|upload_progress|startup-events|info/?|heartbeat/\w+|file=.+)"
)
WRITTEN = re.compile(r"/sign-in|/gradio_api/(?:queue/join|upload|cancel|reset/?)")

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""Names under which a page that listens on loopback alone is asked for: a foreign name that leads
to it belongs to somebody else's page."""

WRONG_PASSWORD_SECONDS = 1.0

_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-eval'{nonce}; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self';"
    " worker-src 'self' blob:; form-action 'self'; base-uri 'self'; frame-ancestors 'none'"
)
_FILE_POLICY = "default-src 'none'; sandbox"

SignInPage = Callable[[bool, str], str]
"""The page that asks for the password: whether one was wrong, and the browser's languages."""


class _TooMuch(Exception):
    """A body went beyond its limit."""


@dataclass(slots=True)
class Guard:
    """The page's app behind its rules. `password` None: everybody who reaches it may ask.

    `loopback` refuses other host names; `uploads` is where Gradio keeps what was uploaded.
    """

    app: ASGIApp
    uploads: Path
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
            except asyncio.CancelledError:
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
        limited = _limited(receive, UPLOAD_BYTES if path == UPLOAD else MESSAGE_BYTES)
        try:
            if path == SIGN_IN:
                response = await self._sign_in(scope, headers, limited)
                await _sent(response, scope, receive, send)
            elif path == JOIN:
                await self._join(scope, limited, send)
            elif path == "/":
                await self._page(scope, limited, send)
            else:
                private = path.startswith((FILE, "/pictures/", "/export/"))
                policy = _FILE_POLICY if private else _POLICY.format(nonce="")
                await self.app(scope, limited, _with_headers(send, policy))
        except _TooMuch:
            await _sent(PlainTextResponse("too much", 413), scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """Why a request goes no further, by all but its body."""
        method, path = scope["method"], scope["path"]
        host = headers.get("host", "")
        if self.loopback and host.rsplit(":", 1)[0] not in LOOPBACK:
            return PlainTextResponse("another host", 403)
        if method == "POST" and headers.get("origin") not in (None, f"http://{host}"):
            return PlainTextResponse("another origin", 403)
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
        if path == UPLOAD and _bytes_kept(self.uploads) > FOLDER_BYTES:
            return PlainTextResponse("no room for more pictures", 507)
        return None

    def _is_known(self, headers: Headers) -> bool:
        if self.password is None:
            return True
        given = re.search(rf"(?:^|;\s*){COOKIE}=([\w-]+)", headers.get("cookie", ""), re.ASCII)
        return given is not None and hmac.compare_digest(given[1], self._pass)

    def _is_upload(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        try:
            return Path(name).resolve().is_relative_to(self.uploads.resolve())
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
        response.set_cookie(COOKIE, self._pass, httponly=True, samesite="strict")
        return response

    async def _join(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A message to the page: what it names as a file must be an upload."""
        body = await _body(receive)
        try:
            named = list(_paths(json.loads(body)))
        except (ValueError, RecursionError):
            named = [None]
        if not all(map(self._is_upload, named)):
            await _sent(PlainTextResponse("no upload", 403), scope, receive, send)
            return
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


def _limited(receive: Receive, most: int) -> Receive:
    taken = 0

    async def receiving() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > most:
            raise _TooMuch
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


def _paths(value: Any) -> Iterable[object]:
    """What stands under `path` anywhere in JSON data: by it Gradio knows files."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "path":
                yield inner
            else:
                yield from _paths(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _paths(inner)


def _bytes_kept(uploads: Path) -> int:
    """Of all that visitors have sent, once uploads are gone that have waited for too long."""
    oldest, kept = time.time() - UPLOAD_SECONDS, 0
    for folder, _, names in os.walk(uploads.parent):
        for file in (Path(folder, name) for name in names):
            # Whoever leaves takes files along meanwhile.
            with contextlib.suppress(FileNotFoundError):
                state = file.stat()
                if state.st_mtime < oldest and file.is_relative_to(uploads):
                    file.unlink()
                else:
                    kept += state.st_size
    return kept
