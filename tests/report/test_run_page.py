"""The report of a run: what it says of whole, old, growing and hostile ones, and in a browser."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from browser import DESK, PAYLOADS, PHONE, Browser
from page_text import data_of, text_of
from PIL import Image
from run_folders import START, Line, MadeRun, answer_line, measured_line, step_line

from finesight.errors import UserError
from finesight.evaluate.compare import Difference
from finesight.report.run_page import run_page, write_report


def pictured(folder: Path, count: int) -> list[Line]:
    """Answers about pictures, in turn worse, better, wrong and right after training."""
    lines = []
    for i in range(count):
        path = folder / f"p{i}.png"
        Image.new("RGB", (90, 60), (3 * i % 256, 80, 120)).save(path)
        truth = {"image": 0, "label": "ring", "xyxy": [10, 10, 40, 40]}
        line = answer_line(f"s{i}", "x^2", r"\frac{a}{b}", 0.0, image=str(path))
        lines.append(line | {"boxes": [truth], "gold_boxes": [truth]})
    return lines


def with_figures(lines: Sequence[Line], *figures: float) -> list[Line]:
    return [
        line | {"scores": {"similarity": figures[i % len(figures)]}} for i, line in enumerate(lines)
    ]


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    """A finished run with twelve examples."""
    made = MadeRun(tmp_path / "latex-2b")
    made.trained()
    difference = Difference("similarity", 0.2, 0.9, 0.6, 0.8, "better")
    made.finished(
        before=measured_line(0, 0.2), after=measured_line(60, 0.9), differences=[asdict(difference)]
    )
    lines = pictured(tmp_path, 12)
    made.answered("before", with_figures(lines, 0.8, 0.1, 0.5, 1.0))
    made.answered("after", with_figures(lines, 0.3, 0.9, 0.5, 1.0))
    made.lines("dropped.jsonl", [{"id": "long", "reason": "over 8192 tokens"}])
    return made


def test_a_finished_run_says_everything(run: MadeRun) -> None:
    page = run_page(run.folder)
    text = text_of(page)
    for words in (
        "latex-2b",
        "Qwen/Qwen2-VL-2B-Instruct tuned on 950 samples",
        "0.2000 → 0.9000 better",
        "rose by 0.7000, more than chance explains: the 95 % interval of the difference is +0.600",
        "3 got better 3 got worse 3 stayed wrong 3 stayed right",
        "need not be edited; higher is better 0.2000 0.150 to 0.250 0.9000 0.850 to 0.950 +0.7000",
        "in nats per token; lower is better 1.8000 1.1000 −0.7000 better",
        "vision frozen 9 900 0 yes: every bit is as it was",
        "language trained 4 80 4 yes: gradients reached 4",
        "preparing 12.5 s training steps 30.0 s measuring 8.0 s",
        "over 8192 tokens long",
        "NVIDIA H200, bf16",
        "ba5e" * 16,
        "eval: {metric: latex}",
        "--prompt &#39;Write the formula.&#39;",
    ):
        assert words in text, words
    assert [chart["series"][0]["name"] for chart in data_of(page)["charts"]] == [
        *("training", "similarity", "merger", "norm", "samples a second", "utilisation")
    ]


def test_examples_are_data_with_pictures_boxes_and_formulas(run: MadeRun) -> None:
    data = data_of(run_page(run.folder))
    assert [one["kind"] for one in data["examples"]] == [
        kind for kind in ("worse", "better", "wrong", "right") for _ in range(3)
    ]
    assert data["measurements"] == ["before", "after"]
    assert len(data["pictures"]) == 12
    first = data["examples"][0]
    assert (first["id"], first["change"]) == ("s0", -0.5)
    assert first["after"]["boxes"][0]["xyxy"] == [10, 10, 40, 40]


def test_too_many_examples_are_counted(run: MadeRun) -> None:
    page = run_page(run.folder, most=6)
    assert len(data_of(page)["examples"]) == 6
    assert (
        "12 held-out samples, told apart by the similarity of each: right is full"
        " marks, wrong is anything less. The greatest changes come first. Not on this page: 2 that"
        " got better, 2 that stayed wrong and 2 that stayed right; all of them are in the run's"
    ) in html.unescape(text_of(page))
    assert "all 6" in text_of(page)


def test_a_run_without_measurements(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", metric=None)
    made.lines("metrics.jsonl", [START, *map(step_line, range(1, 9))])
    made.finished()
    text = text_of(run_page(made.folder))
    assert "Nothing was measured: whether the model got better is not known" in text
    assert "would tell" in text
    assert "Examples" not in text


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    made.lines("metrics.jsonl", [START, measured_line(0, 0.2)])
    made.answered("before", [answer_line("a", "x", "y", 0.5), answer_line("b", "y", "y", 1.0)])
    page = run_page(made.folder)
    assert "not finished: 0 of 60 steps so far" in text_of(page)
    assert "measured once" in text_of(page)
    assert [one["after"] for one in data_of(page)["examples"]] == [None, None]
    assert data_of(page)["measurements"] == ["before"]


def test_a_run_on_its_way_compares_what_there_is(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    steps = [step_line(step) for step in range(1, 41)]
    lines = [START, measured_line(0, 0.0), *steps, measured_line(40, 1.0)]
    made.lines("metrics.jsonl", lines)
    names = [f"s{i}" for i in range(8)]
    made.answered("before", [answer_line(name, "ab", "yz", 0.0) for name in names])
    made.answered("step-40", [answer_line(name, "yz", "yz", 1.0) for name in names])
    page = run_page(made.folder)
    assert data_of(page)["measurements"] == ["before", "after step 40"]
    # By the answers: every one of the eight became right.
    assert "interval of the difference is +0.351 to +1.000" in text_of(page)
    assert "Looked at when the run comes to its end" in text_of(page)


def test_patience_keeps_the_best_and_the_page_says_so(run: MadeRun) -> None:
    best = measured_line(40, 0.95)
    run.finished(before=measured_line(0, 0.2), after=best, stopped_early=True, weights_of=40)
    page = run_page(run.folder)
    assert data_of(page)["measurements"] == ["before", "after step 40"]
    assert "the weights are those of step 40, the best" in text_of(page)


def test_what_was_better_on_the_way_is_said(run: MadeRun) -> None:
    lines = [(0, 0.2), (20, 0.95), (40, 0.7), (60, 0.9)]
    losses = {20: 1.5, 40: 0.25}
    run.lines(
        "metrics.jsonl",
        [
            measured_line(s, f, **({"held_out_loss": losses[s]} if s in losses else {}))
            for s, f in lines
        ],
    )
    text = text_of(run_page(run.folder))
    assert "The similarity was best after step 20: 0.9500." in text
    assert "The held-out loss was best after step 40: 0.2500." in text
    after = {"headline": "similarity", "scores": {"similarity": 0.0}}
    run.finished(before=measured_line(0, 0.2), after=after)
    assert "similarity was best after step 20: 0.9500." in text_of(run_page(run.folder))
    run.trained()
    run.finished()
    assert "best after" not in text_of(run_page(run.folder))


def test_a_headline_without_a_value_still_has_its_page(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    made.lines("metrics.jsonl", [START, measured_line(0, 0.2, scores={"stopped": 1.0})])
    assert "could not be told" in text_of(run_page(made.folder))


def test_a_run_of_an_older_version(run: MadeRun) -> None:
    plain = [
        {"step": s, "held_out_loss": 2.0 - f, "scores": {"similarity": f}}
        for s, f in ((0, 0.2), (60, 0.9))
    ]
    before, after = (line | {"headline": "similarity"} for line in plain)
    run.lines("metrics.jsonl", [before, *map(step_line, range(1, 61)), after])
    run.write("result.json", json.dumps({"steps": 60, "before": before, "after": after}))
    shutil.rmtree(run.folder / "predictions")
    text = text_of(run_page(run.folder))
    assert "0.2000 → 0.9000 better" in text
    assert "device not recorded" in text
    assert "training data not recorded" in text


def test_damaged_files_are_named(run: MadeRun) -> None:
    run.write("moved.json", "{")
    assert "Not readable, and left out here: moved.json" in text_of(run_page(run.folder))


def test_a_metric_of_the_users_own_is_not_run(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", metric="x")
    file = tmp_path / "metric.py"
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef mine(case): return 1.0\n")
    made.write("recipe.yaml", f"eval: {{metric: {json.dumps(f'{file}:mine')}}}\n")
    made.trained()
    for name in ("before", "after"):
        made.answered(name, [answer_line("a", "x", "y", 0.5, scores={"mine": 0.5})])
    assert "latex" not in text_of(run_page(made.folder))
    assert not (tmp_path / "ran").exists()


def test_without_the_converter_formulas_are_their_source(run: MadeRun) -> None:
    program = (
        "import sys; sys.modules['latex2mathml'] = None;"
        "from finesight.cli.app import run; run(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "report", str(run.folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (run.folder / "report.html").read_text()
    assert "Formulas are shown as their source" in text_of(page)
    assert "pip install 'finesight[latex]'" in html.unescape(text_of(page))
    assert {one["formula"] for one in data_of(page)["examples"]} == {None}
    assert "as their source" not in text_of(run_page(run.folder))


def test_classes_and_fields_have_their_tables(run: MadeRun) -> None:
    row = {"f1": 0.25, "precision": 0.5, "recall": 0.125}
    details = {"confusion": [["cat", "dog", 7], ["cat", "cat", 9]], "fields": {"total": row}}
    after = measured_line(60, 0.9, details=details)
    run.finished(before=measured_line(0, 0.2), after=after)
    text = text_of(run_page(run.folder))
    assert "right said samples cat dog 7" in text
    assert "total 0.2500 0.5000 0.1250" in text


def test_it_is_written_where_told_and_only_over_its_like(run: MadeRun, tmp_path: Path) -> None:
    assert write_report(run.folder) == run.folder / "report.html"
    assert write_report(run.folder) == run.folder / "report.html"
    (tmp_path / "mine.html").write_text("precious")
    with pytest.raises(UserError, match="is not a page that finesight made"):
        write_report(run.folder, tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "precious"
    with pytest.raises(UserError, match="is not the folder of a run"):
        write_report(tmp_path)


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(browser: Browser, run: MadeRun, width: int, dark: bool) -> None:
    file = write_report(run.folder)
    browser.open(file, width, dark=dark)
    assert browser.messages() == []
    assert browser.requests() == [file.as_uri()]
    assert browser.overflow() == 0
    assert browser.nameless() == []
    count = "return document.querySelectorAll('.feed > li').length;"
    assert browser.run(count) == 12
    assert browser.run("return document.querySelectorAll('.feed math mfrac').length;") == 12
    assert browser.run("return document.querySelectorAll('.feed .box').length;") == 36
    assert browser.run("return [...document.images].every((i) => i.complete && i.naturalWidth);")
    browser.run("document.querySelector('[data-kind=better]').click();")
    assert browser.run(count) == 3
    assert browser.run("return byId('found').textContent;") == "3 found"


def test_values_are_read_off_a_curve(browser: Browser, run: MadeRun) -> None:
    browser.open(write_report(run.folder))
    browser.run("document.querySelector('.chart > svg').focus();")
    browser.press("ArrowRight", "ArrowRight")
    readout = "return document.querySelector('.chart .readout').textContent;"
    assert browser.run(readout).startswith("step 1 · training 2.954")
    browser.press("End")
    assert browser.run(readout).startswith("step 60 · training 0.2494 · ")
    assert "held-out 1.1" in browser.run(readout)
    browser.press("ArrowLeft")
    assert browser.run(readout).startswith("step 59 · ")


def test_by_keyboard(browser: Browser, run: MadeRun) -> None:
    browser.open(write_report(run.folder))
    where = "return document.activeElement.querySelector('.id')?.textContent;"
    seen = []
    for key in ("j", "j", "k"):
        browser.press(key)
        seen.append(browser.run(where))
    assert seen == ["s0", "s4", "s0"]
    browser.press("Enter")
    assert browser.run("return document.querySelector('.example').classList.contains('wide');")
    browser.press("/")
    assert browser.run("return document.activeElement.id;") == "search"
    browser.press("s", "1", "1")
    assert browser.run("return document.querySelectorAll('.feed > li').length;") == 1
    browser.press("Escape", "j")
    assert browser.run(where) == "s11"


def test_long_texts_begin_short(browser: Browser, run: MadeRun) -> None:
    lines = [answer_line("a", "orange " * 400, "short", 0.5, stopped=False)]
    run.answered("before", lines)
    run.answered("after", with_figures(lines, 0.4))
    browser.open(write_report(run.folder), PHONE)
    height = "return document.querySelector('.before .text').offsetHeight;"
    short = browser.run(height)
    assert short < 120
    browser.run("document.querySelector('.before .whole').focus();")
    browser.press("Enter")
    assert browser.run(height) > 5 * short
    assert browser.run("return document.activeElement.textContent;") == "Show less"
    assert browser.run("return document.activeElement.ariaExpanded;") == "true"


def test_more_examples_come_next_for_the_keyboard(browser: Browser, run: MadeRun) -> None:
    lines = [answer_line(f"s{i}", "a", "b", 0.5) for i in range(25)]
    run.answered("before", lines)
    run.answered("after", lines)
    browser.open(write_report(run.folder))
    browser.run("document.querySelector('.more').focus();")
    browser.press("Enter")
    assert browser.run("return document.activeElement.querySelector('.id').textContent;") == "s20"


def test_differences_from_the_right_answer_are_marked(browser: Browser, run: MadeRun) -> None:
    run.write("recipe.yaml", "eval: {metric: ocr}\n")
    lines = [answer_line("a", "the quick red fox", "the quick brown fox jumps", 0.5)]
    run.answered("before", lines)
    run.answered("after", with_figures(lines, 0.4))
    browser.open(write_report(run.folder))
    marks = "return [...document.querySelectorAll('.after ins, .after del')].map((e) => e.title);"
    wanted = ["missing: brown ", "not in the right answer", "missing: jumps"]
    assert sorted(browser.run(marks)) == sorted(wanted)


def test_payloads_stay_text(browser: Browser, tmp_path: Path) -> None:
    """In questions, answers, formulas, labels, ids, names of files, settings and reasons."""
    made = MadeRun(tmp_path / "run")
    made.trained()
    made.finished(differences=[])
    lines = []
    for number, payload in enumerate(PAYLOADS):
        name = payload.replace("/", "\u2215").replace("\0", "")[:80]
        path = tmp_path / f"{number}{name}.png"
        Image.new("RGB", (20, 20)).save(path)
        box = {"image": 0, "label": payload, "xyxy": [1, 1, 9, 9]}
        line = answer_line(payload, payload, rf"\text{{{payload}}}", 0.5, image=str(path))
        more = {"prompt": payload, "boxes": [box, box], "gold_boxes": [box, box]}
        lines.append(line | more | {"references": [payload]})
    made.answered("before", lines)
    made.answered("after", with_figures(lines, 0.1, 0.9))
    made.write("recipe.yaml", "eval: {metric: latex}\n# " + " ".join(PAYLOADS).replace("\n", ""))
    made.lines("dropped.jsonl", [{"id": p, "reason": f"{p}: {p}"} for p in PAYLOADS])
    file = write_report(made.folder)
    browser.open(file)
    browser.run("for (let i = 0; i < 9; i += 1) document.querySelector('.more').click();")
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; });")
    browser.settle()
    assert browser.ran() == []
    assert browser.messages() == []
    assert browser.requests() == [file.as_uri()]
    assert browser.run("return document.querySelectorAll('.feed > li').length;") == len(PAYLOADS)
    questions = browser.run(
        "return [...document.querySelectorAll('.question')].map((e) => e.textContent);"
    )
    assert sorted(questions) == sorted(PAYLOADS)
    assert (
        browser.run("return document.querySelectorAll('iframe, object, embed, form').length;") == 0
    )
