"""Tests of the chat page: uploads, requests and limits, and flows in a browser."""

import asyncio
import io
import json
import os
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from browser import PHONE_WIDTH, WAIT_PAINT_SCRIPT, XSS_PAYLOADS, Browser
from engine_fixtures import write_noise_image
from html_text import ParsedPage, compact
from PIL import Image
from service_fixture import run_service, write_shape_image
from starlette.testclient import TestClient
from web_server_fixture import ChatPageDriver, ScriptedService, get_image_pool, run_web_page

from finesight.app import chat_page
from finesight.app.chat_page import make_chat_app
from finesight.app.server import Access
from finesight.infer.model_loader import load_inference_model
from finesight.infer.request import SamplingParams
from finesight.model_folder import TINY_MODEL
from finesight.samples.image_file import read_image_size
from finesight.samples.sample import BoxPart, ImagePart, read_samples
from finesight.serve.preprocessing_jobs import encode_in_worker
from finesight.settings.manifest import Manifest
from finesight.vision.image_reader import create_image_pool

SETTINGS: dict[str, Any] = {"max_new_tokens": 9}


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService()


@pytest.fixture
def client(service: ScriptedService, tmp_path: Path) -> Iterator[TestClient]:
    (tmp_path / "private").mkdir()
    app = make_chat_app(service, tmp_path / "private", get_image_pool(), Access())
    with TestClient(app, "http://127.0.0.1") as client:
        client.get("/")  # sets the cookie of the browser
        yield client


def list_files(tmp_path: Path) -> list[Path]:
    return [file for file in (tmp_path / "private").rglob("*") if file.is_file()]


def upload(client: TestClient, content: bytes, name: str = "a.png", status: int = 200) -> Any:
    response = client.post("/uploads", params={"name": name}, content=content)
    assert response.status_code == status, response.text
    return response.json()


def send(
    client: TestClient,
    text: str,
    images: Any = (),
    chat: str = "",
    index: int | None = None,
    **settings: Any,
) -> str:
    """Ask a question, wait for the answer, and return the ID of the conversation."""
    shown = client.get("/", params={"chat": chat}).text.count('<section class="turn">')
    body = {"chat": chat, "text": text, "images": images, "index": index, "num_turns": shown}
    body["settings"] = {**SETTINGS, **settings}
    response = client.post("/answers", json=body)
    assert response.status_code == 200, response.text
    chat = response.json()["chat"]
    while "data-busy" in client.get("/", params={"chat": chat}).text:
        time.sleep(0.01)
    return chat


def test_images_are_stored_original_and_shown_without_metadata(client, tmp_path):
    image, file = Image.new("RGB", (2 * chat_page.MAX_DISPLAY_SIDE, 40)), tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a secret place"
    image.save(file, exif=exif)
    [shown] = upload(client, file.read_bytes(), "a.jpg")
    page = compact(client.get(f"/turns/{send(client, 'What?', [shown])}").text)
    assert f'width="40" height="{2 * chat_page.MAX_DISPLAY_SIDE}"' in page
    assert [one.read_bytes() for one in list_files(tmp_path)] == [file.read_bytes()]
    copy = client.get(f"/images/{shown}")
    assert "sandbox" in copy.headers["content-security-policy"]
    with Image.open(io.BytesIO(copy.content)) as opened:
        assert (opened.size, {*opened.getexif()}) == ((20, chat_page.MAX_DISPLAY_SIDE), set())
    assert b"secret" not in copy.content
    for wrong in ("x", "a" * 32, f"{shown}%23page=1", f"{shown}%23page=1x", "..%2f" * 8):
        assert client.get(f"/images/{wrong}").status_code == 404


