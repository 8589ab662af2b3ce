"""The page of `data check`: what was found, where, and with which boxes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from browser import DESK, PAYLOADS, PHONE, Browser
from page_text import data_of
from scenery import paint

from finesight.check.findings import FAULTS, Checked, Finding, Shown, Source
from finesight.report.check_page import PICTURES_OF_ONE, check_page

CODES = ("picture-missing", "box-outside", "contradiction", "box-tiny")


def checked(findings: list[Finding], **more: int) -> Checked:
    counts = Counter(finding.code for finding in findings) + Counter(more)
    source = Source("labels.jsonl", False, "samples", "each line has `messages`", 60, 50)
    return Checked((source,), dict(counts), tuple(findings), 40, 30, {"box-outside": 7})


def finding(number: int, code: str, *shown: Shown, text: str = "what is wrong") -> Finding:
    place = f"labels.jsonl:{number}"
    return Finding(code, place, text, "mend it", sample=f"s{number}", shown=shown)


@pytest.fixture
def mixed(tmp_path: Path) -> Checked:
    picture = paint(tmp_path / "a.png", 200, 100, shade=90)
    gone = tmp_path / "gone.png"
    boxes = ((10.0, 20.0, 60.0, 80.0), (150.0, 50.0, 240.0, 90.0))
    return checked(
        [
            finding(1, "picture-missing", Shown(gone)),
            finding(2, "box-outside", Shown(picture, 0, boxes, ("cat", "dog"))),
            finding(3, "box-reversed", Shown(picture, 0, ((60.0, 80.0, 10.0, 20.0),))),
            *(finding(number, "contradiction") for number in range(4, 50)),
            finding(50, "box-tiny", Shown(picture, 0, ((5.0, 5.0, float("nan"), 6.0),))),
        ]
    )


def test_every_finding_is_told(mixed: Checked) -> None:
    data = data_of(check_page(mixed))
    assert [told["where"] for told in data["findings"]] == [f.where for f in mixed.findings]
    for told, found in zip(data["findings"], mixed.findings, strict=True):
        assert told["severity"] == found.severity
        assert told["says"] == FAULTS[found.code][1]
        assert (told["what"], told["remedy"]) == (found.what, found.remedy)
    missing, outside, *_, tiny = data["findings"]
    assert data["pictures"][missing["shown"][0]["picture"]] == "no such picture"
    labels = [box["label"] for box in outside["shown"][0]["boxes"]]
    assert labels == ["cat", "dog"]
    assert tiny["shown"][0]["boxes"] == [], "a corner that is no number has no place"


def test_pictures_are_shared_out_among_the_faults(tmp_path: Path) -> None:
    pictures = [paint(tmp_path / f"{number}.png", shade=number) for number in range(40)]
    many = [finding(n, "box-outside", Shown(pictures[n])) for n in range(38)]
    few = [finding(n, "box-tiny", Shown(pictures[n])) for n in (38, 39)]
    page = check_page(checked([*many, *few]), pictures=10)
    data = data_of(page)
    drawn = Counter(told["code"] for told in data["findings"] if told["shown"])
    assert drawn == {"box-outside": 8, "box-tiny": 2}
    assert len(data["pictures"]) == 10
    assert "30 more findings are told without theirs" in page


def test_a_picture_is_held_once_and_few_of_one_finding(tmp_path: Path) -> None:
    picture = paint(tmp_path / "a.png")
    same = finding(1, "same-picture", *[Shown(picture)] * 9)
    data = data_of(check_page(checked([same, finding(2, "box-tiny", Shown(picture))])))
    assert len(data["pictures"]) == 1
    assert len(data["findings"][0]["shown"]) == PICTURES_OF_ONE
    assert data["findings"][0]["more"] == 9 - PICTURES_OF_ONE


def test_nothing_found() -> None:
    page = check_page(checked([]))
    assert "No fault was found." in page
    assert data_of(page) == {"findings": [], "pictures": []}


def test_advance_counts_every_finding(mixed: Checked) -> None:
    done: list[int] = []
    check_page(mixed, advance=done.append)
    assert sum(done) == len(mixed.findings)


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_in_a_browser(browser: Browser, tmp_path: Path, mixed: Checked, width: int) -> None:
    file = tmp_path / "check.html"
    file.write_text(check_page(mixed))
    browser.open(file, width)
    assert browser.messages() == []
    assert browser.requests() == [file.as_uri()]
    assert browser.overflow() == 0
    assert browser.nameless() == []
    cards = "return document.querySelectorAll('.feed > li').length;"
    assert browser.run(cards) == 30
    browser.run("document.querySelector('.more').click();")
    assert browser.run(cards) == 50
    assert browser.run("return document.querySelector('.more').hidden;")
    browser.run("document.querySelector('[data-severity=error]').click();")
    assert browser.run(cards) == 3
    browser.run("document.querySelector('[data-code=box-tiny]').click();")
    assert browser.run(cards) == 1
    assert browser.run("return byId('shown').textContent;") == "1 of 50 findings"
    assert browser.run("return byId('fault').value;") == "box-tiny"
    assert browser.overflow() == 0


def test_boxes_stand_where_they_are_said_to_be(
    browser: Browser, tmp_path: Path, mixed: Checked
) -> None:
    file = tmp_path / "check.html"
    file.write_text(check_page(mixed))
    browser.open(file)
    places = browser.run(
        """return [...document.querySelectorAll('.picture')].slice(0, 2).map((picture) => {
          const frame = picture.querySelector('img').getBoundingClientRect();
          const scale = 200 / frame.width;
          return [...picture.querySelectorAll('.box')].map((box) => {
            const at = box.getBoundingClientRect();
            return [at.left - frame.left, at.top - frame.top, at.right - frame.left,
              at.bottom - frame.top].map((value) => value * scale);
          });
        });"""
    )
    expected = [
        [[10, 20, 60, 80], [150, 50, 240, 90]],
        [[10, 20, 60, 80]],
    ]
    for found, right in zip(places, expected, strict=True):
        for corners, wanted in zip(found, right, strict=True):
            assert corners == pytest.approx(wanted, abs=1), "in pixels of the original"


def test_by_keyboard(browser: Browser, tmp_path: Path, mixed: Checked) -> None:
    file = tmp_path / "check.html"
    file.write_text(check_page(mixed))
    browser.open(file)
    where = "return document.activeElement.querySelector('.mono').textContent;"
    seen = []
    for key in "jjjkj":
        browser.press(key)
        seen.append(browser.run(where))
    assert seen == [f"labels.jsonl:{number}" for number in (1, 2, 3, 2, 3)]
    for _ in range(40):
        browser.press("j")
    assert browser.run(where) == "labels.jsonl:43", "what is not drawn yet is drawn on the way"
    browser.open(file)
    for _ in range(12):
        browser.press("Tab")
        if browser.run("return document.activeElement.dataset.severity === 'warning';"):
            break
    browser.press("Enter")
    assert browser.run("return document.querySelectorAll('.feed > li .warning').length;") == 30


def test_payloads_stay_text(browser: Browser, tmp_path: Path) -> None:
    findings = []
    for number, payload in enumerate(PAYLOADS):
        picture = paint(tmp_path / f"{payload.replace('/', '|')}.png")
        shown = (Shown(picture, 0, ((1, 2, 9, 9),), (payload,)), Shown(Path(payload)))
        made = finding(number, "box-tiny", *shown, text=payload)
        findings.append(
            Finding(
                made.code, payload, payload, payload, payload, payload, shown, (payload,), "clipped"
            )
        )
    source = Source(PAYLOADS[0], True, PAYLOADS[1], PAYLOADS[2], 1, 1)
    found = Checked((source,), {"box-tiny": 32}, tuple(findings), 1, 1)
    file = tmp_path / "check.html"
    file.write_text(check_page(found))
    browser.open(file)
    browser.run("document.querySelector('.more').click();")
    browser.run("document.querySelector('details').open = true;")
    browser.settle()
    assert browser.ran() == []
    assert browser.messages() == []
    assert browser.requests() == [file.as_uri()]
    told = browser.run(
        "return [...document.querySelectorAll('.feed .mono')].map((place) => place.textContent);"
    )
    assert told == list(PAYLOADS)
