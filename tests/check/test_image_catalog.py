"""Image inspection in worker processes: each content once, in input order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest
from image_fixtures import write_gray_image
from PIL import Image

from finesight.check.image_catalog import (
    MIN_PARALLEL_SAMPLES,
    ImageCatalog,
    inspect_images,
    open_executor,
    prefetch_map,
)
from finesight.data.image_header import TruncatedImageError
from finesight.errors import UserError
from finesight.vision.image_processing import load_image


class CountingPool(Executor):
    """Does the work here and counts the files that each kind of work was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}

    def submit(self, work, /, *args, **kwargs):
        self.files[work.__name__] = self.files.get(work.__name__, 0) + len(args[-1])
        future: Future = Future()
        future.set_result(work(*args, **kwargs))
        return future


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(10):
        write_gray_image(tmp_path / f"{number}.png", gray_level=number)
    for number in range(10):
        (tmp_path / f"copy-{number}.png").write_bytes((tmp_path / f"{number}.png").read_bytes())
        (tmp_path / f"link-{number}.png").hardlink_to(tmp_path / f"{number}.png")
    return tmp_path


def image_groups(folder: Path) -> list[list[str]]:
    """Groups of three names of each content, all names twice, and one without a file."""
    groups = [
        [str(folder / f"{kind}{number}.png") for kind in ("", "copy-", "link-")]
        for number in range(10)
    ]
    return [*groups, *groups, [str(folder / "gone.png")]]


def test_each_file_is_hashed_once_and_each_content_decoded_once(folder):
    pool = CountingPool()
    album = ImageCatalog(pool)
    assert list(album.process_groups(image_groups(folder), lambda group: group)) == image_groups(
        folder
    )
    assert pool.files == {"_hash_files": 20, "inspect_images": 10}
    assert (len(album), len(album.image_infos)) == (31, 11)
    for group in image_groups(folder)[:10]:
        assert len({album.image_index(path) for path in group}) == 1
        assert album[group[0]].size == (20, 40)
    assert album[str(folder / "gone.png")].issue_code == "image-missing"


def test_falls_back_to_threads_without_multiprocessing(folder, monkeypatch):
    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("multiprocessing.context.BaseContext.Lock", refused)
    monkeypatch.setattr("multiprocessing.context.BaseContext.BoundedSemaphore", refused)
    with open_executor(MIN_PARALLEL_SAMPLES) as pool:
        assert pool.submit(os.getpid).result() == os.getpid()


def test_worker_processes_give_the_same_catalog(folder):
    groups = image_groups(folder)
    with open_executor(MIN_PARALLEL_SAMPLES) as pool:
        there = ImageCatalog(pool)
        list(there.process_groups(groups, lambda group: group))
    with open_executor(0) as pool:
        here = ImageCatalog(pool)
        list(here.process_groups(groups, lambda group: group))
    assert there.image_infos == here.image_infos


def crash_while_reading() -> None:
    with open_executor(MIN_PARALLEL_SAMPLES) as pool:
        pool.submit(os._exit, 3).result()


def test_dead_worker_raises_user_error():
    with pytest.raises(UserError, match="an image worker process died"):
        crash_while_reading()


def test_prefetch_keeps_order_and_limits_pending_work():
    started: list[int] = []
    finished: list[int] = []

    def begin(item: int) -> int:
        started.append(item)
        assert len(started) - len(finished) <= 3, f"{started} begun, {finished} finished"
        return item * item

    def finish(item: int, square: int) -> tuple[int, int]:
        finished.append(item)
        return item, square

    assert list(prefetch_map(range(9), begin, finish, max_pending=2)) == [
        (n, n * n) for n in range(9)
    ]


def test_image_workers_do_not_import_torch():
    code = "import sys, json, finesight.check.image_catalog; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in json.loads(done.stdout)


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpeg_is_detected_at_reduced_size(tmp_path, progressive):
    noise = Image.effect_noise((320, 240), 60).convert("RGB")
    full = tmp_path / "whole.jpg"
    noise.save(full, quality=80, progressive=progressive)
    content = full.read_bytes()
    small = load_image(full, min_side=64)
    assert small.size == (160, 120), "a quarter would have a side below 64"
    cut = tmp_path / "cut.jpg"
    for end in (len(content) // 3, len(content) // 2, len(content) - 200, len(content) - 3):
        cut.write_bytes(content[:end])
        for at_least in (None, 64):
            with pytest.raises(TruncatedImageError):
                load_image(cut, min_side=at_least)
        assert inspect_images([str(cut)])[0].issue_code == "image-truncated"
