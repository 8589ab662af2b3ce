"""Pictures from the web: who is asked, at which address, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import ipaddress
import json
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hubs import certificate
from serving import asked, data_url, image, png, question, running, send

from finesight.errors import UserError
from finesight.remote.web import public_address
from finesight.serve.fetch import Fetcher

__all__ = ["certificate"]

OUTSIDE, INSIDE = "127.0.0.2", "127.0.0.1"
"""Addresses that stand for the public network, and for what must not be reached."""

PICTURE = png()


class Web(ThreadingHTTPServer):
    """A server over TLS at an address; `asked` are the paths and hosts that it was asked for."""

    daemon_threads = True

    def __init__(self, address: str, port: int, made: Path, key: Path) -> None:
        super().__init__((address, port), Answers)
        self.asked: list[tuple[str, str]] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(made, key)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing on the screen: clients go away."""


class Answers(BaseHTTPRequestHandler):
    """/a.png, /to/URL, /large, /endless, /slow, /text."""

    server: Web

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on the screen."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"]))
        name = self.path.split("/")[1]
        if name == "to":
            self._send(302, b"", {"Location": self.path.removeprefix("/to/")})
        elif name == "text":
            self._send(200, b"<html>", {"Content-Type": "text/html"})
        elif name == "missing":
            self._send(404, b"", {"Content-Type": "image/png"})
        elif name == "large":
            self._send(200, b"x", {"Content-Type": "image/png", "Content-Length": "999999"})
        elif name in ("endless", "slow"):
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(1000) if name == "endless" else b"x")
                    time.sleep(0 if name == "endless" else 0.05)
        else:
            self._send(200, PICTURE, {"Content-Type": "image/png"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for header in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def webs(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Web, Web]]:
    """The same name leads to two servers at one port: one outside, one that must not be asked."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    outside, inside = _at_one_port(certificate)
    yield outside, inside
    for web in (outside, inside):
        web.shutdown()
        web.server_close()


def _at_one_port(certificate: tuple[Path, Path]) -> tuple[Web, Web]:
    """Two servers at a port that is free at both addresses: others take ports meanwhile."""
    while True:
        outside = Web(OUTSIDE, 0, *certificate)
        try:
            return outside, Web(INSIDE, outside.server_address[1], *certificate)
        except OSError as error:
            outside.shutdown()
            outside.server_close()
            if error.errno != errno.EADDRINUSE:
                raise


class Names:
    """A resolver: each look-up takes the next answer, the last one stays."""

    def __init__(self, *answers: list[str]) -> None:
        self._answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def fetcher(names: Names, **given: float) -> Fetcher:
    limits = {"seconds": 5.0, "most": 100_000, **given}
    return Fetcher(
        ["localhost"],
        seconds=limits["seconds"],
        most=int(limits["most"]),
        resolve=names,
        fits=lambda address: str(address) == OUTSIDE,
    )


def taken(fetcher: Fetcher, url: str) -> bytes:
    file = io.BytesIO()
    asyncio.run(fetcher.take(url, file))
    return file.getvalue()


def test_a_picture_of_an_allowed_host(webs):
    outside, inside = webs
    port = outside.server_address[1]
    names = Names([OUTSIDE])
    assert taken(fetcher(names), f"https://localhost:{port}/a.png?sign=1") == PICTURE
    # The name is asked for, though the address is connected to.
    assert outside.asked == [("/a.png?sign=1", f"localhost:{port}")]
    assert names.asked == ["localhost"]
    assert taken(fetcher(names), f"https://LOCALHOST:{port}/to//a.png") == PICTURE
    assert not inside.asked


def test_a_name_that_changes_its_mind(webs):
    outside, inside = webs
    port = outside.server_address[1]
    names = Names([OUTSIDE], [INSIDE])
    # Whatever it would mean a moment later: the address that was checked is connected to.
    assert taken(fetcher(names), f"https://localhost:{port}/a.png") == PICTURE
    assert names.asked == ["localhost"]
    names = Names([OUTSIDE], [INSIDE])
    with pytest.raises(UserError, match="inside of a network"):
        taken(fetcher(names), f"https://localhost:{port}/to/https://localhost:{port}/a.png")
    for found in ([OUTSIDE, INSIDE], [INSIDE, OUTSIDE], [INSIDE], []):
        with pytest.raises(UserError, match="inside of a network"):
            taken(fetcher(Names(found)), f"https://localhost:{port}/a.png")
    assert not inside.asked


@pytest.mark.parametrize(
    "place",
    [
        "http://localhost/a.png",
        "https://127.0.0.1:{port}/a.png",
        "https://[::1]:{port}/a.png",
        "https://169.254.169.254/latest/meta-data",
        "https://evil.example/a.png",
        "https://localhost.evil.example/a.png",
        "https://user@localhost:{port}/a.png",
        "file:///etc/passwd",
        "ftp://localhost/a.png",
        "https://localhost:0/",
        "https://localhost:99999/",
        "https://[::1",
        "//evil.example/a.png",
    ],
)
def test_places_that_are_not_asked(webs, place):
    outside, inside = webs
    port = outside.server_address[1]
    place = place.format(port=port)
    with pytest.raises(UserError, match="is refused"):
        taken(fetcher(Names([OUTSIDE])), place)
    with pytest.raises(UserError, match="is refused"):
        taken(fetcher(Names([OUTSIDE])), f"https://localhost:{port}/to/{place}")
    assert [path for path, _ in outside.asked] == [f"/to/{place}"]
    assert not inside.asked


def test_redirects_without_end(webs):
    port = webs[0].server_address[1]
    place = f"https://localhost:{port}/"
    with pytest.raises(UserError, match="redirects"):
        taken(fetcher(Names([OUTSIDE])), place + f"to/{place}" * 9)
    assert len(webs[0].asked) == 6


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("large", "999999 bytes"),
        ("endless", "100000 are taken"),
        ("slow", "not there within 0.3 seconds"),
        ("text", "content type 'text/html'"),
        ("missing", "status 404"),
    ],
)
def test_answers_that_are_not_taken(webs, path, said):
    port = webs[0].server_address[1]
    patience = 0.3 if path == "slow" else 5.0
    with pytest.raises(UserError, match=said):
        taken(fetcher(Names([OUTSIDE]), seconds=patience), f"https://localhost:{port}/{path}")


def test_a_certificate_of_another(webs):
    port = webs[0].server_address[1]
    other = Fetcher(
        ["other.example"],
        seconds=5,
        most=1000,
        resolve=Names([OUTSIDE]),
        fits=lambda address: True,
    )
    with pytest.raises(UserError, match="could not be had"):
        taken(other, f"https://other.example:{port}/a.png")
    assert not webs[0].asked


def test_offline_nothing_is_asked(webs, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    port = webs[0].server_address[1]
    with pytest.raises(UserError, match="are not fetched"):
        taken(fetcher(Names([OUTSIDE])), f"https://localhost:{port}/a.png")
    assert not webs[0].asked


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("::127.0.0.1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.215.14", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:7f00:1::", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("fc00::1", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
        # Special-purpose networks that Python 3.11 takes for public ones.
        ("192.0.0.8", False),
        ("192.0.0.9", False),
        ("192.0.0.170", False),
        ("192.31.196.1", False),
        ("192.52.193.1", False),
        ("192.88.99.1", False),
        ("192.175.48.1", False),
        ("64:ff9b:1::a00:1", False),
        ("100::1", False),
        ("100:0:0:1::1", False),
        ("2001:1::1", False),
        ("2001:4:112::1", False),
        ("2001:20::1", False),
        ("2001:30::1", False),
        ("2001:db8::1", False),
        ("2620:4f:8000::1", False),
        ("3fff::1", False),
        ("3fff:fff:ffff::1", False),
        ("5f00::1", False),
        # Not allocated: nobody's.
        ("4000::1", False),
        ("8000::1", False),
        # Right beside them.
        ("192.0.1.1", True),
        ("192.88.98.255", True),
        ("192.88.100.0", True),
        ("198.17.255.255", True),
        ("2001:200::1", True),
        ("2003::1", True),
        ("3ffe:ffff::1", True),
        ("2620:4f:8001::1", True),
    ],
)
def test_addresses_of_the_public_network(address, expected):
    assert public_address(ipaddress.ip_address(address)) is expected


@pytest.fixture(scope="module")
def open_server(answerer, tmp_path_factory):
    """A server that may ask this machine's names, were they of the public network."""
    hosts = ["localhost", "127.0.0.1", "::1", "[::1]", "169.254.169.254", "2130706433"]
    there = Fetcher(hosts, seconds=5, most=100_000)
    with running(answerer, tmp_path_factory.mktemp("open"), fetcher=there) as server:
        yield server


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "FILE:///etc/passwd",
        "/etc/passwd",
        "../../../etc/passwd",
        "picture-1",
        "http://127.0.0.1:{port}/a.png",
        "https://127.0.0.1:{port}/a.png",
        "https://localhost:{port}/a.png",
        "https://[::1]:{port}/a.png",
        "https://[::ffff:127.0.0.1]:{port}/a.png",
        "https://2130706433:{port}/a.png",
        "https://169.254.169.254/latest/meta-data",
        "https://10.0.0.1/a.png",
        "gopher://127.0.0.1:{port}/",
        "data:text/plain,hello",
        "data:image/png,hello",
        "data:image/png;base64,#",
        "data:image/png;base64," + "A" * 40,
        "",
    ],
)
def test_a_server_opens_nothing_else(open_server, webs, url):
    url = url.format(port=webs[0].server_address[1])
    body = question(open_server, image(url), "What?")
    status, said, _ = send(open_server, "POST", "/v1/chat/completions", body)
    assert status == 400, said
    assert said["error"]["param"] == "messages.0.content.0"
    # Where the server keeps what it was sent is nobody's business.
    assert str(open_server.folder) not in said["error"]["message"]
    assert not webs[0].asked
    assert not webs[1].asked
    assert list((open_server.folder / "requests").iterdir()) == []


