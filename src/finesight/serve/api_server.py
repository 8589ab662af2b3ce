"""Inference server: routes, limits, and graceful shutdown."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from finesight.encode.renderer import NativeRenderer
from finesight.files.storage import temporary_folder
from finesight.files.worker_pool import WorkerPool
from finesight.infer.inference_service import InferenceService
from finesight.infer.model_loader import InferenceModel
from finesight.model.backend import as_native
from finesight.serve.api_schema import (
    ApiError,
    ClientDisconnectedError,
    ServerLimits,
    internal_error,
)
from finesight.serve.chat_completions import ChatCompletionsHandler, stop_at_disconnect
from finesight.serve.http_protocol import LimitedServer, build_protocol_class, fit_connections
from finesight.serve.label_studio_backend import LabelStudioOptions
from finesight.serve.media_sources import (
    DEFAULT_IMAGE_FORMATS,
    FILE_PURPOSE,
    FileStore,
    MediaFetcher,
)
from finesight.serve.preprocessing_jobs import load_worker_state
from finesight.serve.request_middleware import (
    CLIENT_CLOSED_REQUEST,
    ApiKeys,
    RequestMiddleware,
    ServerMetrics,
)
from finesight.serve.request_preprocessor import ConstraintFactory

QUIET_LOGGERS = ("httpx2", "httpcore2", "uvicorn", "python_multipart", "PIL", "asyncio")
"""Loggers of libraries that may log client addresses or content, and so log warnings only."""


FORCED_SECONDS = 2.0
"""Seconds from a second Ctrl-C until the process is ended without waiting."""

ENDING_SECONDS = 5.0
"""Seconds after the shutdown timeout until the process is ended without waiting."""


def make_app(
    service: InferenceService,
    worker_pool: WorkerPool,
    vocab_size: int,
    folder: Path,
    *,
    api_keys: Sequence[str] = (),
    limits: ServerLimits | None = None,
    fetcher: MediaFetcher | None = None,
    image_formats: Sequence[str] = DEFAULT_IMAGE_FORMATS,
    label_studio: LabelStudioOptions | None = None,
) -> RequestMiddleware:
    """Build the inference server as an ASGI application.

    Args:
        worker_pool: Worker processes with the state of `load_worker_state`.
        folder: Private folder for files of clients.
        api_keys: API keys of clients. Without keys, every client is accepted.
        fetcher: Fetches images from the web. Without it, image URLs are rejected.
        label_studio: Settings of the ML backend for Label Studio, None for no such backend.
    """
    limits = limits or ServerLimits()
    request_folder = folder / "requests"
    request_folder.mkdir(mode=0o700)
    metrics = ServerMetrics(service)
    completions = ChatCompletionsHandler(
        service=service,
        worker_pool=worker_pool,
        constraint_factory=ConstraintFactory(
            worker_pool, limits, vocab_size, service.renderer.end_ids
        ),
        image_formats=image_formats,
        limits=limits,
        metrics=metrics,
        fetcher=fetcher or MediaFetcher((), limits),
        store=FileStore(folder / "files", limits),
        folder=request_folder,
    )

    async def get_metrics(request: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", completions.create_chat_completion, methods=["POST"]),
            Route("/metrics", get_metrics),
            *_build_model_routes(service),
            *_build_file_routes(completions),
            *(label_studio.build_routes(completions) if label_studio else ()),
        ],
        exception_handlers=dict.fromkeys(
            (ApiError, ClientDisconnectedError, HTTPException, Exception), _handle_error
        ),
    )
    app.router.redirect_slashes = False
    return RequestMiddleware(app, ApiKeys(api_keys), limits, metrics)


def _build_model_routes(service: InferenceService) -> list[Route]:
    created_at = int(time.time())

    def model_to_dict(name: str) -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": created_at, "owned_by": "finesight"}
        templates = service.get_prompt_format(name).templates
        if templates:
            model["prompt_templates"] = [template.template for template in templates]
        return model

    async def list_models(request: Request) -> Response:
        models = [model_to_dict(name) for name in service.model_names]
        return JSONResponse({"object": "list", "data": models})

    async def get_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in service.model_names:
            raise ApiError(404, f"unknown model {name[:80]!r}", "model", "model_not_found")
        return JSONResponse(model_to_dict(name))

    async def get_health(request: Request) -> Response:
        if service.is_alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unavailable"}, status_code=503)

    return [
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", get_model),
        Route("/health", get_health),
    ]


def _build_file_routes(completions: ChatCompletionsHandler) -> list[Route]:
    store = completions.store

    async def upload_file(request: Request) -> Response:
        async with request.form(max_files=1, max_fields=8) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise ApiError(400, f"no file in {len(form)} form fields", "file")
            if purpose != FILE_PURPOSE:
                raise ApiError(
                    400, f"purpose is {purpose!r:.40}; expected {FILE_PURPOSE}", "purpose"
                )
            uploaded_file = await completions.run_in_thread(
                store.add, request.state.owner, file.filename or "", file.file
            )
        preprocessor = completions.create_preprocessor(uploaded_file.path.parent)
        try:
            async with stop_at_disconnect(request.receive):
                await completions.run_in_thread(
                    preprocessor.inspect_file,
                    uploaded_file.path,
                    "file",
                    executor=completions.media_executor,
                )
        except BaseException:
            preprocessor.cancel()
            store.delete(uploaded_file.owner, uploaded_file.id)
            raise
        return JSONResponse(uploaded_file.as_json())

    async def list_files(request: Request) -> Response:
        files = await completions.run_in_thread(store.list_files, request.state.owner)
        data = [file.as_json() for file in files]
        return JSONResponse({"object": "list", "data": data, "has_more": False})

    async def get_file(request: Request) -> Response:
        name = request.path_params["name"]
        file = await completions.run_in_thread(store.get, request.state.owner, name)
        return JSONResponse(file.as_json())

    async def delete_file(request: Request) -> Response:
        name = request.path_params["name"]
        await completions.run_in_thread(store.delete, request.state.owner, name)
        return JSONResponse({"id": name, "object": "file", "deleted": True})

    return [
        Route("/v1/files", upload_file, methods=["POST"]),
        Route("/v1/files", list_files),
        Route("/v1/files/{name}", get_file),
        Route("/v1/files/{name}", delete_file, methods=["DELETE"]),
    ]


async def _handle_error(request: Request, error: Exception) -> Response:
    """Convert an exception to a response in the format of the OpenAI API."""
    if isinstance(error, ClientDisconnectedError):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if isinstance(error, HTTPException):
        messages = {404: "unknown path", 405: "method not allowed"}
        message = messages.get(error.status_code, str(error.detail)[:200])
        error = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    elif not isinstance(error, ApiError):
        error = internal_error()
    return JSONResponse(error.body, error.status, error.response_headers)


def _build_refusal(max_connections: int) -> bytes:
    """Build the HTTP response to a connection beyond the limit."""
    error = ApiError(503, f"{max_connections} connections are open", retry_after_s=2)
    response = JSONResponse(
        error.body, error.status, {**error.response_headers, "Connection": "close"}
    )
    headers = b"".join(b"%b: %b\r\n" % header for header in response.raw_headers)
    return b"HTTP/1.1 503 Service Unavailable\r\n" + headers + b"\r\n" + bytes(response.body)


class ApiServer(LimitedServer):
    """Server with limits on connections and on the duration of the shutdown.

    `abort` ends the process immediately. It is called if the process still runs some time after a
    signal, since Python waits for busy threads.
    """

    def __init__(
        self,
        app: RequestMiddleware,
        limits: ServerLimits,
        on_ready: Callable[[], None],
        abort: Callable[[], None] | None = None,
        trusted_proxies: Sequence[str] = (),
    ) -> None:
        for name in QUIET_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        num_connections = fit_connections(limits.max_connections)
        super().__init__(
            uvicorn.Config(
                app,
                http=build_protocol_class(
                    limits.header_timeout_s,
                    limits.send_timeout_s,
                    num_connections,
                    refusal=_build_refusal(num_connections),
                ),
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=bool(trusted_proxies),
                forwarded_allow_ips=[*trusted_proxies],
                server_header=False,
                timeout_keep_alive=round(limits.keep_alive_timeout_s),
                timeout_graceful_shutdown=round(limits.shutdown_timeout_s),
            )
        )
        self._on_ready, self._abort = on_ready, abort
        self._closing_seconds = limits.shutdown_timeout_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen for connections, then call `on_ready`."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop to listen, complete the running requests, and close all connections."""
        for listener in sockets or ():
            stop_listening(listener)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the shutdown of the server. A second Ctrl-C shortens its time limit."""
        is_forced = self.should_exit and sig == signal.SIGINT
        super().handle_exit(sig, frame)
        if self._abort is not None:
            seconds = FORCED_SECONDS if is_forced else self._closing_seconds + ENDING_SECONDS
            timer = threading.Timer(seconds, self._abort)
            timer.daemon = True
            timer.start()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM and Ctrl-C as a shutdown within a `with` block.

        The method of uvicorn would raise the signal again, so that the process exits with its
        status.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        previous_handlers = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)


def stop_listening(listener: socket.socket) -> None:
    """Free the port of a socket, of which forked processes have copies."""
    with contextlib.suppress(OSError):  # It is closed.
        listener.shutdown(socket.SHUT_RDWR)


def run_api_server(
    inference_model: InferenceModel,
    listener: socket.socket,
    *,
    api_keys: Sequence[str],
    limits: ServerLimits,
    allowed_media_hosts: Sequence[str] = (),
    image_formats: Sequence[str] = DEFAULT_IMAGE_FORMATS,
    label_studio: LabelStudioOptions | None = None,
    trusted_proxies: Sequence[str] = (),
    on_ready: Callable[[InferenceService, Callable[[], None]], None],
) -> None:
    """Serve requests until a signal stops the server, then close the listener.

    At shutdown, running requests have `shutdown_timeout_s` to complete. `on_ready` is called when
    the server listens, with the inference service and a function that stops the server. Images may
    be fetched from `allowed_media_hosts`. The header X-Forwarded-For of `trusted_proxies` names the
    client.
    """
    renderer = inference_model.renderer.native
    vocab_size = as_native(inference_model.model).config.decoder.vocab_size
    with contextlib.ExitStack() as stack:
        stack.callback(listener.close)
        stack.callback(stop_listening, listener)
        folder = stack.enter_context(temporary_folder("serve"))
        worker_pool = create_worker_pool(renderer, vocab_size, limits)
        stack.callback(worker_pool.close)
        worker_pool.start()
        service = InferenceService(
            inference_model, max_num_seqs=limits.max_num_seqs, max_waiting=limits.max_queue
        )
        stack.callback(service.close, wait_for_running=False)
        # Close the pool first, because threads may wait for a worker.
        stack.callback(worker_pool.close)
        app = make_app(
            service,
            worker_pool,
            vocab_size,
            folder,
            api_keys=api_keys,
            limits=limits,
            fetcher=MediaFetcher(allowed_media_hosts, limits),
            image_formats=image_formats,
            label_studio=label_studio,
        )

        def abort() -> None:
            worker_pool.kill()
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)

        def stop() -> None:
            server.should_exit = True

        server = ApiServer(app, limits, lambda: on_ready(service, stop), abort, trusted_proxies)
        server.run(sockets=[listener])


def create_worker_pool(
    renderer: NativeRenderer, vocab_size: int, limits: ServerLimits
) -> WorkerPool:
    """Create the pool of worker processes that preprocess requests, without starting it."""
    return WorkerPool(
        load_worker_state,
        renderer,
        vocab_size,
        num_idle=limits.num_reader_threads,
        memory_bytes=limits.max_worker_memory_bytes,
    )
