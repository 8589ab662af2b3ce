"""Tests of the comparison page."""

import json
from pathlib import Path

import pytest
from browser import XSS_PAYLOADS, Browser, assert_nothing_executed, count, read_texts
from case_files import load_cases
from html_text import read_script_data, read_visible_text
from run_dir_fixtures import RECIPE, make_prediction_line, make_run, make_sign_answers, start_record

from finesight.report.compare_page import compare_runs, render_compare_page, write_compare_page
from finesight.report.comparison import compare_samples

A, B, C = [0.5, 1.0, 0.5, 1.0] * 3, [1.0, 1.0, 0.5, 0.25] * 3, [0.75] * 12


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three runs with twelve samples. The last one is unfinished."""
    rank = RECIPE | {"tune": {"language": "lora", "lora": {"rank": 64}}}
    a = make_run(tmp_path / "a", make_sign_answers(tmp_path, A))
    b = make_run(
        tmp_path / "b", make_sign_answers(tmp_path, B), recipe=rank, start=start_record(500)
    )
    c = make_run(
        tmp_path / "c", make_sign_answers(tmp_path, C), start=start_record(fingerprint="07e4" * 16)
    )
    (c.folder / "result.json").unlink()
    return [a.folder, b.folder, c.folder]


def test_page_content(runs: list[Path]) -> None:
    page = render_compare_page(compare_runs(runs))
    text = read_visible_text(page)
    for words in load_cases("report_words")["comparison"]:
        assert words in text, words
    assert "eval.metric" not in text, "only what differs"
    charts = [one["series"][0]["name"] for one in read_script_data(page)["charts"]]
    assert charts == ["A a"] * 6


def test_differing_samples_are_first(runs: list[Path]) -> None:
    samples = compare_samples(compare_runs(runs).runs)
    assert samples.counts == {"differ": 12, "wrong": 0, "right": 0}
    assert samples.displayed[0].scores == [1.0, 0.25, 0.75]
    few = compare_samples(compare_runs(runs[:2]).runs, max_samples=4)
    assert few.counts == {"differ": 6, "wrong": 3, "right": 3}
    assert [one.kind for one in few.displayed] == ["differ", "differ", "wrong", "right"]


def test_filters(browser: Browser, runs: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_compare_page(runs, file, "en")
    browser.open(file)

    def found(**chosen: str) -> int:
        for name, value in chosen.items():
            field = f"byId({name!r})"
            browser.run(f"{field}.value = {value!r}; {field}.dispatchEvent(new Event('input'));")
        number = count(browser, ".feed > li")
        assert read_texts(browser, "#found") == [f"{number} found"]
        return number

    assert found(kind="better 1") == 3
    assert found(kind="worse 1") == 3
    assert found(kind="worse 1", search="number 003") == 1
    assert found(kind="", search="NUMBER 00") == 10
    assert found(search="", min_score="0.6") == 6
    assert found(run="1", max_score="0.9") == 0
    assert found(min_score="") == 6
    assert found(run="2") == 12
    assert found(max_score="", kind="right") == 0


def test_html_payloads_are_escaped(browser: Browser, tmp_path: Path) -> None:
    """Payloads are in run names, settings, questions, answers, labels, IDs and file names."""
    lines, folders = [], []
    for number, payload in enumerate(XSS_PAYLOADS):
        box = {"image": 0, "label": payload, "xyxy": [1, 1, 9, 9]}
        line = make_prediction_line(payload, payload, payload[::-1], 0.5, image=f"{payload}.png")
        more = {"prompt": payload, "boxes": [box], "gold_boxes": [box], "references": [payload]}
        lines.append(line | more | {"scores": {"similarity": number / 40}})
    for number in range(2):
        name = f"{number}{XSS_PAYLOADS[7 + number]}{XSS_PAYLOADS[12]}".replace("/", "\u2215")
        settings = {f"x{i}": f"{number}{payload}" for i, payload in enumerate(XSS_PAYLOADS)}
        texts = {payload: f"{payload}{number}" for payload in XSS_PAYLOADS}
        recipe = RECIPE | {"model": XSS_PAYLOADS[number], "data": settings, "more": texts}
        start = start_record() | {
            "device": XSS_PAYLOADS[number],
            "versions": {XSS_PAYLOADS[0]: XSS_PAYLOADS[number]},
        }
        run = make_run(tmp_path / name, lines, recipe=recipe, start=start)
        ended = {"step": 10, "ended_at": "x", "status": "failed", "reason": XSS_PAYLOADS[number]}
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(ended) + "\n")
        (run.folder / "result.json").unlink()
        folders.append(run.folder)
    page = tmp_path / "page.html"
    write_compare_page(folders, page, "en")
    browser.open(page)
    browser.run("for (let i = 0; i < 9; i += 1) document.querySelector('.more').click();")
    assert_nothing_executed(browser, page)
    assert count(browser, ".feed > li") == len(XSS_PAYLOADS)
    assert count(browser, "iframe, object, embed, form, article script") == 0
