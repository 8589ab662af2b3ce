"""Tests of image fetching: allowed hosts, addresses, and limits."""

import asyncio
import contextlib
import io
import ipaddress
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from api_server_fixtures import (
    make_data_url,
    make_image_part,
    make_messages,
    make_noise_png,
    post_chat,
    run_server,
)
from case_files import load_cases
from each_value import each
from hub_fixtures import certificate

from finesight.errors import UserError
from finesight.hub.download import is_public_address
from finesight.serve.api_schema import ServerLimits
from finesight.serve.image_sources import ImageFetcher

CASES = load_cases("image_fetcher")

__all__ = ["certificate"]

OUTSIDE, INSIDE = "127.0.0.2", "127.0.0.1"
"""Addresses that represent the public network and the local network."""

IMAGE_BYTES = make_noise_png()


FIXED_ANSWERS = {
    "text": (200, b"<html>", {"Content-Type": "text/html"}),
    "missing": (404, b"", {"Content-Type": "image/png"}),
    "large": (200, b"x", {"Content-Type": "image/png", "Content-Length": "999999"}),
}


class TlsServer(ThreadingHTTPServer):
    """TLS server that records path and host of its `requests`."""

    daemon_threads = True

    def __init__(self, address: str, port: int, made: Path, key: Path) -> None:
        super().__init__((address, port), Answers)
        self.requests: list[tuple[str, str]] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(made, key)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore disconnects of clients."""


class Answers(BaseHTTPRequestHandler):
    """Handler of /a.png, /to/URL, /large, /endless, /slow, /text."""

    server: TlsServer

    def log_message(self, format: str, *arguments: object) -> None:
        """Disable logging."""

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers["Host"]))
        name = self.path.split("/")[1]
        if name == "to":
            self._send(302, b"", {"Location": self.path.removeprefix("/to/")})
        elif name in FIXED_ANSWERS:
            self._send(*FIXED_ANSWERS[name])
        elif name in ("endless", "slow"):
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(1000) if name == "endless" else b"x")
                    time.sleep(0 if name == "endless" else 0.05)
        else:
            self._send(200, IMAGE_BYTES, {"Content-Type": "image/png"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for header in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def public_and_local_servers(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[TlsServer, TlsServer]]:
    """Two servers at the same port: a public one, and a local one that must not be contacted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with contextlib.ExitStack() as stack:
        inside = None
        while inside is None:
            # The port must be free at both addresses.
            outside = stack.enter_context(TlsServer(OUTSIDE, 0, *certificate))
            stack.callback(outside.shutdown)
            with contextlib.suppress(OSError):
                inside = TlsServer(INSIDE, outside.server_address[1], *certificate)
        stack.enter_context(inside)
        stack.callback(inside.shutdown)
        yield outside, inside


@pytest.fixture
def url(public_and_local_servers: tuple[TlsServer, TlsServer]) -> str:
    """Address of the public server."""
    return f"https://localhost:{public_and_local_servers[0].server_address[1]}"


class FakeResolver:
    """Resolver that returns its answers in order and repeats the last one."""

    def __init__(self, *answers: list[str]) -> None:
        self._answers = list(answers)
        self.lookups: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.lookups.append(host)
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def fetcher(names: FakeResolver, timeout_s: float = 5.0) -> ImageFetcher:
    return ImageFetcher(
        ["localhost"],
        ServerLimits(fetch_timeout_s=timeout_s, max_image_bytes=100_000),
        resolve=names,
        is_allowed_address=lambda address: str(address) == OUTSIDE,
    )


def fetch_bytes(fetcher: ImageFetcher, url: str) -> bytes:
    file = io.BytesIO()
    asyncio.run(fetcher.fetch(url, file))
    return file.getvalue()


def test_image_from_allowed_host(public_and_local_servers, url):
    outside, inside = public_and_local_servers
    names = FakeResolver([OUTSIDE])
    assert fetch_bytes(fetcher(names), f"{url}/a.png?sign=1") == IMAGE_BYTES
    # The Host header is the name, the connection uses the address.
    assert outside.requests == [("/a.png?sign=1", url.removeprefix("https://"))]
    assert names.lookups == ["localhost"]
    assert fetch_bytes(fetcher(names), f"{url.upper()}/to//a.png".replace("HTTPS", "https")) == (
        IMAGE_BYTES
    )
    assert not inside.requests


def test_dns_rebinding_is_blocked(public_and_local_servers, url):
    inside = public_and_local_servers[1]
    names = FakeResolver([OUTSIDE], [INSIDE])
    # The connection uses the address that was checked.
    assert fetch_bytes(fetcher(names), f"{url}/a.png") == IMAGE_BYTES
    assert names.lookups == ["localhost"]
    redirected = FakeResolver([OUTSIDE], [INSIDE]), f"{url}/to/{url}/a.png"
    answers = ([OUTSIDE, INSIDE], [INSIDE, OUTSIDE], [INSIDE], [])
    for names, location in (redirected, *((FakeResolver(one), f"{url}/a.png") for one in answers)):
        with pytest.raises(UserError, match="no public address"):
            fetch_bytes(fetcher(names), location)
    assert not inside.requests


