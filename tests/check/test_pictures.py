"""Pictures are looked at by other processes, each content once, and come back in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest
from PIL import Image
from scenery import paint

from finesight.check.pictures import Album, describe
from finesight.check.processes import WORTH_IT, ahead, processes
from finesight.data.headers import CutOff
from finesight.errors import UserError
from finesight.vision.picture import open_picture


class Counting(Executor):
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
        paint(tmp_path / f"{number}.png", shade=number)
    for number in range(10):
        (tmp_path / f"copy-{number}.png").write_bytes((tmp_path / f"{number}.png").read_bytes())
        (tmp_path / f"link-{number}.png").hardlink_to(tmp_path / f"{number}.png")
    return tmp_path


def names(folder: Path) -> list[list[str]]:
    """Groups of three names of each content, all names twice, and one without a file."""
    groups = [
        [str(folder / f"{kind}{number}.png") for kind in ("", "copy-", "link-")]
        for number in range(10)
    ]
    return [*groups, *groups, [str(folder / "gone.png")]]


def test_each_file_is_hashed_once_and_each_content_decoded_once(folder):
    pool = Counting()
    album = Album(pool)
    assert list(album.look(names(folder), lambda group: group)) == names(folder)
    assert pool.files == {"_digests": 20, "describe": 10}
    assert (len(album), len(album.contents)) == (31, 11)
    for group in names(folder)[:10]:
        assert len({album.number(path) for path in group}) == 1
        assert album[group[0]].size == (20, 40)
    assert album[str(folder / "gone.png")].fault == "picture-missing"


def test_where_processes_cannot_speak_to_each_other_there_are_none(folder, monkeypatch):
    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("multiprocessing.context.BaseContext.Lock", refused)
    monkeypatch.setattr("multiprocessing.context.BaseContext.BoundedSemaphore", refused)
    with processes(WORTH_IT) as pool:
        assert pool.submit(os.getpid).result() == os.getpid()


def test_other_processes_give_the_same(folder):
    groups = names(folder)
    with processes(WORTH_IT) as pool:
        there = Album(pool)
        list(there.look(groups, lambda group: group))
    with processes(0) as pool:
        here = Album(pool)
        list(here.look(groups, lambda group: group))
    assert there.contents == here.contents


def look_and_die() -> None:
    with processes(WORTH_IT) as pool:
        pool.submit(os._exit, 3).result()


def test_a_process_that_dies_is_told_in_one_sentence():
    with pytest.raises(UserError, match="a process that looks at pictures died"):
        look_and_die()


def test_ahead_keeps_order_and_begins_no_more_than_it_may():
    begun: list[int] = []
    finished: list[int] = []

    def begin(item: int) -> int:
        begun.append(item)
        assert len(begun) - len(finished) <= 3, f"{begun} begun, {finished} finished"
        return item * item

    def finish(item: int, square: int) -> tuple[int, int]:
        finished.append(item)
        return item, square

    assert list(ahead(range(9), begin, finish, most=2)) == [(n, n * n) for n in range(9)]


def test_nothing_that_looks_at_pictures_loads_torch():
    code = "import sys, json, finesight.check.pictures; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in json.loads(done.stdout)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_decoded_small_is_found_cut_wherever_the_whole_one_is(tmp_path, progressive):
    noise = Image.effect_noise((320, 240), 60).convert("RGB")
    whole = tmp_path / "whole.jpg"
    noise.save(whole, quality=80, progressive=progressive)
    content = whole.read_bytes()
    small = open_picture(whole, at_least=64)
    assert small.size == (160, 120), "a quarter would have a side below 64"
    cut = tmp_path / "cut.jpg"
    for end in (len(content) // 3, len(content) // 2, len(content) - 200, len(content) - 3):
        cut.write_bytes(content[:end])
        for at_least in (None, 64):
            with pytest.raises(CutOff):
                open_picture(cut, at_least=at_least)
        assert describe([str(cut)])[0].fault == "picture-cut-off"
