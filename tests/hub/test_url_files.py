"""Web downloads: allowed hosts, HTTPS, size limit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from case_files import load_cases
from fake_hub_servers import FakeHubServer

from finesight.errors import UserError
from finesight.hub import url_files
from finesight.hub.url_files import fetch_url

CASES = load_cases("url_files")

DATA = bytes(range(256)) * 2000
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(web_server: FakeHubServer) -> FakeHubServer:
    web_server.repositories["files"] = {"data.bin": DATA}
    return web_server


def address(server: FakeHubServer, path: str = "data.bin", host: str = "localhost") -> str:
    return f"https://{host}:{server.server_address[1]}/{path}"


def test_changed_file_is_downloaded_again(
    server: FakeHubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for expected in (DATA, DATA, DATA[::-1]):
        server.repositories["files"]["data.bin"] = expected
        file = fetch_url(address(server), ["LOCALHOST"], tmp_path)
        assert (file.name, file.read_bytes()) == ("data.bin", expected)
    etags = [request.headers.get("If-None-Match") for request in server.requests]
    assert [etag is None for etag in etags] == [True, False, False]
    file.with_name(f".{file.name}.etag").write_text("")
    server.repositories["files"]["data.bin"] = DATA
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_url(address(server), ["localhost"], tmp_path).read_bytes() == DATA[::-1]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert fetch_url(address(server), ["localhost"], tmp_path).read_bytes() == DATA


@pytest.mark.parametrize(("source", "message"), CASES["test_requests_that_are_never_sent"])
def test_requests_that_are_never_sent(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    without_sockets: None,
    source: str,
    message: str,
) -> None:
    if source.endswith("offline"):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        fetch_url(source, ["localhost"], tmp_path)


def test_redirects(server: FakeHubServer, tmp_path: Path) -> None:
    other_url = address(server, host="127.0.0.1")
    targets = ("file:///etc/passwd", "http://169.254.169.254/a", "http://localhost/a")
    for target in (other_url, *targets):
        with pytest.raises(UserError, match="not an allowed address, the redirect") as raised:
            fetch_url(address(server, f"to/{target}"), ["localhost"], tmp_path)
        assert "--allow-host" in raised.value.remedy
        assert target in raised.value.what
    hosts = ["localhost", "127.0.0.1"]
    assert fetch_url(address(server, f"to/{other_url}"), hosts, tmp_path).read_bytes() == DATA
    with pytest.raises(UserError, match="more than 10 redirects"):
        fetch_url(address(server, "to/?"), ["localhost"], tmp_path)


def test_interrupted_download_is_resumed(server: FakeHubServer, tmp_path: Path) -> None:
    server.faults.cuts["data.bin"] = [100_000]
    assert fetch_url(address(server), ["localhost"], tmp_path / "a").read_bytes() == DATA
    assert [request.range for request in server.requests] == [None, "bytes=100000-"]

    server.faults.cuts["data.bin"] = [100_000, 0, 0, 0, 0]
    with pytest.raises(UserError, match="received 100000 bytes, then"):
        fetch_url(address(server), ["localhost"], tmp_path / "b")
    changed = DATA[::-1]
    server.repositories["files"]["data.bin"] = changed
    assert fetch_url(address(server), ["localhost"], tmp_path / "b").read_bytes() == changed


def test_verified_file_is_not_requested_again(server: FakeHubServer, tmp_path: Path) -> None:
    source = f"{address(server)}#sha256={DIGEST}"
    for _ in range(2):
        assert fetch_url(source, ["localhost"], tmp_path).read_bytes() == DATA
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"data.bin#sha256={'0' * 64}", f"its SHA-256 is {DIGEST}, expected {'0' * 64}"),
        ("data.bin#md5=1", "after the #"),
        ("none.zip", "rejects the request with status 404"),
        ("data.bin", r"at least 512000 bytes[\s\S]*at most 100000 bytes"),
    ],
)
def test_rejected_files(
    server: FakeHubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    if path == "data.bin":
        monkeypatch.setattr(url_files, "MAX_FILE_BYTES", 100_000)
    with pytest.raises(UserError, match=message):
        fetch_url(address(server, path), ["localhost"], tmp_path)
