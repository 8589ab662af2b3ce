"""Pages hold everything they need, and take what they are given for text."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import DESK, PAYLOADS, PHONE, Browser
from jinja2 import UndefinedError

from finesight.errors import UserError
from finesight.report.page import render, write_page

TEMPLATES = Path(str(importlib.resources.files("finesight.report"))) / "templates"


class Reader(HTMLParser):
    """The elements of a page with their attributes, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data


def page_of(*texts: str) -> str:
    return render("base", [*texts], title=" ".join(texts))


def test_data_comes_back_as_it_was() -> None:
    data = {"texts": [*PAYLOADS, "a & b", "]]>", "é😀"], "numbers": [1, 2.5, None, True]}
    page = Reader(render("base", data, title="x"))
    assert json.loads(page.scripts[0]) == data


def test_texts_add_no_element() -> None:
    plain, hostile = Reader(page_of("x")), Reader(page_of(*PAYLOADS))
    names = [[tag for tag, _ in page.elements] for page in (plain, hostile)]
    assert names[0] == names[1]
    assert plain.scripts[1] == hostile.scripts[1]
    for page in (plain, hostile):
        for tag, attributes in page.elements:
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)


def test_the_policy_names_the_one_script_and_nothing_outside() -> None:
    page = Reader(page_of("x"))
    (policy,) = (
        attributes["content"]
        for _, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    places = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href") and value is not None
    ]
    assert places
    assert all(place.startswith(("#", "data:")) for place in places), places


def test_templates_parse_no_markup() -> None:
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|createContextualFragment|DOMParser|document\.write"
        r"|\beval\(|new Function|setTimeout\(\s*[\"']|\|\s*safe\b|autoescape|@import|url\("
    )
    files = sorted(TEMPLATES.iterdir())
    assert {"base.html", "base.js", "base.css"} <= {file.name for file in files}
    for file in files:
        found = forbidden.search(file.read_text(encoding="utf-8"))
        assert found is None, f"{file.name}: {found}"


def brightness(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_from_its_ground() -> None:
    style = (TEMPLATES / "base.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    )
    for colours in (light, dark):
        grounds = ("paper", "card", "field", "tint")
        pairs = [(text, on) for text in ("ink", "soft", "accent") for on in grounds]
        pairs += [(text, "card") for text in ("bad", "warn", "good")] + [("on-accent", "accent")]
        for text, ground in pairs:
            a, b = sorted((brightness(colours[text]), brightness(colours[ground])))
            assert (b + 0.05) / (a + 0.05) >= 4.5, f"{text} on {ground}: {colours}"


def test_what_a_page_cannot_say() -> None:
    with pytest.raises(ValueError, match="float values"):
        render("base", [float("nan")], title="x")
    with pytest.raises(UndefinedError, match="title"):
        render("base", [])


def test_names_of_files_that_are_no_text() -> None:
    assert "caf?.png" in page_of("caf\udce9.png").encode().decode()


def test_a_page_replaces_an_older_page_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "new" / "page.html"
    for title in ("one", "two"):
        write_page(file, page_of(title))
        assert f"<title>{title} · finesight</title>" in file.read_text()
    labels = tmp_path / "labels.jsonl"
    labels.write_text("{}\n")
    for taken in (labels, tmp_path):
        with pytest.raises(UserError, match="exists already and is not a page"):
            write_page(taken, page_of("x"))
    assert labels.read_text() == "{}\n"


def test_the_browser_sees_what_is_wrong_with_a_page(browser: Browser, tmp_path: Path) -> None:
    """Without this, the tests that find nothing wrong could not fail."""
    file = tmp_path / "open.html"
    wide = "<img src=gone.png><div style='width: 3000px'>x</div><h4>x</h4>"
    file.write_text(f"<!doctype html><meta charset=utf-8>{wide}{'<p>'.join(PAYLOADS)}")
    browser.open(file, PHONE)
    browser.settle()
    assert len(set(browser.ran())) >= 12, browser.ran()
    assert browser.overflow() > 2000
    assert (tmp_path / "gone.png").as_uri() in browser.requests()
    assert any("gone.png" in message for message in browser.messages())
    assert len(browser.nameless()) >= 4


def test_the_policy_stops_what_escaping_would_have_missed(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "holed.html"
    file.write_text(page_of("x").replace("<noscript>", f"{''.join(PAYLOADS[7:])}<noscript>"))
    browser.open(file)
    browser.settle()
    assert browser.ran() == []
    assert any("Content Security Policy" in message for message in browser.messages())


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("dark", [False, True])
def test_the_bare_page_opens(browser: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    file = tmp_path / "page.html"
    write_page(file, page_of("a heading", "w" * 300, *PAYLOADS))
    browser.open(file, width, dark=dark)
    assert browser.messages() == []
    assert browser.requests() == [file.as_uri()]
    assert browser.overflow() == 0
    assert browser.nameless() == []
    assert browser.ran() == []
    paper = browser.run("return getComputedStyle(document.body).backgroundColor;")
    (brightness, *_) = (int(number) for number in re.findall(r"\d+", paper))
    assert (brightness < 100) == dark
