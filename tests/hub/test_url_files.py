"""Web downloads: allowed hosts, HTTPS, size limit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from fake_hub_servers import FakeHubServer

from finesight.errors import UserError
from finesight.hub import url_files
from finesight.hub.url_files import fetch_url

DATA = bytes(range(256)) * 2000


@pytest.fixture
def server(web_server: FakeHubServer) -> FakeHubServer:
    web_server.repositories["files"] = {"data.bin": DATA}
    return web_server


def address(server: FakeHubServer, path: str = "data.bin", host: str = "localhost") -> str:
    return f"https://{host}:{server.server_address[1]}/{path}"


def test_file_from_allowed_host(server: FakeHubServer, tmp_path: Path) -> None:
    file = fetch_url(address(server), ["localhost"], tmp_path)
    assert (file.name, file.read_bytes()) == ("data.bin", DATA)


def test_changed_file_is_downloaded_again(
    server: FakeHubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for expected in (DATA, DATA, DATA[::-1]):
        server.repositories["files"]["data.bin"] = expected
        file = fetch_url(address(server), ["LOCALHOST"], tmp_path)
        assert file.read_bytes() == expected
    etags = [request.headers.get("If-None-Match") for request in server.requests]
    assert [etag is None for etag in etags] == [True, False, False]
    file.with_name(f".{file.name}.etag").write_text("")
    server.repositories["files"]["data.bin"] = DATA
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_url(address(server), ["localhost"], tmp_path).read_bytes() == DATA[::-1]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert fetch_url(address(server), ["localhost"], tmp_path).read_bytes() == DATA


def test_other_hosts_are_rejected_without_request(tmp_path: Path, without_sockets: None) -> None:
    with pytest.raises(UserError, match=r"downloads from example\.com are not allowed") as raised:
        fetch_url("https://example.com/a.zip", ["example.org"], tmp_path)
    assert "--allow-host example.com" in raised.value.remedy


@pytest.mark.parametrize(
    "source",
    ["http://localhost/a", "ftp://localhost/a", "file:///etc/passwd", "https:///a", "https://["],
)
def test_other_protocols_are_rejected_without_request(
    tmp_path: Path, without_sockets: None, source: str
) -> None:
    with pytest.raises(UserError, match="is not a supported URL"):
        fetch_url(source, ["localhost"], tmp_path)


def test_redirects(server: FakeHubServer, tmp_path: Path) -> None:
    other_url = address(server, host="127.0.0.1")
    for target in (
        other_url,
        "file:///etc/passwd",
        "http://169.254.169.254/a",
        "http://localhost/a",
    ):
        with pytest.raises(
            UserError, match="is not an allowed address, the redirect target of localhost:"
        ) as raised:
            fetch_url(address(server, f"to/{target}"), ["localhost"], tmp_path)
        assert "--allow-host" in raised.value.remedy
        assert target in raised.value.what
    hosts = ["localhost", "127.0.0.1"]
    assert fetch_url(address(server, f"to/{other_url}"), hosts, tmp_path).read_bytes() == DATA
    with pytest.raises(UserError, match="more than 10 redirects"):
        fetch_url(address(server, "to/?"), ["localhost"], tmp_path)


def test_interrupted_download_is_resumed(server: FakeHubServer, tmp_path: Path) -> None:
    server.faults.cuts["data.bin"] = [100_000]
    assert fetch_url(address(server), ["localhost"], tmp_path).read_bytes() == DATA
    assert [request.range for request in server.requests] == [None, "bytes=100000-"]


def test_file_changed_during_download_is_rejected(server: FakeHubServer, tmp_path: Path) -> None:
    server.faults.cuts["data.bin"] = [100_000, 0, 0, 0, 0]
    with pytest.raises(UserError, match="received 100000 bytes, then"):
        fetch_url(address(server), ["localhost"], tmp_path)
    server.repositories["files"]["data.bin"] = DATA[::-1]
    assert fetch_url(address(server), ["localhost"], tmp_path).read_bytes() == DATA[::-1]


def test_sha256_fragment_is_verified(server: FakeHubServer, tmp_path: Path) -> None:
    digest = hashlib.sha256(DATA).hexdigest()
    source = f"{address(server)}#sha256={digest}"
    for _ in range(2):
        assert fetch_url(source, ["localhost"], tmp_path).read_bytes() == DATA
    assert len(server.requests) == 1, "a verified file was requested again"
    wrong_source = f"{address(server)}#sha256={'0' * 64}"
    with pytest.raises(UserError, match=f"its SHA-256 is {digest}, expected {'0' * 64}"):
        fetch_url(wrong_source, ["localhost"], tmp_path)
    with pytest.raises(UserError, match="after the #"):
        fetch_url(f"{address(server)}#md5=1", ["localhost"], tmp_path)


def test_size_limit(server: FakeHubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_files, "MAX_FILE_BYTES", 100_000)
    with pytest.raises(UserError, match="at least 512000 bytes") as raised:
        fetch_url(address(server), ["localhost"], tmp_path)
    assert "at most 100000 bytes" in raised.value.expected


def test_http_error_is_reported(server: FakeHubServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rejects the request with status 404"):
        fetch_url(address(server, "none.zip"), ["localhost"], tmp_path)


def test_offline_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_sockets: None
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        fetch_url("https://localhost/a.zip", ["localhost"], tmp_path)
