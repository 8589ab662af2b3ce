"""Tests of reports of finished, old, running and hostile runs, also in a browser."""

import html
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from browser import (
    DESKTOP_WIDTH,
    PHONE_WIDTH,
    XSS_PAYLOADS,
    Browser,
    assert_nothing_executed,
    click,
    count,
    open_page,
    read_texts,
)
from case_files import load_cases
from html_text import read_script_data, read_visible_text
from PIL import Image
from run_dir_fixtures import (
    START_RECORD,
    FakeRunDir,
    JsonLine,
    make_evaluation_line,
    make_prediction_line,
    make_step_line,
)

from finesight.evaluate.metric_difference import MetricDifference
from finesight.evaluate.prediction_file import read_predictions
from finesight.report.charts import build_run_charts
from finesight.report.metric_rows import read_metrics
from finesight.report.run_page import (
    LiveReportState,
    find_main_error,
    rank_incorrect_examples,
    render_run_page,
    select_evaluations,
    write_report,
)
from finesight.report.run_reader import JsonObject, read_run


def make_image_answers(folder: Path, count: int) -> list[JsonLine]:
    """Make predictions for images."""
    lines = []
    for i in range(count):
        path = folder / f"p{i}.png"
        Image.new("RGB", (90, 60), (3 * i % 256, 80, 120)).save(path)
        truth = {"image": 0, "label": "ring", "xyxy": [10, 10, 40, 40]}
        line = make_prediction_line(f"s{i}", "x^2", r"\frac{a}{b}", 0.0, image=str(path))
        lines.append(line | {"boxes": [truth], "gold_boxes": [truth]})
    return lines


def with_figures(lines: Sequence[JsonLine], *figures: float) -> list[JsonLine]:
    return [
        line | {"scores": {"similarity": figures[i % len(figures)]}} for i, line in enumerate(lines)
    ]


@pytest.fixture
def run(tmp_path: Path) -> FakeRunDir:
    """Finished run with twelve examples."""
    made = FakeRunDir(tmp_path / "latex-2b")
    made.write_metrics()
    difference = MetricDifference("similarity", 0.2, 0.9, 0.6, 0.8, "better")
    made.write_finished(
        before=make_evaluation_line(0, 0.2, num_samples=12),
        after=make_evaluation_line(60, 0.9, num_samples=12),
        metric_differences=[asdict(difference)],
    )
    lines = make_image_answers(tmp_path, 12)
    lines[0]["question"] = "<image>Write the formula."
    made.write_predictions("before", with_figures(lines, 0.8, 0.1, 0.5, 1.0))
    made.write_predictions("after", with_figures(lines, 0.3, 0.9, 0.5, 1.0))
    made.write_lines("skipped_samples.jsonl", [{"id": "long", "reason": "over 8192 tokens"}])
    return made


def test_finished_run(run: FakeRunDir) -> None:
    page = render_run_page(run.folder)
    text = read_visible_text(page)
    assert "<title>latex-2b · finesight</title>" in page
    for words in load_cases("report_words")["run"]:
        assert words in text, words
    assert [chart["series"][0]["name"] for chart in read_script_data(page)["charts"]] == [
        *("training", "similarity", "merger", "norm", "samples/s", "MFU")
    ]


