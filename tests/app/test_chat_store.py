from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_fixtures import write_noise_image
from finesight.web import web_sessions as module
from finesight.web.access_middleware import BROWSER_COOKIE, QUESTION_INPUT
from finesight.web.chat_html import CHINESE, ENGLISH, UiText, select_ui_text
from finesight.web.web_server import create_session_store
from finesight.web.web_sessions import WebSession, WebSessionStore
from PIL import Image
from starlette.requests import Request
from web_server_fixture import ScriptedService, get_image_pool

from finesight.data.image_header import CorruptImageError
from finesight.errors import UserError
from finesight.infer.chat_session import ChatReply
from finesight.infer.request import GenerationOptions


@pytest.fixture
def visitors(tmp_path: Path) -> WebSessionStore:
    (tmp_path / "chats").mkdir()
    (tmp_path / "uploads").mkdir()
    return create_session_store(tmp_path, ScriptedService(), get_image_pool())


@pytest.fixture
def visitor(visitors: WebSessionStore) -> WebSession:
    return visitors.get_or_create("one")


@pytest.fixture
def noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write an upload that is shown without a smaller copy."""
    monkeypatch.setattr(module, "MAX_DISPLAY_BYTES", 0)
    return write_noise_image(tmp_path / "uploads" / "a.png", 400, 400)


async def consume_reply(reply: ChatReply) -> None:
    async for _ in reply:
        pass


def ask(session: WebSession, text: str, *uploads: Path) -> None:
    paths = session.add_uploads(text, uploads)
    turn = session.chat.send(text, paths, [GenerationOptions()])
    asyncio.run(consume_reply(turn.replies[0]))


def test_session_is_thread_safe(visitors, visitor):
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def is_same(_: int) -> bool:
        return all(visitors.get_or_create("one") is visitor for _ in range(50_000))

    try:
        with ThreadPoolExecutor(3) as threads:
            assert all(threads.map(is_same, range(3)))
    finally:
        sys.setswitchinterval(before)


def test_images_over_the_disk_limit_are_rejected(visitors, visitor, noise, tmp_path, monkeypatch):
    """Chats contain copies of uploads, so small uploads count as well."""
    monkeypatch.setattr(module, "MAX_STORED_BYTES", 4 * noise.stat().st_size)
    for _ in range(20):
        with contextlib.suppress(UserError):
            visitor.add_uploads("", [noise])
    with pytest.raises(UserError, match="no disk space"):
        visitor.add_uploads("", [noise])
    retained = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert retained <= module.MAX_STORED_BYTES
    assert 1 <= len(visitor.images) <= 3
    visitors.close("one")
    visitors.get_or_create("two").add_uploads("", [noise])


def test_exports_count_until_they_are_closed(visitor, noise, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="0 turns"):
        visitor.export_archive()
    ask(visitor, "What?", noise)
    size = sum(file.stat().st_size for file in tmp_path.glob("chats/*/*"))
    monkeypatch.setattr(module, "MAX_STORED_BYTES", size + 2 * noise.stat().st_size)
    archive = visitor.export_archive()
    with pytest.raises(UserError, match="no disk space"):
        visitor.export_archive()
    archive.close()
    del archive
    visitor.export_archive().close()


def test_each_session_has_its_own_chat_and_folder(visitors):
    one, two = visitors.get_or_create("one"), visitors.get_or_create("two")
    assert visitors.get_or_create("one") is one
    assert one.token != two.token
    assert one.folder != two.folder
    assert visitors.find_by_token(two.token) is two
    assert visitors.find_by_token("no") is None
    visitors.close("one")
    assert not one.folder.exists()
    assert visitors.get_or_create("one") is not one


def test_least_recently_used_session_is_evicted(visitors):
    first, second, *_ = [visitors.get_or_create(str(n)) for n in range(module.MAX_SESSIONS)]
    visitors.get_or_create("0")
    visitors.get_or_create("another")
    assert len(visitors.list_sessions()) == module.MAX_SESSIONS
    assert (first.folder.exists(), second.folder.exists()) == (True, False)


def test_images_are_stored_original_and_shown_without_metadata(visitor, tmp_path):
    image, upload = Image.new("RGB", (2 * module.MAX_DISPLAY_SIDE, 40)), tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a secret place"
    image.save(upload, exif=exif)
    [retained] = visitor.add_uploads("What?", [upload])
    assert retained.read_bytes() == upload.read_bytes()
    shown = visitor.images[retained]
    assert (shown.width, shown.height) == (40, 2 * module.MAX_DISPLAY_SIDE)
    with Image.open(shown.display_path) as copy:
        assert copy.size == (20, module.MAX_DISPLAY_SIDE)
        assert not copy.getexif()
    assert b"secret" not in shown.display_path.read_bytes()
    # Another image of the same name does not replace it.
    (tmp_path / "b").mkdir()
    other = write_noise_image(tmp_path / "b" / "a.jpg", 30, 30)
    assert visitor.add_uploads("What?", [other])[0].read_bytes() == other.read_bytes()
    assert retained.read_bytes() == upload.read_bytes()


def test_oversized_questions_and_images_are_rejected(visitor, tmp_path):
    image = write_noise_image(tmp_path / "a.png", 30, 30)
    with pytest.raises(UserError, match=f"{module.MAX_IMAGES_PER_MESSAGE + 1} images"):
        visitor.add_uploads("What?", [image] * (module.MAX_IMAGES_PER_MESSAGE + 1))
    with pytest.raises(UserError, match=f"{module.MAX_MESSAGE_CHARS + 1} characters"):
        visitor.add_uploads("x" * (module.MAX_MESSAGE_CHARS + 1), [])
    bomb, text = tmp_path / "bomb.png", tmp_path / "text.png"
    Image.new("1", (10_000, 10_000)).save(bomb)
    assert bomb.stat().st_size < 20_000
    with pytest.raises(CorruptImageError, match="100000000"):
        visitor.add_uploads("What?", [bomb])
    text.write_text("<svg onload=alert(1)>")
    with pytest.raises(CorruptImageError, match="not an image"):
        visitor.add_uploads("What?", [image, text])
    assert [*visitor.folder.iterdir()] == []
    for _ in range(module.MAX_IMAGES_PER_CHAT):
        visitor.add_uploads("What?", [image])
    with pytest.raises(UserError, match="1 images"):
        visitor.add_uploads("What?", [image])


def test_unreferenced_images_are_removed(visitor, tmp_path):
    retained = visitor.add_uploads("What?", [write_noise_image(tmp_path / "a.png", 30, 30)])
    turn = visitor.chat.send("What?", retained, [GenerationOptions()])
    visitor.remove_images(turn.image_paths)
    assert retained[0].exists()
    visitor.chat.undo()
    visitor.remove_images(turn.image_paths)
    assert [*visitor.folder.iterdir()] == []
    assert visitor.images == {}


def test_texts_exist_in_the_first_available_language():
    for accepted, expected in (
        ("zh-CN,zh;q=0.9,en;q=0.8", CHINESE),
        ("en-GB,en;q=0.9,zh;q=0.8", ENGLISH),
        ("de-DE,de;q=0.9,zh-TW;q=0.3", CHINESE),
        ("de", ENGLISH),
        ("", ENGLISH),
    ):
        assert select_ui_text(accepted) is expected, accepted
    for field in fields(UiText):
        english, chinese = (str(getattr(words, field.name)) for words in (ENGLISH, CHINESE))
        assert english != chinese, field.name
        assert english.count("{}") == chinese.count("{}"), field.name


def test_conversation_survives_a_reload_for_its_browser_only(visitors, tmp_path):
    first = visitors.restore("tab", "browser", "")
    ask(first, "What\nis it?", write_noise_image(tmp_path / "a.png", 30, 30))
    visitors.close("tab", "browser")
    # Gradio gives a new ID to a tab that is loaded again.
    assert visitors.restore("tab 2", "browser", first.token) is first
    assert [image.display_path.exists() for image in first.images.values()] == [True]
    for stranger in ("another browser", None):
        assert visitors.list_chats(stranger or "x") == []
        for show in (visitors.restore, visitors.open):
            assert show("tab", stranger, first.token) is not first
            assert visitors.get_or_create("tab", stranger) is not first
    second = visitors.restore("tab 3", "browser", "unknown")
    assert second is not first, "the conversation is open in another tab"
    visitors.close("tab 3", "browser")
    assert not second.folder.exists()
    visitors.close("tab 2", "browser")
    assert visitors.restore("tab 4", "browser", "") is first
    # A lost connection does not end the conversation of a tab.
    visitors.close("tab 4", "browser")
    assert visitors.get_or_create("tab 4", "browser") is first


def test_answer_stops_when_no_tab_shows_it(visitors):
    visitors.service.is_endless = True
    session = visitors.restore("tab", "browser", "")
    reply = session.chat.send("What?", [], [GenerationOptions()]).replies[0]
    session.is_generating = True
    visitors.restore("tab 2", "browser", session.token)
    visitors.close("tab", "browser")
    visitors.close("tab 2", "browser")
    asyncio.run(asyncio.wait_for(consume_reply(reply), 10))
    assert reply.finish_reason == "cancelled"
    assert visitors.list_chats("browser") == [session]


@pytest.mark.parametrize("has_other_tab", [True, False])
def test_closed_tab_ends_the_answer_unless_another_tab_shows_it(visitors, has_other_tab):
    chat_page = pytest.importorskip("finesight.web.chat_page", reason="no extra `web`")
    visitors.service.is_endless = True
    page, browser = chat_page.ChatPage(visitors), "b" * 43
    [number] = [number for number, inputs in page.inputs.items() if inputs is QUESTION_INPUT]
    event = page.blocks.fns[number]
    given = ({"text": "What?", "files": []}, False, False, 9, 0, 1, 0, 1, -1, "")
    values = dict(zip(event.inputs, given, strict=True))
    headers = [(b"cookie", f"{BROWSER_COOKIE}={browser}".encode())]
    request = Request({"type": "http", "headers": headers})
    session = visitors.restore("tab", browser, "")
    if has_other_tab:
        visitors.open("other tab", browser, session.token)

    async def wait_for(condition):
        while not condition():
            await asyncio.sleep(0.01)

    async def run():
        updates = event.fn(values, SimpleNamespace(session_hash="tab", request=request))
        await anext(updates)
        # Gradio closes the event of a closed tab.
        await updates.aclose()
        [reply] = session.chat.turns[0].replies
        if has_other_tab:
            num_chars = len(reply.text)
            await wait_for(lambda: len(reply.text) > num_chars + 50)
            assert session.is_generating
            visitors.close("tab", browser)
            visitors.close("other tab", browser)
        await wait_for(lambda: not session.is_generating)
        assert reply.finish_reason == "cancelled"

    asyncio.run(asyncio.wait_for(run(), 60))


def test_conversations_are_listed_opened_and_deleted(visitors):
    first = visitors.restore("tab", "browser", "")
    assert visitors.open("tab", "browser", "") is first, "an empty conversation is used"
    assert first.display_title == "New chat"
    ask(first, "a \n" * 100)
    assert first.display_title == ("a " * 100)[: module.MAX_TITLE_CHARS]
    first.ui_text = CHINESE
    second = visitors.open("tab", "browser", "")
    assert second is not first
    assert second.ui_text is CHINESE
    assert visitors.list_chats("browser") == [first]
    ask(second, "b")
    second.title = "Letters"
    assert visitors.list_chats("browser")[0].display_title == "Letters"
    assert visitors.open("tab", "browser", first.token) is first
    assert visitors.list_chats("browser") == [first, second]
    visitors.delete(first)
    assert not first.folder.exists()
    assert visitors.get_or_create("tab", "browser").chat.turns == []
    assert visitors.list_chats("browser") == [second]


def test_conversations_of_a_browser_are_limited(visitors, monkeypatch):
    monkeypatch.setattr(module, "MAX_SESSIONS_PER_BROWSER", 3)
    monkeypatch.setattr(module, "MAX_TABS", 5)
    other = visitors.restore("tab", "other browser", "")
    for number in range(5):
        ask(visitors.open(f"tab {number}", "browser", ""), str(number))
    titles = [session.display_title for session in visitors.list_chats("browser")]
    assert titles == ["4", "3", "2"]
    assert other in visitors.list_sessions()
    for number in range(20):
        visitors.get_or_create(f"many {number}", "other browser")
    assert sum(len(session.tabs) for session in visitors.list_sessions()) <= 5


def test_closed_conversations_are_deleted_for_new_images(visitors, noise, monkeypatch):
    monkeypatch.setattr(module, "MAX_STORED_BYTES", 5 * noise.stat().st_size)
    closed = visitors.restore("tab", "browser", "")
    ask(closed, "What?", noise)
    shown = visitors.restore("tab", "other browser", "")
    ask(shown, "What?", noise)
    visitors.close("tab", "browser")
    visitors.get_or_create("third").add_uploads("", [noise, noise])
    assert (closed.folder.exists(), shown.folder.exists()) == (False, True)
    with pytest.raises(UserError, match="no disk space"):
        visitors.get_or_create("third").add_uploads("", [noise, noise])


def test_sent_and_forgotten_uploads_give_way_to_new_ones(visitors, visitor, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_DISPLAY_BYTES", 0)
    past = time.time() - module.MIN_UPLOAD_TTL_S - 60
    for number in range(6):
        upload = write_noise_image(tmp_path / "uploads" / f"{number}.png", 400, 400)
        size = upload.stat().st_size
        monkeypatch.setattr(module, "MAX_STORED_BYTES", 4 * size)
        if number % 2 == 0:
            visitor.remove_images(visitor.add_uploads("", [upload]))
        os.utime(upload, (past, past))
        if number % 2 == 0:
            # The next message has the same upload, after a long pause.
            visitor.remove_images(visitor.add_uploads("", [upload]))
    new = write_noise_image(tmp_path / "uploads" / "new.png", 400, 400)
    with visitors.budget.reserve(2 * size):
        assert new.exists()


def test_no_more_conversations_are_deleted_than_needed(visitors, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_DISPLAY_BYTES", 0)
    (tmp_path / "other").mkdir()
    small, large = (
        write_noise_image(tmp_path / "other" / f"{side}.png", side, side) for side in (50, 400)
    )
    sessions = []
    for number, upload in enumerate((small, large, large)):
        sessions.append(visitors.restore(f"tab {number}", f"browser {number}", ""))
        ask(sessions[-1], "What?", upload)
        visitors.close(f"tab {number}", f"browser {number}")
    stored = sum(file.stat().st_size for file in tmp_path.glob("chats/*/*"))
    monkeypatch.setattr(module, "MAX_STORED_BYTES", stored)
    for num_bytes, expected in (
        (stored + 1, [True, True, True]),  # not even all of them suffice
        (large.stat().st_size, [True, False, True]),
        (2 * large.stat().st_size, [True, False, False]),
    ):
        with contextlib.suppress(module.DiskFullError), visitors.budget.reserve(num_bytes):
            assert num_bytes <= stored
        assert [session.folder.exists() for session in sessions] == expected
