"""Tests of verdicts, and of pages of random runs: no two statements of a page disagree."""

import html
import json
import random
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import click
import pytest
from html_text import read_script_data, read_visible_text
from run_dir_fixtures import (
    MANIFEST,
    START_RECORD,
    FakeRunDir,
    JsonLine,
    make_evaluation_line,
    make_prediction_line,
    make_step_line,
)

from finesight.cli.app import app
from finesight.doctor import run_check
from finesight.errors import Step
from finesight.evaluate.metric_difference import (
    MetricDifference,
    build_unsampled_difference,
    compare_cases,
)
from finesight.evaluate.prediction_file import read_predictions
from finesight.evaluate.score_format import format_score, format_score_change
from finesight.evaluate.task_metrics import compute_metrics, get_primary_metric
from finesight.metric_components import get_score
from finesight.operations.training import list_next_steps
from finesight.report import examples, metric_rows, run_verdict
from finesight.report.i18n import use_language
from finesight.report.metric_rows import build_metric_rows, format_metric_name
from finesight.report.run_page import render_run_page
from finesight.report.run_reader import read_run
from finesight.report.run_verdict import Proposal, RunVerdict, judge_run
from finesight.report.summary import find_overfitting, list_lines_of_weights
from finesight.settings.config import Recipe
from finesight.settings.manifest import find_next_run_dir

NONE = "no clear change"


def judge_scores(*scores: float, **differences: MetricDifference) -> RunVerdict:
    """Judge one or two evaluations."""
    lines = [make_evaluation_line(9 * step, score) for step, score in enumerate(scores)]
    return RunVerdict(["before", "after"], build_metric_rows(lines, differences), 10)


@pytest.mark.parametrize(
    ("low", "high", "verdict", "level", "words"),
    [
        (0.6, 0.8, "better", "better", "is +0.60 to +0.80. This is unlikely to be due to chance."),
        (-0.1, 0.8, NONE, NONE, "is −0.10 to +0.80. This may be due to chance."),
        (None, None, "better", "", "The confidence interval of the difference is unknown"),
    ],
)
def test_verdict_of_comparison_is_used(low, high, verdict, level, words):
    difference = MetricDifference("similarity", 0.2, 0.9, low, high, verdict)
    found = judge_scores(0.2, 0.9, similarity=difference)
    rows = [
        replace(row, cells=[replace(c, num_samples=10) for c in row.cells]) for row in found.rows
    ]
    found = replace(found, rows=rows)
    assert (found.level, found.cell.verdict_text) == (level, level)
    assert "The similarity increased by 0.70" in found.change_text
    assert words in found.change_text
    fallen = judge_scores(0.9, 0.2, similarity=difference)
    assert "The similarity decreased by 0.7000" in fallen.change_text


def write_finished_run(
    folder: Path, scores: JsonLine, *, metric: str = "ocr", **more: object
) -> FakeRunDir:
    """Write a finished run of 30 samples with such scores after training; `more` adds keys."""
    run = FakeRunDir(folder, metric)
    lines = []
    for step, values in ((0, dict.fromkeys(scores, 0.0)), (60, scores)):
        line = make_evaluation_line(step, 0.5, scores=values, intervals={}, num_samples=30)
        lines.append(line | {"primary_metric": next(iter(scores))} | more)
    run.write_lines("metrics.jsonl", [START_RECORD, lines[0], make_step_line(60), lines[1]])
    run.write_finished(before=lines[0], after=lines[1])
    return run


def test_proposed_labels_are_those_of_a_command_that_runs(tmp_path: Path) -> None:
    run = write_finished_run(tmp_path / "run", {"exact": 0.2})
    step = judge_run(read_run(run.folder)).next_step
    assert step is not None
    assert step.operation == "label"
    program, name, *words = shlex.split(str(replace(step, purpose="")))
    context = click.Context(app)
    command = app.get_command(context, name)
    assert command is not None
    assert program == "finesight"
    command.make_context(name, words)  # An argument that is missing is an error.
    # The end of a training proposes the same step; its data are not those of `label`.
    recipe = {"model": "m", "data": {"train": "t.jsonl"}, "output_dir": str(run.folder)}
    proposed, *others = list_next_steps(Recipe.model_validate(recipe))
    assert proposed == step
    assert [one.operation for one in others] == ["predict", "serve"]


