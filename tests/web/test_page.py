"""The page as somebody sees it, in a browser, with the package's own model behind it."""

from __future__ import annotations

import io
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import DESK, PAYLOADS, PHONE, Browser
from page_visit import Visit
from PIL import Image
from served_page import Parrot, Served, served
from speaking import random_adapter, shapes, speaking

from finesight.data.jsonl import read_samples
from finesight.data.sample import BoxPart, ImagePart
from finesight.vision.picture import open_picture

PASSWORD = "right-password"
WIDTHS = pytest.mark.parametrize("width", [PHONE, DESK])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    run = random_adapter(tmp_path_factory.mktemp("run") / "shapes")
    with speaking(str(run)) as service, served(service) as place:
        yield place


@pytest.fixture(scope="module")
def tiny_page() -> Iterator[Served]:
    with speaking("finesight-tiny") as service, served(service) as place:
        yield place


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("pictures")
    return [shapes(folder, number) for number in (0, 10)]


def _sound(browser: Browser, place: Served) -> None:
    """Nothing was complained of, nothing asked for elsewhere, nothing sticks out."""
    assert browser.messages() == []
    assert [url for url in browser.requests() if not url.startswith(place.address)] == []
    assert browser.overflow() == 0
    assert browser.nameless() == []


@WIDTHS
def test_boxes_are_drawn_on_the_picture_that_was_asked_about(browser, tiny_page, pictures, width):
    visit = Visit(browser, tiny_page.address, width)
    (first, question), (second, _) = pictures
    visit.ask(question, [first, second])
    assert visit.texts(".asked .said") == [question]
    assert len(visit.texts(".asked img")) == 2
    [visitor] = [v for v in tiny_page.visitors.all() if v.talk.turns]
    [box] = visitor.talk.turns[0].replies[0].boxes
    assert visit.texts(".box b") == [box.label]
    across, down = open_picture(first).size
    drawn = browser.run(
        "const picture = document.querySelector('.boxed img').getBoundingClientRect();"
        " const box = document.querySelector('.box').getBoundingClientRect();"
        " return [box.left - picture.left, box.top - picture.top, box.right - picture.left,"
        " box.bottom - picture.top].map((n, i) => n / (i % 2 ? picture.height : picture.width));"
    )
    x1, y1, x2, y2 = box.xyxy
    assert drawn == pytest.approx([x1 / across, y1 / down, x2 / across, y2 / down], abs=0.01)
    _sound(browser, tiny_page)
    visit.press("New talk")
    visit.until("return !!document.querySelector('.welcome');")


def test_an_answer_is_stopped_asked_again_and_taken_back(browser, pictures):
    parrot = Parrot(lambda text: (f"{text} ", ()), endless=True)
    with served(parrot) as place:
        visit = Visit(browser, place.address, PHONE)
        visit.click("#settings > button")
        visit.until("return !!document.querySelector('#temperature input[type=range]');")
        browser.run(
            "const slider = document.querySelector('#temperature input[type=range]');"
            " slider.value = 1.5; slider.dispatchEvent(new Event('input', {bubbles: true}));"
        )
        visit.begin("Say it.", [pictures[0][0]])
        for asked in (1, 2):
            visit.until("return document.querySelector('.growing')?.textContent.length > 40;")
            assert len(parrot.asked) == asked
            visit.click("#composer .stop-button")
            visit.settled()
            assert visit.texts(".facts") == ["tokens: 1 · stopped"]
            assert visit.turns() == 1
            if asked == 1:
                visit.press("Again")
        assert {options.sampling.temperature for options in parrot.asked} == {1.5}
        visit.press("Undo")
        visit.until("return !!document.querySelector('.welcome');")
        visit.until("return document.querySelector('#composer textarea').value === 'Say it.';")
        _sound(browser, place)


@WIDTHS
def test_tuned_and_base_answer_side_by_side(browser, page, pictures, width):
    visit = Visit(browser, page.address, width)
    visit.click("#compare input")
    visit.ask(pictures[0][1], [pictures[0][0]])
    assert visit.texts(".reply h3") == ["shapes", "base"]
    tuned, base = visit.texts(".reply .said")
    assert tuned != base
    left, right = browser.run(
        "return [...document.querySelectorAll('.reply')].map(at => at.getBoundingClientRect().x);"
    )
    assert (left < right) == (width == DESK)
    visit.click("#compare input")
    visit.ask("Why?")
    assert len(visit.texts(".reply")) == 3
    _sound(browser, page)


def test_the_exported_talk_is_a_sample_with_its_pictures(browser, tiny_page, pictures, tmp_path):
    visit = Visit(browser, tiny_page.address)
    assert visit.texts("#export a") == []
    for picture, question in pictures:
        visit.ask(question, [picture])
    link = browser.run("return document.querySelector('#export a').href;")
    with urllib.request.urlopen(link) as answer:
        assert "attachment" in answer.headers["content-disposition"]
        archive = zipfile.ZipFile(io.BytesIO(answer.read()))
    archive.extractall(tmp_path)
    [sample] = read_samples(tmp_path / "talk/talk.jsonl")
    named = [part.image for part in sample.parts() if isinstance(part, ImagePart)]
    assert [(tmp_path / "talk" / name).read_bytes() for name in named] == [
        picture.read_bytes() for picture, _ in pictures
    ]
    assert sample.messages[0].content[-1].text == pictures[0][1]
    assert any(isinstance(part, BoxPart) for part in sample.messages[1].content)
    assert [*tiny_page.folder.rglob("*.zip")] == []


