"""HTTP server of the pages: sign-in, allowed hosts and origins, limits, and the pages of jobs.

It contacts no other servers than the pages of jobs. Requests under `/pages/{job}/` are forwarded to
the page of a job, which listens on a Unix socket. The sign-in, origin checks and limits of the
studio so apply to all pages, and one port serves them.

A TLS proxy must forward the Host header. Headers such as X-Forwarded-Proto are never read, because
any client can send them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import signal
import socket
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import httpx2
import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    HTMLResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finesight.app.pages import PREFIX_HEADER, UPLOADS_PATH, read_language, render_page
from finesight.app.request_jobs import run_until_disconnect
from finesight.credentials import Credentials
from finesight.files.worker_pool import WorkerPool
from finesight.report.i18n import translate, use_language
from finesight.serve.http_protocol import (
    SIGNED_IN_KEY,
    LimitedServer,
    build_protocol_class,
    build_upstream_request,
    fit_connections,
    is_loopback,
)

SIGN_IN_PATH, SIGN_OUT_PATH, STATIC_PREFIX = "/sign-in", "/sign-out", "/static/"

DEFAULT_PORTS = {"http": 80, "https": 443}

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; media-src 'self' blob:; connect-src 'self'; frame-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

MAX_MESSAGE_BYTES, MAX_SIGN_IN_BYTES, MAX_PATH_CHARS = 4 << 20, 16 << 10, 2000

FAILED_LOGIN_DELAY_S, UPLOAD_IDLE_TIMEOUT_S = 1.0, 30
"""Seconds until a wrong password is answered, and without data after which a request is rejected.

