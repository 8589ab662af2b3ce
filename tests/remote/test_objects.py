"""Object storage, by the one that fsspec keeps in memory: fetched once, whole, or refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from packing import as_tars
from small_run import Task, losses

from finesight.config import DataFile
from finesight.data.sources import load_sources
from finesight.digests import verify_folder
from finesight.errors import UserError
from finesight.remote import objects
from finesight.remote.objects import fetched


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(objects, "objects_folder", lambda: tmp_path / "objects")
    return tmp_path / "objects"


@pytest.fixture
def bucket() -> Iterator[MemoryFileSystem]:
    system = MemoryFileSystem()
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def test_fetched_once_and_anew_when_it_has_changed(
    bucket: MemoryFileSystem, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe("/b/1.tar", b"one")
    (first,) = fetched("memory://b/1.tar")
    assert first.read_bytes() == b"one"
    assert first.name == "1.tar"
    verify_folder(first.parent)
    with monkeypatch.context() as patch:
        patch.setattr(bucket, "get_file", None)
        patch.setattr(MemoryFileSystem, "get_file", None)
        assert fetched("memory://b/1.tar") == [first]
    bucket.pipe("/b/1.tar", b"other")
    (second,) = fetched("memory://b/1.tar")
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"other")


def test_a_pattern_by_name(bucket: MemoryFileSystem) -> None:
    for name in ("2.tar", "10.tar", "1.tar", "other.txt"):
        bucket.pipe(f"/b/x/{name}", name.encode())
    assert [file.name for file in fetched("memory://b/x/*.tar")] == ["1.tar", "10.tar", "2.tar"]
    with pytest.raises(UserError, match=r"memory://b/\*\.tar: no file fits"):
        fetched("memory://b/*.tar")


def test_several_at_once_fetch_it_once(
    bucket: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe("/b/1.tar", b"one")
    asked: list[str] = []
    whole = MemoryFileSystem.get_file

    def counting(system: MemoryFileSystem, name: str, *more: Any) -> None:
        asked.append(name)
        whole(system, name, *more)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counting)
    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(fetched, ["memory://b/1.tar"] * 4))
    assert len({file for (file,) in files}) == 1
    assert asked == ["/b/1.tar"]


@pytest.mark.parametrize("how", ["short", "broken", "changed"])
def test_whole_or_not_at_all(
    bucket: MemoryFileSystem, kept: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    bucket.pipe("/b/1.tar", b"one")

    def spoilt(system: MemoryFileSystem, name: str, target: str, *more: Any) -> None:
        Path(target).write_bytes(b"on" if how == "short" else b"one")
        if how == "broken":
            raise ConnectionResetError("line is down")
        if how == "changed":
            system.pipe(name, b"two")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", spoilt)
        with pytest.raises(UserError, match="line is down" if how == "broken" else "changed on"):
            fetched("memory://b/1.tar")
    assert [path.suffix for path in kept.iterdir()] == [".lock"]
    (file,) = fetched("memory://b/1.tar")
    assert file.read_bytes() == (b"two" if how == "changed" else b"one")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("memory://b/none.tar", "cannot be fetched .FileNotFoundError"),
        ("https://host/1.tar", r"an address of the web[\s\S]*--allow-host"),
        ("nothing://b/1.tar", "no package for nothing"),
    ],
)
def test_what_cannot_be_fetched(address: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        fetched(address)


def test_without_the_package_of_a_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(address: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(UserError, match=r"no package for s3: Install s3fs"):
        fetched("s3://b/1.tar")


def test_without_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match=r"finesight\[objects\]"):
        fetched("memory://b/1.tar")


def test_files_without_their_pictures_are_refused() -> None:
    with pytest.raises(UserError, match=r"neither \.tar nor \.parquet"):
        load_sources((DataFile(path="memory://b/train.jsonl"),))


def test_a_run_learns_from_it(tmp_path: Path, bucket: MemoryFileSystem) -> None:
    task = Task(tmp_path)
    as_tars(tmp_path / "train.jsonl", tmp_path / "shards", each=4)
    for shard in sorted((tmp_path / "shards").iterdir()):
        bucket.pipe(f"/bucket/{shard.name}", shard.read_bytes())
    task.run(name="plain", data={"train": str(tmp_path / "train.jsonl")})
    task.run(name="stored", data={"train": "memory://bucket/*.tar"})
    assert losses(tmp_path / "stored") == losses(tmp_path / "plain")
    recipe = (tmp_path / "stored" / "recipe.yaml").read_text()
    assert "memory://bucket/*.tar" in recipe
