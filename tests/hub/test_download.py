"""Invalid, endless and large responses of servers raise UserError."""

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

CHUNKED = {"Transfer-Encoding": "chunked"}
CHUNKS = b"2\r\nab\r\n0\r\n\r\n"


class Server(ThreadingHTTPServer):
    """Returns the status, headers and body in `reply` for all requests."""

    daemon_threads = True
    reply: tuple[int, dict[str, str], bytes] = (200, {}, b"")

    def download(self, folder: Path) -> bytes:
        url = f"http://127.0.0.1:{self.server_address[1]}/x?Signature=secret"
        site = HttpSite(lambda response, body: UserError(f"status {response.status_code}: {body}"))
        with Downloader(site) as downloader:
            downloader.download(RemoteFile("a", url), folder / "a")
        return (folder / "a").read_bytes()


class ReplyHandler(BaseHTTPRequestHandler):
    server: Server

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


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (200, {}, "does not send the size of a"),
        (302, {"Location": "http://[::1"}, "not an allowed address"),
        (302, {"Location": "https://a..b/"}, "not an allowed address"),
        (302, {"Location": f"https://{'a' * 70}.com/"}, "not an allowed address"),
    ],
)
def test_invalid_responses_are_rejected(server, tmp_path, status, headers, message):
    server.reply = (status, headers, b"ab")
    with pytest.raises(UserError, match=message) as raised:
        server.download(tmp_path)
    assert "secret" not in str(raised.value)
    assert not list(tmp_path.glob("a"))


def test_invalid_retry_after_header(server: Server, tmp_path: Path) -> None:
    server.reply = (503, {"Retry-After": "\xb2"}, b"")
    with pytest.raises(UserError, match="received 0 bytes, then status 503"):
        server.download(tmp_path)


def test_chunked_responses_need_no_size(server: Server, tmp_path: Path) -> None:
    for status, headers in ((200, {}), (206, {"Content-Range": f"bytes 0-1/{'9' * 5000}"})):
        server.reply = (status, CHUNKED | headers, CHUNKS)
        assert server.download(tmp_path / str(status)) == b"ab"


def test_endless_error_body_is_bounded(server: Server, tmp_path: Path) -> None:
    server.reply = (404, {"Content-Encoding": "gzip"}, gzip.compress(bytes(100_000_000)))
    tracemalloc.start()
    with pytest.raises(UserError, match="status 404"):
        server.download(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
