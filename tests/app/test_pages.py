"""Uploads are stored within limits, found by their secret ID, and leave nothing after failures."""

import contextlib
import errno
import math
import os
import threading
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


def send(client: TestClient, size: int = LIMIT, **query: str) -> str:
    """Upload a file; return its ID, or the status of a refusal."""
    response = client.post("/uploads", params={"name": "a", **query}, content=b"x" * size)
    return response.json()["id"] if response.status_code == 200 else str(response.status_code)


def make_older(folder: Path, age_s: float, upload_ids: list[str]) -> None:
    for upload_id in upload_ids:
        os.utime(folder / upload_id / "a", (time.time() - age_s,) * 2)


def test_unused_uploads_give_way_to_others(client, tmp_path):
    """A page that was closed after its uploads keeps nobody out for an hour."""
    ids = [send(client) for _ in range(3)]
    assert send(client) == "507"
    make_older(tmp_path, pages.UNUSED_TTL_S + 10, ids[1:])
    make_older(tmp_path, pages.UNUSED_TTL_S + 20, ids[2:])
    newest = send(client)
    # The oldest one, and no further one.
    assert {path.name for path in tmp_path.iterdir()} == {*ids[:2], newest}


def test_files_of_a_batch_are_deleted_together(client, store, tmp_path):
    """While an action uploads its files, the first ones wait for the last one."""
    old = [send(client, batch="old") for _ in range(2)]
    new = [send(client, batch="new")]
    make_older(tmp_path, pages.UNUSED_TTL_S + 10, [old[0], *new])
    # Neither a batch with a new file nor the own one gives way.
    assert send(client, batch="new") == "507"
    make_older(tmp_path, pages.UNUSED_TTL_S + 10, old)
    new += [send(client, batch="new") for _ in range(2)]
    assert {path.name for path in tmp_path.iterdir()} == {*new}
    make_older(tmp_path, pages.UPLOAD_TTL_S + 10, new)
    assert send(client, batch="new") == "507"
    assert send(client, batch="x" * 5000) != "507"
    with pytest.raises(UserError, match="expired"):
        store.find(new[0])


@pytest.mark.parametrize(("used_ttl_s", "is_kept"), [(3600, True), (100, False)])
def test_used_uploads_are_kept_for_a_time(tmp_path, monkeypatch, used_ttl_s, is_kept):
    monkeypatch.setattr(pages, "MAX_STORED_BYTES", LIMIT)
    store = UploadStore(tmp_path, LIMIT, math.inf, used_ttl_s)
    routes = [Route("/uploads", store.receive, methods=["POST"])]
    app = AccessMiddleware(create_app(routes), Access(max_upload_bytes=LIMIT))
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        used = send(client)
        store.find(used)
        make_older(tmp_path, 90, [used])
        assert send(client, 1) == "507"
        make_older(tmp_path, 110, [used])
        assert (send(client, 1) == "507") == is_kept
        assert (tmp_path / used).exists() == is_kept


def test_upload_that_is_used_meanwhile_is_not_deleted(client, store, tmp_path, monkeypatch):
    """An action either gets its file, or the message that it has expired."""
    ids = [send(client) for _ in range(3)]
    make_older(tmp_path, pages.UNUSED_TTL_S + 10, ids[:1])
    remove = store.remove
    found = list[Path]()

    def use_file() -> None:
        with contextlib.suppress(UserError):
            found.append(store.find(ids[0]))

    thread = threading.Thread(target=use_file)

    def remove_late(upload_ids):
        thread.start()
        thread.join(0.2)
        remove(upload_ids)

    monkeypatch.setattr(store, "remove", remove_late)
    send(client)
    thread.join()
    assert all(file.is_file() for file in found)
