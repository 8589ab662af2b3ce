"""Browser tests of the chat page with the bundled model."""

from __future__ import annotations

import io
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe import AxeChecker
from browser import DESKTOP_WIDTH, PHONE_WIDTH, XSS_PAYLOADS, Browser
from chat_page_driver import ChatPageDriver
from PIL import Image
from service_fixture import run_service, write_random_adapter, write_shape_image
from web_server_fixture import RunningWebPage, ScriptedService, run_web_page

from finesight.data.sample import BoxPart, ImagePart, read_samples
from finesight.infer.request import SamplingParams
from finesight.manifest import Manifest
from finesight.vision.image_processing import load_image
from finesight.web.access_middleware import BROWSER_COOKIE, SESSION_COOKIE

PASSWORD = "right-password"
WIDTHS = pytest.mark.parametrize("width", [PHONE_WIDTH, DESKTOP_WIDTH])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWebPage]:
    run = write_random_adapter(tmp_path_factory.mktemp("run") / "shapes")
    with run_service(str(run)) as service, run_web_page(service) as location:
        yield location


@pytest.fixture(scope="module")
def tiny_page() -> Iterator[RunningWebPage]:
    with run_service("finesight-tiny") as service, run_web_page(service) as location:
        yield location


@pytest.fixture(scope="module")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("images")
    return [write_shape_image(folder, number) for number in (0, 10)]


def assert_page_is_clean(browser: Browser, location: RunningWebPage) -> None:
    """Check for console messages, foreign requests, overflow and missing labels."""
    assert browser.messages() == []
    assert [url for url in browser.requests() if not url.startswith(location.address)] == []
    assert browser.overflow_width() == 0
    assert browser.unlabeled_elements() == []


@WIDTHS
def test_boxes_are_drawn_on_the_target_image(browser, tiny_page, image_paths, width):
    visit = ChatPageDriver(browser, tiny_page.address, width)
    (first, question), (second, _) = image_paths
    visit.ask(question, [first, second])
    assert visit.read_texts(".question .message-text") == [question]
    assert len(visit.read_texts(".question img")) == 2
    [visitor] = [v for v in tiny_page.visitors.list_sessions() if v.chat.turns]
    [box] = visitor.chat.turns[0].replies[0].boxes
    assert visit.read_texts(".box b") == [box.label]
    across, down = load_image(first).size
    drawn = browser.run(
        "const image = document.querySelector('.boxed img').getBoundingClientRect();"
        " const box = document.querySelector('.box').getBoundingClientRect();"
        " return [box.left - image.left, box.top - image.top, box.right - image.left,"
        " box.bottom - image.top].map((n, i) => n / (i % 2 ? image.height : image.width));"
    )
    x1, y1, x2, y2 = box.xyxy
    assert drawn == pytest.approx([x1 / across, y1 / down, x2 / across, y2 / down], abs=0.01)
    assert_page_is_clean(browser, tiny_page)
    tiny_page.visitors.delete(visitor)


def test_missing_image_is_hinted_at(browser, image_paths):
    manifest = Manifest.model_construct(metric=None, max_new_tokens=9, prompts=(), has_images=True)
    hint = "return [...document.querySelectorAll('#image-hint p')].some(p => p.offsetHeight > 0);"
    with run_web_page(ScriptedService(manifest=manifest)) as location:
        visit = ChatPageDriver(browser, location.address, PHONE_WIDTH)
        visit.wait_for_script(hint)
        visit.submit("Without an image.")
        visit.wait_until_idle()
        visit.wait_for_script(hint)
        visit.submit("What is it?", [image_paths[0][0]])
        visit.wait_until_idle()
        assert not browser.run(hint)
    for has_images in (False, None):
        manifest = manifest.model_copy(update={"has_images": has_images})
        with run_web_page(ScriptedService(manifest=manifest)) as location:
            ChatPageDriver(browser, location.address, PHONE_WIDTH).wait_until_idle()
            assert not browser.run(hint)