def test_role_of_chance_names_the_score_if_another_one_counts_answers() -> None:
    difference = MetricDifference("similarity", 0.2, 0.9, -0.1, 0.8, NONE)
    found = judge_scores(0.2, 0.9, similarity=difference)
    counts = [examples.AnswerCounts(3, 0, 7)] * 2
    text = replace(found, counts=counts).change_text
    assert text.endswith("The change of the similarity may be due to chance.")


def test_score_that_is_undefined_was_evaluated() -> None:
    lines = [make_evaluation_line(0, float("nan")), make_evaluation_line(9, 0.5)]
    lines[0]["validation_loss"] = 1.0
    found = RunVerdict(["before", "after"], build_metric_rows(lines, {}), 10)
    text = "The similarity (before) could not be computed, so there is no comparison."
    assert found.change_text == text
    once = RunVerdict(["before", "after"], build_metric_rows([{}, lines[1]], {}), 10)
    assert "was evaluated once" in once.change_text


def test_next_run_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(write_finished_run(tmp_path / "run", {"exact": 0.2}).folder)
    assert find_next_run_dir(Path(".")) == tmp_path / "run-2"
    assert find_next_run_dir(Path("adapter/..")) == tmp_path / "run-2"
    assert find_next_run_dir(Path("../run")) == Path("../run-2")


@pytest.mark.parametrize(
    ("value", "num_samples", "expected"),
    [
        (-0.0, 100, ("0.00", "+0.00")),
        (-0.00001, 100, ("0.0000", "+0.0000")),
        (-0.25, 100, ("-0.25", "-0.25")),
        (0.5, -3, ("0.5000", "+0.5000")),
    ],
)
def test_zero_has_no_sign(value: float, num_samples: int, expected: tuple[str, str]) -> None:
    found = format_score(value, num_samples), format_score_change(value, num_samples)
    assert found == expected


WORSE = asdict(MetricDifference("exact", 0.9, 0.4, -0.7, -0.2, "worse"))


@pytest.mark.parametrize(
    ("scores", "settings", "operation"),
    [
        ([0.9, 0.95, 0.4], {}, "train"),
        ([0.9, 0.95, 0.4], {"every": 0.1, "patience": 2}, "doctor"),
        ([0.9, 0.7, 0.4], {}, "doctor"),
        ([0.9, 0.3, 0.4], {}, "doctor"),
    ],
)
def test_early_stopping_needs_a_better_evaluation(
    tmp_path: Path, scores: list[float], settings: JsonLine, operation: str
) -> None:
    run = FakeRunDir(tmp_path / "run")
    run.write("recipe.yaml", json.dumps({"model": "m", "eval": {"metric": "ocr"} | settings}))
    lines = []
    for step, score in zip((0, 30, 60), scores, strict=True):
        line = make_evaluation_line(step, 0.5, scores={"exact": score}, num_samples=30)
        lines.append(line | {"primary_metric": "exact"})
    run.write_lines("metrics.jsonl", [START_RECORD, *lines])
    run.write_finished(before=lines[0], after=lines[-1], metric_differences=[WORSE])
    record = read_run(run.folder)
    step = judge_run(record).next_step
    assert step is not None
    assert step.operation == operation
    (found,) = [one for one in run_check.check_predictions(record) if one.code == "metric-worse"]
    # The doctor does not propose itself.
    own = replace(step, purpose="")
    if operation == "doctor":
        own = Step("report", {"run": str(run.folder)})
    assert found.remedy == str(own)


def test_counts_of_other_samples_are_not_compared(tmp_path: Path) -> None:
    run = write_finished_run(tmp_path / "run", {"exact": 0.5})
    lines = []
    for step, count in ((0, 64), (60, 500)):
        line = make_evaluation_line(step, 0.5, scores={"exact": 0.5}, num_samples=count)
        lines.append(line | {"primary_metric": "exact"})
    run.write_lines("metrics.jsonl", [START_RECORD, *lines])
    run.write_finished(before=lines[0], after=lines[1])
    found = judge_run(read_run(run.folder))
    assert found.sentence.startswith("250 of 500 answers are correct. For new samples")
    assert found.counts[0] is None


