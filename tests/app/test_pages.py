"""Uploads are stored within limits, found by their secret ID, and leave nothing after failures."""

import errno
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from finesight.app import pages
from finesight.app.pages import UploadStore, create_app
from finesight.app.server import Access, AccessMiddleware
from finesight.errors import UserError

LIMIT = 1000


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UploadStore:
    monkeypatch.setattr(pages, "MAX_STORED_BYTES", 3 * LIMIT)
    return UploadStore(tmp_path, LIMIT, math.inf)


@pytest.fixture
def client(store: UploadStore) -> Iterator[TestClient]:
    routes = [Route("/uploads", store.receive, methods=["POST"])]
    app = AccessMiddleware(create_app(routes), Access(max_upload_bytes=LIMIT))
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat.png", "cat.png"),
        ("../../etc/passwd", "passwd"),
        ("..", "file"),
        ("C:\\images\\猫.jpg", "猫.jpg"),
        ("a\0b\n.png", "ab.png"),
        ("é" * 300 + ".png", "é" * 98 + ".png"),
    ],
)
def test_names_are_last_parts_of_paths(client, store, name, expected):
    answer = client.post("/uploads", params={"name": name}, content=b"data").json()
    file = store.find(answer["id"])
    assert (file.name, answer["name"], file.read_bytes()) == (expected, expected, b"data")


@pytest.mark.parametrize("upload_id", ["", "..", "x" * 32, "../" * 10 + "ab", "a/../" * 6 + "ab"])
def test_unknown_ids_are_refused(store: UploadStore, upload_id: str) -> None:
    with pytest.raises(UserError, match="expired"):
        store.find(upload_id)


def test_large_uploads_and_full_disks_leave_nothing(client, tmp_path, monkeypatch):
    assert client.post("/uploads?name=a", content=b"x" * (LIMIT + 1)).status_code == 413
    chunks = (b"x" * LIMIT for _ in range(2))
    assert client.post("/uploads?name=a", content=chunks).status_code == 413
    assert [*tmp_path.iterdir()] == []

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "open", fail)
    assert client.post("/uploads?name=a", content=b"x").status_code == 507
    assert [*tmp_path.iterdir()] == []


def test_old_uploads_are_deleted_for_new_ones(client: TestClient, store: UploadStore) -> None:
    ids = [client.post("/uploads?name=a", content=b"x" * LIMIT).json()["id"] for _ in range(3)]
    old = store.find(ids[0])
    for age_s, status in ((pages.UPLOAD_TTL_S - 60, 507), (pages.UPLOAD_TTL_S + 60, 200)):
        os.utime(old, (time.time() - age_s,) * 2)
        store.find(ids[1])
        assert client.post("/uploads?name=a", content=b"x" * LIMIT).status_code == status
    with pytest.raises(UserError):
        store.find(ids[0])
    assert store.find(ids[1]).is_file()
    assert client.post("/uploads?name=a", content=b"x").status_code == 507
