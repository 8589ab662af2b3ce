"""Tests of image fetching: allowed hosts, addresses, and limits."""

import asyncio
import contextlib
import io
import ipaddress
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server_fixtures import (
    make_data_url,
    make_image_part,
    make_messages,
    make_noise_png,
    make_video_part,
    post_chat,
    run_server,
)
from case_files import load_cases
from fake_hub_servers import FakeHubServer, HubHandler, run_in_thread
from hub_fixtures import certificate

from finesight.errors import UserError
from finesight.hub.download import is_public_address
from finesight.serve.api_schema import ServerLimits
from finesight.serve.media_sources import MediaFetcher

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


class ImageHandler(HubHandler):
    """Handler of /a.png, /to/URL, /large, /endless, /slow, /text."""

    protocol_version = "HTTP/1.0"

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        name = path.split("/")[1]
        if name == "to":
            self.send(302, b"", {"Location": self.path.removeprefix("/to/")})
        elif name in ("endless", "slow"):
            self.send_head(200, {"Content-Type": "image/png"})
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(1000) if name == "endless" else b"x")
                    time.sleep(0 if name == "endless" else 0.05)
        else:
            self.send(*FIXED_ANSWERS.get(name, (200, IMAGE_BYTES, {"Content-Type": "image/png"})))


@pytest.fixture
def public_and_local_servers(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[FakeHubServer, FakeHubServer]]:
    """Two servers at the same port: a public one, and a local one that must not be contacted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with contextlib.ExitStack() as stack:

        def start(address: str, port: int) -> FakeHubServer:
            server = FakeHubServer(ImageHandler, None, (address, port), certificate)
            return stack.enter_context(run_in_thread(server))

        inside = None
        while inside is None:
            # The port must be free at both addresses.
            outside = start(OUTSIDE, 0)
            with contextlib.suppress(OSError):
                inside = start(INSIDE, outside.server_port)
        yield outside, inside


@pytest.fixture
def url(public_and_local_servers: tuple[FakeHubServer, FakeHubServer]) -> str:
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


def fetcher(names: FakeResolver, timeout_s: float = 60.0) -> MediaFetcher:
    return MediaFetcher(
        ["localhost"],
        ServerLimits(fetch_timeout_s=timeout_s, max_image_bytes=100_000),
        resolve=names,
        is_allowed_address=lambda address: str(address) == OUTSIDE,
    )


def fetch_bytes(fetcher: MediaFetcher, url: str) -> bytes:
    file = io.BytesIO()
    asyncio.run(fetcher.fetch(url, file))
    return file.getvalue()


def test_image_from_allowed_host(public_and_local_servers, url):
    outside, inside = public_and_local_servers
    names = FakeResolver([OUTSIDE])
    assert fetch_bytes(fetcher(names), f"{url}/a.png?sign=1") == IMAGE_BYTES
    # The Host header is the name, the connection uses the address.
    (request,) = outside.requests
    assert request.path == "/a.png?sign=1"
    assert request.headers["Host"] == url.removeprefix("https://")
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


@pytest.mark.parametrize("location", CASES["forbidden_urls"].split())
def test_forbidden_urls(public_and_local_servers, url, location):
    outside, inside = public_and_local_servers
    outside.requests.clear()
    location = location.format(port=outside.server_address[1])
    for address in (location, f"{url}/to/{location}"):
        with pytest.raises(UserError, match="is not allowed"):
            fetch_bytes(fetcher(FakeResolver([OUTSIDE])), address)
    assert [request.path for request in outside.requests] == [f"/to/{location}"]
    assert not inside.requests


def test_redirect_loop(public_and_local_servers, url):
    with pytest.raises(UserError, match="redirects"):
        fetch_bytes(fetcher(FakeResolver([OUTSIDE])), f"{url}/" + f"to/{url}/" * 9)
    assert len(public_and_local_servers[0].requests) == 6


@pytest.mark.parametrize(("path", "output"), CASES["test_invalid_responses"])
def test_invalid_responses(url, path, output):
    patience = 0.3 if path == "slow" else 60.0
    with pytest.raises(UserError, match=output):
        fetch_bytes(fetcher(FakeResolver([OUTSIDE]), patience), f"{url}/{path}")


def test_no_request_with_a_wrong_certificate_or_offline(public_and_local_servers, url, monkeypatch):
    other = MediaFetcher(
        ["other.example"],
        ServerLimits(),
        resolve=FakeResolver([OUTSIDE]),
        is_allowed_address=lambda address: True,
    )
    with pytest.raises(UserError, match="could not be fetched"):
        fetch_bytes(other, f"{url.replace('localhost', 'other.example')}/a.png")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="URLs are disabled"):
        fetch_bytes(fetcher(FakeResolver([OUTSIDE])), f"{url}/a.png")
    assert not public_and_local_servers[0].requests


@pytest.mark.parametrize(
    ("kind", "is_public"), [("local_addresses", False), ("public_addresses", True)]
)
def test_public_address_detection(kind, is_public):
    for address in CASES[kind].split():
        assert is_public_address(ipaddress.ip_address(address)) is is_public, address


@pytest.fixture(scope="module")
def open_server(inference_model, tmp_path_factory):
    """Server whose fetcher accepts local addresses."""
    hosts = ["localhost", "127.0.0.1", "::1", "[::1]", "169.254.169.254", "2130706433"]
    there = MediaFetcher(hosts, ServerLimits(max_image_bytes=100_000))
    with run_server(inference_model, tmp_path_factory.mktemp("open"), fetcher=there) as server:
        yield server


@pytest.mark.parametrize(
    "location", [*CASES["local_urls"].split(), "", "data:image/png;base64," + "A" * 40]
)
def test_local_urls_are_rejected(open_server, public_and_local_servers, location):
    url = location.format(port=public_and_local_servers[0].server_address[1])
    for part, field in (
        (make_image_part(url), ""),
        ({"type": "video_url", "video_url": {"url": url}}, ""),
        ({"type": "video", "video": [url]}, ".video.0"),
    ):
        status, error = post_chat(open_server, part, "What?")
        assert (status, error["param"]) == (400, f"messages.0.content.0{field}")
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


def test_question_about_web_videos(inference_model, public_and_local_servers, url, tmp_path):
    clip = pytest.importorskip("video_fixtures").write_video(tmp_path / "a.webm", codec="libvpx")
    FIXED_ANSWERS["clip"] = (200, clip.read_bytes(), {"Content-Type": "video/webm"})
    frame = make_data_url(IMAGE_BYTES)
    parts = (
        (
            {"type": "video_url", "video_url": {"url": f"{url}/clip"}},
            make_video_part(clip.read_bytes()),
        ),
        (
            {"type": "video", "video": [f"{url}/a.png", frame]},
            {"type": "video", "video": [frame] * 2},
        ),
    )
    (tmp_path / "server").mkdir()
    options = {"fetcher": fetcher(FakeResolver([OUTSIDE]))}
    with run_server(inference_model, tmp_path / "server", **options) as server:
        for pair in parts:
            (status, first), (_, second) = (post_chat(server, part, "What?") for part in pair)
            assert (status, first["choices"]) == (200, second["choices"])
            assert first["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"]


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