def test_stop_regenerate_and_undo(browser, image_paths):
    manifest = Manifest.model_construct(metric=None, max_new_tokens=99, prompts=("<b>Say it.",))
    parrot = ScriptedService(lambda text: (f"{text} ", ()), is_endless=True, manifest=manifest)
    with run_web_page(parrot) as location:
        visit = ChatPageDriver(browser, location.address, PHONE_WIDTH)
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
        assert {
            (options.max_new_tokens, options.sampling_params) for options in parrot.requests
        } == {(99, SamplingParams(temperature=1.5))}
        [session] = location.visitors.list_sessions()
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
        assert visit.read_texts(".facts") == ["tokens: 1 · stopped"]
        visit.click("#settings > button")
        visit.wait_for_script(
            "return document.querySelector('#temperature input[type=number]')?.value === '1.5';"
        )
        browser.messages()  # the aborted streams of the page before
        visit.click_button("Undo")
        visit.wait_for_script("return !!document.querySelector('.welcome');")
        visit.wait_for_script(
            "return document.querySelector('#composer textarea').value === 'Say it.';"
        )
        assert_page_is_clean(browser, location)


def test_conversations_survive_a_reload(browser, tiny_page, image_paths):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    visit = ChatPageDriver(browser, tiny_page.address, PHONE_WIDTH)
    questions = "return [...document.querySelectorAll('.question .message-text')].map(at => at"
    (first, question), (second, _) = image_paths
    visit.ask(question, [first, second])
    answer = visit.read_texts(".reply .message-text")
    visit.ask("Why?")
    browser.driver.refresh()
    visit.wait_for_script(f"{questions}.textContent).join() === {question + ',Why?'!r};")
    visit.wait_for_script(
        "return [...document.querySelectorAll('#chat img')].every(at => at.naturalWidth > 0);"
    )
    assert len(visit.read_texts(".question img")) == 2
    assert visit.read_texts(".reply .message-text")[:1] == answer
    browser.messages()  # the aborted streams of the page before

    # Enlarged images have their boxes, and Escape closes them.
    visit.click(".boxed .zoom")
    assert visit.read_texts("dialog .box b") == visit.read_texts("#chat .box b") != []
    visit.click("dialog .view")
    browser.driver.switch_to.active_element.send_keys(keys.ESCAPE)
    visit.wait_for_script("return !document.querySelector('dialog');")

    visit.click(".of-question [data-form]")
    browser.driver.switch_to.active_element.send_keys(" Now.", keys.ENTER)
    visit.wait_for_script(f"{questions}.textContent).join() === {question + ' Now.'!r};")
    visit.wait_until_idle()
    assert len(visit.read_texts(".question img")) == 2
    browser.driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]}
    )
    visit.click(".reply [data-copy]")
    visit.wait_for_script(
        "return document.querySelector('.reply [data-copy]').innerText == 'Copied'"
    )
    copied = browser.driver.execute_async_script(
        "navigator.clipboard.readText().then(arguments[0]);"
    )
    assert [copied] == visit.read_texts(".reply .message-text")

    visit.click_button("New chat")
    visit.wait_for_script("return !!document.querySelector('.welcome');")
    visit.ask("Who?")
    visit.click(".chats summary")
    titles = ["Who?", f"{question} Now."]
    assert visit.read_texts(".chats .title") == titles
    visit.click("li:nth-child(2) [data-form]")
    browser.driver.switch_to.active_element.send_keys(keys.CONTROL, "a")
    browser.driver.switch_to.active_element.send_keys("<b>Stars</b>", keys.ENTER)
    visit.wait_for_script("return document.querySelectorAll('.title')[1].textContent[1] == 'b';")
    assert_page_is_clean(browser, tiny_page)
    visit.click("li:nth-child(2) .title")
    visit.wait_for_script(f"{questions}.textContent).join() === {question + ' Now.'!r};")
    visit.click(".chats summary")
    visit.click("li:nth-child(2) [data-confirm]")
    browser.driver.switch_to.alert.accept()
    visit.wait_for_script("return document.querySelectorAll('.title').length === 1;")
    assert visit.read_texts(".chats .title") == ["<b>Stars</b>"]

    # Images that are gone have a placeholder.
    [session] = [v for v in tiny_page.visitors.list_sessions() if v.title]
    for image in session.images.values():
        image.display_path.unlink()
    browser.driver.execute_cdp_cmd("Network.clearBrowserCache", {})
    browser.driver.refresh()
    visit.wait_for_script("return document.querySelectorAll('.missing-image').length >= 2;")
    assert "no longer on the server" in visit.read_texts(".missing-image")[0]
    tiny_page.visitors.delete(session)


