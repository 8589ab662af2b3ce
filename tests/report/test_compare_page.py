"""The page of a comparison: what it says of its runs, and in a browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import DESK, PAYLOADS, PHONE, Browser
from compared_runs import RECIPE, begun, run_with, signs
from page_text import data_of, text_of
from run_folders import answer_line

from finesight.report.compare_page import compare_page, compared, write_comparison
from finesight.report.language import Language
from finesight.report.side_by_side import samples_of

A, B, C = [0.5, 1.0, 0.5, 1.0] * 3, [1.0, 1.0, 0.5, 0.25] * 3, [0.75] * 12

COUNT = "return document.querySelectorAll('.feed > li').length;"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three runs with twelve samples; the last one goes on."""
    rank = RECIPE | {"tune": {"language": "lora", "lora": {"rank": 64}}}
    a = run_with(tmp_path / "a", signs(tmp_path, A))
    b = run_with(tmp_path / "b", signs(tmp_path, B), recipe=rank, start=begun(500))
    c = run_with(tmp_path / "c", signs(tmp_path, C), start=begun(fingerprint="07e4" * 16))
    (c.folder / "result.json").unlink()
    return [a.folder, b.folder, c.folder]


def test_what_it_says(runs: list[Path]) -> None:
    page = compare_page(compared(runs))
    text = text_of(page)
    for words in (
        "Comparison of 3 runs",
        "A a Qwen/Qwen2-VL-2B-Instruct · The run has come to its end: step 10 of 10.",
        "C c Qwen/Qwen2-VL-2B-Instruct · The run ended without a word after step 10 of 10",
        "The held-out losses of A a and C c are not compared: they are of different data.",
        "tune.lora.rank 8 64 8",
        "training tokens 38,000 47,500 38,000",
        "12 held-out samples, by the similarity of each answer",
        "speed and cost A a B b C c time in all 25.5 s 25.5 s 25.5 s",
    ):
        assert words in text, words
    assert "eval.metric" not in text, "only what differs"
    charts = [one["series"][0]["name"] for one in data_of(page)["charts"]]
    assert charts == ["A a"] * 6


def test_samples_that_differ_come_first(runs: list[Path]) -> None:
    samples = samples_of(compared(runs).entries)
    assert samples.counts == {"differ": 12, "wrong": 0, "right": 0}
    assert samples.shown[0].scores == [1.0, 0.25, 0.75]
    few = samples_of(compared(runs[:2]).entries, most=4)
    assert few.counts == {"differ": 6, "wrong": 3, "right": 3}
    assert [one.kind for one in few.shown] == ["differ", "differ", "wrong", "right"]


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_in_a_browser(
    browser: Browser, runs: list[Path], tmp_path: Path, width: int, dark: bool, language: Language
) -> None:
    file = tmp_path / "page.html"
    write_comparison(runs, file, language)
    browser.open(file, width, dark=dark)
    assert browser.messages() == []
    assert browser.requests() == [file.as_uri()]
    assert browser.overflow() == 0
    assert browser.nameless() == []
    assert browser.run(COUNT) == 12
    assert browser.run("return [...document.images].every((i) => i.complete && i.naturalWidth);")
    # One box where all agree with each other, one more for each that does not.
    boxes = "return document.querySelector('.feed > li').querySelectorAll('.box').length;"
    assert browser.run(boxes) == 4


def test_filters(browser: Browser, runs: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_comparison(runs, file, "en")
    browser.open(file)

    def found(**chosen: str) -> int:
        for name, value in chosen.items():
            field = f"byId({name!r})"
            browser.run(f"{field}.value = {value!r}; {field}.dispatchEvent(new Event('input'));")
        assert browser.run("return byId('found').textContent;") == f"{browser.run(COUNT)} found"
        return int(browser.run(COUNT))

    assert found(kind="better 1") == 3
    assert found(kind="worse 1") == 3
    assert found(kind="worse 1", search="number 003") == 1
    assert found(kind="", search="NUMBER 00") == 10
    assert found(search="", least="0.6") == 6
    assert found(whose="1", most="0.9") == 0
    assert found(least="") == 6
    assert found(whose="2") == 12
    assert found(most="", kind="right") == 0


def test_payloads_stay_text(browser: Browser, tmp_path: Path) -> None:
    """In names of runs, settings, questions, answers, labels, ids, and names of files."""
    lines, folders = [], []
    for number, payload in enumerate(PAYLOADS):
        box = {"image": 0, "label": payload, "xyxy": [1, 1, 9, 9]}
        line = answer_line(payload, payload, payload[::-1], 0.5, image=f"{payload}.png")
        more = {"prompt": payload, "boxes": [box], "gold_boxes": [box], "references": [payload]}
        lines.append(line | more | {"scores": {"similarity": number / 40}})
    for number in range(2):
        name = f"{number}{PAYLOADS[7 + number]}{PAYLOADS[12]}".replace("/", "\u2215")
        settings = {f"x{i}": f"{number}{payload}" for i, payload in enumerate(PAYLOADS)}
        texts = {payload: f"{payload}{number}" for payload in PAYLOADS}
        recipe = RECIPE | {"model": PAYLOADS[number], "data": settings, "more": texts}
        start = begun() | {"device": PAYLOADS[number], "versions": {PAYLOADS[0]: PAYLOADS[number]}}
        run = run_with(tmp_path / name, lines, recipe=recipe, start=start)
        ended = {"step": 10, "ended": "x", "how": "failed", "why": PAYLOADS[number]}
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(ended) + "\n")
        (run.folder / "result.json").unlink()
        folders.append(run.folder)
    page = tmp_path / "page.html"
    write_comparison(folders, page, "en")
    browser.open(page)
    browser.run("for (let i = 0; i < 9; i += 1) document.querySelector('.more').click();")
    browser.settle()
    assert browser.ran() == []
    assert browser.messages() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.run(COUNT) == len(PAYLOADS)
    forbidden = "iframe, object, embed, form, article script"
    assert browser.run(f"return document.querySelectorAll({forbidden!r}).length;") == 0
