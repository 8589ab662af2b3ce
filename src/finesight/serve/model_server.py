"""HTTP server of a model in a thread of a Python program.

Other accounts of the machine and web pages in a browser can reach the port of a loopback address.
So the server listens on 127.0.0.1 only, and every request needs its key, which is in the memory of
this process only. The other limits are those of `finesight serve`; images are read from requests
only, not from the web.
"""

from __future__ import annotations

import atexit
import gc
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

from finesight.errors import UserError
from finesight.operations.model import Model, load_adapters
from finesight.operations.operation import StrPath, require_extra
from finesight.operations.options import LoadingOptions
from finesight.operations.python_training import read_path

if TYPE_CHECKING:
    import socket

    from finesight.infer.inference_service import InferenceService
    from finesight.infer.model_loader import InferenceModel

HOST = "127.0.0.1"
SERVER_PACKAGES = ("starlette", "uvicorn", "prometheus_client", "python_multipart", "llguidance")
"""Packages of the extra `serve`."""

KEY_BYTES = 24


class ModelServer:
    """OpenAI-compatible HTTP server of a model, which runs until `close`.

    Attributes:
        url: Base URL for clients, such as `openai.OpenAI(base_url=server.url)`.
        key: API key, which every request needs.
        model_names: Models that requests can name.
    """

    def __init__(self, inference_model: InferenceModel, listener: socket.socket) -> None:
        self.key = secrets.token_urlsafe(KEY_BYTES)
        self.url = f"http://{HOST}:{listener.getsockname()[1]}/v1"
        self.model_names: tuple[str, ...] = ()
        self._stop: Callable[[], None] | None = None
        self._error: BaseException | None = None
        self._is_closed = False
        self._is_ready = threading.Event()
        # A program that forgets `close` still ends.
        self._thread = threading.Thread(
            target=self._run, args=(inference_model, listener), name="finesight-server", daemon=True
        )
        atexit.register(self.close)
        try:
            self._thread.start()
            self._is_ready.wait()
        except BaseException:
            self.close()
            raise
        if self._error is not None:
            self.close()  # raises the error

    def _run(self, inference_model: InferenceModel, listener: socket.socket) -> None:
        """Serve requests in the thread of the server."""
        from finesight.infer.inference_service import fit_num_seqs
        from finesight.serve.api_schema import ServerLimits
        from finesight.serve.api_server import run_api_server

        def on_ready(service: InferenceService, stop: Callable[[], None]) -> None:
            self.model_names = tuple(service.model_names)
            self._stop = stop
            self._is_ready.set()
            if self._is_closed:  # before it was ready
                stop()

        try:
            limits = ServerLimits()
            num_seqs = fit_num_seqs(inference_model, limits.max_num_seqs)
            run_api_server(
                inference_model,
                listener,
                api_keys=[self.key],
                limits=replace(limits, max_num_seqs=num_seqs),
                on_ready=on_ready,
            )
        except BaseException as error:
            self._error = error
        finally:
            self._is_ready.set()

    def close(self) -> None:
        """Complete the running requests, then stop the server and free its port and its memory.

        Requests have a minute. A closed server stays closed.

        Raises:
            Exception: That of the server, if it has failed.
        """
        self._is_closed = True
        if self._stop is not None:
            self._stop()
        with suppress(RuntimeError):  # An interrupt came before the thread has started.
            self._thread.join()
        atexit.unregister(self.close)
        # The function refers to the server with its KV cache, as do circles of references.
        self._stop = None
        gc.collect()
        error = self._error
        self._error = None
        if error is not None:
            raise error

    def __enter__(self) -> ModelServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:  # Otherwise, the exception of the block is raised.
                raise

    def __repr__(self) -> str:
        state = "" if self._thread.is_alive() else ", closed"
        return f"<{type(self).__name__} of {', '.join(self.model_names)} at {self.url}{state}>"


def start_server(
    model: StrPath | Model,
    *,
    adapters: StrPath | Sequence[StrPath] = (),
    port: int = 0,
    **loading: Unpack[LoadingOptions],
) -> ModelServer:
    """Start an OpenAI-compatible HTTP server of a model in a thread of this process.

    It listens on 127.0.0.1 only. `with` closes it at the end of a block.

    Args:
        model: Loaded model, or the name or folder of a run or model.
        adapters: Further runs or adapters on the same base model, which requests select by name.
            They need the name of a model, which is loaded with them.
        port: Port to listen on. 0 chooses a free one.
        loading: Arguments of `finesight.load`, such as `device`.

    Raises:
        UserError: The model cannot be loaded or has no native implementation, a package of the
            extra `serve` is missing, or the port is in use.
    """
    from finesight.encode.renderer import is_native
    from finesight.infer.model_loader import resolve_model_source

    require_extra("start_server", "serve", SERVER_PACKAGES)
    if not isinstance(port, int) or not 0 <= port < 2**16:
        raise UserError(
            f"port={port!r:.60}",
            where="start_server",
            expected="a number from 0 to 65535",
            remedy="port=0 chooses a free port",
        )
    if isinstance(model, Model):
        if adapters or loading:
            raise UserError(
                "adapters or options of loading beside a loaded model",
                where="start_server",
                expected="the name of a model, which is loaded with them",
                remedy=f"start_server({model.name!r}, adapters=[...])",
            )
        return _serve(lambda: model.inference_model, port)
    name = read_path(model, "model", "a loaded model, or the name or folder of one")
    if isinstance(adapters, str | os.PathLike):
        adapters = [adapters]
    adapter_names: list[str] = []
    for one in adapters or ():
        adapter_names.append(read_path(one, "model", "the name or folder of an adapter"))
    if not is_native(resolve_model_source(name).folder):
        raise _build_family_error()
    return _serve(lambda: load_adapters(name, adapter_names, **loading), port)


def _serve(load: Callable[[], InferenceModel], port: int) -> ModelServer:
    """Bind the port before the model is loaded, and start the server."""
    from finesight.serve.http_protocol import bind_socket

    try:
        listener = bind_socket(HOST, port)
    except UserError as error:
        error.remedy = "port=0 chooses a free port, or stop the other program"
        raise
    try:
        inference_model = load()
        if not inference_model.model.capabilities.batches:
            raise _build_family_error()
    except BaseException:
        listener.close()
        raise
    return ModelServer(inference_model, listener)


def _build_family_error() -> UserError:
    return UserError(
        "a model without a native implementation",
        where="start_server",
        expected="a native model family",
        remedy="finesight.load(...).generate answers without a server",
    )
