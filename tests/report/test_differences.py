"""Intervals of differences from the scores of answers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import answer_line

from finesight.config import Metric
from finesight.data.sample import BoxPart
from finesight.evaluate.answered import Case
from finesight.evaluate.compare import paired
from finesight.evaluate.score import score
from finesight.report.differences import differences

TEXTS = ["one two", "three", "four five six", "seven", "eight nine", "ten", "eleven", "twelve"]


def cases(metric: Metric, right: int) -> list[Case]:
    """Answers of which so many are right."""
    box = BoxPart(image=0, label="a", xyxy=(0.0, 0.0, 9.0, 9.0))
    other = BoxPart(image=0, label="a", xyxy=(0.0, 0.0, 9.0, 6.0))
    boxed = metric == "grounding"
    return [
        Case(
            answer=text if i < right else "nothing",
            boxes=((box if i < right else other,) if boxed else ()),
            truths=(text,),
            targets=(box,) if boxed else (),
            id=str(i),
            stopped=i % 3 == 0,
        )
        for i, text in enumerate(TEXTS)
    ]


def written(path: Path, metric: Metric, answers: list[Case]) -> Path:
    scored = score(metric, answers)
    lines = [
        answer_line(one.id, one.answer, one.truths[0], 0.0, scores=scores, stopped=one.stopped)
        for one, scores in zip(answers, scored.each, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("metric", ["ocr", "qa", "grounding", "classification"])
def test_means_have_the_intervals_of_the_whole_comparison(metric: Metric, tmp_path: Path) -> None:
    before, after = cases(metric, 2), cases(metric, 7)
    files = [written(tmp_path / n, metric, c) for n, c in (("b", before), ("a", after))]
    then, since = score(metric, before).scores, score(metric, after).scores
    found = differences(files[0], files[1], then, since)
    wanted = {one.name: one for one in paired(metric, before, after)}
    assert len(found) >= 2
    assert "stopped" in found
    for name, one in found.items():
        assert one.verdict == wanted[name].verdict
        assert one.low == pytest.approx(wanted[name].low)
        assert one.high == pytest.approx(wanted[name].high)
    assert {"similarity", "anls", "accuracy_at_0.5", "accuracy"} & found.keys()


def test_what_is_no_mean_has_none(tmp_path: Path) -> None:
    before, after = cases("ocr", 2), cases("ocr", 7)
    files = [written(tmp_path / n, "ocr", c) for n, c in (("b", before), ("a", after))]
    then, since = score("ocr", before).scores, score("ocr", after).scores
    assert "cer" not in differences(files[0], files[1], then, since)
    assert differences(files[0], files[1], then | {"exact": 0.9}, since).keys() == {
        *("similarity", "exact_folded", "stopped")
    }


def test_answers_to_other_samples_say_nothing(tmp_path: Path) -> None:
    files = []
    for name in "ba":
        files.append(tmp_path / name)
        files[-1].write_text(json.dumps(answer_line(name, "", "", 0.5)) + "\n")
    assert differences(files[0], files[1], {"similarity": 0.5}, {"similarity": 0.5}) == {}
