"""HTTP server of the pages. It contacts no other servers."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from finesight.app.access import SIGNED_IN_KEY, AccessMiddleware
from finesight.app.pages import PREFIX_HEADER
from finesight.errors import UserError, build_bind_error
from finesight.worker_pool import WorkerPool

REQUEST_TIMEOUT_S, MAX_UNKNOWN_CONNECTIONS = 15.0, 100
"""Seconds of a request, and number of connections, of clients that have not signed in."""


class PageServer(uvicorn.Server):
    """uvicorn server that first ends the worker processes, for which requests may wait."""

    def __init__(self, config: uvicorn.Config, pool: WorkerPool) -> None:
        super().__init__(config)
        self._pool = pool

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the workers, the connections and the listeners."""
        self._pool.close()
        await super().shutdown(sockets)


def build_page_protocol() -> type[H11Protocol]:
    """Create a protocol class with limits on connections that have not signed in.

    Each of their requests must be complete and answered within `REQUEST_TIMEOUT_S`. The oldest one
    beyond `MAX_UNKNOWN_CONNECTIONS` is closed, so that half-sent requests keep nobody out.
    """
    unknown: dict[H11Protocol, asyncio.TimerHandle] = {}

    class PageProtocol(H11Protocol):
        def __init__(
            self,
            config: uvicorn.Config,
            server_state: ServerState,
            app_state: dict[str, Any],
            _loop: asyncio.AbstractEventLoop | None = None,
        ) -> None:
            state = {**app_state, SIGNED_IN_KEY: self._end_limits}
            super().__init__(config, server_state, state, _loop)

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._restart_timeout()
            if len(unknown) > MAX_UNKNOWN_CONNECTIONS:
                next(iter(unknown)).transport.abort()

        def on_response_complete(self) -> None:
            if self in unknown:
                self._restart_timeout()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_limits()
            super().connection_lost(exc)

        def _restart_timeout(self) -> None:
            self._end_limits()
            unknown[self] = self.loop.call_later(REQUEST_TIMEOUT_S, self.transport.abort)

        def _end_limits(self) -> None:
            timeout = unknown.pop(self, None)
            if timeout is not None:
                timeout.cancel()

    return PageProtocol


def create_server_config(
    app: AccessMiddleware, trusted_proxies: Sequence[str] = ()
) -> uvicorn.Config:
    """Return the settings of the server of a page.

    Args:
        trusted_proxies: Addresses of proxies whose header X-Forwarded-For names the client.
    """
    return uvicorn.Config(
        app,
        http=build_page_protocol(),
        ws="none",
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=[*trusted_proxies],
        timeout_graceful_shutdown=1,
    )


def serve_app(
    app: AccessMiddleware,
    listener: socket.socket,
    pool: WorkerPool,
    trusted_proxies: Sequence[str] = (),
) -> None:
    """Serve an application until a signal stops the server, which also closes the pool.

    Args:
        trusted_proxies: See `create_server_config`.
    """
    config = create_server_config(app, trusted_proxies)
    # uvicorn raises the signal again at its end, after which the private folder must be deleted.
    previous_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            PageServer(config, pool).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a socket bound to a host and port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise build_bind_error(host, port, error) from error


def bind_unix_socket(file: Path) -> socket.socket:
    """Return a socket at a path that only this user can connect to."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        file.unlink(missing_ok=True)
        listener.bind(str(file))
        file.chmod(0o600)
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on the socket ({error.strerror or error})",
            where=str(file),
            expected="a path of at most 100 bytes in a folder of this user",
            remedy="choose another path for --socket",
        ) from error
    return listener


HOP_BY_HOP_HEADERS = frozenset(
    {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", PREFIX_HEADER}
)
"""Headers of one connection, which are not forwarded."""


def make_proxy_route(find_socket: Callable[[str], Path]) -> Route:
    """Build the route of the pages of jobs.

    Args:
        find_socket: Returns the socket of a job by its ID. Raises UserError for an unknown job.
    """

    async def forward(request: Request) -> Response:
        job_id = request.path_params["job"]
        transport = httpx2.AsyncHTTPTransport(uds=str(find_socket(job_id)))
        path, query = f"/{request.path_params['path']}", request.scope["query_string"]
        headers = [pair for pair in request.headers.raw if _is_end_to_end(pair[0])]
        headers.append((PREFIX_HEADER.encode(), f"/pages/{job_id}".encode()))
        upstream = httpx2.Request(
            request.method,
            httpx2.URL(scheme="http", host="page", path=path, query=query),
            headers=headers,
            content=request.stream() if request.method == "POST" else None,
            # The page may think before its answer, and streams answers of any length.
            extensions={"timeout": {"connect": 5.0, "read": None, "write": None, "pool": None}},
        )
        try:
            answer = await transport.handle_async_request(upstream)
        except httpx2.TransportError as error:
            await transport.aclose()
            raise HTTPException(503, "The page is not ready, or has ended.") from error

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