A stalled upload would keep its reserved disk space.
"""


@dataclass(frozen=True, slots=True)
class Access:
    """Password, host rule and upload limit of a page.

    Attributes:
        password: Password of the page. None admits everyone.
        loopback_only: Whether the page is for this machine only. Without a password, requests for
            other host names are then rejected.
        cookie: Name of the cookie of signed-in browsers. Cookies do not distinguish ports.
        max_upload_bytes: Maximum size of an upload.
    """

    password: str | None = None
    loopback_only: bool = True
    cookie: str = "finesight"
    max_upload_bytes: int = 0


MAX_SIGN_INS = 1000
"""Maximum number of browsers that are signed in. A further one signs out the first."""


class SignIns:
    """Tokens of the signed-in browsers, one per sign-in, with the requests that they admit.

    Tokens are stored as digests, so that the time of a search tells nothing about them.
    """

    def __init__(self) -> None:
        self._requests: dict[bytes, set[asyncio.Task[object]]] = {}

    def add(self) -> str:
        """Return the token of a new sign-in."""
        while len(self._requests) >= MAX_SIGN_INS:
            self._cancel(next(iter(self._requests)))
        token = secrets.token_urlsafe(32)
        self._requests[_digest(token)] = set()
        return token

    def is_known(self, token: str) -> bool:
        """Return whether a token is that of a signed-in browser."""
        return _digest(token) in self._requests

    def remove(self, token: str) -> None:
        """End a sign-in, if it is known, and the running requests that it has admitted."""
        if self.is_known(token):
            self._cancel(_digest(token))

    @contextlib.contextmanager
    def track(self, token: str) -> Iterator[None]:
        """Cancel the task of the context if the sign-in of a token ends meanwhile."""
        tasks, task = self._requests.get(_digest(token), set()), asyncio.current_task()
        assert task is not None, "no request"
        tasks.add(task)
        try:
            yield
        finally:
            tasks.discard(task)

    def _cancel(self, digest: bytes) -> None:
        for task in self._requests.pop(digest):
            task.cancel()


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


@dataclass(slots=True)
class AccessMiddleware:
    """Admits requests of signed-in browsers to an application, and limits their size and time.

    Texts are translated to the language of the request.
    Files in `/static/` and the sign-in need no password.
    """

    app: ASGIApp
    access: Access
    _sign_ins: SignIns = field(default_factory=SignIns)
    _credentials: Credentials = field(init=False)

    def __post_init__(self) -> None:
        password = self.access.password
        self._credentials = Credentials([] if password is None else [password])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        limit = self._get_body_limit(scope["path"])
        limited_app = RequestBodyLimitMiddleware(self._handle_request, limit)
        try:
            with use_language(read_language(Request(scope))):
                await limited_app(scope, receive, _add_security_headers(send))
        except (asyncio.CancelledError, ClientDisconnect):
            # Event streams are canceled at shutdown.
            return
        except Exception:
            # The log level of uvicorn hides errors, since it reports canceled streams.
            traceback.print_exc()
            raise

    async def _handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, _limit_idle_time(receive))
        response = self._check_request(request)
        try:
            if response is None and scope["path"] == SIGN_IN_PATH:
                response = await self._sign_in(request)
            elif response is None and scope["path"] == SIGN_OUT_PATH and request.method == "POST":
                self._sign_ins.remove(self._get_token(request))
                response = RedirectResponse(_add_query("./", request), 303)
                response.delete_cookie(self.access.cookie)
            elif response is None:
                if not scope["path"].startswith(STATIC_PREFIX):
                    scope.get("state", {}).get(SIGNED_IN_KEY, lambda: None)()
                # An event stream also ends at the sign-out.
                with self._sign_ins.track(self._get_token(request)):
                    await self.app(scope, request.receive, send)
        except HTTPException as error:
            response = PlainTextResponse(error.detail, error.status_code)
        if response is not None:
            await response(scope, receive, send)

    def _get_token(self, request: Request) -> str:
        return request.cookies.get(self.access.cookie, "")

    def _check_request(self, request: Request) -> Response | None:
        """Check a request, except for its body, and return a response if it is rejected."""
        path, headers, password = request.scope["path"], request.headers, self.access.password
        host = headers.get("host", "")
        if len(path) > MAX_PATH_CHARS:
            return PlainTextResponse("path too long", 414)
        # Other names that resolve to this machine are rejected, which prevents DNS rebinding.
        is_local = is_loopback(_split_host_port(f"//{host}", 0)[0])
        if self.access.loopback_only and password is None and not is_local:
            text = "host not allowed: set a password to use another host name"
            return PlainTextResponse(text, 403)
        is_reading = request.method in ("GET", "HEAD")
        # Another site may show this one only. Its images and scripts would cause work.
        site, mode = headers.get("sec-fetch-site"), headers.get("sec-fetch-mode")
        is_embedded = site == "cross-site" and mode != "navigate"
        if is_embedded or not (is_reading or _is_same_origin(headers.get("origin"), host)):
            text = "origin not allowed: a proxy must forward the Host header"
            return PlainTextResponse(text, 403)
        if path == "/favicon.ico":
            return Response(status_code=204)  # browsers request it also before sign-in
        is_public = path == SIGN_IN_PATH or path.startswith(STATIC_PREFIX)
        is_known = self._sign_ins.is_known(self._get_token(request))
        if password is not None and not is_public and not is_known:
            if path == "/" and is_reading:
                return RedirectResponse(_add_query("sign-in", request), 303)
            return PlainTextResponse("sign-in required", 401)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._get_body_limit(path):
            return PlainTextResponse(translate("request too large"), 413)
        return None

    async def _sign_in(self, request: Request) -> Response:
        if self.access.password is None:
            return RedirectResponse(_add_query("./", request), 303)
        if request.method in ("GET", "HEAD"):
            return HTMLResponse(render_page("sign-in.html", is_rejected=False))
        form = parse_qs((await request.body()).decode("utf-8", "replace"))
        password = form.get("password", [""])[0]
        if self._credentials.find_owner(password) is None:
            wait_s = self._credentials.count_wrong(request.client.host if request.client else "")
            page = render_page("sign-in.html", is_rejected=True)
            if wait_s:
                return HTMLResponse(page, 429, {"retry-after": str(wait_s)})
            await asyncio.sleep(FAILED_LOGIN_DELAY_S)
            return HTMLResponse(page, 401)
        # The browser forgets an earlier token, which must not stay valid.
        self._sign_ins.remove(self._get_token(request))
        response = RedirectResponse(_add_query("./", request), 303)
        response.set_cookie(
            self.access.cookie,
            self._sign_ins.add(),
            httponly=True,
            samesite="strict",
            secure=request.headers.get("origin", "").startswith("https://"),
        )
        return response

    def _get_body_limit(self, path: str) -> int:
        if path == SIGN_IN_PATH:
            return MAX_SIGN_IN_BYTES
        return self.access.max_upload_bytes if path.endswith(UPLOADS_PATH) else MAX_MESSAGE_BYTES


def _add_query(path: str, request: Request) -> str:
    """Return a path with the query of a request, which the sign-in keeps."""
    query = request.scope["query_string"].decode("latin-1")
    return f"{path}?{query}" if query else path


def _add_security_headers(send: Send) -> Send:
    """Add headers to each response. The policy of a page is that of a response without its own."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            headers.setdefault("content-security-policy", _PAGE_POLICY)
            headers.setdefault("x-frame-options", "DENY")
            headers["x-content-type-options"] = "nosniff"
            # Other sites cannot embed images, of which they would learn existence and size.
            headers["cross-origin-resource-policy"] = "same-origin"
            # With no-referrer, browsers would omit the origin of the sign-in form.
            headers["referrer-policy"] = "same-origin"
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
    if "]" in parts.netloc and parts.netloc.rpartition("]")[2][:1] not in ("", ":"):
        return "", port  # [::1]a.example
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


