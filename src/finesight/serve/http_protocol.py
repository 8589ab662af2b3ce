"""HTTP/1.1 protocol of all servers, with limits on connections, headers and slow clients."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import resource
import socket
import stat
import sys
import time
from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import h11
import uvicorn
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from finesight.errors import UserError, build_bind_error

if TYPE_CHECKING:
    import httpx2

MAX_HEAD_BYTES = 1 << 14
REFUSED_SECONDS = 2.0
MAX_REFUSED_CONNECTIONS = 64
"""Seconds that connections beyond the limit stay open for a response, and their maximum number."""

ACCEPT_BURST = 32
"""Number of connections that are accepted before the first of them is checked."""

LISTEN_BACKLOG = 512
"""Number of connections that the system keeps until they are accepted."""

RESERVED_DESCRIPTORS = 64
"""Number of file descriptors for files, worker processes and pipes."""

MIN_CONNECTIONS = 8

DESCRIPTORS_PER_CONNECTION = 2
"""A request may open a file, or a connection to another server."""

WARNING_INTERVAL_S = 60.0

NUM_UNCHECKED_CHUNKS = 1000
MIN_MEAN_CHUNK_BYTES = 256
"""Minimum mean chunk size of a body, checked after `NUM_UNCHECKED_CHUNKS` chunks."""

ABORT_STATE_KEY = "finesight_abort"
"""Key of the request state for the function that closes the connection."""

SIGNED_IN_KEY = "finesight_signed_in"
"""Key of the request state for the function that makes the client of the connection known."""


def is_loopback(host: str) -> bool:
    """Return whether only processes of this machine can reach the host."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def bind_socket(host: str, port: int, file: Path | None = None) -> socket.socket:
    """Return a socket bound to a host and port or, with a file, a Unix socket of this user."""
    if file is not None:
        return bind_unix_socket(file)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=LISTEN_BACKLOG)
    except (OSError, OverflowError) as error:
        raise build_bind_error(host, port, error) from error


def bind_unix_socket(file: Path) -> socket.socket:
    """Return a socket at a path that only this user can connect to."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        _remove_unused_socket(file)
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


def _remove_unused_socket(file: Path) -> None:
    """Remove a socket that an ended server left. Raises UserError for any other file."""
    if not os.path.lexists(file):
        return
    what = "a file that is no socket exists"
    if stat.S_ISSOCK(file.lstat().st_mode):
        what = "another process uses the socket"
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            if client.connect_ex(str(file)) == errno.ECONNREFUSED:
                file.unlink()
                return
    raise UserError(
        what,
        where=str(file),
        expected="a new path, or the socket of an ended server",
        remedy="choose another path for --socket",
    )


def build_upstream_request(
    method: str,
    target: bytes,
    headers: Sequence[tuple[Any, Any]],
    content: bytes | AsyncIterable[bytes] | None,
) -> httpx2.Request:
    """Build the request of a proxy to a server on a Unix socket, for an encoded path and query.

    Raises HTTPException with status 404 if path and query are invalid, such as with a `#`.
    """
    import httpx2  # slow to import

    # The server may think before its answer, and streams answers of any length.
    timeout = {"connect": 5.0, "read": None, "write": None, "pool": None}
    try:
        url = httpx2.URL("http://localhost").copy_with(raw_path=target)
    except (httpx2.InvalidURL, UnicodeDecodeError) as error:
        raise HTTPException(404) from error
    options = {"timeout": timeout}
    return httpx2.Request(method, url, headers=headers, content=content, extensions=options)


class ChunkCountingConnection(h11.Connection):
    """h11 connection that detects request bodies in tiny chunks, and then sets `is_flooded`.

    They would block the event loop: parsing a one-byte chunk takes as long as a thousand bytes.
    """

    is_flooded = False
    _num_chunks = 0
    _num_bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Parse the next event, or return NEED_DATA if the connection is flooded."""
        if self.is_flooded:
            return h11.NEED_DATA
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_chunks = self._num_bytes = 0
        elif isinstance(event, h11.Data):
            self._num_chunks += 1
            self._num_bytes += len(event.data)
            self.is_flooded = (
                self._num_chunks > NUM_UNCHECKED_CHUNKS
                and self._num_bytes < MIN_MEAN_CHUNK_BYTES * self._num_chunks
            )
        return event