def test_running_run_compares_available_evaluations(tmp_path: Path) -> None:
    made = FakeRunDir(tmp_path / "run")
    steps = [make_step_line(step) for step in range(1, 41)]
    lines = [START_RECORD, make_evaluation_line(0, 0.0, num_samples=8), *steps]
    lines.append(make_evaluation_line(40, 1.0, num_samples=8))
    made.write_lines("metrics.jsonl", lines)
    for name, answer in (("before", "ab"), ("step-40", "yz")):
        score = float(answer == "yz")
        answers = [make_prediction_line(f"s{i}", answer, "yz", score) for i in range(8)]
        made.write_predictions(name, answers)
    page = render_run_page(made.folder)
    assert read_script_data(page)["evaluation_names"] == ["before", "after step 40"]
    # By the answers: every one of the eight became right.
    assert "interval of the difference is +0.35 to +1.00" in read_visible_text(page)
    words = "Compared with before, on 8 validation samples: better in similarity"
    assert words in read_visible_text(page)
    assert "Computed at the end of the run" in read_visible_text(page)


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("losses", [(2.0, 1.18, 1.175), (2.0, 1.1, 1.175)])
def test_evaluations_of_different_samples_are_not_compared(run, losses, is_old):
    """The figures of all samples are higher, as those of other samples may be."""
    lines = []
    for step, loss in zip((0, 20, 40), losses, strict=True):
        counts = {"num_samples": 64, "num_loss_samples": 64}
        of_all = {"validation_loss": loss + 0.25} | dict.fromkeys(counts, 200)
        line = make_evaluation_line(step, 0.5, validation_loss=loss, **counts)
        full = line | of_all | {"scores": {"similarity": 0.25}} if step != 20 else None
        lines.append(full or line if is_old else line | {"sample_set": "0af1", "full": full})
    run.write_lines("metrics.jsonl", [START_RECORD, *lines])
    before, after = (line.get("full") or line for line in (lines[0], lines[-1]))
    run.write_finished(before=before, after=after)
    page = render_run_page(run.folder)
    text, data = read_visible_text(page), read_script_data(page)
    assert "2.2500" in text
    assert "1.4250" in text
    series = (one for chart in data["charts"] for one in chart["series"])
    (loss_points,) = (one["points"] for one in series if one["name"] == "validation")
    curve = [before["validation_loss"], after["validation_loss"]] if is_old else list(losses)
    assert [point[1] for point in loss_points] == curve
    assert f"; validation on the same {200 if is_old else 64} samples" in text
    assert "Overfitting" not in text


@pytest.mark.parametrize(
    ("sets", "before"),
    [
        ("AA AA BB", {}),
        ("AA AA AB", {"validation_loss": 2.0}),
        ("AA AA BA", {"similarity": 0.0}),
        ("AA BB BB", {"validation_loss": 1.5, "similarity": 0.5}),
        ("AA BB AA", {"validation_loss": 2.0, "similarity": 0.0}),
    ],
)
@pytest.mark.parametrize("is_finished", [False, True])
def test_latest_evaluation_is_paired_with_equal_samples(tmp_path, sets, before, is_finished):
    run = FakeRunDir(tmp_path / "run")
    counts = {"num_samples": 5, "num_loss_samples": 7}
    lines = [
        make_evaluation_line(20 * n, n / 2, **counts, sample_set=loss, score_set=scores)
        for n, (loss, scores) in enumerate(sets.split())
    ]
    run.write_lines("metrics.jsonl", [START_RECORD, *lines])
    if is_finished:
        run.write_finished(before=lines[0], after=lines[-1])
        before = {} if sets == "AA BB BB" else before
    paired, latest = select_evaluations(read_run(run.folder))
    assert latest["step"] == 40
    found = read_metrics(paired)
    found.pop("ended_with_eos", None)
    assert found == before
    text = read_visible_text(render_run_page(run.folder))
    assert ("has other samples" in text) == (len(before) < 2)
    charts = {c.title: c.caption for c in build_run_charts(read_run(run.folder))}
    assert ("the same 7 samples" in charts["Loss"]) == (len({s[0] for s in sets.split()}) > 1)


def test_formulas_without_latex2mathml(run: FakeRunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "latex2mathml.converter", None)
    page = render_run_page(run.folder)
    assert "Formulas are shown as LaTeX source" in read_visible_text(page)
    assert "pip install 'finesight[latex]'" in html.unescape(read_visible_text(page))
    assert {one["formula"] for one in read_script_data(page)["examples"]} == {None}


def test_confusion_and_field_tables(run: FakeRunDir) -> None:
    row = {"f1": 0.25, "precision": 0.5, "recall": 0.125}
    details = {"confusion": [["cat", "dog", 7], ["cat", "cat", 9]], "fields": {"total": row}}
    after = make_evaluation_line(60, 0.9, details=details)
    run.write_finished(before=make_evaluation_line(0, 0.2), after=after)
    text = read_visible_text(render_run_page(run.folder))
    assert "reference prediction samples cat dog 7" in text
    assert "total 0.2500 0.5000 0.1250" in text