def test_unreadable_and_forgotten_images_are_deleted(client, service, tmp_path, monkeypatch):
    bomb = tmp_path / "bomb.png"
    Image.new("1", (10_000, 10_000)).save(bomb)
    assert bomb.stat().st_size < 20_000
    for content, words in (
        (bomb.read_bytes(), "100000000"),
        (b"<svg onload=alert(1)>", "not an image"),
    ):
        assert words in upload(client, content, status=422)["error"]
    assert list_files(tmp_path) == []
    noise = write_noise_image(tmp_path / "a.png", 30, 30).read_bytes()
    images = [image for _ in range(9) for image in upload(client, noise)]
    chat = send(client, "Who?", images[:8])
    monkeypatch.setattr(chat_page, "MAX_IMAGES_PER_CHAT", 8)
    for sent, text in (
        (images, "9 images; at most 8"),
        (images[8:], "1 image; at most"),
        (["../a.png"], "expired"),
    ):
        body = {"chat": chat, "text": "What?", "images": sent}
        assert text in client.post("/answers", json=body).json()["error"]
    # Only images of no conversation can be deleted alone.
    odd = ["../a.png", "x" * 32]
    assert client.post("/forget", json={"images": [*odd, *images[1:]]}).status_code == 200
    assert len(list_files(tmp_path)) == 8
    assert client.post("/answers", json={"text": "", "images": images[8:]}).status_code == 422
    client.post("/delete", json={"chat": chat})
    assert list_files(tmp_path) == []
    assert "deleted" in client.post("/answers", json={"chat": chat, "text": "?"}).json()["error"]


def test_image_that_is_deleted_while_its_question_is_sent(client, tmp_path, monkeypatch):
    noise = write_noise_image(tmp_path / "a.png", 30, 30).read_bytes()
    original = chat_page.ChatPage._send

    def forget(page, chat, body):
        turns = original(page, chat, body)
        page._remove_images(turns[-1].image_paths)
        return turns

    send(client, "", upload(client, noise, "\u3000"))  # a chat without a title
    monkeypatch.setattr(chat_page.ChatPage, "_send", forget)
    send(client, "Who?", upload(client, noise))
    assert "no longer on the server" in client.get("/").text


def test_upload_during_the_deletion_of_another_is_stored(client, tmp_path, monkeypatch):
    noise = write_noise_image(tmp_path / "a.png", 30, 30).read_bytes()
    [first], scan = upload(client, noise), os.scandir

    def scan_folder(path):
        if Path(path).name == first:
            raise FileNotFoundError(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan_folder)
    upload(client, noise)


def test_conversations_belong_to_one_browser_up_to_a_limit(client, service, monkeypatch):
    monkeypatch.setattr(chat_page, "MAX_CHATS", 2)
    chats = [send(client, f"Question {n}?") for n in range(3)]
    send(client, "Again?", chat=chats[1])
    titles = ParsedPage(client.get("/").text).text
    assert titles.index("Question 1?") < titles.index("Question 2?")
    assert "Question 0?" not in titles
    # A secret that a client chooses, such as the first character of another one, is its own.
    (name, secret), owned = next(iter(client.cookies.items())), dict(client.cookies)
    client.cookies.clear()
    client.cookies.set(name, secret[0])
    for _ in range(3):
        send(client, "Whose?")
    client.cookies.clear()
    client.cookies.update(owned)
    assert "Question 2?" in client.get("/").text
    client.cookies.clear()
    assert "Question" not in client.get("/", params={"chat": chats[2]}).text
    for path in ("/answers", "/stop", "/delete", "/chat.zip"):
        body = {"chat": chats[2], "text": "What?"}
        assert "deleted" in client.post(path, json=body).json()["error"]
    client.cookies.clear()
    assert "cookies" in client.post("/answers", json={"text": "What?"}).json()["error"]


def test_pages_of_a_pdf_are_images_of_a_message(client, tmp_path):
    pages = [Image.new("RGB", (30 * n, 40)) for n in (1, 2)]
    pages[0].save(tmp_path / "a.pdf", save_all=True, append_images=pages[1:])
    images = upload(client, (tmp_path / "a.pdf").read_bytes(), "a.pdf")
    assert [one[32:] for one in images] == ["#page=1", "#page=2"]
    assert client.get(f"/images/{images[1].replace('#', '%23')}").status_code == 200
    chat = send(client, "Which page?", images)
    archive = client.post("/chat.zip", json={"chat": chat})
    with zipfile.ZipFile(io.BytesIO(archive.content)) as file:
        assert file.namelist() == ["chat/chat.jsonl", "chat/images/1-a.pdf"]
        file.extractall(tmp_path)
    (sample,) = read_samples(tmp_path / "chat" / "chat.jsonl")
    named = [part.image for part in sample.iter_parts() if part.type == "image"]
    assert [read_image_size(tmp_path / "chat" / one) for one in named] == [(80, 60), (80, 120)]
    pages[0].save(tmp_path / "b.pdf", save_all=True, append_images=pages * 4)
    error = upload(client, (tmp_path / "b.pdf").read_bytes(), "b.pdf", status=422)["error"]
    assert "9 images" in error
    # The page shows the newest state before it deletes turns.
    error = client.post("/delete", json={"chat": chat, "index": 0, "num_turns": 2}).json()["error"]
    assert "another tab" in error
    answer = client.post("/delete", json={"chat": chat, "index": 0, "num_turns": 1})
    assert answer.json() == {"text": "Which page?"}
    assert list_files(tmp_path) == []


