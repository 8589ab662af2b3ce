"""Tests of difference intervals from recorded scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_dir_fixtures import make_prediction_line

from finesight.config import MetricSpec
from finesight.data.sample import BoxPart
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.metric_difference import compare_cases
from finesight.evaluate.task_metrics import compute_metrics
from finesight.report.examples import estimate_differences

TEXTS = ["one two", "three", "four five six", "seven", "eight nine", "ten", "eleven", "twelve"]


def cases(metric: MetricSpec, right: int) -> list[EvalCase]:
    """Cases with a number of correct answers."""
    box = BoxPart(image=0, label="a", xyxy=(0.0, 0.0, 9.0, 9.0))
    other = BoxPart(image=0, label="a", xyxy=(0.0, 0.0, 9.0, 6.0))
    boxed = metric == "grounding"
    return [
        EvalCase(
            answer=text if i < right else "nothing",
            boxes=((box if i < right else other,) if boxed else ()),
            references=(text,),
            reference_boxes=(box,) if boxed else (),
            id=str(i),
            ended_with_eos=i % 3 == 0,
        )
        for i, text in enumerate(TEXTS)
    ]


def write_predictions(path: Path, metric: MetricSpec, answers: list[EvalCase]) -> Path:
    scored = compute_metrics(metric, answers)
    lines = [
        make_prediction_line(
            one.id,
            one.answer,
            one.references[0],
            0.0,
            scores=scores,
            finish_reason="stop" if one.ended_with_eos else "length",
        )
        for one, scores in zip(answers, scored.per_sample, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("metric", ["ocr", "qa", "grounding", "classification"])
def test_means_match_the_full_comparison(metric: MetricSpec, tmp_path: Path) -> None:
    before, after = cases(metric, 2), cases(metric, 7)
    files = [write_predictions(tmp_path / n, metric, c) for n, c in (("b", before), ("a", after))]
    then, since = compute_metrics(metric, before).scores, compute_metrics(metric, after).scores
    found = estimate_differences(files[0], files[1], then, since)
    wanted = {one.name: one for one in compare_cases(metric, before, after)}
    assert len(found) >= 2
    assert "ended_with_eos" in found
    for name, one in found.items():
        assert one.verdict == wanted[name].verdict
        assert one.low == pytest.approx(wanted[name].low)
        assert one.high == pytest.approx(wanted[name].high)
    assert {"similarity", "anls", "accuracy_at_0.5", "accuracy"} & found.keys()


def test_non_mean_metrics_have_no_interval(tmp_path: Path) -> None:
    before, after = cases("ocr", 2), cases("ocr", 7)
    files = [write_predictions(tmp_path / n, "ocr", c) for n, c in (("b", before), ("a", after))]
    then, since = compute_metrics("ocr", before).scores, compute_metrics("ocr", after).scores
    assert "cer" not in estimate_differences(files[0], files[1], then, since)
    assert estimate_differences(files[0], files[1], then | {"exact": 0.9}, since).keys() == {
        *("similarity", "exact_folded", "ended_with_eos")
    }


def test_different_samples_give_no_difference(tmp_path: Path) -> None:
    files = []
    for name in "ba":
        files.append(tmp_path / name)
        files[-1].write_text(json.dumps(make_prediction_line(name, "", "", 0.5)) + "\n")
    assert estimate_differences(files[0], files[1], {"similarity": 0.5}, {"similarity": 0.5}) == {}
