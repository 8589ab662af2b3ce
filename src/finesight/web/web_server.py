"""Web server of the chat page. It contacts no other servers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, Response, StreamingResponse
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from finesight.errors import UserError, build_bind_error
from finesight.infer.inference_service import InferenceService
from finesight.storage import temporary_folder
from finesight.vision.image_reader import ImageReader
from finesight.web.access_middleware import SIGNED_IN_KEY, AccessMiddleware
from finesight.web.chat_html import STATIC_FOLDER
from finesight.web.web_sessions import MAX_IMAGE_BYTES, DiskBudget, WebSessionStore
from finesight.worker_pool import WorkerPool

if TYPE_CHECKING:
    import gradio as gr

REQUEST_TIMEOUT_S, MAX_UNKNOWN_CONNECTIONS = 15.0, 100
"""Seconds of a request, and number of connections, of clients that have not signed in."""

UPLOADS_FOLDER, CHATS_FOLDER = "uploads", "chats"
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "sans-serif")
MONOSPACE_FONTS = ("ui-monospace", "Menlo", "Consolas", "monospace")


def run_web_server(
    service: InferenceService,
    pool: WorkerPool,
    listener: socket.socket,
    password: str | None,
    loopback_only: bool,
    trusted_proxies: Sequence[str] = (),
) -> None:
    """Serve the chat page until a signal stops the server.

    Args:
        pool: Worker processes that read images. The function closes them.
        password: Password of the page. None admits everyone.
        loopback_only: Whether the page is for this machine only. See `AccessMiddleware`.
        trusted_proxies: See `create_server_config`.
    """
    # Closed at the end: threads of the page may wait for a worker.
    with create_private_folder() as folder, contextlib.closing(pool):
        pool.start()
        session_store = create_session_store(folder, service, pool)
        app = make_app(session_store, folder / UPLOADS_FOLDER, password, loopback_only)
        serve_app(app, listener, pool, trusted_proxies)


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


@contextmanager
def create_private_folder() -> Iterator[Path]:
    """Create a temporary folder for uploads and chats, accessible by this user only.

    The folder is deleted at the end of the `with` block.
    """
    with temporary_folder("web") as folder:
        (folder / UPLOADS_FOLDER).mkdir()
        (folder / CHATS_FOLDER).mkdir()
        with _configure_gradio(folder / UPLOADS_FOLDER):
            yield folder


def create_session_store(
    folder: Path, service: InferenceService, pool: WorkerPool
) -> WebSessionStore:
    """Create an empty session store in the private folder."""
    budget = DiskBudget(folder / UPLOADS_FOLDER, folder / CHATS_FOLDER)
    return WebSessionStore(service, folder / CHATS_FOLDER, budget, ImageReader(pool))


def make_app(
    session_store: WebSessionStore, upload_folder: Path, password: str | None, loopback_only: bool
) -> AccessMiddleware:
    """Build the chat page as an ASGI application with access control.

    Args:
        password: Password of the page. None admits everyone.
        loopback_only: Whether the page is for this machine only. See `AccessMiddleware`.
    """
    # Imported here, because Gradio reads its environment variables at import.
    from finesight.web.chat_page import ChatPage

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_file_routes(app, session_store)
    page = ChatPage(session_store)
    mounted_app = mount_page(app, page.blocks, (STATIC_FOLDER / "page.js").read_text("utf-8"))

    return AccessMiddleware(
        mounted_app,
        upload_folder,
        session_store.budget,
        page.inputs,
        lambda name: name in page.blocks._queue.pending_messages_per_session,
        password,
        loopback_only,
        identifies_browsers=True,
    )


def mount_page(
    app: FastAPI,
    blocks: gr.Blocks,
    script: str,
    *,
    head: str | None = None,
    max_file_size: int = MAX_IMAGE_BYTES,
) -> FastAPI:
    """Mount a Gradio page at the root of an application, without features that it does not need.

    Args:
        script: JavaScript function that runs when the page is loaded.
        head: HTML for the head of the page.
    """
    import gradio as gr

    @app.get("/page.css")
    def get_style() -> Response:
        return FileResponse(STATIC_FOLDER / "page.css", media_type="text/css")

    mounted_app: FastAPI = gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        # The default themes would load fonts from other servers.
        theme=gr.themes.Base(
            primary_hue="teal",
            neutral_hue="slate",
            radius_size="lg",
            font=FONTS,
            font_mono=MONOSPACE_FONTS,
        ),
        css=(STATIC_FOLDER / "page.css").read_text(encoding="utf-8"),
        js=script,
        head=head,
        max_file_size=max_file_size,
        allowed_paths=[],
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        show_error=False,
    )
    return mounted_app


@contextmanager
def _configure_gradio(folder: Path) -> Iterator[None]:
    """Set environment variables of Gradio within a `with` block.

    Gradio stores its files in `folder` and sends no usage statistics. Components that are created
    by events read the variables as well.
    """
    variables = {
        "GRADIO_TEMP_DIR": str(folder),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    previous_values = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in previous_values.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


def _add_file_routes(app: FastAPI, session_store: WebSessionStore) -> None:
    @app.get("/images/{token}/{number}")
    def get_image(token: str, number: int) -> Response:
        session = session_store.find_by_token(token)
        for image in [] if session is None else [*session.images.values()]:
            if image.number == number and image.display_path.is_file():
                headers = {"cache-control": "private, max-age=3600"}
                return FileResponse(image.display_path, media_type="image/webp", headers=headers)
        return Response("no such image", 404)

    @app.get("/export/{token}/chat.zip")
    def export_chat(token: str) -> Response:
        session = session_store.find_by_token(token)
        if session is None:
            return Response("no such chat", 404)
        try:
            archive = session.export_archive()
        except UserError as error:
            return Response(str(error), 409, media_type="text/plain")
        headers = {
            "content-disposition": 'attachment; filename="chat.zip"',
            "content-length": str(os.fstat(archive.fileno()).st_size),
        }
        return StreamingResponse(
            iter_chunks(archive), headers=headers, media_type="application/zip"
        )

    def iter_chunks(archive: IO[bytes]) -> Iterator[bytes]:
        with archive:
            while chunk := archive.read(1 << 16):
                yield chunk
