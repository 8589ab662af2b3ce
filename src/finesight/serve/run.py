"""The server as a process: an address, a model behind it, and an end that finishes answers."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from finesight.encode.render import Renderer
from finesight.errors import UserError
from finesight.infer.load import Answerer
from finesight.infer.service import Service
from finesight.model.network import VisionLanguageModel
from finesight.serve.app import make_app
from finesight.serve.connection import protocol
from finesight.serve.fetch import Fetcher
from finesight.serve.formats import IMAGE_FORMATS
from finesight.serve.guard import Guard
from finesight.serve.keys import check_reach
from finesight.serve.limits import Limits
from finesight.serve.worker_jobs import load_state
from finesight.worker_pool import WorkerPool

QUIET = ("httpx2", "httpcore2", "uvicorn", "python_multipart", "PIL", "asyncio")
"""What may log addresses and pieces of what clients send; only its warnings are wanted."""


FORCED_SECONDS = 2.0
"""From a second Ctrl-C to the end of the process, whatever still runs."""

ENDING_SECONDS = 5.0
"""The same from the end of `closing_seconds` after SIGTERM or the first Ctrl-C."""


class Server(uvicorn.Server):
    """uvicorn, within the limits; told to stop, it ends as a program that is done.

    Args:
        app: The application.
        limits: Limits on connections and times.
        ready: Called once the server listens.
        abort: Ends the process at once. It is called some time after a signal, where the process
            has not ended by itself: threads may be busy, and Python waits for them.
    """

    def __init__(
        self,
        app: Guard,
        limits: Limits,
        ready: Callable[[], None],
        abort: Callable[[], None] | None = None,
    ) -> None:
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
        self._ready, self._abort = ready, abort
        self._closing_seconds = limits.closing_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, or at a second Ctrl-C end; in either case within a time that is sure."""
        forced = self.should_exit and sig == signal.SIGINT
        super().handle_exit(sig, frame)
        if self._abort is not None:
            seconds = FORCED_SECONDS if forced else self._closing_seconds + ENDING_SECONDS
            timer = threading.Timer(seconds, self._abort)
            timer.daemon = True
            timer.start()

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
    formats: Sequence[str] = IMAGE_FORMATS,
    ready: Callable[[Service], None],
) -> None:
    """Answer at `place` until told to stop; running answers finish then, within the limits.

    `hosts` are those that pictures may be fetched from, `formats` those that images may have.
    `ready` is called once it listens.
    """
    renderer, model = answerer.renderer, answerer.model
    assert isinstance(model, VisionLanguageModel), f"a model of the type {type(model)}"
    assert isinstance(renderer, Renderer), f"a renderer of the type {type(renderer)}"
    vocabulary = model.geometry.language.vocabulary
    with contextlib.ExitStack() as stack:
        stack.callback(place.close)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="finesight-serve-"))
        workers = make_workers(renderer, vocabulary, limits)
        stack.callback(workers.close)
        workers.start()
        service = Service(answerer, rows=limits.rows, waiting=limits.waiting)
        stack.callback(service.close, finish=False)
        # Before the others: threads that wait for a worker end with it.
        stack.callback(workers.close)
        app = make_app(
            service,
            workers,
            vocabulary,
            Path(folder),
            keys=keys,
            limits=limits,
            fetcher=Fetcher(hosts, seconds=limits.fetch_seconds, most=limits.picture_bytes),
            formats=formats,
        )

        def abort() -> None:
            workers.kill()
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)

        Server(app, limits, lambda: ready(service), abort).run(sockets=[place])


def make_workers(renderer: Renderer, vocabulary: int, limits: Limits) -> WorkerPool:
    """Make the worker processes of a server; they are not started yet."""
    return WorkerPool(
        load_state,
        renderer,
        vocabulary,
        idle=limits.readers,
        memory_bytes=limits.worker_bytes,
    )