def test_run_that_stopped_early_is_not_trained_longer(tmp_path: Path) -> None:
    steps = [make_step_line(step) | {"loss": 2.0 / step} for step in range(1, 61)]
    for is_stopped in (False, True):
        run = write_finished_run(tmp_path / str(is_stopped), {"exact": 0.6})
        lines = list(read_run(run.folder).evaluations)
        run.write_lines("metrics.jsonl", [START_RECORD, lines[0], *steps, lines[1]])
        run.write_finished(before=lines[0], after=lines[1], stopped_early=is_stopped)
        reason = judge_run(read_run(run.folder)).proposal.reason
        assert (reason == "The training loss still falls.") != is_stopped


def test_good_run_with_overfitting_is_used(tmp_path: Path) -> None:
    run = write_finished_run(tmp_path / "run", {"exact": 1.0})
    lines = [make_step_line(step) for step in range(1, 61)]
    losses = ((0, 2.0), (20, 0.5), (40, 0.9), (60, 1.5))
    for step, loss in losses:
        line = make_evaluation_line(step, 0.5, scores={"exact": 1.0}, num_samples=30)
        lines.append(line | {"primary_metric": "exact", "validation_loss": loss})
    run.write_lines("metrics.jsonl", [START_RECORD, *sorted(lines, key=lambda one: one["step"])])
    record = read_run(run.folder)
    assert find_overfitting(list_lines_of_weights(record))
    step = judge_run(record).next_step
    assert step is not None
    assert step.operation == "serve"


def test_doctor_names_no_metric_without_a_primary_one(tmp_path: Path) -> None:
    """The primary score of an earlier evaluation is not that of the result."""
    run = FakeRunDir(tmp_path / "run")
    lines = [make_evaluation_line(0, 0.2), make_evaluation_line(60, 0.9)]
    run.write_lines("metrics.jsonl", [START_RECORD, *lines])
    before, after = [line | {"scores": {}, "primary_metric": None} for line in lines]
    run.write_finished(before=before, after=after)
    record = read_run(run.folder)
    assert record.primary_metric is not None
    assert judge_run(record).primary_row is not None
    codes = {one.code for one in run_check.check_predictions(record)}
    assert not any(code.startswith("metric") for code in codes)


def make_scored_lines(name: str, values: Sequence[float]) -> list[JsonLine]:
    lines = []
    for index, value in enumerate(values):
        lines.append(make_prediction_line(f"s{index}", "x", "y", 0.0, scores={name: value}))
    return lines


@pytest.mark.parametrize(
    ("metric", "expected"), [("own.py:score", (0, 30, 0)), ("classification", (15, 0, 15))]
)
def test_mean_of_a_custom_score_counts_no_answers(
    tmp_path: Path, metric: str, expected: tuple[int, int, int]
) -> None:
    run = write_finished_run(tmp_path / "run", {"accuracy": 0.5}, metric=metric)
    record = read_run(run.folder)
    assert (judge_run(record).counts[-1] is None) == (metric == "own.py:score")
    for name in ("before", "after"):
        run.write_predictions(name, make_scored_lines("accuracy", [0.5] * 30))
    counts = judge_run(record).counts[-1]
    assert counts is not None
    assert (counts.correct, counts.partly, counts.wrong) == expected


def test_next_step_does_not_depend_on_the_size_of_prediction_files(tmp_path: Path) -> None:
    """The page of a large file counts by the score, which need not be the primary one."""
    run = write_finished_run(tmp_path / "run", {"similarity": 0.5, "exact": 0.1})
    lines = make_scored_lines("exact", [1.0] * 3 + [0.0] * 27)
    for name in ("before", "after"):
        run.write_predictions(name, lines)
    record = read_run(run.folder)
    found = judge_run(record)
    assert found.next_step is not None
    assert found.next_step.operation == "label"
    assert judge_run(replace(record, max_bytes=2000)).next_step == found.next_step


@pytest.mark.parametrize("num_samples", [-3, 0, 0.5, 60.0])
def test_invalid_number_of_samples_is_unknown(tmp_path: Path, num_samples: float) -> None:
    run = write_finished_run(tmp_path / "run", {"exact": 0.2}, num_samples=num_samples)
    record = read_run(run.folder)
    found = judge_run(record)
    assert found.num_samples is None
    assert found.cell.value_text == "0.2000"
    assert found.counts == [None, None]
    run_check.check_predictions(record)
    render_run_page(run.folder)


