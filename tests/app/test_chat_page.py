"""Tests of the chat page: stored conversations and limits, requests, and flows in a browser."""

import io
import json
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from browser import PHONE_WIDTH, XSS_PAYLOADS, Browser
from engine_fixtures import write_noise_image
from PIL import Image
from service_fixture import run_service, write_shape_image
from starlette.testclient import TestClient
from web_server_fixture import ChatPageDriver, ScriptedService, get_image_pool, run_web_page

from finesight.app import chat_page, pages
from finesight.app.chat_page import BROWSER_COOKIE, ChatStore, StoredChat, make_chat_app
from finesight.app.server import Access
from finesight.data.image_header import CorruptImageError, read_image_size
from finesight.data.sample import BoxPart, ImagePart, read_samples
from finesight.errors import UserError
from finesight.infer.model_loader import load_inference_model
from finesight.infer.request import GenerationOptions, SamplingParams
from finesight.manifest import Manifest
from finesight.model_folder import TINY_MODEL
from finesight.serve.preprocessing_jobs import encode_in_worker
from finesight.vision.image_processing import load_image
from finesight.vision.image_reader import create_image_pool


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
        numbers += chat.add_image(path)
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


def test_pages_of_a_pdf_are_images_of_a_message(chat, tmp_path):
    pages = [Image.new("RGB", (30 * n, 40)) for n in (1, 2)]
    pages[0].save(tmp_path / "a.pdf", save_all=True, append_images=pages[1:])
    content = (tmp_path / "a.pdf").read_bytes()
    paths = add(chat, content, name="a.pdf")
    list(chat.session.send("Which page?", paths, [GenerationOptions()]).replies[0])
    assert [path.name for path in paths] == ["1-a.pdf#page=1", "1-a.pdf#page=2"]
    shown = [(one.number, one.name, one.width, one.height) for one in chat.images.values()]
    assert shown == [(1, "a.pdf#page=1", 60, 80), (2, "a.pdf#page=2", 120, 80)]
    with chat.export_archive() as archive, zipfile.ZipFile(archive) as file:
        assert file.namelist() == ["chat/chat.jsonl", "chat/images/1-a.pdf"]
        file.extractall(tmp_path)
    (sample,) = read_samples(tmp_path / "chat" / "chat.jsonl")
    images = [part.image for part in sample.iter_parts() if part.type == "image"]
    assert [read_image_size(tmp_path / "chat" / one) for one in images] == [(80, 60), (80, 120)]
    chat.remove_images(add(chat, content, name="b.pdf")[:1])
    assert chat.folder.joinpath("3-b.pdf").exists(), "its other page may be sent"
    with pytest.raises(UserError, match="10 images"):
        add(chat, *[content] * 5, name="c.pdf")
    chat.session.undo()
    chat.remove_images([*chat.images])
    assert [*chat.folder.glob("*.pdf")] == [*chat.folder.glob("*.webp")] == []


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


PASSWORD = "right-password"


@pytest.fixture(scope="module")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("images")
    return [write_shape_image(folder, number) for number in (0, 10)]


def assert_page_is_clean(browser: Browser, address: str) -> None:
    """Check for console messages, foreign requests, overflow and missing labels."""
    assert browser.messages() == []
    assert [
        url for url in browser.requests() if not url.startswith((address, f"blob:{address}"))
    ] == []
    assert browser.overflow_width() == 0
    assert browser.unlabeled_elements() == []