def test_prompt_has_the_answered_turns(client, service, tmp_path):
    [image] = upload(client, write_noise_image(tmp_path / "a.png", 30, 30).read_bytes())
    chat = send(client, "Where?", [image], system_prompt="Be brief.")
    service.answer = lambda text: ("", ())
    send(client, "Lost?", chat=chat)
    send(client, "Why?", chat=chat, compare="base")
    one, other = service.samples[-2:]
    assert one == other
    assert [options.model for options in service.requests[-2:]] == ["parrot", "base"]
    texts = ["".join(part.text for part in turn.content[-1:]) for turn in one.messages]
    assert texts == ["Where?", "Where?", "Why?"]
    assert [turn.role for turn in service.samples[0].messages] == ["system", "user"]


def test_question_alone_has_the_images_of_the_last_question_with_any(client, service, tmp_path):
    images = [
        upload(client, write_noise_image(tmp_path / "a.png", 30, side).read_bytes())[0]
        for side in (30, 60)
    ]
    chat = send(client, "Where 0?", images[:1])
    send(client, "Where 1?", images[1:], chat)
    send(client, "Why?", (), chat, ask_alone=True)
    send(client, "Who?", images[:1], chat, ask_alone=True)
    names = []
    for text in ("Why?", "Who?"):
        (sample,) = [s for s in service.samples if s.messages[-1].content[-1].text == text]
        assert [turn.role for turn in sample.messages] == ["user"]
        names += [part.image for part in sample.iter_parts() if isinstance(part, ImagePart)]
    assert [images[1] in names[0], images[0] in names[1]] == [True, True]
    send(client, "Who now?", None, chat, index=3, ask_alone=True)
    assert 'class="thumb"' in client.get(f"/turns/{chat}").text  # keeps its own image
    send(client, "And?", chat=chat)
    assert len(service.samples[-1].messages) == 9


