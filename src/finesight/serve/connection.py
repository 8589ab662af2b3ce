"""Connections that are closed when their client is too slow, or when there are too many.

uvicorn closes what is idle between requests; a head that never ends, a first one that never comes
and an answer that nobody takes would keep a connection for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from finesight.serve.limits import Limits

ABORT = "finesight_abort"
"""Under this name a request's state holds what closes its connection at once."""


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

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.abort()
                return
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
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
