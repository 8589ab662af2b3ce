"""Web downloads: allowed hosts, HTTPS, size limit."""

import hashlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from case_files import load_cases
from container_fixtures import write_tar_shards
from fake_hub_servers import FakeHubServer
from fsspec.implementations.memory import MemoryFileSystem
from tiny_task import TinyTask

from finesight.errors import UserError
from finesight.files.storage import verify_folder
from finesight.hub import url_files
from finesight.hub.url_files import fetch_objects, fetch_url
from finesight.samples.corpus import load_corpus
from finesight.settings.config import TrainFileSettings

CASES = load_cases("url_files")

DATA = bytes(range(256)) * 2000
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(web_server: FakeHubServer) -> FakeHubServer:
    web_server.repositories["files"] = {"data.bin": DATA}
    return web_server


def address(server: FakeHubServer, path: str = "data.bin", host: str = "localhost") -> str:
    return f"https://{host}:{server.server_address[1]}/{path}"


def test_changed_file_is_downloaded_again(server, tmp_path, monkeypatch):
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
def test_requests_that_are_never_sent(tmp_path, monkeypatch, without_sockets, source, message):
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
        assert "--allow-host" in str(raised.value.remedy)
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
def test_rejected_files(server, tmp_path, monkeypatch, path, message):
    if path == "data.bin":
        monkeypatch.setattr(url_files, "MAX_FILE_BYTES", 100_000)
    with pytest.raises(UserError, match=message):
        fetch_url(address(server, path), ["localhost"], tmp_path)


ADDRESS = "memory://b/1.tar"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(url_files, "get_objects_folder", lambda: tmp_path / "objects")
    return tmp_path / "objects"


@pytest.fixture
def bucket() -> Iterator[MemoryFileSystem]:
    file_system = MemoryFileSystem()
    file_system.pipe("/b/1.tar", b"one")
    yield file_system
    file_system.store.clear()
    file_system.pseudo_dirs[:] = [""]


def test_object_is_fetched_once_until_it_changes(bucket, monkeypatch):
    requested: list[str] = []
    get_file = MemoryFileSystem.get_file

    def count_download(file_system: MemoryFileSystem, name: str, *arguments: Any) -> None:
        requested.append(name)
        get_file(file_system, name, *arguments)

    monkeypatch.setattr(MemoryFileSystem, "get_file", count_download)
    with ThreadPoolExecutor(4) as pool:
        ((first,),) = set(map(tuple, pool.map(fetch_objects, [ADDRESS] * 4)))
    assert fetch_objects(ADDRESS) == [first]
    assert requested == ["/b/1.tar"]
    assert first.name == "1.tar"
    verify_folder(first.parent)
    bucket.pipe("/b/1.tar", b"other")
    (second,) = fetch_objects(ADDRESS)
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"other")


def test_glob_pattern_is_sorted_by_name(bucket: MemoryFileSystem) -> None:
    for name in ("2.tar", "10.tar", "1.tar", "other.txt"):
        bucket.pipe(f"/b/x/{name}", name.encode())
    names = [file.name for file in fetch_objects("memory://b/x/*.tar")]
    assert names == ["1.tar", "10.tar", "2.tar"]


FAULTS = {
    "short": "file changed",
    "changed": "file changed",
    "broken": r"line is down[\s\S]*connection",
    "forbidden": r"PermissionError[\s\S]*check the credentials",
    "no credentials": r"NoCredentialsError[\s\S]*credentials",
}


class NoCredentialsError(Exception):
    """Error of the package of S3."""


@pytest.mark.parametrize("fault", FAULTS)
def test_partial_download_is_never_used(bucket, cache_folder, monkeypatch, fault):
    errors = {
        "broken": ConnectionResetError("line is down"),
        "forbidden": PermissionError("Access Denied"),
        "no credentials": NoCredentialsError("Unable to locate credentials"),
    }

    def get_faulty_file(file_system, name, target, *arguments):
        Path(target).write_bytes(b"on" if fault == "short" else b"one")
        if fault in errors:
            raise errors[fault]
        if fault == "changed":
            file_system.pipe(name, b"two")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", get_faulty_file)
        with pytest.raises(UserError, match=FAULTS[fault]):
            fetch_objects(ADDRESS)
    assert [path.suffix for path in cache_folder.iterdir()] == [".lock"]
    (file,) = fetch_objects(ADDRESS)
    assert file.read_bytes() == (b"two" if fault == "changed" else b"one")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://b/none.tar", r"FileNotFoundError[\s\S]*check the address"),
        ("memory://b/none/*.tar", r"memory://b/none/\*\.tar: no file matches"),
        ("https://host/1.tar", r"an address of the web[\s\S]*--allow-host"),
        ("nothing://b/1.tar", "no package for nothing"),
    ],
)
def test_missing_objects_are_reported(bucket: MemoryFileSystem, address: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fetch_objects(address)


def test_missing_packages_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_import_error(address: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", raise_import_error)
    with pytest.raises(UserError, match=r"no package for s3: Install s3fs"):
        fetch_objects("s3://b/1.tar")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match=r"finesight\[objects\]"):
        fetch_objects(ADDRESS)


def test_shards_of_object_storage_are_loaded(tmp_path: Path, bucket: MemoryFileSystem) -> None:
    def list_ids(path: str) -> list[str]:
        found = load_corpus((TrainFileSettings(path=path),)).read_samples()
        return [located.sample.id for located in found]

    with pytest.raises(UserError, match=r"neither \.tar nor \.parquet"):
        list_ids("memory://b/train.jsonl")
    table = TinyTask(tmp_path).folder / "train.jsonl"
    write_tar_shards(table, tmp_path / "shards", each=4)
    for shard in (tmp_path / "shards").iterdir():
        bucket.pipe(f"/bucket/{shard.name}", shard.read_bytes())
    assert list_ids("memory://bucket/*.tar") == list_ids(str(table))
