"""Addresses on the web: asked only when allowed, over HTTPS, up to a size."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hub_servers import Serving

from finesight.errors import UserError
from finesight.remote import https
from finesight.remote.https import fetch_address

DATA = bytes(range(256)) * 2000


@pytest.fixture
def server(web_server: Serving) -> Serving:
    web_server.repositories["files"] = {"data.bin": DATA}
    return web_server


def address(server: Serving, path: str = "data.bin", host: str = "localhost") -> str:
    return f"https://{host}:{server.server_address[1]}/{path}"


def test_a_file_of_an_allowed_host(server: Serving, tmp_path: Path) -> None:
    file = fetch_address(address(server), ["localhost"], tmp_path)
    assert (file.name, file.read_bytes()) == ("data.bin", DATA)


def test_a_file_that_is_there_comes_again_when_it_changed(
    server: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for expected in (DATA, DATA, DATA[::-1]):
        server.repositories["files"]["data.bin"] = expected
        file = fetch_address(address(server), ["LOCALHOST"], tmp_path)
        assert file.read_bytes() == expected
    marks = [asked.headers.get("If-None-Match") for asked in server.asked]
    assert [mark is None for mark in marks] == [True, False, False, True]
    file.with_name(f".{file.name}.etag").write_text("")
    server.repositories["files"]["data.bin"] = DATA
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_address(address(server), ["localhost"], tmp_path).read_bytes() == DATA[::-1]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert fetch_address(address(server), ["localhost"], tmp_path).read_bytes() == DATA


def test_other_hosts_are_refused_unasked(tmp_path: Path, without_sockets: None) -> None:
    with pytest.raises(UserError, match=r"nothing is fetched from example\.com") as raised:
        fetch_address("https://example.com/a.zip", ["example.org"], tmp_path)
    assert "--allow-host example.com" in raised.value.remedy


@pytest.mark.parametrize(
    "source",
    ["http://localhost/a", "ftp://localhost/a", "file:///etc/passwd", "https:///a", "https://["],
)
def test_other_protocols_are_refused_unasked(
    tmp_path: Path, without_sockets: None, source: str
) -> None:
    with pytest.raises(UserError, match="is no address that is fetched"):
        fetch_address(source, ["localhost"], tmp_path)


def test_redirects(server: Serving, tmp_path: Path) -> None:
    elsewhere = address(server, host="127.0.0.1")
    for target in (
        elsewhere,
        "file:///etc/passwd",
        "http://169.254.169.254/a",
        "http://localhost/a",
    ):
        with pytest.raises(UserError, match="is not asked, to which localhost:") as raised:
            fetch_address(address(server, f"to/{target}"), ["localhost"], tmp_path)
        assert "--allow-host" in raised.value.remedy
        assert target in raised.value.what
    both = ["localhost", "127.0.0.1"]
    assert fetch_address(address(server, f"to/{elsewhere}"), both, tmp_path).read_bytes() == DATA
    with pytest.raises(UserError, match="more than 10 redirects"):
        fetch_address(address(server, "to/?"), ["localhost"], tmp_path)


def test_a_cut_connection_is_continued(server: Serving, tmp_path: Path) -> None:
    server.faults.cuts["data.bin"] = [100_000]
    assert fetch_address(address(server), ["localhost"], tmp_path).read_bytes() == DATA
    assert [asked.range for asked in server.asked] == [None, "bytes=100000-"]


def test_a_file_that_changed_meanwhile_is_not_joined(server: Serving, tmp_path: Path) -> None:
    server.faults.cuts["data.bin"] = [100_000, 0, 0, 0, 0]
    with pytest.raises(UserError, match="100000 bytes were received, then"):
        fetch_address(address(server), ["localhost"], tmp_path)
    server.repositories["files"]["data.bin"] = DATA[::-1]
    assert fetch_address(address(server), ["localhost"], tmp_path).read_bytes() == DATA[::-1]


def test_a_digest(server: Serving, tmp_path: Path) -> None:
    right = hashlib.sha256(DATA).hexdigest()
    source = f"{address(server)}#sha256={right}"
    for _ in range(2):
        assert fetch_address(source, ["localhost"], tmp_path).read_bytes() == DATA
    assert len(server.asked) == 1, "a file that is there and verified was asked for again"
    wrong = f"{address(server)}#sha256={'0' * 64}"
    with pytest.raises(UserError, match=f"its SHA-256 is {right}, not {'0' * 64}"):
        fetch_address(wrong, ["localhost"], tmp_path)
    with pytest.raises(UserError, match="after the #"):
        fetch_address(f"{address(server)}#md5=1", ["localhost"], tmp_path)


def test_sizes(server: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(https, "LARGEST", 100_000)
    with pytest.raises(UserError, match="512000 bytes or more") as raised:
        fetch_address(address(server), ["localhost"], tmp_path)
    assert "at most 100000 bytes" in raised.value.expected


def test_a_refusal(server: Serving, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="refuses with status 404"):
        fetch_address(address(server, "none.zip"), ["localhost"], tmp_path)


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_sockets: None) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        fetch_address("https://localhost/a.zip", ["localhost"], tmp_path)