METRICS = "classification", "json", "ocr", "grounding", "captions"


def answer_text(rng: random.Random, metric: str, gold: str, quality: float) -> str:
    """Answer with the reference, a part of it, or something else."""
    if rng.random() < quality:
        return gold
    if metric == "json" and rng.random() < 0.8:
        return json.dumps(json.loads(gold) | {rng.choice("abc"): "other"})
    return rng.choice(["dog", "a red cat", gold[: len(gold) // 2], ""])


def draw_answers(rng: random.Random, metric: str, count: int, quality: float) -> list[JsonLine]:
    lines = []
    for index in range(count):
        gold = {"json": '{"a": "1", "b": "x", "c": "y"}', "grounding": ""}.get(metric, "cat")
        if metric == "captions":
            gold = f"a {['red', 'blue'][index % 2]} cat on chair {index % 5}"
        elif metric == "classification":
            gold = ["cat", "dog", "bird"][index % 3]
        boxes: list[JsonLine] = []
        answer = answer_text(rng, metric, gold, quality)
        shown: list[JsonLine] = []
        if metric == "grounding":
            boxes = [{"image": 0, "label": "ring", "xyxy": [10, 10, 40, 40]}]
            offset = 0 if rng.random() < quality else rng.choice([4, 18, 60])
            corners = [10 + offset, 10, 40 + offset, 40]
            shown = [boxes[0] | {"xyxy": corners}]
            answer = ""
        more = {"references": [], "boxes": shown, "gold_boxes": boxes, "image_size": [90, 60]}
        more["finish_reason"] = rng.choice(["stop"] * 9 + ["length"])
        lines.append(make_prediction_line(f"s{index}", answer, gold, 0.0, **more))
    return lines


def draw_run(folder: Path, seed: int) -> Path:
    """Write a run with random answers, scores, losses and missing parts."""
    rng = random.Random(seed)
    metric = rng.choice(METRICS)
    run = FakeRunDir(folder, metric)
    if rng.random() < 0.2:
        run.write("manifest.json", json.dumps(MANIFEST | {"family": "hf"}))
    count = rng.choice([1, 3, 5, 6, 8, 12, 20, 30, 60])
    before = rng.choice([0.0, 0.3, 0.6, 0.9, 1.0])
    after = rng.choice([before, before, 0.0, 0.5, 0.8, 0.95, 1.0])
    steps = {"before": (0, before), "after": (60, after)}
    is_finished = rng.random() < 0.8
    evaluations = []
    cases = []
    for name, (step, quality) in steps.items():
        stem = name if is_finished or not step else f"step-{step}"
        lines = draw_answers(rng, metric, count, quality)
        run.write_predictions(stem, lines)
        file = folder / "predictions" / f"{stem}.jsonl"
        cases.append([one.case for one in read_predictions(file)])
        result = compute_metrics(metric, cases[-1])
        scored = [line | {"scores": s} for line, s in zip(lines, result.per_sample, strict=True)]
        run.write_predictions(stem, scored)
        primary = get_primary_metric(metric, result.scores)
        line = {"step": step, "primary_metric": primary, "scores": result.scores}
        line |= {"intervals": result.intervals(), "notes": result.notes()}
        line |= {"details": result.details, "validation_loss": rng.choice([0.2, 1.0, 2.0])}
        line |= {"num_samples": count, "num_loss_samples": count, "eval_s": 1.0}
        evaluations.append(line | {"sample_set": "a", "score_set": "a"})
    if rng.random() < 0.15:
        evaluations[0]["score_set"] = "b"
    if rng.random() < 0.15:
        (folder / "predictions" / "before.jsonl").unlink()
    decay_steps = rng.choice([5, 20, 1e9])
    lines = [make_step_line(step, loss=2 * 2.7 ** (-step / decay_steps)) for step in range(1, 61)]
    interim = []
    if rng.random() < 0.3:
        for step, loss in ((20, 0.5), (40, 0.9)):
            interim.append(evaluations[0] | {"step": step, "validation_loss": loss})
        evaluations[1]["validation_loss"] = 1.5
    metrics = [START_RECORD, evaluations[0], *lines[:40], *interim, *lines[40:], evaluations[1]]
    if rng.random() < 0.1:
        metrics = [START_RECORD, *lines, evaluations[1]]
        evaluations[0] = {}
    run.write_lines("metrics.jsonl", metrics)
    if is_finished:
        differences = []
        if evaluations[0].get("score_set") == "a":
            differences = compare_cases(metric, *cases, num_samples=count)
        losses = [one.get("validation_loss", 1.0) for one in evaluations]
        differences.append(build_unsampled_difference("validation_loss", *losses))
        run.write_finished(
            before=evaluations[0] or None,
            after=evaluations[1],
            metric_differences=[asdict(one) for one in differences],
        )
    return folder


ROW = re.compile(r"<tr[^>]*>\s*<th scope=\"row\">(.*?)</tr>", re.DOTALL)
CHIP = re.compile(r'<span class="chip ?([a-z]*)">([^<]*)</span>')


def read_metric_chips(page: str) -> dict[str, tuple[str, float | None, float | None]]:
    """Return the verdict of each metric of the table, and the bounds of its difference."""
    table = page[page.index('class="metrics-table') :].partition("</table>")[0]
    found = {}
    for row in ROW.findall(table):
        name = read_visible_text(row.partition("<span")[0])
        chips = CHIP.findall(row)
        bounds = re.search(r"\(([+−][\d.,]+) to ([+−][\d.,]+)\)", row)
        ends = (
            [float(one.replace("−", "-").replace(",", "")) for one in bounds.groups()]
            if bounds
            else [None, None]
        )
        found[name] = (chips[-1][1].strip() if chips else "", *ends)
    return found


def check_statements(page: str, folder: Path) -> None:
    """Check that the statements on the quality of a run agree, in the HTML of its page."""
    text = html.unescape(read_visible_text(page))
    card = page[page.index('<div class="card verdict') :].partition("metrics-table")[0]
    card_text = html.unescape(read_visible_text(card))
    record = read_run(folder)
    verdict = judge_run(record)
    assert verdict.sentence in card_text
    chips = read_metric_chips(page)
    assert verdict.primary_row is not None
    primary = format_metric_name(verdict.primary_row.name)
    card_chip = CHIP.findall(card)[0][1].strip()
    assert card_chip == verdict.level == chips[primary][0]
    check_table(text, chips, {format_metric_name(row.name): row.name for row in verdict.rows})
    # Role of chance, and direction.
    assert ("unlikely to be due to chance" in card_text) == (card_chip in ("better", "worse"))
    assert ("may be due to chance." in card_text) <= (card_chip == NONE)
    if match := re.search(r"The .*? (increased|decreased) by", card_text):
        _, low, high = chips[primary]
        if low is not None and high is not None:
            assert (high > 0) if match[1] == "increased" else (low < 0)
    check_counts(page, card, card_text)
    check_next_step(page, text, card_chip, folder)


def check_table(
    text: str, chips: dict[str, tuple[str, float | None, float | None]], names: dict[str, str]
) -> None:
    """Check the verdicts of the table by their intervals, and the conclusion by the table."""
    for name, (chip, low, high) in chips.items():
        if chip in ("better", "worse"):
            assert low is not None
            assert high is not None
            assert low * high > 0
            is_better = (low > 0) != get_score(names[name]).lower_is_better
            assert chip == ("better" if is_better else "worse")
        elif chip == NONE:
            assert low is not None
            assert high is not None
            assert low <= 0 <= high
    conclusion = re.search(r"Compared with .*? validation samples: (.*?)\. ", text)
    if conclusion is None:
        return
    claimed = {}
    for part in conclusion[1].split("; "):
        kind, _, listed = part.partition(" in ")
        # The name of a metric may contain a comma and that of another one.
        for name in sorted(chips, key=len, reverse=True):
            if name in listed:
                listed = listed.replace(name, "", 1)
                claimed[name] = {"no clear difference": NONE}.get(kind, kind)
        assert not listed.strip(", ")
    assert all(chips[name][0] == kind for name, kind in claimed.items()), claimed
    clear = {name for name, (chip, *_) in chips.items() if chip in ("better", "worse")}
    assert clear == {name for name, kind in claimed.items() if kind != NONE}


def is_correct(data: JsonLine, example: JsonLine, index: int) -> bool:
    """Return whether an answer is correct, by its scores on the page."""
    scores = example["predictions"][index]["scores"]
    names = [name for name in scores if get_score(data["score_names"][name]).counts_answers]
    value: float = scores[names[0]] if names else example["scores"][index]
    return value == 1


def check_errors(data: JsonLine, card_text: str) -> None:
    """Check the number of answers with the named error, and that the images have it."""
    match = re.search(r"in the field (\w+) \((\d+) of (\d+) answers\)", card_text)
    if match is None:
        return
    found = set()
    for index, example in enumerate(data["examples"]):
        fields = example["predictions"][-1]["fields"] or {}
        if match[1] in [row[0] for row in fields.get("differences", ())]:
            found.add(index)
    assert [len(found), len(data["examples"])] == [int(match[2]), int(match[3])]
    shown = data["worst"]
    assert set(shown[: len(found)]) <= found


def check_counts(page: str, card: str, card_text: str) -> None:
    """Check the numbers of the sentence, of the bars and of the examples."""
    data = read_script_data(page)
    assert all(data["examples"][index]["is_incorrect"] for index in data["worst"])
    check_errors(data, card_text)
    bars = re.findall(
        r'aria-label="\w[^"]*: ([\d,]+) correct, ([\d,]+) partly correct, ([\d,]+) wrong"', card
    )
    pattern = r"(\d+) of (\d+) answers are (?:entirely )?correct(?: at an IoU of at least 0\.5)?"
    pattern += r"(?: \(\w+: (\d+)\))?\. For new samples, expect (\d+) to (\d+) of 100"
    sentence = re.search(pattern + r" \(95 % interval\)\.", card_text)
    assert bool(bars) == bool(sentence) or len(bars) == 1
    changes = re.search(r"Changed answers: (\d+) became correct, (\d+) became incorrect", card_text)
    if changes is not None:
        num_gained, num_lost = map(int, changes.groups())
        first, last = (int(bar[0]) for bar in bars)
        assert last - first == num_gained - num_lost
        # Of all answers on the page.
        pairs = [[is_correct(data, one, index) for index in (0, 1)] for one in data["examples"]]
        assert [pairs.count([False, True]), pairs.count([True, False])] == [num_gained, num_lost]
    if sentence is None:
        return
    assert ("IoU of at least" in sentence[0]) == ("hit at IoU 0.5" in data["score_names"])
    correct, partly, wrong = map(int, bars[-1])
    assert (correct, correct + partly + wrong) == (int(sentence[1]), int(sentence[2]))
    assert int(sentence[4]) <= 100 * correct / int(sentence[2]) <= int(sentence[5])
    if sentence[3]:
        assert int(bars[0][0]) == int(sentence[3])
    assert ("entirely correct" in card_text) == any(int(bar[1]) for bar in bars)
    legend = re.findall(r'<i class="(\w+)"></i>([\d,]+) ', card)
    shown = [int(bar[index]) for bar in bars for index in range(3) if int(bar[index])]
    assert [int(number) for _, number in legend] == shown
    button = re.search(r'data-kind="wrong">.*?class="count">([\d,]+)<', page, re.DOTALL)
    if button is not None:
        assert int(button[1]) == partly + wrong


def check_next_step(page: str, text: str, card_chip: str, folder: Path) -> None:
    """Check that there is at most one next step, which agrees with the verdict."""
    steps = re.findall(r"Next step: ([^<]*</strong>[^<]*)", page)
    assert len(steps) <= 1
    reason = "".join(steps)
    record = read_run(folder)
    if record.result is not None:
        is_overfitting = find_overfitting(list_lines_of_weights(record)) is not None
        is_shown = "The model overfits." in reason
        assert is_shown <= is_overfitting == ("Overfitting: " in text)
        assert not (card_chip == "worse" and "use the model" in reason)
        assert ("worse than before" in reason) <= (card_chip == "worse")
        assert ("There is no clear change." in reason) <= (card_chip == NONE)
    match = re.search(r"(\d+) of (\d+) answers are correct", reason)
    if match:
        assert f"{match[1]} of {match[2]} answers" in text
    codes = {"better": {"metric"}, "worse": {"metric-worse"}, NONE: {"metric-unclear"}}
    found = {one.code for one in run_check.check_predictions(record)}
    diagnosed = found & {"metric", "metric-worse", "metric-unclear"}
    assert diagnosed <= codes.get(card_chip, set())
    commands = re.findall(r'class="card next-step".*?<code>([^<]*)</code>', page, re.DOTALL)
    assert len(commands) == len(steps)
    for one in run_check.check_predictions(record):
        if one.code in ("metric-worse", "metric-unclear") and commands:
            (command,) = map(html.unescape, commands)
            # The page proposes the doctor for a worse result, and the doctor proposes the page.
            assert one.remedy == re.sub("^finesight doctor ", "finesight report ", command)


def check_run(folder: Path, seed: int) -> str:
    draw_run(folder, seed)
    page = render_run_page(folder)
    check_statements(page, folder)
    with use_language("zh"):
        chinese = html.unescape(read_visible_text(render_run_page(folder)))
        assert judge_run(read_run(folder)).sentence in chinese
    return page


@pytest.mark.parametrize("start", range(0, 40, 10))
def test_statements_of_a_page_agree(tmp_path: Path, start: int) -> None:
    for seed in range(start, start + 10):
        check_run(tmp_path / str(seed), seed)


@pytest.mark.fuzz
@pytest.mark.parametrize("start", range(40, 540, 50))
def test_statements_of_many_pages_agree(tmp_path: Path, start: int) -> None:
    for seed in range(start, start + 50):
        check_run(tmp_path / str(seed), seed)


def swap_counts(lines: list[JsonLine | None], metric: str) -> examples.AnswerCounts | None:
    counts = COUNT_ANSWERS(lines, metric)
    if counts is None:
        return None
    return examples.AnswerCounts(counts.wrong, counts.partly, counts.correct)


COUNT_ANSWERS = examples.count_answers


def add_changes(pairs: list[list[JsonLine]], metric: str) -> tuple[int, int]:
    num_gained, num_lost = COUNT_CHANGES(pairs, metric)
    return num_gained + 1, num_lost + 1


COUNT_CHANGES = examples.count_changes

BROKEN_CODE: dict[str, tuple[object, str, object]] = {
    "counts": (examples, "count_answers", swap_counts),
    "changed answers": (examples, "count_changes", add_changes),
    "chips": (metric_rows.MetricCell, "verdict_text", "better"),
    "conclusion": (run_verdict, "CONCLUSIONS", {NONE: "better in {}", "better": "worse in {}"}),
    "chance": (RunVerdict, "change_text", "This is unlikely to be due to chance."),
    "next step": (
        run_verdict,
        "propose_step",
        lambda *_: Proposal(Step("serve", {}), "stop", "The model overfits."),
    ),
}
"""Object, attribute and wrong value of statements that are broken on purpose."""


@pytest.mark.parametrize("name", BROKEN_CODE)
def test_check_detects_a_broken_statement(tmp_path, monkeypatch, name):
    owner, attribute, value = BROKEN_CODE[name]
    monkeypatch.setattr(owner, attribute, value)
    num_detected = 0
    for seed in range(10):
        try:
            check_run(tmp_path / str(seed), seed)
        except AssertionError:
            num_detected += 1
    assert num_detected


REPLACE_IN_PAGE: dict[str, Callable[[str], str]] = {
    "second step": lambda page: page.replace(
        "</main>", 2 * "<p><strong>Next step: a</strong></p>" + "</main>"
    ),
    "sentence": lambda page: re.sub(r"\d+ of (\d+) answers are", r"999 of \1 answers are", page),
    "changed answers": lambda page: re.sub(r"(Changed answers: )\d+", r"\g<1>999", page),
    "named error": lambda page: re.sub(r"(in the field \w+ \()\d+", r"\g<1>999", page),
    "bar": lambda page: re.sub(r"\d+( partly correct, )", r"999\1", page),
}


@pytest.mark.parametrize("name", REPLACE_IN_PAGE)
def test_check_detects_a_changed_page(tmp_path: Path, name: str) -> None:
    num_detected = 0
    for seed in range(6):
        page = check_run(tmp_path / str(seed), seed)
        changed = REPLACE_IN_PAGE[name](page)
        if changed != page:
            num_detected += 1
            with pytest.raises(AssertionError):
                check_statements(changed, tmp_path / str(seed))
    assert num_detected