@pytest.mark.parametrize("width", [PHONE_WIDTH, DESKTOP_WIDTH])
def test_examples_are_sorted_filtered_and_enlarged(browser, run, width):
    open_page(browser, write_report(run.folder), width)
    assert count(browser, ".feed math mfrac") == 12
    assert {*read_texts(browser, ".feed .truth .score")} == {""}
    assert count(browser, ".feed .box") == 36
    assert browser.run("return [...document.images].every((i) => i.complete && i.naturalWidth);")
    choose = "byId('order').value = '{}'; byId('order').dispatchEvent(new Event('change'));"
    for order, ids in (
        ("incorrect", ["s2", "s6", "s10", "s0"]),
        ("lowest", ["s0", "s4", "s8", "s2"]),
        ("highest", ["s3", "s7", "s11", "s1"]),
        ("decrease", ["s0", "s4", "s8", "s2"]),
        ("increase", ["s1", "s5", "s9", "s2"]),
        ("file", ["s0", "s1", "s2", "s3"]),
    ):
        browser.run(choose.format(order))
        assert read_texts(browser, ".feed .id")[:4] == ids, order
    click(browser, "[data-kind=worse]")
    assert read_texts(browser, ".feed .id") == ["s0", "s4", "s8"]
    assert read_texts(browser, "#found") == ["3 found"]
    click(browser, "[data-view=grid]")
    for kind, number in (("wrong", 9), ("worse", 3)):
        click(browser, f"[data-kind={kind}]")
        assert count(browser, "#feed .tile") == number
    assert browser.unlabeled_elements() == []
    browser.press("j", "j", "k", "Enter")
    assert read_texts(browser, "#enlarged[open] .id") == ["s0"]
    browser.press("ArrowRight", "ArrowRight", "ArrowRight")
    assert read_texts(browser, "#enlarged[open] .id") == ["s8"]
    assert read_texts(browser, "#enlarged .position") == ["3 of 3"]
    click(browser, "#enlarged .close")
    assert count(browser, "#enlarged[open]") == 0


def test_copy_and_export(browser: Browser, run: FakeRunDir, tmp_path: Path) -> None:
    """The exported file is a prediction file with the values of the run."""
    folder = tmp_path / "saved"
    browser.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)}
    )
    browser.open(write_report(run.folder))
    browser.run(
        "window.copied = []; Object.defineProperty(navigator, 'clipboard', {value: {writeText:"
        " (text) => { copied.push(text); return Promise.resolve(); }}});"
    )
    browser.run(
        "document.querySelectorAll('.example')[0].querySelectorAll('.copy').forEach("
        "(button) => button.click());"
    )
    browser.settle()
    texts = ["Write the formula.", r"\frac{a}{b}", "x^2", "x^2"]
    assert browser.run("return copied;") == texts
    assert read_texts(browser, ".example [role=status]")[0] == "Copied"
    assert read_texts(browser, "#save") == ["Save 9 incorrect as JSONL"]
    click(browser, "[data-kind=better]")
    click(browser, "#save")
    file = folder / "latex-2b-incorrect.jsonl"
    for _ in range(50):
        browser.settle()
        if file.exists():
            break
    recorded = read_predictions(run.folder / "predictions" / "after.jsonl")
    by_id = {one.case.id: one for one in recorded}
    saved = read_predictions(file)
    assert [one.case.id for one in saved] == ["s1", "s5", "s9"]
    for one in saved:
        assert one.scores == by_id[one.case.id].scores
        assert one.case == by_id[one.case.id].case
        assert one.record["image"] == by_id[one.case.id].record["image"]
    assert browser.messages() == []


@pytest.fixture
def reward_run(tmp_path: Path) -> FakeRunDir:
    """Running GRPO run, of which the format and the number of boxes increase."""
    made = FakeRunDir(tmp_path / "grpo")
    steps = [
        {"completions/mean_length": 20.0 + step, "completions/clipped_ratio": 0.0}
        | {"rewards/boxes/mean": 0.5, "rewards/boxes/std": 0.2}
        | {"rewards/format/mean": min(1.0, step / 20), "rewards/format/std": 0.1}
        for step in range(40)
    ]
    groups = []
    for step in range(4):
        line = make_image_answers(tmp_path, 1)[0] | {"scores": {"boxes": 0.5, "format": 1.0}}
        groups.append([line, line | {"boxes": line["boxes"] * (1 + step)}])
    made.write_rewards(steps, groups)
    return made


