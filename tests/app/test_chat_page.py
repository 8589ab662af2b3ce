"""Browser tests of the chat page: one flow each."""

from __future__ import annotations

import asyncio
import io
import ssl
import threading
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from axe import AxeChecker
from browser import DESKTOP_WIDTH, PHONE_WIDTH, XSS_PAYLOADS, Browser
from chat_page_driver import ChatPageDriver
from finesight.web.access_middleware import BROWSER_COOKIE, SESSION_COOKIE
from hub_fixtures import certificate
from PIL import Image
from service_fixture import run_service, write_random_adapter, write_shape_image
from web_server_fixture import ScriptedService, run_web_page

from finesight.data.sample import BoxPart, ImagePart, read_samples
from finesight.infer.request import SamplingParams
from finesight.manifest import Manifest
from finesight.vision.image_processing import load_image

__all__ = ["certificate"]

PASSWORD = "right-password"


@pytest.fixture(scope="module")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("images")
    return [write_shape_image(folder, number) for number in (0, 10)]


def assert_page_is_clean(browser: Browser, address: str) -> None:
    """Check for console messages, foreign requests, overflow and missing labels."""
    assert browser.messages() == []
    assert [url for url in browser.requests() if not url.startswith(address)] == []
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
        [session] = [one for one in page.visitors.list_sessions() if one.chat.turns]
        [box] = session.chat.turns[0].replies[0].boxes
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
            "return [...document.querySelectorAll('#chat img')].every(at => at.naturalWidth > 0);"
        )
        browser.messages()  # the aborted streams of the page before
        # Enlarged images have their boxes, and Escape closes them.
        visit.click(".boxed .zoom")
        assert visit.read_texts("dialog .box b") == [box.label]
        visit.click("dialog .view")
        type_keys(keys.ESCAPE)
        visit.wait_for_script("return !document.querySelector('dialog');")
        visit.click(".of-question [data-form]")
        type_keys(" Now.", keys.ENTER)
        visit.wait_for_script(f"return {questions}.join() === {question + ' Now.'!r};")
        visit.wait_until_idle()
        assert len(visit.read_texts(".question img")) == 2

        link = browser.run("return document.querySelector('#export a').href;")
        with urllib.request.urlopen(link) as answer:
            assert "attachment" in answer.headers["content-disposition"]
            zipfile.ZipFile(io.BytesIO(answer.read())).extractall(tmp_path)
        [sample] = read_samples(tmp_path / "chat/chat.jsonl")
        named = [part.image for part in sample.iter_parts() if isinstance(part, ImagePart)]
        contents = [(tmp_path / "chat" / name).read_bytes() for name in named]
        assert contents == [first.read_bytes(), second.read_bytes()]
        assert sample.messages[0].content[-1].text == f"{question} Now."
        assert [*page.folder.rglob("*.zip")] == []

        visit.click_button("New chat")
        visit.wait_for_script("return !!document.querySelector('.welcome');")
        visit.ask("Who?")
        visit.click(".chats summary")
        assert visit.read_texts(".chats .title") == ["Who?", f"{question} Now."]
        visit.click("li:nth-child(2) [data-form]")
        type_keys(keys.CONTROL, "a")
        type_keys("<b>Stars</b>", keys.ENTER)
        visit.wait_for_script("return document.querySelectorAll('.title')[1].innerText[1] == 'b';")
        visit.click("li:nth-child(2) .title")
        visit.wait_for_script(f"return {questions}.join() === {question + ' Now.'!r};")
        visit.click(".chats summary")
        visit.click("li:nth-child(2) [data-confirm]")
        browser.driver.switch_to.alert.accept()
        visit.wait_for_script("return document.querySelectorAll('.title').length === 1;")
        assert visit.read_texts(".chats .title") == ["<b>Stars</b>"]


