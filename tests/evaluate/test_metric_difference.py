from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from finesight.errors import UserError
from finesight.evaluate.bootstrap import MIN_SAMPLES
from finesight.evaluate.eval_case import EvalCase, MetricResult, mean_metrics
from finesight.evaluate.metric_difference import (
    REASON_UNSAMPLED,
    MetricDifference,
    build_unsampled_difference,
    compare_cases,
    compare_results,
    format_differences,
)


def _answers(*answers: str, truth: str = "abcd") -> list[EvalCase]:
    return [EvalCase(answer, (), (truth,), (), f"s{i}") for i, answer in enumerate(answers)]


def _by_name(differences: list[MetricDifference]) -> dict[str, MetricDifference]:
    return {one.name: one for one in differences}


def test_clear_gain_is_better():
    found = _by_name(
        compare_cases("ocr", _answers(*["wxyz"] * 20), _answers(*["abcd"] * 19, "abc"))
    )
    assert (found["similarity"].before, found["similarity"].after) == (0, pytest.approx(0.9875))
    assert found["similarity"].verdict == "better"
    assert found["cer"].verdict == "better"
    assert found["cer"].high < 0
    assert found["ended_with_eos"].verdict == "no clear change"
    back = _by_name(compare_cases("ocr", _answers(*["abcd"] * 20), _answers(*["wxyz"] * 20)))
    assert back["similarity"].verdict == back["cer"].verdict == "worse"


def test_comparison_is_paired():
    """Each answer gains a little: clear in pairs, though the answers themselves differ much."""
    chance = random.Random(0)
    lengths = [chance.randrange(2, 60) for _ in range(40)]
    before = _answers(*("a" * n for n in lengths), truth="a" * 64)
    after = _answers(*("a" * (n + 1) for n in lengths), truth="a" * 64)
    one = _by_name(compare_cases("ocr", before, after))["similarity"]
    assert one.verdict == "better"
    assert 0.8 / 64 < one.low < 1 / 64 <= one.high < 1.2 / 64
    assert 2 * np.std(lengths) / 64 / np.sqrt(40) > 3 / 64, "apart, the answers differ too much"


def test_noise_is_no_clear_change():
    before = _answers(*(["abcd"] * 10 + ["wxyz"] * 10))
    after = _answers("wxyz", *(["abcd"] * 9), "abcd", *(["wxyz"] * 9))
    one = _by_name(compare_cases("ocr", before, after))["similarity"]
    assert one.low < 0 < one.high
    assert one.verdict == "no clear change"


def test_too_few_samples_give_no_verdict():
    few, enough = MIN_SAMPLES - 1, MIN_SAMPLES
    for count, verdict in ((few, "no clear change"), (enough, "better")):
        found = compare_cases("ocr", _answers(*["x"] * count), _answers(*["abcd"] * count))
        assert _by_name(found)["exact"].verdict == verdict


def test_interval_of_a_bounded_difference_is_bounded():
    truth = "abcd" * 5
    before = [EvalCase("no", (), (label,), (), str(i)) for i, label in enumerate(truth)]
    after = [
        EvalCase(a, (), (b,), (), str(i))
        for i, (a, b) in enumerate(zip("b" + truth[1:], truth, strict=True))
    ]
    assert _by_name(compare_cases("classification", before, after))["f1_macro"].high == 1.0


def test_answers_are_paired_by_sample_id():
    before, after = _answers("abcd", "x", "abcd"), _answers("abcd", "abcd")
    found = _by_name(compare_cases("ocr", before, after[::-1]))
    assert (found["exact"].before, found["exact"].after) == (0.5, 1.0)
    with pytest.raises(UserError, match="no sample in common"):
        compare_cases("ocr", before, [EvalCase("a", (), ("a",), (), "other")])


def test_repeated_ids_are_paired_in_order():
    before = [EvalCase(a, (), ("a",), (), "same") for a in ("a", "b")]
    after = [EvalCase(a, (), ("a",), (), "same") for a in ("b", "b")]
    assert _by_name(compare_cases("ocr", before, after))["exact"].before == 0.5


def test_metric_without_resamples_compares_values():
    assert build_unsampled_difference("validation_loss", 2.0, 1.0).verdict == "better"
    assert build_unsampled_difference("validation_loss", 1.0, 1.0).verdict == "no clear change"
    assert build_unsampled_difference("exact", 1.0, 0.5).verdict == "worse"
    # What is shown as -0.0000 is no change.
    assert build_unsampled_difference("bleu", 4e-5, 0.0).verdict == "no clear change"


def test_table_marks_the_primary_score():
    rows = [
        build_unsampled_difference("validation_loss", 10.25, 1.5),
        MetricDifference("exact", 0.0, 0.25, -0.125, 0.5, "no clear change"),
    ]
    head, loss, exact, note = format_differences(rows, "exact").splitlines()
    assert head.split() == ["score", "before", "after", "difference", "95", "%", "interval"]
    assert loss.split() == ["validation_loss", "10.2500", "1.5000", "-8.7500", "better"]
    assert exact.split()[:4] == ["exact*", "0.0000", "0.2500", "+0.2500"]
    assert "-0.1250 to +0.5000  no clear change" in exact
    assert loss.index("better") == exact.index("no clear")
    assert note == f"validation_loss: {REASON_UNSAMPLED}"


def test_number_of_correct_answers_is_printed():
    cases = [EvalCase("a", (), (answer,), (), str(i)) for i, answer in enumerate("aab")]
    wrong = [replace(case, answer="c", ended_with_eos=False) for case in cases]
    lines = format_differences(compare_cases("classification", wrong, cases)).splitlines()
    assert "accuracy: 0 of 3 answers correct before, 2 after" in lines
    assert not any("max_new_tokens" in line for line in lines)
    fractions = [{"accuracy": value} for value in (0.3, 0.2, 0.1, 0.4)]
    halves = [{"accuracy": 0.5}] * 4
    for before, after in ((fractions, halves), (halves, halves)):
        results = (MetricResult(values, mean_metrics(values)) for values in (before, after))
        assert "correct" not in format_differences(compare_results(*results))
    lines = format_differences(compare_cases("classification", cases, wrong)).splitlines()
    assert "ended_with_eos: share of answers that ended before eval.max_new_tokens" in lines