REQUEST_TIMEOUT_S, SEND_TIMEOUT_S = 15.0, 60.0
MAX_CONNECTIONS = 500

HOP_BY_HOP_HEADERS = frozenset(
    {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", PREFIX_HEADER}
    # Each server sends its own.
    | {"date", "server"}
)
"""Headers of one connection, which are not forwarded."""


class PageServer(LimitedServer):
    """Server of a page. It first ends the worker processes, for which requests may wait.

    Args:
        trusted_proxies: Addresses of proxies whose header X-Forwarded-For names the client.
    """

    def __init__(
        self, app: AccessMiddleware, pool: WorkerPool | None, trusted_proxies: Sequence[str] = ()
    ) -> None:
        num_connections = fit_connections(MAX_CONNECTIONS)
        config = uvicorn.Config(
            app,
            http=build_protocol_class(REQUEST_TIMEOUT_S, SEND_TIMEOUT_S, num_connections),
            ws="none",
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=bool(trusted_proxies),
            forwarded_allow_ips=[*trusted_proxies],
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)
        self._pool = pool

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the workers, the connections and the listeners."""
        if self._pool is not None:
            self._pool.close()
        await super().shutdown(sockets)


def serve_app(
    app: AccessMiddleware,
    listener: socket.socket,
    pool: WorkerPool,
    trusted_proxies: Sequence[str] = (),
) -> None:
    """Serve an application until a signal stops the server, which also closes the pool."""
    # uvicorn raises the signal again at its end, after which the private folder must be deleted.
    previous_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            PageServer(app, pool, trusted_proxies).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def make_proxy_route(find_socket: Callable[[str], Path]) -> Route:
    """Build the route of the pages of jobs.

    Args:
        find_socket: Returns the socket of a job by its ID. Raises UserError for an unknown job.
    """

    async def forward(request: Request) -> Response:
        job_id = request.path_params["job"]
        file = find_socket(job_id)
        if file.is_symlink():
            # A foreign workspace must not lead to other sockets of this user.
            raise HTTPException(404, "no such page")
        transport = httpx2.AsyncHTTPTransport(uds=str(file))
        # Quoted, because any character may be encoded in a path.
        path, query = quote(f"/{request.path_params['path']}"), request.scope["query_string"]
        target = path.encode() + (b"?" + query if query else b"")
        headers = [pair for pair in request.headers.raw if _is_end_to_end(pair[0])]
        if request.method != "POST" or "transfer-encoding" in request.headers:
            # A length would contradict the body that is sent on: none, or one in chunks.
            headers = [pair for pair in headers if pair[0] != b"content-length"]
        headers.append((PREFIX_HEADER.encode(), f"/pages/{job_id}".encode()))
        body_read = asyncio.Event()

        async def stream_body() -> AsyncIterator[bytes]:
            async for chunk in request.stream():
                yield chunk
            body_read.set()

        content = stream_body() if request.method == "POST" else None
        if content is None:
            body_read.set()
        upstream = build_upstream_request(request.method, target, headers, content)
        try:
            # The page cancels its work when this connection is closed.
            answer = await run_until_disconnect(
                request,
                partial(transport.handle_async_request, upstream),
                body_read=body_read,
            )
        except BaseException as error:
            await transport.aclose()
            if isinstance(error, httpx2.TransportError):
                if request.headers.get("sec-fetch-mode") == "navigate" and path == "/":
                    return RedirectResponse(_add_query("studio", request), 303)
                raise HTTPException(503, "The page is not ready, or has ended.") from error
            raise

        async def iterate() -> AsyncIterator[bytes]:
            try:
                async for chunk in answer.aiter_raw():
                    yield chunk
            finally:
                await answer.aclose()
                await transport.aclose()

        response = StreamingResponse(iterate(), answer.status_code)
        response.raw_headers = [pair for pair in answer.headers.raw if _is_end_to_end(pair[0])]
        return response

    return Route("/pages/{job}/{path:path}", forward, methods=["GET", "POST"])


def _is_end_to_end(name: bytes) -> bool:
    return name.decode("latin-1").lower() not in HOP_BY_HOP_HEADERS