@each("location", CASES["forbidden_urls"].split())
def test_forbidden_urls(public_and_local_servers, url, location):
    outside, inside = public_and_local_servers
    outside.requests.clear()
    location = location.format(port=outside.server_address[1])
    for address in (location, f"{url}/to/{location}"):
        with pytest.raises(UserError, match="is not allowed"):
            fetch_bytes(fetcher(FakeResolver([OUTSIDE])), address)
    assert [path for path, _ in outside.requests] == [f"/to/{location}"]
    assert not inside.requests


def test_redirect_loop(public_and_local_servers, url):
    with pytest.raises(UserError, match="redirects"):
        fetch_bytes(fetcher(FakeResolver([OUTSIDE])), f"{url}/" + f"to/{url}/" * 9)
    assert len(public_and_local_servers[0].requests) == 6


@each(("path", "output"), CASES["test_invalid_responses"])
def test_invalid_responses(url, path, output):
    patience = 0.3 if path == "slow" else 5.0
    with pytest.raises(UserError, match=output):
        fetch_bytes(fetcher(FakeResolver([OUTSIDE]), patience), f"{url}/{path}")


def test_no_request_with_a_wrong_certificate_or_offline(public_and_local_servers, url, monkeypatch):
    other = ImageFetcher(
        ["other.example"],
        ServerLimits(),
        resolve=FakeResolver([OUTSIDE]),
        is_allowed_address=lambda address: True,
    )
    with pytest.raises(UserError, match="could not be fetched"):
        fetch_bytes(other, f"{url.replace('localhost', 'other.example')}/a.png")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="image URLs are disabled"):
        fetch_bytes(fetcher(FakeResolver([OUTSIDE])), f"{url}/a.png")
    assert not public_and_local_servers[0].requests


@each(("kind", "is_public"), [("local_addresses", False), ("public_addresses", True)])
def test_public_address_detection(kind, is_public):
    for address in CASES[kind].split():
        assert is_public_address(ipaddress.ip_address(address)) is is_public, address


@pytest.fixture(scope="module")
def open_server(inference_model, tmp_path_factory):
    """Server whose fetcher accepts local addresses."""
    hosts = ["localhost", "127.0.0.1", "::1", "[::1]", "169.254.169.254", "2130706433"]
    there = ImageFetcher(hosts, ServerLimits(max_image_bytes=100_000))
    with run_server(inference_model, tmp_path_factory.mktemp("open"), fetcher=there) as server:
        yield server


@each("location", [*CASES["local_urls"].split(), "", "data:image/png;base64," + "A" * 40])
def test_local_urls_are_rejected(open_server, public_and_local_servers, location):
    url = location.format(port=public_and_local_servers[0].server_address[1])
    status, error = post_chat(open_server, make_image_part(url), "What?")
    assert (status, error["param"]) == (400, "messages.0.content.0")
    # Errors do not contain folders of the server.
    assert str(open_server.folder) not in error["message"]
    assert not public_and_local_servers[0].requests
    assert not public_and_local_servers[1].requests
    assert list((open_server.folder / "requests").iterdir()) == []


def test_question_about_web_image(inference_model, public_and_local_servers, url, tmp_path):
    outside, inside = public_and_local_servers
    with run_server(inference_model, tmp_path, fetcher=fetcher(FakeResolver([OUTSIDE]))) as server:
        urls = f"{url}/a.png", make_data_url(IMAGE_BYTES)
        found = [post_chat(server, make_image_part(at), "What?") for at in urls]
    assert [status for status, _ in found] == [200, 200]
    first, second = (output["choices"][0]["message"]["content"] for _, output in found)
    assert first == second
    assert len(outside.requests) == 1
    assert not inside.requests


def test_image_files_are_deleted_after_request(server):
    urls = [make_data_url(data) for data in (IMAGE_BYTES, make_noise_png(seed=1))]
    assert post_chat(server, *map(make_image_part, urls), "Which?")[0] == 200
    assert list((server.folder / "requests").iterdir()) == []
    for folder in ("requests", "files"):
        assert (server.folder / folder).stat().st_mode & 0o777 == 0o700


def test_invalid_image_references(server):
    for file_id in ("../../../etc/passwd", "/etc/passwd", "file-0", ""):
        part = {"type": "file", "file": {"file_id": file_id}}
        assert post_chat(server, part, "What?")[0] == 404
    image = make_image_part(make_data_url(IMAGE_BYTES))
    messages = [{"role": "system", "content": [image]}, *make_messages("What?")]
    assert post_chat(server, messages=messages)[0] == 400
