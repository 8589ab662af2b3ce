"""Downloads from object storage, with the in-memory file system of fsspec."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from container_fixtures import write_tar_shards
from fsspec.implementations.memory import MemoryFileSystem
from tiny_task import TinyTask, read_losses

from finesight.config import TrainFileSettings
from finesight.data.corpus import load_corpus
from finesight.errors import UserError
from finesight.hub import url_files
from finesight.hub.url_files import fetch_objects
from finesight.storage import verify_folder

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


def test_object_is_fetched_once_until_it_changes(
    bucket: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_partial_download_is_never_used(
    bucket: MemoryFileSystem, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    errors = {
        "broken": ConnectionResetError("line is down"),
        "forbidden": PermissionError("Access Denied"),
        "no credentials": NoCredentialsError("Unable to locate credentials"),
    }

    def get_faulty_file(
        file_system: MemoryFileSystem, name: str, target: str, *arguments: Any
    ) -> None:
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


def test_run_trains_from_object_storage(tmp_path: Path, bucket: MemoryFileSystem) -> None:
    with pytest.raises(UserError, match=r"neither \.tar nor \.parquet"):
        load_corpus((TrainFileSettings(path="memory://b/train.jsonl"),))
    task = TinyTask(tmp_path)
    write_tar_shards(tmp_path / "train.jsonl", tmp_path / "shards", each=4)
    for shard in (tmp_path / "shards").iterdir():
        bucket.pipe(f"/bucket/{shard.name}", shard.read_bytes())
    task.run(name="plain")
    task.run(name="stored", data=task.recipe["data"] | {"train": "memory://bucket/*.tar"})
    assert read_losses(tmp_path / "stored") == read_losses(tmp_path / "plain")
    assert "memory://bucket/*.tar" in (tmp_path / "stored" / "recipe.yaml").read_text()
