"""Invalid, endless and large responses of servers raise UserError."""

from __future__ import annotations

import gzip
import threading
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import finesight.hub.download
from finesight.errors import UserError
from finesight.hub.download import Downloader, HttpSite, RemoteFile


class Server(ThreadingHTTPServer):
    """Returns the status, headers and body in `reply` for all requests."""

    daemon_threads = True
    reply: tuple[int, dict[str, str], bytes] = (200, {}, b"")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/x?Signature=secret"


class ReplyHandler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *arguments: object) -> None:
        """Disable logging."""

    def do_GET(self) -> None:
        status, headers, body = self.server.reply
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(finesight.hub.download, "RETRY_DELAYS_S", ())
    server = Server(("127.0.0.1", 0), ReplyHandler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def site() -> HttpSite:
    return HttpSite(lambda response, body: UserError(f"status {response.status_code}: {body[:9]}"))


def test_endless_error_body_is_bounded(server: Server, tmp_path: Path) -> None:
    server.reply = (404, {"Content-Encoding": "gzip"}, gzip.compress(bytes(100_000_000)))
    tracemalloc.start()
    with pytest.raises(UserError, match="status 404"):
        download(server, tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("location", ["http://[::1", "https://a..b/", f"https://{'a' * 70}.com/"])
def test_invalid_redirect_target(server: Server, tmp_path: Path, location: str) -> None:
    server.reply = (302, {"Location": location}, b"")
    with pytest.raises(UserError, match="not an allowed address") as raised:
        download(server, tmp_path)
    assert "secret" not in str(raised.value)


def test_invalid_retry_after_header(server: Server, tmp_path: Path) -> None:
    server.reply = (503, {"Retry-After": "\xb2"}, b"")
    with pytest.raises(UserError, match="received 0 bytes, then status 503"):
        download(server, tmp_path)
    chunked = {"Transfer-Encoding": "chunked"}
    server.reply = (206, {**chunked, "Content-Range": f"bytes 0-1/{'9' * 5000}"}, CHUNKS)
    assert download(server, tmp_path) == b"ab"


def test_missing_content_length(server: Server, tmp_path: Path) -> None:
    server.reply = (200, {}, b"ab")
    with pytest.raises(UserError, match="does not send the size of a") as raised:
        download(server, tmp_path)
    assert "secret" not in str(raised.value)
    assert not list(tmp_path.glob("a"))
    server.reply = (200, {"Transfer-Encoding": "chunked"}, CHUNKS)
    assert download(server, tmp_path) == b"ab"


CHUNKS = b"2\r\nab\r\n0\r\n\r\n"


def download(server: Server, folder: Path) -> bytes:
    with Downloader(site()) as downloader:
        downloader.download(RemoteFile("a", server.url), folder / "a")
    return (folder / "a").read_bytes()