@pytest.mark.parametrize("is_single", [False, True])
def test_single_questions_are_alone_by_default(service, tmp_path, is_single):
    arguments = service, tmp_path, get_image_pool(), Access()
    with TestClient(make_chat_app(*arguments, ask_alone=is_single), "http://127.0.0.1") as client:
        page = compact(client.get("/").text)
    is_checked = 'form="settings" checked>Ask each' in page
    assert [is_checked, "single questions" in page] == [is_single, is_single]


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
        browser.run(WAIT_PAINT_SCRIPT)
        browser.driver.switch_to.active_element.send_keys(*words)

    with run_service("finesight-tiny") as service, run_web_page(service) as page:
        visit = ChatPageDriver(browser, page.address, PHONE_WIDTH)
        visit.ask(question, [first, second])
        assert len(visit.read_texts(".question img")) == 2
        [label] = visit.read_texts(".box b")
        left, top, width, height = browser.run(
            "const { style } = document.querySelector('.box'); return ['left', 'top', 'width',"
            " 'height'].map((name) => parseFloat(style[name]) / 100);"
        )
        drawn = browser.run(
            "const image = document.querySelector('.boxed img').getBoundingClientRect();"
            " const box = document.querySelector('.box').getBoundingClientRect();"
            " return [box.left - image.left, box.top - image.top, box.right - image.left,"
            " box.bottom - image.top].map((n, i) => n / (i % 2 ? image.height : image.width));"
        )
        expected = [left, top, left + width, top + height]
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
        assert visit.read_texts("dialog .box b") == [label]
        visit.click("dialog .view")
        type_keys(keys.ESCAPE)
        visit.wait_for_script("return !document.querySelector('dialog[open]');")
        visit.click(".of-question [data-form]")
        type_keys(" Now.", keys.ENTER)
        visit.wait_for_script(f"return {questions}.join() === {question + ' Now.'!r};")
        visit.wait_until_idle()
        assert len(visit.read_texts(".question img")) == 2

        where = {"behavior": "allow", "downloadPath": str(tmp_path)}
        browser.driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)
        visit.click_button("Export")
        while not (tmp_path / "chat.zip").exists():
            time.sleep(0.05)
        zipfile.ZipFile(tmp_path / "chat.zip").extractall(tmp_path)
        [sample] = read_samples(tmp_path / "chat/chat.jsonl")
        named = [part.image for part in sample.iter_parts() if isinstance(part, ImagePart)]
        contents = [(tmp_path / "chat" / name).read_bytes() for name in named]
        assert contents == [first.read_bytes(), second.read_bytes()]
        assert sample.messages[0].content[-1].text == f"{question} Now."

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
            # An answer continues while another conversation is shown.
            visit.click_button("New chat")
            visit.wait_for_script("return !document.querySelector('#welcome').hidden;")
            visit.click("#chats summary")
            visit.click("#chats .title")
            visit.wait_for_script("return !!document.querySelector('.streaming');")
            visit.click("#stop")
            visit.wait_until_idle()
            assert visit.read_texts(".facts") == ["tokens: 1 · stopped"]
            assert visit.count_turns() == 1
            if requested == 1:
                visit.click_button("Regenerate")
        for options in parrot.requests:
            assert options.max_new_tokens == 99
            assert options.sampling_params == SamplingParams(temperature=1.5)
        shown = "return JSON.parse(document.querySelector('#turns').dataset.values).system_prompt;"
        assert browser.run(shown) == "Answer. Be brief."
        visit.click_button("Regenerate")
        visit.wait_for_script("return !!document.querySelector('.streaming');")
        browser.driver.refresh()
        # The answer continues, and is found again.
        visit.wait_for_script("return !!document.querySelector('.streaming');")
        visit.click("#stop")
        visit.wait_until_idle()
        assert visit.read_texts(".reply .message-text")[0].startswith("Say it. ")
        browser.messages()  # the aborted streams of the page before
        visit.click_button("Undo")
        visit.wait_for_script("return !document.querySelector('#welcome').hidden;")
        visit.wait_for_script("return document.querySelector('#question').value === 'Say it.';")
        assert_page_is_clean(browser, page.address)


def test_late_update_does_not_return_to_its_conversation(browser):
    """A page that was asked for before another conversation was shown arrives after it."""
    parrot = ScriptedService(lambda text: (f"{text} ", ()), is_endless=True)
    with run_web_page(parrot) as page:
        visit = ChatPageDriver(browser, page.address, PHONE_WIDTH)
        visit.submit("Say it.", [])
        visit.wait_for_script("return !!document.querySelector('.streaming');")
        # A click while the next update is scheduled: the page of the new conversation comes late,
        # and the update, which is requested between them, later.
        browser.run("""
            const [load, schedule] = [window.fetch, window.setTimeout];
            const sleep = (delay) => new Promise((go) => schedule(go, delay));
            window.fetch = async (...values) => {
              const isUpdate = String(values[0]).includes("turns/");
              const isLate = window.hasClicked;
              const response = await load(...values);
              if (isLate) await sleep(isUpdate ? 1500 : 400);
              if (isLate && isUpdate) schedule(() => (window.hasShown = true), 1000);
              return response;
            };
            window.setTimeout = (action, delay, ...values) => {
              if (delay === 80 && !window.hasClicked) {
                window.hasClicked = true;
                schedule(() => document.querySelector("#new-chat").click(), 0);
              }
              return schedule(action, delay === 80 ? 250 : delay, ...values);
            };
        """)
        visit.wait_for_script("return !!window.hasShown;")
        visit.wait_for_script("return !document.querySelector('#welcome').hidden;")
        assert visit.count_turns() == 0


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
        assert visit.read_texts(".reply .message-text") != [""]
        assert visit.read_texts(".box") == []
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


