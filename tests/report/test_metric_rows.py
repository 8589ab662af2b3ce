"""Tests of metric rows and their descriptions."""

from dataclasses import replace

import pytest
from run_dir_fixtures import make_evaluation_line

from finesight.evaluate.metric_difference import MetricDifference
from finesight.report.metric_rows import (
    MetricRow,
    build_metric_rows,
    describe_change,
    format_interval,
    read_interval,
)

NONE = "no clear change"


def build_rows(*scores: float, **differences: MetricDifference) -> list[MetricRow]:
    """Build the rows of one or two evaluations."""
    lines = [make_evaluation_line(9 * step, score) for step, score in enumerate(scores)]
    return build_metric_rows(lines, differences)


def test_number_of_correct_answers_is_shown() -> None:
    scores = {"accuracy": 0.6, "similarity": 0.6}
    lines = [make_evaluation_line(n, 0.2, scores=scores, num_samples=n) for n in (5, 4)]
    found = {one.name: one for one in build_metric_rows(lines, {})}
    # 0.6 is no share of 4 samples.
    assert [cell.correct for cell in found["accuracy"].cells] == ["3 of 5 correct", ""]
    assert found["similarity"].cells[0].correct == ""
    custom = [line | {"metric": "score.py:grade"} for line in lines]  # 0.6 may be partial credits
    assert not any(one.cells[0].correct for one in build_metric_rows(custom, {}))


@pytest.mark.parametrize(
    ("low", "high", "verdict", "words", "output"),
    [
        (0.6, 0.8, "better", "better", "increased by 0.7000: the 95 % interval of"),
        (-0.1, 0.8, NONE, NONE, "increased by 0.7000: the 95 % interval of"),
        (None, None, "better", "", "The confidence interval of the difference is unknown"),
    ],
)
def test_verdict_of_comparison_is_used(low, high, verdict, words, output):
    difference = MetricDifference("similarity", 0.2, 0.9, low, high, verdict)
    found = build_rows(0.2, 0.9, similarity=difference)[0]
    assert (found.name, found.cells[-1].verdict_text) == ("similarity", words)
    assert output in describe_change(found)
    fallen = replace(difference, before=0.9, after=0.2)
    assert "decreased by 0.7000" in describe_change(build_rows(0.9, 0.2, similarity=fallen)[0])


@pytest.mark.parametrize("ends", [None, "ab", [1], [1, 2, 3], [None, 1], [1, float("nan")], 7])
def test_invalid_interval_is_hidden(ends: object) -> None:
    assert read_interval({"intervals": {"similarity": ends}}, "similarity") is None
    assert read_interval({}, "similarity") is None
    assert format_interval(None) == ""