def test_conversation_is_drawn_reloaded_edited_and_exported(browser, image_paths, tmp_path):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    (first, question), (second, _) = image_paths
    questions = "[...document.querySelectorAll('.question .message-text')].map(at => at.innerText)"

    def type_keys(*words: str) -> None:
        browser.driver.switch_to.active_element.send_keys(*words)

    with run_service("finesight-tiny") as service, run_web_page(service) as page:
        visit = ChatPageDriver(browser, page.address, PHONE_WIDTH)
        visit.ask(question, [first, second])
        assert len(visit.read_texts(".question img")) == 2
        [chat] = page.store.list_all()
        [box] = chat.session.turns[0].replies[0].boxes
        assert visit.read_texts(".box b") == [box.label]
        across, down = load_image(first).size
        drawn = browser.run(
            "const image = document.querySelector('.boxed img').getBoundingClientRect();"
            " const box = document.querySelector('.box').getBoundingClientRect();"
            " return [box.left - image.left, box.top - image.top, box.right - image.left,"
            " box.bottom - image.top].map((n, i) => n / (i % 2 ? image.height : image.width));"
        )
        x1, y1, x2, y2 = box.xyxy
        expected = [x1 / across, y1 / down, x2 / across, y2 / down]
        assert drawn == pytest.approx(expected, abs=0.01)
        assert_page_is_clean(browser, page.address)

        visit.ask("Why?")
        browser.driver.refresh()
        visit.wait_for_script(f"return {questions}.join() === {question + ',Why?'!r};")
        visit.wait_for_script(
            "return [...document.querySelectorAll('#turns img')].every(at => at.naturalWidth > 0);"
        )
        browser.messages()  # the aborted streams of the page before
        # Enlarged images have their boxes, and Escape closes them.
        visit.click(".boxed .zoom")
        assert visit.read_texts("dialog .box b") == [box.label]
        visit.click("dialog .view")
        type_keys(keys.ESCAPE)
        visit.wait_for_script("return !document.querySelector('dialog[open]');")
        visit.click(".of-question [data-form]")
        type_keys(" Now.", keys.ENTER)
        visit.wait_for_script(f"return {questions}.join() === {question + ' Now.'!r};")
        visit.wait_until_idle()
        assert len(visit.read_texts(".question img")) == 2

        link = browser.run("return document.querySelector('#export').href;")
        [cookie] = browser.driver.get_cookies()
        assert cookie["httpOnly"]
        headers = {"cookie": f"{BROWSER_COOKIE}={cookie['value']}"}
        with urllib.request.urlopen(urllib.request.Request(link, headers=headers)) as answer:
            assert "attachment" in answer.headers["content-disposition"]
            zipfile.ZipFile(io.BytesIO(answer.read())).extractall(tmp_path)
        [sample] = read_samples(tmp_path / "chat/chat.jsonl")
        named = [part.image for part in sample.iter_parts() if isinstance(part, ImagePart)]
        contents = [(tmp_path / "chat" / name).read_bytes() for name in named]
        assert contents == [first.read_bytes(), second.read_bytes()]
        assert sample.messages[0].content[-1].text == f"{question} Now."
        assert [*page.folder.rglob("*.zip")] == []

        visit.click_button("New chat")
        visit.wait_for_script("return !document.querySelector('#welcome').hidden;")
        visit.ask("Who?")
        visit.click("#chats summary")
        assert visit.read_texts("#chats .title") == ["Who?", f"{question} Now."]
        visit.click("li:nth-child(2) .title")
        visit.wait_for_script(f"return {questions}.join() === {question + ' Now.'!r};")
        visit.click("#chats summary")
        visit.click("li:nth-child(1) [data-confirm]")
        browser.driver.switch_to.alert.accept()
        visit.wait_for_script("return document.querySelectorAll('.title').length === 1;")
        assert visit.read_texts("#chats .title") == [f"{question} Now."]