def test_rewards_and_responses(browser: Browser, reward_run: FakeRunDir) -> None:
    page = render_run_page(reward_run.folder)
    text, data = read_visible_text(page), read_script_data(page)
    for words in (
        "found Length drift 24.5 tokens per response in the first 10 steps and 54.5 in the last",
        "Result Reward of the first and last 10 steps: 0.50 → 0.50; boxes −0.09 to +0.09: no"
        " clear change; format +0.73 to +0.82: better",
        "found Gains of the format only Reward of the first",
        "found Box spam 1.0 box per response in the first groups, 2.5 in the last; reference: 1.0",
        "4 groups of responses",
        "Reward: format",
        "Completion length",
    ):
        assert words in text, words
    assert [group["row_index"] for group in data["groups"]] == [40, 39, 38, 37]
    boxes, rewards = zip(
        *((len(one["boxes"]), one["scores"]) for one in data["groups"][0]["predictions"]),
        strict=True,
    )
    assert boxes == (1, 4)
    assert rewards[1] == {"boxes": 0.5, "format": 1.0, "advantage": 0.5}
    chart, *_ = build_run_charts(read_run(reward_run.folder))
    assert [len(line.error_bars) for line in chart.lines] == [0, 20]
    browser.open(write_report(reward_run.folder))
    assert count(browser, "#groups .feed > li") == 3
    assert read_texts(browser, "#groups .run") == ["1", "2"] * 3
    # The references are on the image of the group, and on those of the responses.
    assert count(browser, "#groups li:first-child .box.truth") == 3
    assert count(browser, "#groups li:first-child .box.r1") == 4
    assert read_texts(browser, "#groups .box.r1 b")[:4] == ["ring"] * 4


def test_repeated_and_new_responses_are_shown(reward_run: FakeRunDir) -> None:
    live_state = LiveReportState(60.0)
    render_run_page(reward_run.folder, live_state=live_state)
    path = reward_run.folder / "responses.jsonl"
    *_, last = path.read_text().splitlines()
    repeated = last.replace('"answer": "x^2"', '"answer": "other"')
    further = repeated.replace('"step": 40', '"step": 41')
    path.write_text(f'{path.read_text()}{repeated}\n{further}\n{{"step": 42, "resp')
    groups = read_script_data(render_run_page(reward_run.folder, live_state=live_state))["groups"]
    texts = [[one["text"] for one in group["predictions"]] for group in groups[:3]]
    assert texts == [["other"], ["x^2", "other"], ["x^2", "x^2"]]


def test_html_payloads_are_escaped(browser: Browser, tmp_path: Path) -> None:
    """Payloads are in all texts, IDs, file names, settings and reasons."""
    made = FakeRunDir(tmp_path / "run")
    made.write_metrics()
    made.write_finished(metric_differences=[])
    lines = []
    for number, payload in enumerate(XSS_PAYLOADS):
        name = payload.replace("/", "\u2215").replace("\0", "")[:80]
        path = tmp_path / f"{number}{name}.png"
        Image.new("RGB", (20, 20)).save(path)
        box = {"image": 0, "label": payload, "xyxy": [1, 1, 9, 9]}
        line = make_prediction_line(payload, payload, rf"\text{{{payload}}}", 0.5, image=str(path))
        more = {"prompt": payload, "boxes": [box, box], "gold_boxes": [box, box]}
        lines.append(line | more | {"references": [payload]})
    made.write_predictions("before", lines)
    made.write_predictions("after", with_figures(lines, 0.1, 0.9))
    made.write(
        "recipe.yaml", "eval: {metric: latex}\n# " + " ".join(XSS_PAYLOADS).replace("\n", "")
    )
    made.write_lines(
        "skipped_samples.jsonl", [{"id": p, "reason": f"{p}: {p}"} for p in XSS_PAYLOADS]
    )
    responses = [line | {"step": 1, "response": n} for n, line in enumerate(lines)]
    made.write_lines("responses.jsonl", responses)
    file = write_report(made.folder)
    browser.open(file)
    browser.run("for (let i = 0; i < 9; i += 1) document.querySelector('#feed .more').click();")
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; });")
    assert_nothing_executed(browser, file)
    assert count(browser, "#feed .feed > li") == len(XSS_PAYLOADS)
    assert sorted(read_texts(browser, "#feed .question")) == sorted(XSS_PAYLOADS)
    assert count(browser, "#groups .answer") == len(XSS_PAYLOADS) + 1
    assert count(browser, "iframe, object, embed, form") == 0


