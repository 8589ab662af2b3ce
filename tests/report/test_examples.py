"""Classification and selection of examples, and differences from recorded scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from each_value import each
from run_dir_fixtures import JsonLine, make_prediction_line

from finesight.config import MetricSpec
from finesight.data.sample import BoxPart
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.metric_difference import MetricDifference, compare_cases
from finesight.evaluate.task_metrics import compute_metrics
from finesight.report.examples import (
    ExampleSet,
    estimate_differences,
    read_examples,
    read_incorrect_lines,
)


def write_predictions(path: Path, *lines: JsonLine) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def compare(folder: Path, before: list[float], after: list[float], most: int = 100) -> ExampleSet:
    files = [
        write_predictions(
            folder / name,
            *(make_prediction_line(f"s{i}", "a", "g", x) for i, x in enumerate(scores)),
        )
        for name, scores in (("before.jsonl", before), ("after.jsonl", after))
    ]
    return read_examples(files[0], files[1], "x", most)


def test_example_kind_follows_its_score(tmp_path: Path) -> None:
    before, after = [0.1, 0.9, 0.5, 1.0, 0.5], [0.8, 0.7, 0.5, 1.0, 0.5 + 1e-9]
    found = compare(tmp_path, before, after)
    assert found.metric == "similarity"
    kinds = {one.latest["id"]: one.kind for one in found.displayed}
    assert kinds == {"s0": "better", "s1": "worse", "s2": "wrong", "s3": "right", "s4": "wrong"}
    assert found.counts == {"worse": 1, "better": 1, "wrong": 2, "right": 1}
    assert found.num_incorrect == 4
    assert found.is_paired
    assert found.count_hidden() == {}
    none = compare(tmp_path, [0.1, 0.9], [0.9, 0.1], most=0)
    assert none.displayed == []
    assert none.count_hidden() == {"worse": 1, "better": 1}


@each(
    ("headline", "score"),
    [
        *(("accuracy_at_0.5", "hit"), ("f1_at_0.5", "f1"), ("similarity", "similarity")),
        *(("mine", "mine"), ("bleu_4", "similarity"), (None, "similarity")),
    ],
)
def test_score_name_of_the_primary_metric(tmp_path: Path, headline: str | None, score: str) -> None:
    scores = {"exact": 1.0, "hit": 0.0, "f1": 0.5, "mine": 3.0, "similarity": 0.1}
    line = make_prediction_line("s", "a", "g", 0.0, scores=scores)
    file = write_predictions(tmp_path / "a.jsonl", line)
    assert read_examples(file, None, headline, 9).metric == score


def test_largest_changes_are_first_and_all_kinds_are_shown(tmp_path: Path) -> None:
    before = [0.5] * 40 + [0.9, 0.9] + [0.3] * 40 + [1.0] * 40
    after = [0.5 + i / 100 for i in range(1, 41)] + [0.2, 0.5] + [0.3] * 40 + [1.0] * 40
    found = compare(tmp_path, before, after, most=40)
    kinds = [one.kind for one in found.displayed]
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert counts == {"worse": 2, "better": 18, "wrong": 10, "right": 10}
    assert [one.latest["id"] for one in found.displayed[:3]] == ["s40", "s41", "s39"]
    assert found.count_hidden() == {"better": 22, "wrong": 30, "right": 30}
    assert found.total == 122


def test_equal_ids_are_paired_in_order(tmp_path: Path) -> None:
    rows = {"b": (("a", 0.1), ("a", 0.9), ("c", 0.5)), "a": (("a", 0.2), ("a", 0.8), ("d", 0.5))}
    before, after = (
        write_predictions(
            tmp_path / answer, *(make_prediction_line(n, answer, "g", x) for n, x in scores)
        )
        for answer, scores in rows.items()
    )
    changes = {
        (one.latest["id"], round(one.change, 3), *(line is None for line in one.predictions))
        for one in read_examples(before, after, "similarity", 9).displayed
    }
    # Sample c was not evaluated again: nothing is known about its latest answer.
    pairs = {("a", 0.1, False, False), ("a", -0.1, False, False)}
    assert changes == pairs | {("d", 0.0, True, False)}


def test_single_evaluation_separates_right_from_wrong(tmp_path: Path) -> None:
    lines = (make_prediction_line("a", "", "", 1.0), make_prediction_line("b", "", "", 0.5))
    file = write_predictions(tmp_path / "b.jsonl", *lines)
    found = read_examples(file, None, "similarity", 9)
    assert not found.is_paired
    assert [one.kind for one in found.displayed] == ["wrong", "right"]
    # A truncated line ends the file.
    with file.open("a") as stream:
        stream.write('{"id": "b", "ans')
    assert read_examples(file, None, "similarity", 9).total == 2
    invalid = {"similarity": float("nan"), "b": "x"}
    file = write_predictions(file, make_prediction_line("a", "", "", 0.0, scores=invalid))
    found = read_examples(file, None, "similarity", 9)
    assert (found.metric, found.counts["wrong"]) == ("", 1)


def test_answer_equal_to_a_reference_is_correct(tmp_path: Path) -> None:
    """The CIDEr-D of a perfect caption of common words is below its maximum."""
    scores = {"cider_d": 7.5}
    box = {"image": 0, "label": None, "xyxy": [1, 2, 3, 4]}
    lines = [
        make_prediction_line("equal", "a circle", "a circle", 0, scores=scores),
        make_prediction_line("second", "a ball", "a", 0, scores=scores, references=["a ball"]),
        make_prediction_line("other", "a ball", "a circle", 0, scores=scores),
        make_prediction_line("box", "here", "here", 0, scores=scores, gold_boxes=[box]),
    ]
    file = write_predictions(tmp_path / "a.jsonl", *lines)
    found = read_examples(file, None, "cider_d", 9)
    assert [one.latest["id"] for one in found.displayed] == ["other", "box", "equal", "second"]
    assert [one.is_incorrect for one in found.displayed] == [True, True, False, False]
    assert [line["id"] for line in read_incorrect_lines(file, "cider_d")] == ["other", "box"]


TEXTS = ["one two", "three", "four five six", "seven", "eight nine", "ten", "eleven", "twelve"]


def make_cases(metric: MetricSpec, num_correct: int) -> list[EvalCase]:
    box = BoxPart(image=0, label="a", xyxy=(0.0, 0.0, 9.0, 9.0))
    other = BoxPart(image=0, label="a", xyxy=(0.0, 0.0, 9.0, 6.0))
    cases = []
    for i, text in enumerate(TEXTS):
        answer, found = (text, box) if i < num_correct else ("nothing", other)
        boxes, truth = ((found,), (box,)) if metric == "grounding" else ((), ())
        cases.append(EvalCase(answer, boxes, (text,), truth, str(i), ended_with_eos=i % 3 == 0))
    return cases


def write_scored(path: Path, metric: MetricSpec, cases: list[EvalCase]) -> Path:
    lines = []
    for one, scores in zip(cases, compute_metrics(metric, cases).per_sample, strict=True):
        reason = "stop" if one.ended_with_eos else "length"
        more = {"scores": scores, "finish_reason": reason}
        lines.append(make_prediction_line(one.id, one.answer, one.references[0], 0.0, **more))
    return write_predictions(path, *lines)


def estimate(
    folder: Path, metric: MetricSpec, **recorded: float
) -> tuple[dict[str, MetricDifference], list[MetricDifference]]:
    """Return the differences from recorded scores, and those of the full comparison."""
    before, after = make_cases(metric, 2), make_cases(metric, 7)
    files = [write_scored(folder / n, metric, c) for n, c in (("b", before), ("a", after))]
    then, since = (compute_metrics(metric, cases).scores for cases in (before, after))
    differences = estimate_differences(files[0], files[1], then | recorded, since)
    return differences, compare_cases(metric, before, after)


@pytest.mark.parametrize("metric", ["ocr", "qa", "grounding", "classification"])
def test_differences_of_means_match_the_full_comparison(metric: MetricSpec, tmp_path: Path) -> None:
    found, expected = estimate(tmp_path, metric)
    wanted = {one.name: one for one in expected}
    assert len(found) >= 2
    assert "ended_with_eos" in found
    for name, one in found.items():
        assert one.verdict == wanted[name].verdict
        assert (one.low, one.high) == pytest.approx((wanted[name].low, wanted[name].high))
    assert {"similarity", "anls", "accuracy_at_0.5", "accuracy"} & found.keys()


def test_other_scores_and_samples_have_no_difference(tmp_path: Path) -> None:
    found, _ = estimate(tmp_path, "ocr")
    assert "cer" not in found
    # The recorded score differs from the mean of the file.
    found, _ = estimate(tmp_path, "ocr", exact=0.9)
    assert found.keys() == {"similarity", "exact_folded", "ended_with_eos"}
    files = [
        write_predictions(tmp_path / name, make_prediction_line(name, "", "", 0.5)) for name in "ba"
    ]
    assert estimate_differences(files[0], files[1], {"similarity": 0.5}, {"similarity": 0.5}) == {}