def fit_connections(max_connections: int) -> int:
    """Return the number of connections for which the process has file descriptors.

    The soft limit of the process is raised to its hard limit if that is necessary.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_used = len(os.listdir("/dev/fd"))
    num_fixed = num_used + RESERVED_DESCRIPTORS + ACCEPT_BURST
    wanted = num_fixed + DESCRIPTORS_PER_CONNECTION * max_connections + MAX_REFUSED_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections
    # Refused connections stay open for a while, too.
    num_left = (soft - num_fixed) // (DESCRIPTORS_PER_CONNECTION + 1)
    return max(MIN_CONNECTIONS, num_left)


class LimitedServer(uvicorn.Server):
    """uvicorn server that accepts connections in small groups, and closes those beyond its limit.

    Otherwise, a flood of connections would use up the file descriptors before the first of them is
    checked. asyncio then accepts no connection for a second, and reports each failure.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen for connections."""
        asyncio.get_running_loop().set_exception_handler(AcceptErrors().handle)
        self.config.backlog = ACCEPT_BURST
        await super().startup(sockets)
        # asyncio has one number for the connections that it accepts at once and those that wait.
        for listener in sockets or ():
            listener.listen(LISTEN_BACKLOG)


class AcceptErrors:
    """Error handler of an event loop that reports missing file descriptors rarely and briefly."""

    def __init__(self) -> None:
        self._next_warning_s = 0.0

    def handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        is_full = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
        if not is_full:
            loop.default_exception_handler(context)
        elif time.monotonic() >= self._next_warning_s:
            self._next_warning_s = time.monotonic() + WARNING_INTERVAL_S
            print(f"warning: connections wait: {error}; raise ulimit -n", file=sys.stderr)


@dataclass(slots=True, eq=False)
class _LimitedConnections:
    """Limits on the connections of a server, and the connections that they concern.

    Attributes:
        refusal: HTTP response to a new client if all connections are open.
        refused: Connections that are open only until their client has read the refusal.
        unknown: Connections of unknown clients, oldest first.
    """

    header_timeout_s: float
    send_timeout_s: float
    max_connections: int
    refusal: bytes
    refused: set[H11Protocol] = field(default_factory=set)
    unknown: dict[H11Protocol, None] = field(default_factory=dict)

    @property
    def max_refused(self) -> int:
        return min(MAX_REFUSED_CONNECTIONS, self.max_connections)


class _LimitedH11Protocol(H11Protocol):
    """Protocol of a connection with limits, which a subclass for each server sets."""

    shared: ClassVar[_LimitedConnections]
    """Limits and connections of a server, shared by its protocols."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        functions = {ABORT_STATE_KEY: self._abort, SIGNED_IN_KEY: self._admit}
        super().__init__(config, server_state, {**app_state, **functions}, _loop)
        self._timeout: asyncio.TimerHandle | None = None
        self.conn = self._counter = ChunkCountingConnection(h11.SERVER, MAX_HEAD_BYTES)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        shared = self.shared
        if len(self.connections) > shared.max_connections and shared.unknown:
            oldest = next(iter(shared.unknown))
            # At once, because several connections may be accepted before it is lost.
            del shared.unknown[oldest]
            self.connections.discard(oldest)
            oldest.transport.abort()
        if len(self.connections) <= shared.max_connections:
            self._start_timeout()
            shared.unknown[self] = None
        elif len(shared.refused) < shared.max_refused:
            self.connections.discard(self)
            shared.refused.add(self)
            transport.write(shared.refusal)
            # Until then, what the client sends is discarded, so that it reads the response.
            self.loop.call_later(REFUSED_SECONDS, self._abort)
        else:
            self._abort()

    def data_received(self, data: bytes) -> None:
        if self in self.shared.refused:
            return
        # In slices, because h11 limits a header only if it arrives in several reads.
        for start in range(0, len(data), MAX_HEAD_BYTES):
            if not self.transport.is_closing():
                super().data_received(data[start : start + MAX_HEAD_BYTES])
        if self._counter.is_flooded:
            self._abort()
        if self.cycle is None or self.cycle.response_complete:
            self._start_timeout()
        elif self not in self.shared.unknown:
            self._cancel_timeout()

    def on_response_complete(self) -> None:
        if self in self.shared.unknown:
            self._cancel_timeout()
            self._start_timeout()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._admit()
        self.shared.refused.discard(self)
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        # A closing connection waits until the client has read the rest.
        self.loop.call_later(self.shared.send_timeout_s, self._abort)

    def _start_timeout(self) -> None:
        if self._timeout is None:
            self._timeout = self.loop.call_later(self.shared.header_timeout_s, self._abort)

    def _cancel_timeout(self) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None

    def _admit(self) -> None:
        """Treat the client, whose request header is complete, as a known one."""
        self.shared.unknown.pop(self, None)
        self._cancel_timeout()

    def _abort(self) -> None:
        self.transport.abort()


def build_protocol_class(
    header_timeout_s: float,
    send_timeout_s: float,
    max_connections: int,
    *,
    refusal: bytes = b"",
) -> type[H11Protocol]:
    """Create a uvicorn protocol class with limits on connections, headers and slow clients.

    uvicorn only closes connections that are idle between requests. This protocol also closes
    connections with an incomplete request header, without a first request, or whose client does
    not read its response.

    A client is unknown until the application calls the function `SIGNED_IN_KEY` of the state.
    Requests of unknown clients must be complete and answered within `header_timeout_s`. If all
    connections are open, the oldest one of an unknown client gives way to a new one. If all clients
    are known, a new connection gets the HTTP response `refusal`.
    """

    class LimitedH11Protocol(_LimitedH11Protocol):
        shared = _LimitedConnections(
            header_timeout_s=header_timeout_s,
            send_timeout_s=send_timeout_s,
            max_connections=max_connections,
            refusal=refusal,
        )

    return LimitedH11Protocol