def test_stop_regenerate_and_undo(browser, image_paths):
    manifest = Manifest.model_construct(metric=None, max_new_tokens=99, prompts=("<b>Say it.",))
    parrot = ScriptedService(lambda text: (f"{text} ", ()), is_endless=True, manifest=manifest)
    with run_web_page(parrot) as page:
        visit = ChatPageDriver(browser, page.address, PHONE_WIDTH)
        visit.click("#settings-panel summary")
        browser.run("document.querySelector('#temperature').value = '1.5';")
        browser.run(
            "const field = document.querySelector('#system_prompt'); field.value += ' Be brief.';"
        )
        visit.click("#prompts button")
        assert browser.run("return document.activeElement.value;") == "<b>Say it."
        browser.run("document.activeElement.value = '';")
        visit.submit("Say it.", [image_paths[0][0]])
        for requested in (1, 2):
            visit.wait_for_script(
                "return document.querySelector('.streaming')?.textContent.length > 40;"
            )
            assert len(parrot.requests) == requested
            visit.click("#stop")
            visit.wait_until_idle()
            assert visit.read_texts(".facts") == ["tokens: 1 · stopped"]
            assert visit.count_turns() == 1
            if requested == 1:
                visit.click_button("Regenerate")
        for options in parrot.requests:
            assert options.max_new_tokens == 99
            assert options.sampling_params == SamplingParams(temperature=1.5)
        [chat] = page.store.list_all()
        assert chat.session.system_prompt == "Answer. Be brief."
        visit.click_button("Regenerate")
        visit.wait_for_script("return !!document.querySelector('.streaming');")
        browser.driver.refresh()
        # The reload stops the answer, or the page shows its rest.
        visit.wait_for_script(
            "document.querySelector('#stop:not([hidden])')?.click();"
            " return !!document.querySelector('.facts');"
        )
        visit.wait_until_idle()
        browser.messages()  # the aborted streams of the page before
        visit.click_button("Undo")
        visit.wait_for_script("return !document.querySelector('#welcome').hidden;")
        visit.wait_for_script("return document.querySelector('#question').value === 'Say it.';")
        assert_page_is_clean(browser, page.address)


def test_video_is_shown_and_answered(browser, tmp_path, monkeypatch):
    clip = pytest.importorskip("video_fixtures").write_video(tmp_path / "clip.mp4")
    renderer = load_inference_model(TINY_MODEL, "cpu").renderer
    pool = create_image_pool(renderer, encode_in_worker.__module__)
    with (
        closing(pool),
        run_service(TINY_MODEL, partial(encode_in_worker, pool)) as service,
        run_web_page(service, pool=pool) as page,
    ):
        visit = ChatPageDriver(browser, page.address, PHONE_WIDTH)
        visit.ask("What is shown?", [clip])
        [chat] = page.store.list_all()
        [reply] = chat.session.turns[0].replies
        assert (reply.image_path, reply.boxes) == (None, ())
        assert visit.read_texts(".reply .message-text") == [reply.prediction.answer]
        loaded = "const video = document.querySelector('.question video'); video.load();"
        visit.wait_for_script(f"{loaded} return video.poster && video.clientHeight > 20;")
        types = "fetch(one).then((got) => got.headers.get('content-type'))"
        urls = "[video.src, video.poster]"
        script = f"return Promise.all({urls}.map((one) => {types}));"
        assert browser.run(f"{loaded} {script}") == ["video/mp4", "image/webp"]
        visit.ask("Why?")
        assert_page_is_clean(browser, page.address)
        assert browser.find_layout_problems() == []
    # Without PyAV, the page says what to install.
    (tmp_path / "without/av").mkdir(parents=True)
    (tmp_path / "without/av/__init__.py").write_text("raise ImportError('missing')")
    monkeypatch.syspath_prepend(tmp_path / "without")
    with closing(create_image_pool()) as pool, run_web_page(ScriptedService(), pool=pool) as page:
        visit = ChatPageDriver(browser, page.address)
        visit.choose_files([clip])
        visit.wait_for_script("return !document.querySelector('#error').hidden;")
        assert "pip install 'finesight[video]'" in visit.read_texts("#error")[0]


