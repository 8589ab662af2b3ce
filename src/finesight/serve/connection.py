"""Connections that are closed when their client is too slow, or when there are too many.

uvicorn closes what is idle between requests; a head that never ends, a first one that never comes
and an answer that nobody takes would keep a connection for ever. A body in chunks of a byte keeps
the event loop from everybody else: reading a chunk takes as long as reading a thousand bytes.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from finesight.serve.limits import Limits

ABORT = "finesight_abort"
"""Under this name a request's state holds what closes its connection at once."""


HEAD_BYTES = 1 << 14
"""Of the head of a request."""

FEW_CHUNKS = 1000
SMALLEST_CHUNK = 256
"""Bytes that the chunks of a body have on average, beyond the first few; else it is not read."""


class ChunkCounter(h11.Connection):
    """HTTP/1.1 state of a connection that notices bodies in tiny chunks: `flooded`."""

    def __init__(self, max_incomplete_event_size: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size)
        self.flooded = False
        self._chunks = self._bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Parse the next event; there is none in a flood of chunks."""
        if self.flooded:
            return h11.NEED_DATA
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._chunks += 1
            self._bytes += len(event.data)
            self.flooded = self._chunks > FEW_CHUNKS and self._bytes < SMALLEST_CHUNK * self._chunks
        return event


def protocol(limits: Limits) -> type[H11Protocol]:
    """HTTP/1.1 within the limits, as uvicorn takes it."""

    class Connection(H11Protocol):
        def __init__(
            self,
            config: Config,
            server_state: ServerState,
            app_state: dict[str, Any],
            _loop: asyncio.AbstractEventLoop | None = None,
        ) -> None:
            super().__init__(config, server_state, {**app_state, ABORT: self._abort}, _loop)
            self._late: asyncio.TimerHandle | None = None
            self.conn = self._counter = ChunkCounter(HEAD_BYTES)

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.abort()
                return
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            # In pieces: h11 bounds a head only where it comes in several.
            for start in range(0, len(data), HEAD_BYTES):
                if not self.transport.is_closing():
                    super().data_received(data[start : start + HEAD_BYTES])
            if self._counter.flooded:
                self._abort()
            if self.cycle is None or self.cycle.response_complete:
                self._wait_for_head()
            else:
                self._unset_late()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unset_late()
            super().connection_lost(exc)

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            # What closes waits for its client to take the rest.
            self.loop.call_later(limits.stalled_seconds, self._abort)

        def _wait_for_head(self) -> None:
            if self._late is None:
                self._late = self.loop.call_later(limits.header_seconds, self._abort)

        def _unset_late(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _abort(self) -> None:
            self.transport.abort()

    return Connection
