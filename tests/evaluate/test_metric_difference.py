"""Prediction files, and differences of two evaluations of the same samples."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finesight.errors import UserError
from finesight.evaluate.eval_case import EvalCase, mean_metrics
from finesight.evaluate.metric_difference import (
    MetricDifference,
    build_unsampled_difference,
    compare_cases,
    compare_estimators,
)
from finesight.evaluate.prediction_file import format_prediction_line, read_predictions
from finesight.infer.prediction import Prediction
from finesight.samples.sample import BoxPart
from finesight.train.finalize import format_differences


def make_answers(*answers: str, truth: str = "abcd") -> list[EvalCase]:
    return [EvalCase(answer, (), (truth,), (), f"s{i}") for i, answer in enumerate(answers)]


def make_classes(pairs: list[tuple[str, str]]) -> list[EvalCase]:
    return [EvalCase(a, (), (b,), (), str(i)) for i, (a, b) in enumerate(pairs)]


def compare(
    before: list[EvalCase], after: list[EvalCase], metric: str = "ocr"
) -> dict[str, MetricDifference]:
    return {one.name: one for one in compare_cases(metric, before, after)}


def test_clear_gain_is_better() -> None:
    found = compare(make_answers(*["wxyz"] * 20), make_answers(*["abcd"] * 19, "abc"))
    assert (found["similarity"].before, found["similarity"].after) == (0, pytest.approx(0.9875))
    assert found["similarity"].verdict == found["cer"].verdict == "better"
    assert found["cer"].high is not None
    assert found["cer"].high < 0
    assert found["ended_with_eos"].verdict == "no clear change"
    back = compare(make_answers(*["abcd"] * 20), make_answers(*["wxyz"] * 20))
    assert back["similarity"].verdict == back["cer"].verdict == "worse"


def test_comparison_is_paired() -> None:
    """Each answer gains a little: clear in pairs, though the answers themselves differ much."""
    chance = random.Random(0)
    lengths = [chance.randrange(2, 60) for _ in range(40)]
    before = make_answers(*("a" * n for n in lengths), truth="a" * 64)
    after = make_answers(*("a" * (n + 1) for n in lengths), truth="a" * 64)
    one = compare(before, after)["similarity"]
    assert one.verdict == "better"
    assert one.low is not None
    assert one.high is not None
    assert 0.8 / 64 < one.low < 1 / 64 <= one.high < 1.2 / 64
    assert 2 * np.std(lengths) / 64 / np.sqrt(40) > 3 / 64, "the answers differ by more"


def test_noise_and_few_samples_give_no_verdict() -> None:
    before = make_answers(*(["abcd"] * 10 + ["wxyz"] * 10))
    after = make_answers("wxyz", *(["abcd"] * 10), *(["wxyz"] * 9))
    one = compare(before, after)["similarity"]
    assert one.low is not None
    assert one.high is not None
    assert one.low < 0 < one.high
    assert one.verdict == "no clear change"
    # Each sample changes in five scores. The primary one is tested at 0.05, as the only one at
    # first. Holm's rule for the other four begins at 0.05 / 4.
    for count, num_clear in ((6, 1), (7, 1), (8, 5)):
        found = compare(make_answers(*["x"] * count), make_answers(*["abcd"] * count))
        assert found["similarity"].p_value == pytest.approx(2 / 2**count)
        verdicts = [one.verdict for one in found.values()]
        assert verdicts.count("better") == num_clear
        assert found["similarity"].verdict == "better"


def test_answers_are_paired_by_sample_id_and_in_order() -> None:
    before, after = make_answers("abcd", "x", "abcd"), make_answers("abcd", "abcd")
    exact = compare(before, after[::-1])["exact"]
    assert (exact.before, exact.after) == (0.5, 1.0)
    before = [EvalCase(a, (), ("a",), (), "same") for a in ("a", "b")]
    after = [EvalCase(a, (), ("a",), (), "same") for a in ("b", "b")]
    assert compare(before, after)["exact"].before == 0.5
    assert compare_cases("ocr", before, after, num_samples=2)
    assert not compare_cases("ocr", before, after, num_samples=1)
    assert not compare_cases("ocr", before, [EvalCase("a", (), ("a",), (), "other")])


@pytest.mark.parametrize("name", ["validation_loss", "exact"])
def test_difference_without_interval_has_no_verdict(name: str) -> None:
    assert build_unsampled_difference(name, 2.0, 1.0).verdict == ""


def test_number_of_correct_answers_is_printed() -> None:
    cases = make_classes([("a", answer) for answer in "aab"])
    wrong = [replace(case, answer="c", ended_with_eos=False) for case in cases]
    lines = format_differences(compare_cases("classification", wrong, cases)).splitlines()
    assert "accuracy: 0 of 3 answers correct before, 2 after" in lines
    assert not any("max_new_tokens" in line for line in lines)
    lines = format_differences(compare_cases("classification", cases, wrong)).splitlines()
    (note,) = (line for line in lines if line.startswith("ended_with_eos: share of answers"))
    assert "raise it" in note
    # Means of fractions do not count answers.
    fractions = [{"accuracy": value} for value in (0.3, 0.2, 0.1, 0.4)]
    halves = [{"accuracy": 0.5}] * 4
    for before, after in ((fractions, halves), (halves, halves)):
        estimators = map(mean_metrics, (before, after))
        assert "correct" not in format_differences(compare_estimators(*estimators))


def test_predictions_roundtrip_exactly(tmp_path: Path) -> None:
    box = BoxPart(label="dog", xyxy=(1 / 3, 2.0, 30.123456789, 40.0))
    case = EvalCase(
        "dog", (box,), ("a dog", "hound"), (box.model_copy(update={"image": 1}),), "s", False
    )
    prediction = Prediction("s", (), "Where?", "dog", "dog<end>", (box,), 4, "length")
    path = tmp_path / "answers.jsonl"
    path.write_text(format_prediction_line(prediction, case, {"iou": 1.0}) * 2)
    first, second = read_predictions(path)
    assert first.case == second.case == case
    assert first.scores == {"iou": 1.0}
    keys = "id image prompt answer raw_text boxes gold references gold_boxes scores num_tokens"
    assert list(first.record) == [*keys.split(), "finish_reason", "image_size", "question"]
    assert (first.record["raw_text"], first.record["num_tokens"]) == ("dog<end>", 4)


@pytest.mark.parametrize("line", ["{}", "no", "[]", json.dumps({"answer": "a", "boxes": 3})])
def test_invalid_line_is_reported(tmp_path: Path, line: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError) as caught:
        read_predictions(path)
    assert caught.value.where == f"{path}:1"