def test_html_payloads_and_errors_are_shown_as_text(browser, tmp_path):
    def answer(text: str) -> tuple[str, tuple[BoxPart, ...]]:
        return text, (BoxPart(label=text, xyxy=(4.0, 4.0, 40.0, 30.0)),)

    typed = "# no heading\n**no** $$x^2$$ `code` [x](http://127.0.0.1:9/)\n\n  two blanks"
    names = ("<img src=x onerror=alert(9)>", "base")
    with run_web_page(ScriptedService(answer, model_names=names)) as page:
        visit = ChatPageDriver(browser, page.address)
        assert visit.read_texts("h1 span") == [names[0]]
        browser.run("document.querySelector('#compare').value = 'base';")
        for number, payload in enumerate(XSS_PAYLOADS):
            image = tmp_path / f"{payload.replace('/', '')[:90]}.png"
            Image.new("RGB", (64, 48), (number, 0, 0)).save(image)
            visit.ask(payload, [image] if number % 4 == 0 else [])
        visit.ask(typed)
        texts = [*XSS_PAYLOADS, typed]
        assert visit.read_texts(".question .message-text") == texts
        replies = visit.read_texts(".reply .message-text")
        assert replies == [text for text in texts for _ in names]
        assert set(visit.read_texts(".box b")) >= set(XSS_PAYLOADS)
        assert browser.executed_payloads() == []
        elements = "'#turns script, #turns svg, #turns a'"
        assert browser.run(f"return document.querySelectorAll({elements}).length;") == 0
        assert_page_is_clean(browser, page.address)
        (tmp_path / "<b>x<b>.png").write_text("no image")
        for question, images, text in (
            ("What?", [tmp_path / "<b>x<b>.png"], "not an image"),
            ("refuse", [], "<b>refused</b>"),
        ):
            visit = ChatPageDriver(browser, page.address)
            visit.choose_files(images)
            if not images:
                visit.submit(question)
            visit.wait_for_script("return !document.querySelector('#error').hidden;")
            assert text in visit.read_texts("#error")[0]
            assert visit.count_turns() == 0


SETTINGS: dict[str, Any] = {"max_new_tokens": 9}


@contextmanager
def open_client(service: ScriptedService, folder: Path) -> Iterator[TestClient]:
    app = make_chat_app(ChatStore(service, folder, get_image_pool()), Access())
    with TestClient(app, "http://127.0.0.1") as client:
        client.get("/")
        yield client


def send(client: TestClient, text: str, token: str = "", **values: Any) -> Any:
    """Send a question, and return the state at the end of the answer."""
    token = token or client.post("/chats").json()["token"]
    body = {"text": text, "settings": SETTINGS, **values}
    response = client.post(f"/chats/{token}/ask", json=body)
    assert response.status_code == 200, response.text
    return read_state(client, token)


def read_state(client: TestClient, token: str) -> Any:
    """Follow an answer to its end."""
    *_, last = client.get(f"/chats/{token}/stream").text.strip().split("\n\n")
    return json.loads(last.removeprefix("data: "))["state"]


def test_requests_reach_no_conversation_of_another_browser(tmp_path):
    with open_client(ScriptedService(), tmp_path / "private") as client:
        token = send(client, "secret")["token"]
        owner = dict(client.cookies)
        body = {"text": "x", "index": 0, "settings": SETTINGS}
        for cookies in ({}, {BROWSER_COOKIE: "a" * 43}):
            client.cookies.clear()
            client.cookies.update(cookies)
            assert "data-token" not in client.get("/chats").json()["chats"]
            for path in ("", "/stream", "/chat.zip"):
                assert client.get(f"/chats/{token}{path}").status_code == 404
            for name in ("ask", "uploads", "undo", "stop", "delete"):
                assert client.post(f"/chats/{token}/{name}", json=body).status_code == 404
        client.cookies.clear()
        # Without cookies, the token is the secret.
        assert send(client, "mine")["turns"].count('class="turn"') == 1
        client.cookies.update(owner)
        assert "secret" in client.get(f"/chats/{token}").json()["turns"]


MALFORMED = [
    *({"settings": {**SETTINGS, name: value}} for name, value in (
        *(("compare", 1), ("max_new_tokens", 0), ("max_new_tokens", 1e308)),
        *(("temperature", -1), ("temperature", None), ("top_p", 0), ("top_k", -1)),
        *(("repetition_penalty", 9), ("seed", 0.5), ("seed", -2), ("seed", 2**53)),
        *(("system_prompt", "x" * 20_001), ("unknown", 1)),
    )),
    *({"text": text} for text in (None, 1, "\ud800", "x" * 20_001, "")),
    *({"files": files} for files in ("x", [None], ["../x"], [1], [1] * 1001)),
    *({"index": index} for index in (-1, 5, 0.5)),
    {"settings": None},
]  # fmt: skip


