"""The page put together and served: nothing of it comes from elsewhere, nothing goes there."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response, StreamingResponse

from finesight.errors import UserError
from finesight.infer.service import Service
from finesight.web.disk_budget import DiskBudget
from finesight.web.guard import Guard
from finesight.web.limits import PICTURE_BYTES
from finesight.web.show import sign_in_html
from finesight.web.visitors import Visitor, Visitors
from finesight.web.words import CHINESE, preferred

if TYPE_CHECKING:
    import gradio as gr

STATIC = Path(__file__).parent / "static"
UPLOADS, TALKS = "uploads", "talks"
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "sans-serif")
MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")


def serve(service: Service, listener: socket.socket, password: str | None, loopback: bool) -> None:
    """Serve the page at a bound socket until a signal ends it; see `Guard` for the rest."""
    import uvicorn

    with private_folder() as folder:
        config = uvicorn.Config(
            make_app(visitors_in(folder, service), folder / UPLOADS, password, loopback),
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
        # The server raises a signal again when it has ended; the folder must go before this does.
        with contextlib.suppress(KeyboardInterrupt), _terminated_as_interrupted():
            uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Within the block SIGTERM does what Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound there. Raises UserError where that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot listen at {host} port {port} ({error})",
                where="--host, --port",
                expected="an address of this machine and a port that is free",
                remedy="choose another --port",
            ) from error
        yield listener


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for what visitors send, readable by this user alone, and gone in the end."""
    with tempfile.TemporaryDirectory(prefix="finesight-web-", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        (folder / UPLOADS).mkdir()
        (folder / TALKS).mkdir()
        with _kept_in(folder / UPLOADS):
            yield folder


def visitors_in(folder: Path, service: Service) -> Visitors:
    """Create the visitors of a page, nobody at first, within a `private_folder`."""
    return Visitors(service, folder / TALKS, DiskBudget(folder / UPLOADS, folder / TALKS))


def make_app(visitors: Visitors, uploads: Path, password: str | None, loopback: bool) -> Guard:
    """The page behind its guard, within a `private_folder` whose `uploads` hold what comes."""
    # Imported here: Gradio reads where it keeps files when it is imported, too.
    import gradio as gr

    from finesight.web.page import Page

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_files(app, visitors)
    page = Page(visitors)
    mounted = gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        theme=_theme(),
        css=(STATIC / "page.css").read_text(encoding="utf-8"),
        js=(STATIC / "page.js").read_text(encoding="utf-8"),
        max_file_size=PICTURE_BYTES,
        allowed_paths=[],
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        show_error=False,
    )

    def sign_in_page(refused: bool, languages: str) -> str:
        return sign_in_html(STATIC / "sign-in.html", refused, preferred(languages) is CHINESE)

    return Guard(
        mounted,
        uploads,
        visitors.budget,
        page.inputs,
        lambda name: name in page.blocks._queue.pending_messages_per_session,
        sign_in_page,
        password,
        loopback,
    )


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Within the block, Gradio's parts that are made, also those that answer an event, keep their
    files there; and it reports to nobody."""
    wanted = {
        "GRADIO_TEMP_DIR": str(folder),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


def _theme() -> gr.themes.Base:
    """Fonts of the visitor's own machine: Gradio's are fetched from elsewhere."""
    import gradio as gr

    return gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", radius_size="lg", font=FONTS, font_mono=MONO
    )


def _add_files(app: FastAPI, visitors: Visitors) -> None:
    @app.get("/page.css")
    def style() -> Response:
        return FileResponse(STATIC / "page.css", media_type="text/css")

    @app.get("/pictures/{token}/{number}")
    def picture(token: str, number: int) -> Response:
        visitor = visitors.with_token(token)
        found = [] if visitor is None else [*visitor.pictures.values()]
        copy = next((shown.copy for shown in found if shown.number == number), None)
        if copy is None or not copy.is_file():
            return Response("no such picture", 404)
        kept = {"cache-control": "private, max-age=3600"}
        return FileResponse(copy, media_type="image/webp", headers=kept)

    @app.get("/export/{token}/talk.zip")
    def export(token: str) -> Response:
        visitor: Visitor | None = visitors.with_token(token)
        if visitor is None:
            return Response("no such talk", 404)
        try:
            archive = visitor.export()
        except UserError as error:
            return Response(str(error), 409, media_type="text/plain")
        size = os.fstat(archive.fileno()).st_size
        told = {
            "content-disposition": 'attachment; filename="talk.zip"',
            "content-length": str(size),
        }
        return StreamingResponse(_pieces(archive), headers=told, media_type="application/zip")


def _pieces(archive: IO[bytes]) -> Iterator[bytes]:
    with archive:
        while piece := archive.read(1 << 16):
            yield piece