def test_stop_regenerate_and_undo(browser, image_paths):
    manifest = Manifest.model_construct(metric=None, max_new_tokens=99, prompts=("<b>Say it.",))
    parrot = ScriptedService(lambda text: (f"{text} ", ()), is_endless=True, manifest=manifest)
    with run_web_page(parrot) as page:
        visit = ChatPageDriver(browser, page.address, PHONE_WIDTH)
        visit.click("#settings > button")
        # The slider ignores events until the page has attached its handlers.
        visit.wait_for_script(
            "const slider = document.querySelector('#temperature input[type=range]');"
            " if (!slider) return false;"
            " slider.value = 1.5; slider.dispatchEvent(new Event('input', {bubbles: true}));"
            " return document.querySelector('#temperature input[type=number]').value === '1.5';"
        )
        browser.run(
            "const field = document.querySelector('#system-prompt textarea');"
            " field.value += ' Be brief.'; field.dispatchEvent(new Event('input'));"
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
            visit.click("#composer .stop-button")
            visit.wait_until_idle()
            assert visit.read_texts(".facts") == ["tokens: 1 · stopped"]
            assert visit.count_turns() == 1
            if requested == 1:
                visit.click_button("Regenerate")
        for options in parrot.requests:
            assert options.max_new_tokens == 99
            assert options.sampling_params == SamplingParams(temperature=1.5)
        [session] = page.visitors.list_sessions()
        assert session.chat.system_prompt == "Answer. Be brief."
        visit.click_button("Regenerate")
        visit.wait_for_script("return !!document.querySelector('.streaming');")
        browser.driver.refresh()
        # The reload stops the answer, or the page shows its rest.
        visit.wait_for_script(
            "document.querySelector('#composer .stop-button')?.click();"
            " return !!document.querySelector('.facts');"
        )
        visit.wait_until_idle()
        browser.messages()  # the aborted streams of the page before
        visit.click_button("Undo")
        visit.wait_for_script("return !!document.querySelector('.welcome');")
        visit.wait_for_script(
            "return document.querySelector('#composer textarea').value === 'Say it.';"
        )
        assert_page_is_clean(browser, page.address)


def test_finetuned_and_base_model_answer_in_parallel(browser, image_paths, tmp_path):
    (image, question), _ = image_paths
    run = write_random_adapter(tmp_path / "shapes")
    with run_service(str(run)) as service, run_web_page(service) as page:
        visit = ChatPageDriver(browser, page.address, DESKTOP_WIDTH)
        visit.click("#compare input")
        visit.ask(question, [image])
        assert visit.read_texts(".reply h3") == ["shapes", "base"]
        tuned, base = visit.read_texts(".reply .message-text")
        assert tuned != base
        visit.click("#compare input")
        visit.ask("Why?")
        assert len(visit.read_texts(".reply")) == 3
        assert_page_is_clean(browser, page.address)


def test_html_payloads_and_errors_are_shown_as_text(browser, tmp_path):
    def answer(text: str) -> tuple[str, tuple[BoxPart, ...]]:
        return text, (BoxPart(label=text, xyxy=(4.0, 4.0, 40.0, 30.0)),)

    typed = "# no heading\n**no** $$x^2$$ `code` [x](http://127.0.0.1:9/)\n\n  two blanks"
    names = ("<img src=x onerror=alert(9)>", "base")
    with run_web_page(ScriptedService(answer, model_names=names)) as page:
        visit = ChatPageDriver(browser, page.address)
        assert visit.read_texts("#title span") == [names[0]]
        visit.click("#compare input")
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
        elements = "'#chat script, #chat svg, #chat a, #chat .katex'"
        assert browser.run(f"return document.querySelectorAll({elements}).length;") == 0
        assert_page_is_clean(browser, page.address)
        (tmp_path / "<b>x<b>.png").write_text("no image")
        for question, images, text in (
            ("What?", [tmp_path / "<b>x<b>.png"], "not an image"),
            ("refuse", [], "<b>refused</b>"),
        ):
            visit = ChatPageDriver(browser, page.address)
            visit.submit(question, images)
            visit.wait_for_script("return !!document.querySelector('.notice');")
            assert text in visit.read_texts(".notice")[0]
            assert visit.count_turns() == 0


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy bytes until one side ends."""
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextmanager
def tls_proxy(context: ssl.SSLContext, port: int) -> Iterator[int]:
    """Run a TLS proxy for a local port; yields the port of the proxy."""

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        page_reader, page_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, page_writer), pump(page_reader, writer))

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(connect, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()


def test_password_sign_in_behind_a_tls_proxy(browser, certificate, tmp_path):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    browser.driver.execute_cdp_cmd("Security.setIgnoreCertificateErrors", {"ignore": True})
    with (
        run_web_page(ScriptedService(), password=PASSWORD, loopback=False) as page,
        tls_proxy(context, page.port) as port,
    ):
        address = f"https://127.0.0.1:{port}/"
        visit = ChatPageDriver(browser, address)
        assert browser.run("return location.pathname;") == "/sign-in"
        assert browser.unlabeled_elements() == []
        for password, then in (("wrong-password", "[role=alert]"), (PASSWORD, "#title h1 span")):
            browser.driver.find_element("css selector", "input").send_keys(f"{password}\n")
            visit.wait_for_script(f"return !!document.querySelector('{then}');")
        cookies = {one["name"]: one["httpOnly"] for one in browser.driver.get_cookies()}
        assert cookies == {SESSION_COOKIE: True, BROWSER_COOKIE: True}
        visit.ask("What is it?", [tmp_path / "red.png"])
        assert visit.read_texts(".reply .message-text") == ["What is it?"]
        assert len(visit.read_texts(".question img")) == 1
        assert [url for url in browser.requests() if not url.startswith(address)] == []


@pytest.mark.parametrize("language", ["en-GB,en", "zh-CN,zh;q=0.9,en;q=0.8"])
def test_page_is_accessible_in_the_language_of_the_browser(browser, language):
    axe, tag = AxeChecker(), language[:2]
    with run_web_page(ScriptedService()) as page:
        visit = ChatPageDriver(browser, page.address, language=language)
        visit.wait_for_script(f"return document.documentElement.lang === '{tag}';")
        assert axe.find_layout_problems(browser) == [], "empty"
        visit.ask("Hello?")
        visit.click(".chats summary")
        visit.click("#settings > button")
        visit.wait_for_script("return !!document.querySelector('#seed input');")
        visit.click(".of-question [data-form]")
        assert axe.find_layout_problems(browser) == [], "conversation"
        assert browser.messages() == []
        visit.click_button({"en": "中文", "zh": "English"}[tag])
        other = {"en": "zh", "zh": "en"}[tag]
        visit.wait_for_script(f"return document.documentElement.lang === '{other}';")