def test_a_question_about_a_picture_on_the_web(answerer, webs, tmp_path):
    outside, inside = webs
    url = f"https://localhost:{outside.server_address[1]}/a.png"
    with running(answerer, tmp_path, fetcher=fetcher(Names([OUTSIDE]))) as server:
        found = [
            send(server, "POST", "/v1/chat/completions", question(server, image(at), "What?"))
            for at in (url, data_url(PICTURE))
        ]
    assert [status for status, _, _ in found] == [200, 200]
    contents = [said["choices"][0]["message"]["content"] for _, said, _ in found]
    assert contents[0] == contents[1]
    assert len(outside.asked) == 1
    assert not inside.asked


def test_pictures_are_kept_as_long_as_their_request(server):
    body = question(server, image(data_url(PICTURE)), image(data_url(png(seed=1))), "Which?")
    status, _, _ = send(server, "POST", "/v1/chat/completions", body)
    assert status == 200
    assert list((server.folder / "requests").iterdir()) == []
    for folder in ("requests", "files"):
        assert (server.folder / folder).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("file_id", ["../../../etc/passwd", "/etc/passwd", "file-0", ""])
def test_file_ids_are_no_paths(server, file_id):
    part = {"type": "file", "file": {"file_id": file_id}}
    body = question(server, part, "What?")
    assert send(server, "POST", "/v1/chat/completions", body)[0] == 404


def test_pictures_stand_in_turns_of_the_user_alone(server):
    messages = [{"role": "system", "content": [image(data_url(PICTURE))]}, *asked("What?")]
    given = json.dumps({"model": server.service.names[0], "messages": messages})
    assert send(server, "POST", "/v1/chat/completions", given)[0] == 400