MALFORMED = [
    *({"settings": {**SETTINGS, name: value}} for name, value in (
        *(("compare", 1), ("max_new_tokens", 0), ("max_new_tokens", 1e308)),
        *(("temperature", -1), ("temperature", None), ("top_p", 0), ("top_k", -1)),
        *(("repetition_penalty", 9), ("seed", 0.5), ("seed", -2), ("seed", 2**53)),
        *(("system_prompt", "x" * 20_001), ("unknown", 1)),
    )),
    *({"text": text} for text in (None, 1, "\ud800", "x" * 20_001, "")),
    *({"images": images} for images in ("x", [None], [{"id": "x"}], ["x" * 65])),
    *({"settings": None}, {"chat": None}, {"chat": "x"}, {"index": -1}),
]  # fmt: skip


def test_malformed_messages_are_refused(client, capfd):
    for change in MALFORMED:
        body = json.dumps({"text": "What?", "settings": SETTINGS, **change})
        response = client.post("/answers", content=body)
        assert (response.status_code, bool(response.json()["error"])) == (422, True), change
    assert "still there" in client.get(f"/turns/{send(client, 'still there')}").text
    assert capfd.readouterr().err == ""


def test_one_answer_at_a_time_and_its_failure_is_shown(client, service, capfd):
    service.is_endless = True
    chat = client.post("/answers", json={"text": "What?"}).json()["chat"]
    while "What?What?" not in client.get(f"/turns/{chat}").text:
        time.sleep(0.01)
    for path in ("/answers", "/delete", "/chat.zip"):
        answer = client.post(path, json={"chat": chat, "text": "Why?"})
        assert "being generated" in answer.json()["error"]
    client.post("/stop", json={"chat": chat})
    while "stopped" not in client.get(f"/turns/{chat}").text:
        time.sleep(0.01)
    service.answer = lambda text: (1, ())  # fails beside the text of a generation
    page = client.get(f"/turns/{send(client, 'Who?')}").text
    assert "server error" in page
    assert "TypeError" in capfd.readouterr().err


def test_page_of_an_answer_that_ends_meanwhile_asks_again(client, service, monkeypatch):
    original = chat_page.ChatPage._render_turns

    async def render_before_the_end(page, chat, first_index):
        turns = await original(page, chat, first_index)
        for reply in chat.turns[-1].replies:
            reply.cancel()
        while page._chats[chat.id].is_busy:
            await asyncio.sleep(0.01)
        return turns

    service.is_endless = True
    chat = client.post("/answers", json={"text": "Who?"}).json()["chat"]
    with monkeypatch.context() as patch:
        patch.setattr(chat_page.ChatPage, "_render_turns", render_before_the_end)
        page = client.get("/", params={"chat": chat}).text
    assert "streaming" in page
    assert "data-busy" in page
    page = client.get("/", params={"chat": chat}).text
    assert "streaming" not in page
    assert "data-busy" not in page


def test_page_is_shown_while_another_chat_is_deleted(client, monkeypatch):
    deleted, shown = send(client, "What?"), send(client, "Who?")
    original = chat_page.ChatPage._render_turns

    async def render_before_the_deletion(page, chat, first_index):
        turns = await original(page, chat, first_index)
        answer = await asyncio.to_thread(client.post, "/delete", json={"chat": deleted})
        assert answer.status_code == 200
        return turns

    with monkeypatch.context() as patch:
        patch.setattr(chat_page.ChatPage, "_render_turns", render_before_the_deletion)
        page = client.get("/", params={"chat": shown})
    assert (page.status_code, "Who?" in page.text) == (200, True)
    assert "What?" not in client.get("/", params={"chat": shown}).text


HOLD_SCRIPT = """window.realFetch ??= window.fetch;
window.release = null;
window.fetch = async (url, options) => {
  const isHeld = String(url).includes(HELD) && !window.release;
  if (!isHeld) return realFetch(url, options);
  const response = IS_LATE ? await realFetch(url, options) : null;
  await new Promise((resolve) => { window.release = resolve; });
  return response ?? realFetch(url, options);
};"""
"""Holds the first request of matching URLs, or with IS_LATE its response, until `release`."""


