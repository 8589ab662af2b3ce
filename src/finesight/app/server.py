"""HTTP server of the pages. It contacts no other servers than the pages of jobs.

Requests under `/pages/{job}/` are forwarded to the page of a job, which listens on a Unix socket.
The sign-in, origin checks and limits of the studio so apply to all pages, and one port serves them.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from finesight.app.access import AccessMiddleware
from finesight.app.pages import PREFIX_HEADER
from finesight.errors import UserError, build_bind_error
from finesight.serve.http_protocol import build_protocol_class
from finesight.worker_pool import WorkerPool

REQUEST_TIMEOUT_S, SEND_TIMEOUT_S = 15.0, 60.0
MAX_CONNECTIONS, MAX_UNKNOWN_CONNECTIONS = 500, 100
"""Numbers of connections, the second one of clients that have not signed in."""

HOP_BY_HOP_HEADERS = frozenset(
    {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", PREFIX_HEADER}
    # Each server sends its own.
    | {"date", "server"}
)
"""Headers of one connection, which are not forwarded."""


class PageServer(uvicorn.Server):
    """uvicorn server that first ends the worker processes, for which requests may wait."""

    def __init__(self, config: uvicorn.Config, pool: WorkerPool) -> None:
        super().__init__(config)
        self._pool = pool

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the workers, the connections and the listeners."""
        self._pool.close()
        await super().shutdown(sockets)


def create_server_config(
    app: AccessMiddleware, trusted_proxies: Sequence[str] = ()
) -> uvicorn.Config:
    """Return the settings of the server of a page.

    Args:
        trusted_proxies: Addresses of proxies whose header X-Forwarded-For names the client.
    """
    timeouts = REQUEST_TIMEOUT_S, SEND_TIMEOUT_S
    return uvicorn.Config(
        app,
        http=build_protocol_class(*timeouts, MAX_CONNECTIONS, max_unknown=MAX_UNKNOWN_CONNECTIONS),
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


def make_proxy_route(find_socket: Callable[[str], Path]) -> Route:
    """Build the route of the pages of jobs.

    Args:
        find_socket: Returns the socket of a job by its ID. Raises UserError for an unknown job.
    """

    async def forward(request: Request) -> Response:
        import httpx2  # slow to import

        job_id = request.path_params["job"]
        file = find_socket(job_id)
        if file.is_symlink():
            # A foreign workspace must not lead to other sockets of this user.
            raise HTTPException(404, "no such page")
        transport = httpx2.AsyncHTTPTransport(uds=str(file))
        # Quoted, because any character may be encoded in a path.
        path, query = quote(f"/{request.path_params['path']}"), request.scope["query_string"]
        headers = [pair for pair in request.headers.raw if _is_end_to_end(pair[0])]
        if request.method != "POST" or "transfer-encoding" in request.headers:
            # It would contradict the body that is sent.
            headers = [pair for pair in headers if pair[0] != b"content-length"]
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
        except BaseException as error:
            await transport.aclose()
            if isinstance(error, httpx2.TransportError):
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
