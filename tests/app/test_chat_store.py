"""Tests of stored conversations: owners, uploaded images, and limits."""

import time
from pathlib import Path

import pytest
from engine_fixtures import write_noise_image
from PIL import Image
from starlette.testclient import TestClient
from web_server_fixture import ScriptedService, get_image_pool

from finesight.app import chat_page, pages
from finesight.app.chat_page import BROWSER_COOKIE, ChatStore, StoredChat, make_chat_app
from finesight.app.server import Access
from finesight.data.image_header import CorruptImageError
from finesight.errors import UserError
from finesight.infer.request import GenerationOptions


@pytest.fixture
def store(tmp_path: Path) -> ChatStore:
    return ChatStore(ScriptedService(), tmp_path / "private", get_image_pool())


@pytest.fixture
def chat(store: ChatStore) -> StoredChat:
    return store.create("browser")


@pytest.fixture
def noise(tmp_path: Path) -> bytes:
    return write_noise_image(tmp_path / "noise.png", 400, 400).read_bytes()


def add(chat: StoredChat, *contents: bytes, name: str = "a.png") -> list[Path]:
    numbers = []
    for content in contents:
        chat.last_number += 1
        path = chat.folder / f"{chat.last_number}-{name}"
        path.write_bytes(content)
        numbers.append(chat.add_image(path))
    return chat.find_images(numbers)


def ask(chat: StoredChat, text: str, *contents: bytes) -> None:
    turn = chat.session.send(text, add(chat, *contents), [GenerationOptions()])
    list(turn.replies[0])
    chat.changed_at = time.monotonic()


def age(chat: StoredChat) -> None:
    """Mark a conversation as not displayed."""
    chat.used_at = time.monotonic() - chat_page.SHOWN_S - 1


def count_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_images_of_a_browser_leave_space_to_others(store, noise, monkeypatch):
    client = TestClient(make_chat_app(store, Access()), "http://127.0.0.1")

    def send(browser: str, content: bytes = noise) -> int:
        headers = {"cookie": f"{BROWSER_COOKIE}={browser * 43}"}
        token = client.post("/chats", headers=headers).json()["token"]
        url = f"/chats/{token}/uploads?name=a.png"
        return client.post(url, content=content, headers=headers).status_code

    assert send("a") == 200
    monkeypatch.setattr(pages, "MAX_OWNER_BYTES", count_bytes(store._folder) * 5 // 2)
    assert [send("a"), send("a"), send("b")] == [200, 507, 200]
    assert send("a", b"no image") == 422
    monkeypatch.setattr(chat_page, "MAX_IMAGES_PER_CHAT", 0)
    assert send("b") == 422


def test_images_over_the_disk_limit_are_rejected(store, chat, noise, tmp_path, monkeypatch):
    add(chat, noise)
    monkeypatch.setattr(pages, "MAX_STORED_BYTES", 3 * count_bytes(tmp_path / "private"))
    files = [*chat.folder.iterdir()]
    add(chat, noise, noise)
    with pytest.raises(pages.DiskFullError, match="no disk space"):
        add(chat, noise)
    assert len(chat.images) == 3
    assert len([*chat.folder.iterdir()]) == 3 * len(files)
    assert count_bytes(tmp_path / "private" / "chats") <= pages.MAX_STORED_BYTES


def test_exports_count_until_they_are_closed(chat, noise, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="0 turns"):
        chat.export_archive()
    ask(chat, "What?", noise)
    size = count_bytes(tmp_path / "private")
    monkeypatch.setattr(pages, "MAX_STORED_BYTES", size + 2 * len(noise))
    archive = chat.export_archive()
    with pytest.raises(pages.DiskFullError, match="no disk space"):
        chat.export_archive()
    archive.close()
    chat.export_archive().close()
    assert count_bytes(chat.folder) < size + len(noise)


def test_new_conversations_replace_unused_ones(store, monkeypatch):
    monkeypatch.setattr(chat_page, "MAX_CHATS_PER_BROWSER", 3)
    monkeypatch.setattr(chat_page, "MAX_CHATS", 5)
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
    image, file = Image.new("RGB", (2 * chat_page.MAX_DISPLAY_SIDE, 40)), tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a secret place"
    image.save(file, exif=exif)
    [stored] = add(chat, file.read_bytes(), name="a.jpg")
    assert stored.read_bytes() == file.read_bytes()
    shown = chat.images[stored]
    assert (shown.width, shown.height) == (40, 2 * chat_page.MAX_DISPLAY_SIDE)
    with Image.open(shown.display_path) as copy:
        assert copy.size == (20, chat_page.MAX_DISPLAY_SIDE)
        assert not copy.getexif()
    assert b"secret" not in shown.display_path.read_bytes()
    # Another image of the same name does not replace it.
    other = write_noise_image(tmp_path / "b.png", 30, 30).read_bytes()
    assert add(chat, other)[0].read_bytes() == other
    assert stored.read_bytes() == file.read_bytes()


def test_unreadable_images_are_deleted_and_unused_ones_give_way(chat, tmp_path, monkeypatch):
    image = write_noise_image(tmp_path / "a.png", 30, 30).read_bytes()
    bomb = tmp_path / "bomb.png"
    Image.new("1", (10_000, 10_000)).save(bomb)
    assert bomb.stat().st_size < 20_000
    for content, words in (
        (bomb.read_bytes(), "100000000"),
        (b"<svg onload=alert(1)>", "not an image"),
    ):
        with pytest.raises(CorruptImageError, match=words):
            add(chat, content)
    assert ([*chat.folder.iterdir()], chat.images) == ([], {})
    ask(chat, "What?", image)
    numbers = [chat.images[path].number for path in add(chat, image)]
    chat.remove_images([*chat.images])
    assert len(chat.images) == 1
    for wrong, words in ((numbers, "expired"), ([1] * 9, "9 images; at most 8")):
        with pytest.raises(UserError, match=words):
            chat.find_images(wrong)
    with pytest.raises(UserError, match="20001 characters"):
        chat.check_text("x" * (chat_page.MAX_MESSAGE_CHARS + 1))


def test_unused_conversations_give_their_disk_space(store, noise, tmp_path, monkeypatch):
    chats = [store.create(f"browser {number}") for number in range(3)]
    for chat in chats:
        ask(chat, "What?", noise)
    for chat in chats[:2]:
        age(chat)
        time.sleep(0.001)
    monkeypatch.setattr(pages, "MAX_STORED_BYTES", count_bytes(tmp_path / "private"))
    add(chats[2], noise)
    assert [chat.folder.exists() for chat in chats] == [False, True, True]
    add(chats[2], noise)
    with pytest.raises(pages.DiskFullError):
        add(chats[2], noise)
    assert [chat.folder.exists() for chat in chats] == [False, False, True]
