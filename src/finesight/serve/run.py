"""The server as a process: an address, a model behind it, and an end that finishes answers."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import uvicorn

from finesight.encode.render import Renderer
from finesight.errors import UserError
from finesight.infer.constrain import Grammars
from finesight.infer.load import Answerer
from finesight.infer.service import Service
from finesight.model.network import VisionLanguageModel
from finesight.serve.app import make_app
from finesight.serve.connection import protocol
from finesight.serve.fetch import Fetcher
from finesight.serve.guard import Guard
from finesight.serve.keys import check_reach
from finesight.serve.limits import Limits

QUIET = ("httpx2", "httpcore2", "uvicorn", "python_multipart", "PIL", "asyncio")
"""What may log addresses and pieces of what clients send; only its warnings are wanted."""


class Server(uvicorn.Server):
    """uvicorn, within the limits; told to stop, it ends as a program that is done."""

    def __init__(self, app: Guard, limits: Limits, ready: Callable[[], None]) -> None:
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.WARNING)
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol(limits),
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=round(limits.idle_seconds),
                timeout_graceful_shutdown=round(limits.closing_seconds),
            )
        )
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at SIGTERM and Ctrl-C, without dying of them in the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int, keys: Sequence[str]) -> socket.socket:
    """A socket at the address. Raises UserError for one that is taken or not this machine's, and
    for one that others reach without a key."""
    check_reach(host, keys)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=512)
    except OSError as error:
        raise UserError(
            f"{host}:{port} cannot be listened on ({error.strerror or error})",
            where="--host, --port",
            expected="an address of this machine, and a port that is free",
            remedy="choose another --port; 0 takes any that is free",
        ) from error


def serve(
    answerer: Answerer,
    place: socket.socket,
    *,
    keys: Sequence[str],
    limits: Limits,
    hosts: Sequence[str] = (),
    ready: Callable[[Service], None],
) -> None:
    """Answer at `place` until told to stop; running answers finish then, within the limits.

    `hosts` are those that pictures may be fetched from. `ready` is called once it listens.
    """
    service = Service(answerer, rows=limits.rows, waiting=limits.waiting)
    renderer, model = answerer.renderer, answerer.model
    assert isinstance(model, VisionLanguageModel), f"a model of the type {type(model)}"
    assert isinstance(renderer, Renderer), f"a renderer of the type {type(renderer)}"
    fetcher = Fetcher(hosts, seconds=limits.fetch_seconds, most=limits.picture_bytes)
    try:
        with tempfile.TemporaryDirectory(prefix="finesight-serve-") as folder:
            app = make_app(
                service,
                Grammars(renderer, model.geometry.language.vocabulary),
                Path(folder),
                keys=keys,
                limits=limits,
                fetcher=fetcher,
            )
            Server(app, limits, lambda: ready(service)).run(sockets=[place])
    finally:
        place.close()
        service.close(finish=False)
