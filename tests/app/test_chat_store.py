"""Tests of stored conversations: owners, uploaded images, and limits."""

import asyncio
import contextlib
import secrets
import time
import zipfile
from pathlib import Path

import pytest
from engine_fixtures import write_noise_image
from PIL import Image
from starlette.routing import Route
from starlette.testclient import TestClient
from web_server_fixture import ScriptedService, get_image_pool

from finesight.app import chat_store, uploads
from finesight.app.chat_store import BROWSER_COOKIE, ChatStore, StoredChat
from finesight.app.pages import create_app
from finesight.data.image_header import CorruptImageError, read_image_size
from finesight.data.sample import read_samples
from finesight.errors import UserError
from finesight.infer.request import GenerationOptions


@pytest.fixture
def store(tmp_path: Path) -> ChatStore:
    return ChatStore(ScriptedService(), tmp_path / "private", get_image_pool())


@pytest.fixture
def chat(store: ChatStore) -> StoredChat:
    return store.create("browser")


@pytest.fixture
def noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Return an image that is shown without a smaller copy."""
    monkeypatch.setattr(chat_store, "MAX_DISPLAY_BYTES", 0)
    return write_noise_image(tmp_path / "noise.png", 400, 400).read_bytes()


def upload(chat: StoredChat, content: bytes, name: str = "a.png") -> str:
    """Store an upload, and return its ID."""
    upload_id = secrets.token_urlsafe(24)
    folder = chat.folder.parents[1] / "uploads" / upload_id
    folder.mkdir()
    (folder / name).write_bytes(content)
    return upload_id


def add(chat: StoredChat, *contents: bytes, text: str = "") -> list[Path]:
    with chat.take_uploads(text, [upload(chat, content) for content in contents]) as paths:
        return paths


def ask(chat: StoredChat, text: str, *contents: bytes) -> None:
    turn = chat.session.send(text, add(chat, *contents), [GenerationOptions()])
    list(turn.replies[0])
    chat.mark_changed()


def age(chat: StoredChat) -> None:
    """Mark a conversation as not displayed."""
    chat.used_at = time.monotonic() - chat_store.SHOWN_S - 1


def count_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_uploads_of_a_browser_leave_space_to_others(store, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_OWNER_BYTES", 250)
    client = TestClient(create_app([Route("/uploads", store.uploads.receive, methods=["POST"])]))
    ids = []

    def send(browser: str) -> int:
        headers = {"cookie": f"{BROWSER_COOKIE}={browser * 43}"}
        answer = client.post("/uploads", content=b"a" * 100, headers=headers)
        ids.append(answer.json().get("id", ""))
        return answer.status_code

    assert [send("a") for _ in range(3)] == [200, 200, 507]
    assert send("b") == 200
    # The files of a conversation count, too.
    store.uploads.remove(ids[:2])
    (store.create("a" * 43).folder / "1-image").write_bytes(b"a" * 100)
    assert [send("a"), send("a")] == [200, 507]


def test_images_over_the_disk_limit_are_rejected(store, chat, noise, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_STORED_BYTES", 5 * len(noise))
    monkeypatch.setattr(chat_store, "MAX_DISPLAY_BYTES", len(noise))
    for _ in range(6):
        with contextlib.suppress(UserError):
            add(chat, noise)
    with pytest.raises(UserError, match="no disk space"):
        add(chat, noise)
    assert 1 <= len(chat.images) <= 3
    assert count_bytes(tmp_path / "private" / "chats") <= uploads.MAX_STORED_BYTES


def test_exports_count_until_they_are_closed(chat, noise, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="0 turns"):
        chat.export_archive()
    ask(chat, "What?", noise)
    size = count_bytes(tmp_path / "private")
    monkeypatch.setattr(uploads, "MAX_STORED_BYTES", size + 2 * len(noise))
    archive = chat.export_archive()
    with pytest.raises(UserError, match="no disk space"):
        chat.export_archive()
    archive.close()
    del archive
    chat.export_archive().close()


def test_new_conversations_replace_unused_ones(store, monkeypatch):
    monkeypatch.setattr(chat_store, "MAX_CHATS_PER_BROWSER", 3)
    monkeypatch.setattr(chat_store, "MAX_CHATS", 5)
    other = store.create("other browser")
    ask(other, "Who?")
    for number in range(5):
        ask(store.create("browser"), str(number))
    titles = [chat.display_title for chat in store.list_chats("browser")]
    assert titles == ["4", "3", "2"]
    store.find(other.token, "other browser")
    empty = store.create(None)
    third = store.create(None)
    assert [empty in store.list_all(), third in store.list_all()] == [False, True]
    ask(third, "What?")
    store.create(None)
    assert other in store.list_all(), "used after the others"
    assert len(store.list_all()) == 5
    # Answers in progress stay.
    for one in store.list_all():
        one.is_generating = True
    with pytest.raises(UserError, match="Wait for the end"):
        store.create(None)
    store.list_all()[-1].is_generating = False
    newest = store.list_all()[-1]
    store.create(None)
    assert (newest in store.list_all(), other in store.list_all()) == (False, True)


def test_images_are_stored_original_and_shown_without_metadata(chat, tmp_path):
    image, file = Image.new("RGB", (2 * chat_store.MAX_DISPLAY_SIDE, 40)), tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a secret place"
    image.save(file, exif=exif)
    [stored] = add(chat, file.read_bytes())
    assert stored.read_bytes() == file.read_bytes()
    shown = chat.images[stored]
    assert (shown.width, shown.height) == (40, 2 * chat_store.MAX_DISPLAY_SIDE)
    with Image.open(shown.display_path) as copy:
        assert copy.size == (20, chat_store.MAX_DISPLAY_SIDE)
        assert not copy.getexif()
    assert b"secret" not in shown.display_path.read_bytes()
    # Another image of the same name does not replace it.
    other = write_noise_image(tmp_path / "b.png", 30, 30).read_bytes()
    assert add(chat, other)[0].read_bytes() == other
    assert stored.read_bytes() == file.read_bytes()
    assert [*(tmp_path / "private" / "uploads").iterdir()] == [], "uploads are moved"


def test_pages_of_a_pdf_are_images_of_a_message(chat, tmp_path):
    pages = [Image.new("RGB", (30 * n, 40)) for n in (1, 2)]
    pages[0].save(tmp_path / "a.pdf", save_all=True, append_images=pages[1:])
    content = (tmp_path / "a.pdf").read_bytes()
    with chat.take_uploads("", [upload(chat, content, "a.pdf")]) as paths:
        list(chat.session.send("Which page?", paths, [GenerationOptions()]).replies[0])
    assert [path.name for path in paths] == ["1-a.pdf#page=1", "1-a.pdf#page=2"]
    assert [(image.width, image.height) for image in chat.images.values()] == [(60, 80), (120, 80)]
    with chat.export_archive() as archive, zipfile.ZipFile(archive) as file:
        assert file.namelist() == ["chat/chat.jsonl", "chat/images/1-a.pdf"]
        file.extractall(tmp_path)
    (sample,) = read_samples(tmp_path / "chat" / "chat.jsonl")
    images = [part.image for part in sample.iter_parts() if part.type == "image"]
    assert [read_image_size(tmp_path / "chat" / one) for one in images] == [(80, 60), (80, 120)]
    ids = [upload(chat, content, "a.pdf") for _ in range(5)]
    with pytest.raises(UserError, match="10 images"), chat.take_uploads("", ids):
        pass
    chat.session.undo()
    chat.remove_images(paths)
    assert not any(chat.folder.glob("1-*"))


def test_refused_messages_leave_their_uploads_in_place(chat, tmp_path):
    image = write_noise_image(tmp_path / "a.png", 30, 30).read_bytes()
    bomb = tmp_path / "bomb.png"
    Image.new("1", (10_000, 10_000)).save(bomb)
    assert bomb.stat().st_size < 20_000
    many = chat_store.MAX_IMAGES_PER_MESSAGE + 1
    long = "x" * (chat_store.MAX_MESSAGE_CHARS + 1)
    for contents, text, error, words in (
        ([image] * many, "", UserError, f"{many} images"),
        ([image], long, UserError, f"{len(long)} characters"),
        ([image, bomb.read_bytes()], "", CorruptImageError, "100000000"),
        ([image, b"<svg onload=alert(1)>"], "", CorruptImageError, "not an image"),
    ):
        ids = [upload(chat, content) for content in contents]
        with pytest.raises(error, match=words), chat.take_uploads(text, ids):
            pass
        assert [chat.uploads.find(one).read_bytes() for one in ids] == contents
    ids = [upload(chat, image)]
    with pytest.raises(ValueError, match="refused"), chat.take_uploads("", ids):
        raise ValueError("refused")
    assert chat.uploads.find(ids[0]).read_bytes() == image
    with pytest.raises(UserError, match="expired"), chat.take_uploads("", ["../" * 12]):
        pass
    assert ([*chat.folder.iterdir()], chat.images) == ([], {})
    for _ in range(chat_store.MAX_IMAGES_PER_CHAT):
        add(chat, image)
    with pytest.raises(UserError, match="1 image; at most"):
        add(chat, image)


def test_answer_stops_when_no_tab_follows_it(store, chat):
    store.service.is_endless = True
    earlier, turn = (chat.session.send("What?", [], [GenerationOptions()]) for _ in range(2))
    [reply] = turn.replies
    chat.is_generating, chat.num_streams = True, 1
    chat.stop_unfollowed(turn)

    async def run() -> None:
        async for _ in reply:
            if len(reply.text) > 50:
                chat.num_streams = 0
                # A timer of an earlier answer does not stop this one.
                chat.stop_unfollowed(earlier if len(reply.text) < 100 else turn)

    asyncio.run(asyncio.wait_for(run(), 10))
    assert reply.finish_reason == "cancelled"
    assert len(reply.text) >= 100


def test_no_more_conversations_are_deleted_than_needed(store, noise, tmp_path, monkeypatch):
    small = write_noise_image(tmp_path / "small.png", 50, 50).read_bytes()
    chats = []
    for number, content in enumerate((small, noise, noise)):
        chats.append(store.create(f"browser {number}"))
        ask(chats[-1], "What?", content)
    for chat in chats:
        age(chat)
        time.sleep(0.001)
    stored = count_bytes(tmp_path / "private")
    monkeypatch.setattr(uploads, "MAX_STORED_BYTES", stored)
    for num_bytes, expected in (
        (stored + 1, [True, True, True]),  # not even all of them suffice
        (len(noise), [True, False, True]),
        (2 * len(noise), [True, False, False]),
    ):
        with contextlib.suppress(uploads.DiskFullError), store.budget.reserve(num_bytes):
            assert num_bytes <= stored
        assert [chat.folder.exists() for chat in chats] == expected
