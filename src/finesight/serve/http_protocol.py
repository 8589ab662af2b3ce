"""HTTP/1.1 protocol of the server, with limits on connections, headers and slow clients.

uvicorn only closes connections that are idle between requests. This protocol also closes
connections with an incomplete request header, without a first request, or whose client does not
read its response. It rejects bodies in tiny chunks, which would block the event loop: parsing a
one-byte chunk takes as long as parsing a thousand bytes.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from finesight.serve.server_limits import ServerLimits

ABORT_STATE_KEY = "finesight_abort"
"""Key of the request state whose value is a function that closes the connection."""


MAX_HEAD_BYTES = 1 << 14
"""Maximum size of a request header."""

NUM_UNCHECKED_CHUNKS = 1000
MIN_MEAN_CHUNK_BYTES = 256
"""Minimum mean chunk size of a body, checked after `NUM_UNCHECKED_CHUNKS` chunks."""


class ChunkCountingConnection(h11.Connection):
    """h11 connection that detects request bodies in tiny chunks.

    `is_flooded` is then true.
    """

    def __init__(self, max_incomplete_event_size: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size)
        self.is_flooded = False
        self._num_chunks = self._num_bytes = 0

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


def build_protocol_class(limits: ServerLimits) -> type[H11Protocol]:
    """Create a uvicorn protocol class with the given limits."""

    class LimitedH11Protocol(H11Protocol):
        def __init__(
            self,
            config: Config,
            server_state: ServerState,
            app_state: dict[str, Any],
            _loop: asyncio.AbstractEventLoop | None = None,
        ) -> None:
            super().__init__(
                config, server_state, {**app_state, ABORT_STATE_KEY: self._abort}, _loop
            )
            self._head_timeout: asyncio.TimerHandle | None = None
            self.conn = self._counter = ChunkCountingConnection(MAX_HEAD_BYTES)

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                transport.abort()
                return
            self._start_head_timeout()

        def data_received(self, data: bytes) -> None:
            # In slices, because h11 limits a header only if it arrives in several reads.
            for start in range(0, len(data), MAX_HEAD_BYTES):
                if not self.transport.is_closing():
                    super().data_received(data[start : start + MAX_HEAD_BYTES])
            if self._counter.is_flooded:
                self._abort()
            if self.cycle is None or self.cycle.response_complete:
                self._start_head_timeout()
            else:
                self._cancel_head_timeout()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_head_timeout()
            super().connection_lost(exc)

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            # A closing connection waits until the client has read the rest.
            self.loop.call_later(limits.send_timeout_s, self._abort)

        def _start_head_timeout(self) -> None:
            if self._head_timeout is None:
                self._head_timeout = self.loop.call_later(limits.header_timeout_s, self._abort)

        def _cancel_head_timeout(self) -> None:
            if self._head_timeout is not None:
                self._head_timeout.cancel()
                self._head_timeout = None

        def _abort(self) -> None:
            self.transport.abort()

    return LimitedH11Protocol