@WIDTHS
def test_finetuned_and_base_model_answer_in_parallel(browser, page, image_paths, width):
    visit = ChatPageDriver(browser, page.address, width)
    visit.click("#compare input")
    visit.ask(image_paths[0][1], [image_paths[0][0]])
    assert visit.read_texts(".reply h3") == ["shapes", "base"]
    tuned, base = visit.read_texts(".reply .message-text")
    assert tuned != base
    left, right = browser.run(
        "return [...document.querySelectorAll('.reply')].map(at => at.getBoundingClientRect().x);"
    )
    assert (left < right) == (width == DESKTOP_WIDTH)
    visit.click("#compare input")
    visit.ask("Why?")
    assert len(visit.read_texts(".reply")) == 3
    assert_page_is_clean(browser, page)


def test_exported_chat_is_a_sample_with_images(browser, tiny_page, image_paths, tmp_path):
    visit = ChatPageDriver(browser, tiny_page.address)
    assert visit.read_texts("#export a") == []
    for image, question in image_paths:
        visit.ask(question, [image])
    link = browser.run("return document.querySelector('#export a').href;")
    with urllib.request.urlopen(link) as answer:
        assert "attachment" in answer.headers["content-disposition"]
        archive = zipfile.ZipFile(io.BytesIO(answer.read()))
    archive.extractall(tmp_path)
    [sample] = read_samples(tmp_path / "chat/chat.jsonl")
    named = [part.image for part in sample.iter_parts() if isinstance(part, ImagePart)]
    assert [(tmp_path / "chat" / name).read_bytes() for name in named] == [
        image.read_bytes() for image, _ in image_paths
    ]
    assert sample.messages[0].content[-1].text == image_paths[0][1]
    assert any(isinstance(part, BoxPart) for part in sample.messages[1].content)
    assert [*tiny_page.folder.rglob("*.zip")] == []