def test_pictures_of_later_questions_lie_in_the_private_folder_too(
    browser, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with served(Parrot(lambda text: (text, ()))) as place:
        visit = Visit(browser, place.address)
        for picture, question in pictures[:2]:
            visit.ask(question, [picture])
        found = [at for at in tmp_path.rglob("*.png") if place.folder not in at.parents]
        assert any(place.folder.rglob("*.png")), "nothing was sent"
    assert found == []
    assert list(tmp_path.rglob("*.png")) == []


def test_the_page_speaks_the_browsers_language_and_the_other(browser, tiny_page):
    shown = "return document.querySelector('#composer textarea').placeholder"
    visit = Visit(browser, tiny_page.address, PHONE, language="zh-CN,zh;q=0.9,en;q=0.8")
    visit.until("return document.documentElement.lang === 'zh';")
    visit.until(f"{shown}.includes('图片');")
    assert [text.strip() for text in visit.texts("#tools button")] == ["重新回答", "撤销", "新对话"]
    _sound(browser, tiny_page)
    visit.press("English")
    visit.until("return document.documentElement.lang === 'en';")
    visit.until(f"{shown}.includes('pictures');")
    visit.press("中文")
    visit.until("return document.documentElement.lang === 'zh';")


def test_payloads_stay_text_wherever_they_stand(browser, tmp_path):
    def answer(text: str) -> tuple[str, tuple[BoxPart, ...]]:
        return text, (BoxPart(label=text, xyxy=(4.0, 4.0, 40.0, 30.0)),)

    with served(Parrot(answer, names=("<img src=x onerror=alert(9)>", "base"))) as place:
        visit = Visit(browser, place.address)
        assert visit.texts("#title span") == ["<img src=x onerror=alert(9)>"]
        visit.click("#compare input")
        for number, payload in enumerate(PAYLOADS):
            picture = tmp_path / f"{payload.replace('/', '')[:90]}.png"
            Image.new("RGB", (64, 48), (number, 0, 0)).save(picture)
            visit.ask(payload, [picture] if number % 4 == 0 else [])
        assert visit.texts(".asked .said") == list(PAYLOADS)
        assert visit.texts(".reply .said") == [p for p in PAYLOADS for _ in range(2)]
        assert set(visit.texts(".box b")) == set(PAYLOADS)
        visit.press("中文")
        visit.until("return document.documentElement.lang === 'zh';")
        browser.settle()
        assert browser.ran() == []
        assert (
            browser.run("return document.querySelectorAll('#talk script, #talk svg').length;") == 0
        )
        _sound(browser, place)


def test_what_is_refused_is_told_as_text(browser, tmp_path):
    (tmp_path / "<b>x<b>.png").write_text("no picture")
    with served(Parrot(lambda text: (text, ()))) as place:
        visit = Visit(browser, place.address)
        visit.begin("What?", [tmp_path / "<b>x<b>.png"])
        visit.until("return !!document.querySelector('.notice');")
        assert "not a picture" in visit.texts(".notice")[0]
        visit = Visit(browser, place.address)
        visit.begin("refuse")
        visit.until("return !!document.querySelector('.notice');")
        assert "<b>refused</b>" in visit.texts(".notice")[0]
        assert visit.turns() == 0


def test_markup_and_formulas_show_as_they_were_typed(browser):
    typed = "# no heading\n**no** $$x^2$$ `code` [x](http://127.0.0.1:9/)\n\n  two blanks"
    with served(Parrot(lambda text: (text, ()))) as place:
        visit = Visit(browser, place.address)
        visit.ask(typed)
        assert visit.texts(".reply .said") == [typed]
        assert browser.run("return document.querySelector('.reply .said').innerText;") == typed
        assert browser.run("return document.querySelectorAll('#talk a, #talk .katex').length;") == 0


def test_a_password_lets_in(browser):
    with served(Parrot(lambda text: (text, ())), password=PASSWORD, loopback=False) as place:
        visit = Visit(browser, place.address)
        assert browser.run("return location.pathname;") == "/sign-in"
        assert browser.nameless() == []
        for password, then in (("wrong-password", "[role=alert]"), (PASSWORD, "#title h1 span")):
            browser.driver.find_element("css selector", "input").send_keys(f"{password}\n")
            visit.until(f"return !!document.querySelector('{then}');")
        assert [cookie["httpOnly"] for cookie in browser.driver.get_cookies()] == [True]
        visit.ask("Who is there?")
        assert visit.texts(".reply .said") == ["Who is there?"]
