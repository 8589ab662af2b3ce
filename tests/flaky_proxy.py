"""A line to a server of this machine that breaks in the middle of answers."""

from __future__ import annotations

import contextlib
import socket
import threading

CHUNK_BYTES = 2**16


class FlakyProxy:
    """Passes connections on to `server`, and breaks so many of them `after` bytes of answers."""

    def __init__(self, server: int, after: int, times: int) -> None:
        self._server, self._after, self.remaining_cuts = server, after, times
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> FlakyProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server))
                for work in (self._forward_requests, self._forward_responses):
                    threading.Thread(target=work, args=(client, server), daemon=True).start()

    def _forward_requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(CHUNK_BYTES):
                server.sendall(data)
        _close(server)

    def _forward_responses(self, client: socket.socket, server: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := server.recv(CHUNK_BYTES):
                passed += len(data)
                if passed > self._after and self.remaining_cuts:
                    self.remaining_cuts -= 1
                    break
                client.sendall(data)
        _close(client)
        _close(server)


def _close(one: socket.socket) -> None:
    # Closing alone does not end a connection on which another thread waits.
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
