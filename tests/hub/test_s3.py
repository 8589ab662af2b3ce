"""S3 downloads from a moto server: success, rejection and interruption."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flaky_proxy import FlakyProxy

from finesight.errors import UserError
from finesight.hub import url_files
from finesight.hub.url_files import fetch_objects

server = pytest.importorskip("moto.server", reason="moto is not installed")
s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    moto_server = server.ThreadedMotoServer(port=0, verbose=False)
    moto_server.start()
    yield moto_server.get_host_and_port()[1]
    moto_server.stop()


@pytest.fixture(autouse=True)
def bucket(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(url_files, "get_objects_folder", lambda: tmp_path / "objects")
    credentials = {"ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "key", "DEFAULT_REGION": "us-east-1"}
    for name, value in credentials.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    set_endpoint(port, monkeypatch)
    address = {"endpoint_url": f"http://127.0.0.1:{port}", "skip_instance_cache": True}
    file_system = s3fs.S3FileSystem(key="id", secret="key", **address)
    file_system.mkdir("bucket")
    file_system.pipe("bucket/1.tar", b"one")
    yield file_system
    file_system.rm("bucket", recursive=True)


def set_endpoint(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the endpoint to a port of this machine."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    s3fs.S3FileSystem.clear_instance_cache()


def test_changed_object_is_downloaded_again(bucket: Any) -> None:
    with pytest.raises(UserError, match=r"FileNotFoundError[\s\S]*check the address"):
        fetch_objects("s3://none/1.tar")
    (first,) = fetch_objects("s3://bucket/1.tar")
    assert fetch_objects("s3://bucket/1.tar") == [first]
    bucket.pipe("bucket/1.tar", b"two")
    s3fs.S3FileSystem.clear_instance_cache()
    (second,) = fetch_objects("s3://bucket/1.tar")
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"two")


@pytest.mark.parametrize("name", ["1.tar", "*.tar"])
def test_missing_and_wrong_credentials(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.core import set_initial_no_auth_action_count

    fetch_unauthorized = set_initial_no_auth_action_count(0)(fetch_objects)
    with pytest.raises(UserError, match=r"PermissionError[\s\S]*check the credentials"):
        fetch_unauthorized(f"s3://bucket/{name}")
    for variable in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{variable}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"NoCredentialsError[\s\S]*credentials"):
        fetch_objects(f"s3://bucket/{name}")


def test_interrupted_connection(
    port: int, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rare interruptions are retried; after permanent ones no partial file remains."""
    content = bytes(range(256)) * 20_000
    bucket.pipe("bucket/1.tar", content)
    bucket.pipe("bucket/2.tar", content)
    with FlakyProxy(port, after=1_000_000, times=2) as proxy:
        set_endpoint(proxy.port, monkeypatch)
        (file,) = fetch_objects("s3://bucket/1.tar")
        assert file.read_bytes() == content
        assert proxy.remaining_cuts == 0
    with FlakyProxy(port, after=100_000, times=1000) as proxy:
        set_endpoint(proxy.port, monkeypatch)
        with pytest.raises(UserError, match=r"2\.tar: download failed[\s\S]*start again"):
            fetch_objects("s3://bucket/2.tar")
    paths = [path for path in (tmp_path / "objects").rglob("*") if path.suffix != ".lock"]
    assert {path.name for path in paths if path.is_file()} == {"1.tar", "sha256.json"}
    set_endpoint(port, monkeypatch)
    assert fetch_objects("s3://bucket/2.tar")[0].read_bytes() == content
    assert threading.active_count() < 50
