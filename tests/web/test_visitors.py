from __future__ import annotations

import asyncio
import contextlib
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from asking import noise
from PIL import Image
from served_page import Parrot

from finesight.data.headers import DamagedPicture, TooLarge
from finesight.errors import UserError
from finesight.infer.request import Options
from finesight.infer.talk import Reply
from finesight.web import disk_budget
from finesight.web import visitors as module
from finesight.web.limits import (
    QUESTION_CHARACTERS,
    QUESTION_PICTURES,
    TALK_PICTURES,
    VISITORS,
)
from finesight.web.server import visitors_in
from finesight.web.visitors import SHOWN_SIDE, Visitor, Visitors


@pytest.fixture
def visitors(tmp_path: Path) -> Visitors:
    (tmp_path / "talks").mkdir()
    return visitors_in(tmp_path, Parrot(lambda text: (text, ())))


@pytest.fixture
def visitor(visitors: Visitors) -> Visitor:
    return visitors.of("one")


def test_a_talk_is_kept_however_many_threads_ask_for_it(visitors):
    one = visitors.of("one")
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as threads:
            same = threads.map(
                lambda _: all(visitors.of("one") is one for _ in range(50_000)), range(3)
            )
            assert all(same)
    finally:
        sys.setswitchinterval(before)


async def _heard(reply: Reply) -> None:
    async for _ in reply:
        pass


def test_images_that_would_pass_the_limit_are_refused(visitors, tmp_path, monkeypatch):
    """However small an upload is: a conversation keeps copies of all that was asked about."""
    (tmp_path / "uploads").mkdir()
    upload = tmp_path / "uploads" / "a.png"
    noise(upload, 400, 400)
    monkeypatch.setattr(module, "SHOWN_BYTES", 0)
    monkeypatch.setattr(disk_budget, "FOLDER_BYTES", 4 * upload.stat().st_size)
    visitor = visitors.of("one")
    for _ in range(20):
        with contextlib.suppress(UserError):
            visitor.take("", [upload])
    with pytest.raises(UserError, match="no room"):
        visitor.take("", [upload])
    kept = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert kept <= disk_budget.FOLDER_BYTES
    assert 1 <= len(visitor.pictures) <= 3
    visitors.leave("one")
    visitors.of("two").take("", [upload])


def test_exports_count_until_they_are_closed(visitors, tmp_path, monkeypatch):
    (tmp_path / "uploads").mkdir()
    upload = tmp_path / "uploads" / "a.png"
    noise(upload, 400, 400)
    visitor = visitors.of("one")
    turn = visitor.talk.ask("What?", visitor.take("", [upload]), [Options()])
    asyncio.run(_heard(turn.replies[0]))
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    monkeypatch.setattr(disk_budget, "FOLDER_BYTES", size + 2 * upload.stat().st_size)
    archive = visitor.export()
    with pytest.raises(UserError, match="no room"):
        visitor.export()
    archive.close()
    del archive
    visitor.export().close()


def test_each_session_has_a_talk_and_a_folder_of_its_own(visitors):
    one, two = visitors.of("one"), visitors.of("two")
    assert visitors.of("one") is one
    assert one.token != two.token
    assert one.folder != two.folder
    assert visitors.with_token(two.token) is two
    assert visitors.with_token("no") is None
    visitors.leave("one")
    assert not one.folder.exists()
    assert visitors.of("one") is not one


def test_the_quietest_makes_room(visitors):
    first = visitors.of("0")
    second = visitors.of("1")
    for number in range(2, VISITORS):
        visitors.of(str(number))
    visitors.of("0")
    visitors.of("another")
    assert len(visitors.all()) == VISITORS
    assert first.folder.exists()
    assert not second.folder.exists()


def test_pictures_are_kept_as_they_came_and_shown_bare(visitor, tmp_path):
    picture = Image.new("RGB", (2 * SHOWN_SIDE, 40), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a secret place"
    picture.save(tmp_path / "a.jpg", exif=exif)
    [kept] = visitor.take("What?", [tmp_path / "a.jpg"])
    assert kept.read_bytes() == (tmp_path / "a.jpg").read_bytes()
    shown = visitor.pictures[kept]
    assert (shown.width, shown.height) == (40, 2 * SHOWN_SIDE)
    with Image.open(shown.copy) as copy:
        assert copy.size == (20, SHOWN_SIDE)
        assert not copy.getexif()
    assert b"secret" not in shown.copy.read_bytes()


def test_two_pictures_of_one_name_stay_two(visitor, tmp_path):
    (tmp_path / "b").mkdir()
    one, two = noise(tmp_path / "a.png", 30, 30), noise(tmp_path / "b" / "a.png", 30, 30, seed=1)
    kept = visitor.take("What?", [one, two])
    assert [path.read_bytes() for path in kept] == [one.read_bytes(), two.read_bytes()]


def test_too_much_is_refused(visitor, tmp_path):
    picture = noise(tmp_path / "a.png", 30, 30)
    with pytest.raises(UserError, match=f"{QUESTION_PICTURES + 1} pictures"):
        visitor.take("What?", [picture] * (QUESTION_PICTURES + 1))
    with pytest.raises(UserError, match=f"{QUESTION_CHARACTERS + 1} characters"):
        visitor.take("x" * (QUESTION_CHARACTERS + 1), [])
    for _ in range(TALK_PICTURES):
        visitor.take("What?", [picture])
    with pytest.raises(UserError, match="1 pictures"):
        visitor.take("What?", [picture])


def test_a_bomb_is_known_by_its_header(visitor, tmp_path):
    (tmp_path / "bomb.png").write_bytes(_bomb(10_000))
    assert (tmp_path / "bomb.png").stat().st_size < 20_000
    with pytest.raises(TooLarge, match="100000000"):
        visitor.take("What?", [tmp_path / "bomb.png"])
    (tmp_path / "text.png").write_text("<svg onload=alert(1)>")
    with pytest.raises(DamagedPicture, match="not a picture"):
        visitor.take("What?", [noise(tmp_path / "a.png", 30, 30), tmp_path / "text.png"])
    assert [*visitor.folder.iterdir()] == []


def test_pictures_that_no_turn_shows_are_removed(visitor, tmp_path):
    kept = visitor.take("What?", [noise(tmp_path / "a.png", 30, 30)])
    turn = visitor.talk.ask("What?", kept, [Options()])
    visitor.forget(turn.pictures)
    assert kept[0].exists()
    visitor.talk.undo()
    visitor.forget(turn.pictures)
    assert [*visitor.folder.iterdir()] == []
    assert visitor.pictures == {}


def test_nothing_said_is_nothing_to_export(visitor):
    with pytest.raises(UserError, match="0 turns"):
        visitor.export()


def _bomb(side: int) -> bytes:
    """A small PNG whose header says that it has `side` times `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side * (side // 8 + 1)), 9)
    ends = chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + ends
