"""Invalid, endless and large responses of servers raise UserError."""

import contextlib
import gzip
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub_servers import FakeHubServer, HubHandler, run_in_thread

import finesight.hub.download
from finesight.errors import UserError
from finesight.hub.download import Downloader, HttpSite, RemoteFile

CHUNKED = {"Transfer-Encoding": "chunked"}
CHUNKS = b"2\r\nab\r\n0\r\n\r\n"


class ReplyHandler(HubHandler):
    """Sends the same reply to all requests."""

    protocol_version = "HTTP/1.0"
    reply: tuple[int, dict[str, str], bytes]

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        status, headers, body = self.reply
        self.send_head(status, headers)
        self.wfile.write(body)


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., bytes]]:
    """Download a file from a server with one reply."""
    monkeypatch.setattr(finesight.hub.download, "RETRY_DELAYS_S", ())

    def download(folder: Path, status: int, headers: dict[str, str], body: bytes) -> bytes:
        monkeypatch.setattr(ReplyHandler, "reply", (status, headers, body), raising=False)
        site = HttpSite(lambda response, body: UserError(f"status {response.status_code}: {body}"))
        with Downloader(site) as downloader:
            downloader.download(RemoteFile("a", f"{server.url}/x?Signature=secret"), folder / "a")
        return (folder / "a").read_bytes()

    with run_in_thread(FakeHubServer(ReplyHandler)) as server:
        yield download


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (200, {}, "does not send the size of a"),
        (302, {"Location": "http://[::1"}, "not an allowed address"),
        (302, {"Location": "https://a..b/"}, "not an allowed address"),
        (302, {"Location": f"https://{'a' * 70}.com/"}, "not an allowed address"),
    ],
)
def test_invalid_responses_are_rejected(download, tmp_path, status, headers, message):
    with pytest.raises(UserError, match=message) as raised:
        download(tmp_path, status, headers, b"ab")
    assert "secret" not in str(raised.value)
    assert not list(tmp_path.glob("a"))


def test_invalid_retry_after_header(download, tmp_path):
    with pytest.raises(UserError, match="received 0 bytes, then status 503"):
        download(tmp_path, 503, {"Retry-After": "\xb2"}, b"")


def test_chunked_responses_need_no_size(download, tmp_path):
    for status, headers in ((200, {}), (206, {"Content-Range": f"bytes 0-1/{'9' * 5000}"})):
        assert download(tmp_path / str(status), status, CHUNKED | headers, CHUNKS) == b"ab"


class TrickleHandler(HubHandler):
    """Sends one byte after the other, until the client leaves."""

    protocol_version = "HTTP/1.0"
    num_requests = 0

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        TrickleHandler.num_requests += 1
        self.send_head(200, {"Content-Length": "1000000"})
        with contextlib.suppress(ConnectionError):
            while True:
                self.wfile.write(b"a")
                self.wfile.flush()
                time.sleep(0.01)


def test_trickle_of_single_bytes_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(finesight.hub.download, "RETRY_DELAYS_S", (0.0, 0.0))
    monkeypatch.setattr(finesight.hub.download, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(TrickleHandler, "num_requests", 0)
    site = HttpSite(lambda response, body: UserError(body))
    with run_in_thread(FakeHubServer(TrickleHandler)) as server, Downloader(site) as downloader:
        file = RemoteFile("a", f"{server.url}/x")
        with pytest.raises(UserError, match=r"bytes within 0\.3 s"):
            downloader.download(file, tmp_path / "a")
    assert TrickleHandler.num_requests == 3


def test_endless_error_body_is_bounded(download, tmp_path):
    body = gzip.compress(bytes(100_000_000))
    tracemalloc.start()
    with pytest.raises(UserError, match="status 404"):
        download(tmp_path, 404, {"Content-Encoding": "gzip"}, body)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