def test_malformed_messages_are_refused(tmp_path, capfd):
    with open_client(ScriptedService(), tmp_path / "private") as client:
        token = client.post("/chats").json()["token"]
        for change in MALFORMED:
            body = json.dumps({"text": "What?", "settings": SETTINGS, **change})
            response = client.post(f"/chats/{token}/ask", content=body)
            assert (response.status_code, bool(response.json()["error"])) == (422, True), change
        assert send(client, "still there", token)["turns"].count('class="turn"') == 1
    assert capfd.readouterr().err == ""


def test_two_tabs_follow_an_answer_until_both_are_closed(monkeypatch):
    monkeypatch.setattr(chat_page, "UNFOLLOWED_S", 0.3)
    gate = threading.Event()

    def answer(text: str) -> tuple[str, tuple[BoxPart, ...]]:
        gate.wait()
        return text, ()

    with run_web_page(ScriptedService(answer, is_endless=True)) as page:
        chat = page.store.create(None)

        def request(path: str, body: object = None) -> Any:
            data = None if body is None else json.dumps(body).encode()
            return urllib.request.urlopen(f"{page.address}chats/{chat.token}/{path}", data, 30)

        body = {"text": "What?", "settings": SETTINGS}
        sender = threading.Thread(target=request, args=("ask", body))
        sender.start()
        while not chat.is_generating:
            time.sleep(0.02)
        # The second tab follows the answer while its images are read.
        second = request("stream")
        gate.set()
        sender.join()
        [reply] = chat.session.turns[0].replies
        first = request("stream")
        assert b'"index": 0' in first.readline()
        assert b'"index": 0' in second.readline()
        with pytest.raises(HTTPError, match="422"):
            request("ask", {"text": "Again?", "settings": SETTINGS})
        first.close()
        size = len(reply.text)
        for _ in range(30):
            second.readline()
        assert len(reply.text) > size
        assert chat.is_generating
        second.close()
        while chat.is_generating:
            time.sleep(0.02)
        assert reply.finish_reason == "cancelled"


def test_password_is_asked_for_before_a_question(browser, image_paths):
    with run_web_page(ScriptedService(), password=PASSWORD) as page:
        visit = ChatPageDriver(browser, page.address)
        assert browser.run("return location.pathname;") == "/sign-in"
        assert browser.unlabeled_elements() == []
        for password, then in (("wrong-password", "[role=alert]"), (PASSWORD, "h1 span")):
            browser.driver.find_element("css selector", "input").send_keys(f"{password}\n")
            visit.wait_for_script(f"return !!document.querySelector('{then}');")
        cookies = {one["name"]: one["httpOnly"] for one in browser.driver.get_cookies()}
        assert cookies == {f"finesight-chat-{page.port}": True, BROWSER_COOKIE: True}
        visit.ask("What is it?", [image_paths[0][0]])
        assert visit.read_texts(".reply .message-text") == ["What is it?"]
        assert len(visit.read_texts(".question img")) == 1


@pytest.mark.parametrize("language", ["en-GB,en", "zh-CN,zh;q=0.9,en;q=0.8"])
def test_page_is_accessible_in_the_language_of_the_browser(browser, language):
    tag = language[:2]
    with run_web_page(ScriptedService()) as page:
        visit = ChatPageDriver(browser, page.address, language=language)
        visit.wait_for_script(f"return document.documentElement.lang.startsWith('{tag}');")
        assert browser.find_layout_problems() == [], "empty"
        visit.ask("Hello?")
        visit.click("#chats summary")
        visit.click("#settings-panel summary")
        visit.wait_for_script("return document.querySelector('#settings-panel').open;")
        visit.click(".of-question [data-form]")
        assert browser.find_layout_problems() == [], "conversation"
        assert browser.messages() == []
        visit.click("#language")
        other = {"en": "zh", "zh": "en"}[tag]
        visit.wait_for_script(f"return document.documentElement.lang.startsWith('{other}');")
