"""HTTP server of the pages. It contacts no other servers."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from finesight.app.access import SIGNED_IN_KEY, AccessMiddleware
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
