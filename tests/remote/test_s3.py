"""Object storage as S3 speaks it, by moto's server: what is fetched, refused, and cut off."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cutting import Cutting
from packing import as_parquet, as_tars
from small_run import Task, losses

from finesight.errors import UserError
from finesight.remote import objects
from finesight.remote.objects import fetched

server = pytest.importorskip("moto.server", reason="moto is not installed")
s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    store = server.ThreadedMotoServer(port=0, verbose=False)
    store.start()
    yield store.get_host_and_port()[1]
    store.stop()


@pytest.fixture(autouse=True)
def bucket(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(objects, "objects_folder", lambda: tmp_path / "objects")
    told = {"ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "key", "DEFAULT_REGION": "us-east-1"}
    for name, value in told.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    at(port, monkeypatch)
    address = {"endpoint_url": f"http://127.0.0.1:{port}", "skip_instance_cache": True}
    system = s3fs.S3FileSystem(key="id", secret="key", **address)
    system.mkdir("bucket")
    yield system
    system.rm("bucket", recursive=True)


def at(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage is at that port of this machine, from now on."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_run_learns_from_it(tmp_path: Path, bucket: Any) -> None:
    task = Task(tmp_path)
    as_tars(tmp_path / "train.jsonl", tmp_path / "shards", each=4)
    for shard in sorted((tmp_path / "shards").iterdir()):
        bucket.put(str(shard), f"bucket/shards/{shard.name}")
    bucket.put(str(as_parquet(tmp_path / "eval.jsonl", tmp_path / "e.parquet")), "bucket/e.parquet")
    task.run(name="plain")
    data = {"train": "s3://bucket/shards/*.tar", "eval": "s3://bucket/e.parquet"}
    task.run(name="stored", data=data)
    assert losses(tmp_path / "stored") == losses(tmp_path / "plain")


def test_another_version_is_fetched_anew(bucket: Any) -> None:
    bucket.pipe("bucket/1.tar", b"one")
    (first,) = fetched("s3://bucket/1.tar")
    assert fetched("s3://bucket/1.tar") == [first]
    bucket.pipe("bucket/1.tar", b"two")
    s3fs.S3FileSystem.clear_instance_cache()
    (second,) = fetched("s3://bucket/1.tar")
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"two")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://bucket/none.tar", r"FileNotFoundError[\s\S]*check the address"),
        ("s3://bucket/none/*.tar", "no file fits"),
        ("s3://none/1.tar", r"FileNotFoundError[\s\S]*check the address"),
        ("s3://*.tar", "cannot be fetched"),
    ],
)
def test_what_is_not_there(address: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        fetched(address)


@pytest.mark.parametrize("name", ["1.tar", "*.tar"])
def test_without_credentials(name: str, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.pipe("bucket/1.tar", b"one")
    for variable in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{variable}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"NoCredentialsError[\s\S]*credentials"):
        fetched(f"s3://bucket/{name}")


@pytest.mark.parametrize("name", ["1.tar", "*.tar"])
def test_with_wrong_credentials(name: str, bucket: Any) -> None:
    from moto.core import set_initial_no_auth_action_count

    bucket.pipe("bucket/1.tar", b"one")
    s3fs.S3FileSystem.clear_instance_cache()
    refused = set_initial_no_auth_action_count(0)(fetched)
    with pytest.raises(UserError, match=r"PermissionError[\s\S]*check the credentials"):
        refused(f"s3://bucket/{name}")


def test_a_storage_that_is_gone(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = free.getsockname()[1]
    at(nobody, monkeypatch)
    with pytest.raises(UserError, match=r"cannot be fetched[\s\S]*connection"):
        fetched("s3://bucket/1.tar")


def test_a_line_that_is_cut(
    port: int, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Now and then: what is missing comes afterwards. Always: nothing of it is kept."""
    content = bytes(range(256)) * 20_000
    bucket.pipe("bucket/1.tar", content)
    with Cutting(port, after=1_000_000, times=2) as cutting:
        at(cutting.port, monkeypatch)
        (file,) = fetched("s3://bucket/1.tar")
        assert file.read_bytes() == content
        assert cutting.left == 0
    bucket.pipe("bucket/2.tar", content)
    with Cutting(port, after=100_000, times=1000) as cutting:
        at(cutting.port, monkeypatch)
        with pytest.raises(UserError, match=r"2\.tar: cannot be fetched[\s\S]*start again"):
            fetched("s3://bucket/2.tar")
    kept = [path for path in (tmp_path / "objects").rglob("*") if path.suffix != ".lock"]
    assert {path.name for path in kept if path.is_file()} == {"1.tar", "sha256.json"}
    at(port, monkeypatch)
    assert fetched("s3://bucket/2.tar")[0].read_bytes() == content
    assert threading.active_count() < 50