def test_named_error_is_that_of_the_images(tmp_path: Path) -> None:
    """A refusal has a lower score than an answer with a wrong field, but another error."""
    gold = '{"date": "1", "seat": "2", "from": "3"}'
    answers = {
        "I cannot read this.": 0.0,
        '{"date": "1", "seat": "2", "from": "9"}': 0.6,
        '{"date": "8", "seat": "2", "from": "3"}': 0.7,
        '{"date": "8", "seat": "7", "from": "3"}': 0.3,
        gold: 1.0,
    }
    lines = []
    for index, (answer, f1) in enumerate(answers.items()):
        path = tmp_path / f"p{index}.png"
        Image.new("RGB", (90, 60)).save(path)
        scores = {"f1": f1, "exact": float(f1 == 1)}
        line = make_prediction_line(f"s{index}", answer, gold, f1, image=str(path))
        lines.append(line | {"scores": scores})
    made = FakeRunDir(tmp_path / "run", "json")
    details = {"fields": {"date": {"f1": 0.4, "precision": 0.5, "recall": 0.4}}}
    line = make_evaluation_line(40, 0.5, num_samples=5)
    line |= {"primary_metric": "f1", "scores": {"f1": 0.52, "exact": 0.2}, "details": details}
    made.write_lines("metrics.jsonl", [START_RECORD, make_step_line(40), line])
    made.write_predictions("step-40", lines)
    page = render_run_page(made.folder)
    words = "Most frequent errors: in the field date (2 of 5 answers); most often 8 instead of 1."
    assert words in read_visible_text(page)
    data = read_script_data(page)
    assert [data["examples"][index]["id"] for index in data["worst"]] == ["s3", "s2", "s0"]
    one_hidden = read_visible_text(render_run_page(made.folder, max_examples=4))
    assert "Most frequent errors: in the field" in one_hidden
    assert "of 5 answers)" not in one_hidden


def test_boxes_with_the_lowest_overlap_are_shown(tmp_path: Path, browser: Browser) -> None:
    lines = make_image_answers(tmp_path, 4)
    for line, iou in zip(lines, (0.4, 0.1, 0.3, 0.9), strict=True):
        line |= {"answer": "", "gold": "", "scores": {"hit": float(iou > 0.5), "iou": iou}}
    lines[1] |= {"boxes": [], "scores": {"hit": 0.0, "iou": 0.0}}
    lines[2]["boxes"] = [lines[2]["boxes"][0] | {"xyxy": [30, 10, 60, 40]}]
    lines[0]["boxes"] = [lines[0]["boxes"][0] | {"xyxy": [20, 10, 50, 40]}]
    made = FakeRunDir(tmp_path / "run", "grounding")
    line = make_evaluation_line(40, 0.5, num_samples=4)
    scores = {"accuracy_at_0.5": 0.25, "mean_iou": 0.4}
    line |= {"primary_metric": "accuracy_at_0.5", "scores": scores}
    made.write_lines("metrics.jsonl", [START_RECORD, make_step_line(40), line])
    made.write_predictions("step-40", lines)
    open_page(browser, write_report(made.folder))
    assert read_texts(browser, "#worst .answer-text") == ["no box", "IoU 0.3", "IoU 0.4"]
    assert count(browser, "#worst .box.truth") == 3
    assert count(browser, "#worst .box.before") == 2
    click(browser, "#worst .tile")
    assert count(browser, "#enlarged[open]") == 1


def make_example(scores: list[float | None], text: str, reference: str, index: int) -> JsonObject:
    """Return the page data of an incorrect example with one prediction."""
    answer = {"text": text, "scores": {}, "fields": None}
    return {
        "is_incorrect": True,
        "scores": scores,
        "row_index": index,
        "predictions": [None, answer],
        "references": [reference],
    }


def test_examples_without_a_last_score_are_ranked_by_the_one_before() -> None:
    shown = [
        make_example([0.9, None], "a", "b", 0),
        make_example([0.0, 0.1], "a", "b", 1),
        make_example([None, None], "a", "b", 2),
    ]
    assert rank_incorrect_examples(shown) == [2, 1, 0]


def test_examples_of_other_answers_are_no_known_classes() -> None:
    details = {"confusions": [("cat", "(something else)", 2), ("cat", "dog", 1)], "fields": []}
    shown = [
        make_example([0.0, 0.0], "dog", "cat", 0),
        make_example([0.0, 0.0], "a lamp", "cat", 1),
        make_example([0.0, 0.0], "cat", "dog", 2),
    ]
    assert find_main_error(details, shown, [0, 1, 2]).examples == [1]