def test_later_images_are_stored_in_the_private_folder(browser, image_paths, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with run_web_page(ScriptedService()) as location:
        visit = ChatPageDriver(browser, location.address)
        for image, question in image_paths[:2]:
            visit.ask(question, [image])
        found = [at for at in tmp_path.rglob("*.png") if location.folder not in at.parents]
        assert any(location.folder.rglob("*.png")), "nothing was sent"
    assert found == []
    assert list(tmp_path.rglob("*.png")) == []


def test_page_language_follows_the_browser(browser, tiny_page):
    shown = "return document.querySelector('#composer textarea').placeholder"
    visit = ChatPageDriver(
        browser, tiny_page.address, PHONE_WIDTH, language="zh-CN,zh;q=0.9,en;q=0.8"
    )
    visit.wait_for_script("return document.documentElement.lang === 'zh';")
    visit.wait_for_script(f"{shown}.includes('图像');")
    assert [text.strip() for text in visit.read_texts("#tools button")] == [
        "重新回答",
        "撤销",
        "新对话",
    ]
    assert_page_is_clean(browser, tiny_page)
    visit.click_button("English")
    visit.wait_for_script("return document.documentElement.lang === 'en';")
    visit.wait_for_script(f"{shown}.includes('images');")
    visit.click_button("中文")
    visit.wait_for_script("return document.documentElement.lang === 'zh';")


def test_html_payloads_are_escaped(browser, tmp_path):
    def answer(text: str) -> tuple[str, tuple[BoxPart, ...]]:
        return text, (BoxPart(label=text, xyxy=(4.0, 4.0, 40.0, 30.0)),)

    with run_web_page(
        ScriptedService(answer, model_names=("<img src=x onerror=alert(9)>", "base"))
    ) as location:
        visit = ChatPageDriver(browser, location.address)
        assert visit.read_texts("#title span") == ["<img src=x onerror=alert(9)>"]
        visit.click("#compare input")
        for number, payload in enumerate(XSS_PAYLOADS):
            image = tmp_path / f"{payload.replace('/', '')[:90]}.png"
            Image.new("RGB", (64, 48), (number, 0, 0)).save(image)
            visit.ask(payload, [image] if number % 4 == 0 else [])
        assert visit.read_texts(".question .message-text") == list(XSS_PAYLOADS)
        assert visit.read_texts(".reply .message-text") == [
            p for p in XSS_PAYLOADS for _ in range(2)
        ]
        assert set(visit.read_texts(".box b")) == set(XSS_PAYLOADS)
        visit.click_button("中文")
        visit.wait_for_script("return document.documentElement.lang === 'zh';")
        browser.settle()
        assert browser.executed_payloads() == []
        assert (
            browser.run("return document.querySelectorAll('#chat script, #chat svg').length;") == 0
        )
        assert_page_is_clean(browser, location)


def test_errors_are_shown_as_text(browser, tmp_path):
    (tmp_path / "<b>x<b>.png").write_text("no image")
    with run_web_page(ScriptedService()) as location:
        visit = ChatPageDriver(browser, location.address)
        visit.submit("What?", [tmp_path / "<b>x<b>.png"])
        visit.wait_for_script("return !!document.querySelector('.notice');")
        assert "not an image" in visit.read_texts(".notice")[0]
        visit = ChatPageDriver(browser, location.address)
        visit.submit("refuse")
        visit.wait_for_script("return !!document.querySelector('.notice');")
        assert "<b>refused</b>" in visit.read_texts(".notice")[0]
        assert visit.count_turns() == 0


def test_markup_and_formulas_are_shown_verbatim(browser):
    typed = "# no heading\n**no** $$x^2$$ `code` [x](http://127.0.0.1:9/)\n\n  two blanks"
    with run_web_page(ScriptedService()) as location:
        visit = ChatPageDriver(browser, location.address)
        visit.ask(typed)
        assert visit.read_texts(".reply .message-text") == [typed]
        visit.click(".source summary")
        for text in (".question .message-text", ".reply .message-text"):
            assert browser.run(f"return document.querySelector('{text}').innerText;") == typed
        assert visit.read_texts("#chat math") == ["x2"]
        assert visit.read_texts(".message-body") == [typed.replace("$$x^2$$", "x2")]
        assert browser.run("return document.querySelectorAll('#chat a, #chat .katex').length;") == 0


def test_password_sign_in(browser):
    with run_web_page(ScriptedService(), password=PASSWORD, loopback=False) as location:
        visit = ChatPageDriver(browser, location.address)
        assert browser.run("return location.pathname;") == "/sign-in"
        assert browser.unlabeled_elements() == []
        for password, then in (("wrong-password", "[role=alert]"), (PASSWORD, "#title h1 span")):
            browser.driver.find_element("css selector", "input").send_keys(f"{password}\n")
            visit.wait_for_script(f"return !!document.querySelector('{then}');")
        assert {cookie["name"]: cookie["httpOnly"] for cookie in browser.driver.get_cookies()} == {
            SESSION_COOKIE: True,
            BROWSER_COOKIE: True,
        }
        visit.ask("Who is there?")
        assert visit.read_texts(".reply .message-text") == ["Who is there?"]


@pytest.mark.parametrize("language", ["en-GB,en", "zh-CN,zh"])
def test_page_has_no_severe_violations(browser, language):
    axe = AxeChecker()
    with run_web_page(ScriptedService()) as location:
        visit = ChatPageDriver(browser, location.address, language=language)
        assert axe.find_layout_problems(browser) == [], "empty"
        visit.ask("Hello?")
        visit.click(".chats summary")
        visit.click("#settings > button")
        visit.wait_for_script("return !!document.querySelector('#seed input');")
        visit.click(".of-question [data-form]")
        assert axe.find_layout_problems(browser) == [], "conversation"
        assert browser.messages() == []