class HeldChat(ChatPageDriver):
    """Chat page whose requests can be held, and whose server gets requests of another tab."""

    def hold(self, text: str, *, is_late: bool) -> None:
        script = HOLD_SCRIPT.replace("HELD", json.dumps(text))
        self.browser.run(script.replace("IS_LATE", json.dumps(is_late)))

    def wait_until_held(self) -> None:
        self.wait_for_script("return !!window.release;")

    def release(self) -> None:
        self.browser.run("window.release();")
        self.browser.settle()

    def request(self, path: str, **body: Any) -> None:
        options = {"method": "POST", "body": json.dumps(body)}
        self.browser.run(f"return realFetch({path!r}, {json.dumps(options)}).then(() => true);")

    def wait_for_end(self) -> None:
        text = "return realFetch(location.href).then((page) => page.text())"
        self.wait_for_script(f"{text}.then((page) => !page.includes('data-busy'));")

    @property
    def chat(self) -> str:
        return str(self.browser.run("return document.querySelector('#turns').dataset.chat;"))


def test_late_responses_and_other_tabs_leave_the_page_current(browser):
    parrot = ScriptedService(lambda text: (f"{text} ", ()), is_endless=True)
    questions = ".question .message-text"
    with run_web_page(parrot) as page:
        visit = HeldChat(browser, page.address)
        visit.submit("One?")
        # The state of an answer comes after its end is shown.
        visit.hold("turns/", is_late=True)
        visit.wait_until_held()
        visit.request("stop", chat=visit.chat)
        visit.wait_for_end()
        visit.click("#chats .title")
        visit.wait_until_idle()
        visit.release()
        assert browser.count(".streaming") == 0
        # A page comes after that of the next answer, which continues.
        visit.hold("chat=", is_late=True)
        visit.click("#chats .title")
        visit.wait_until_held()
        visit.click("#regenerate")
        visit.wait_for_script("return !!document.querySelector('.streaming');")
        visit.release()
        assert browser.count(".streaming") == 1
        # Another tab asks the next question.
        visit.hold("turns/", is_late=False)
        visit.wait_until_held()
        visit.request("stop", chat=visit.chat)
        visit.wait_for_end()
        visit.request("answers", chat=visit.chat, text="Two?")
        visit.release()
        visit.wait_for_script("return document.querySelectorAll('.turn').length === 2;")
        assert visit.read_texts(questions) == ["One?", "Two?"]
        # Another tab deletes the conversation.
        visit.hold("turns/", is_late=False)
        visit.wait_until_held()
        visit.request("stop", chat=visit.chat)
        visit.wait_for_end()
        visit.request("delete", chat=visit.chat)
        visit.release()
        visit.wait_for_script("return !document.querySelector('#welcome').hidden;")


def test_answer_that_ends_before_it_is_shown_is_announced(browser):
    with run_web_page(ScriptedService()) as page:
        visit = HeldChat(browser, page.address)
        visit.hold("chat=", is_late=False)
        visit.submit("Hello?")
        visit.wait_until_held()
        visit.wait_for_end()
        visit.release()
        visit.wait_for_script("return document.querySelector('#announcement').textContent;")
        assert visit.read_texts("#announcement") == ["Hello?"]


def test_password_is_asked_for_before_a_question(browser, image_paths):
    with run_web_page(ScriptedService(), password=PASSWORD) as page:
        visit = ChatPageDriver(browser, page.address)
        assert browser.run("return location.pathname;") == "/sign-in"
        assert browser.unlabeled_elements() == []
        for password, then in (("wrong-password", "[role=alert]"), (PASSWORD, "h1 span")):
            browser.run(WAIT_PAINT_SCRIPT)
            browser.driver.find_element("css selector", "input").send_keys(f"{password}\n")
            visit.wait_for_script(f"return !!document.querySelector('{then}');")
        cookies = {one["name"]: one["httpOnly"] for one in browser.driver.get_cookies()}
        assert [cookies.pop(f"finesight-chat-{page.port}"), *cookies.values()] == [True, True]
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
