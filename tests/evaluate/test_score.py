from __future__ import annotations

from typing import get_args

import pytest

from finesight.config import Metric
from finesight.data.sample import BoxPart, Message, Sample, TextPart
from finesight.errors import UserError
from finesight.evaluate.score import LOWER_IS_BETTER, TASKS, Case, score, truths_of


def _case(answer: str, *truths: str) -> Case:
    return Case(answer, (), truths, ())


def test_every_metric_of_a_recipe_has_a_task():
    assert set(TASKS) == set(get_args(Metric))


@pytest.mark.parametrize("metric", list(TASKS))
def test_the_headline_is_a_score_that_grows_with_quality(metric):
    target = BoxPart(xyxy=(0, 0, 10, 10))
    scored = score(
        metric,
        [Case("a b c d", (target,), ("a b c d",), (target,)), Case("x", (), ("y z",), (target,))],
    )
    assert TASKS[metric].headline in scored.scores
    assert TASKS[metric].headline not in LOWER_IS_BETTER
    assert len(scored.each) == 2


def test_latex_takes_the_nearest_reference():
    scored = score("latex", [_case("x^2", "y + z", "x^{2}"), _case("a b c d", "a b c e")])
    assert scored.scores == pytest.approx(
        {"similarity": (1 + 0.75) / 2, "exact": 0.5, "edit_distance": 0.5}
    )


def test_ocr_rates_characters_over_the_whole_set():
    scored = score("ocr", [_case("ab", "abcd"), _case("Stop!", "STOP", "halt")])
    assert scored.scores["cer"] == pytest.approx((2 + 4) / (4 + 4))
    assert scored.scores["exact"] == 0
    assert scored.scores["exact_folded"] == 0.5
    assert scored.each[0]["cer"] == 0.5


def test_captions_score_higher_with_more_words_right():
    truths = ("a dog runs on the beach", "a dog on sand")
    better = score("captions", [_case("A dog runs.", *truths), _case("Two cats.", "two cats sit")])
    worse = score("captions", [_case("A bird sits.", *truths), _case("Two cats.", "two cats sit")])
    for name in ("bleu_1", "rouge_l", "cider_d"):
        assert better.scores[name] > worse.scores[name]


def test_grounding_counts_unparsable_answers_as_misses():
    target = BoxPart(xyxy=(0, 0, 10, 10))
    near = BoxPart(xyxy=(0, 0, 10, 8))
    cases = [Case("", (near,), ("",), (target,)), Case("no idea", (), ("",), (target,))]
    assert score("grounding", cases).scores == pytest.approx(
        {"accuracy_at_0.5": 0.5, "mean_iou": 0.4, "parse_rate": 0.5}
    )


def test_truths_are_the_last_answer_its_boxes_and_the_references():
    box = BoxPart(label="dog", xyxy=(1, 2, 3, 4))
    sample = Sample(
        id="s",
        messages=(
            Message(role="user", content=(TextPart(text="Where?"),)),
            Message(role="assistant", content=(TextPart(text="here: "), box)),
        ),
        references=("there",),
    )
    assert truths_of(sample) == (("here: ", "there"), (box,))


def test_a_sample_without_answer_is_refused():
    sample = Sample(id="s1", messages=(Message(role="user", content=(TextPart(text="Why?"),)),))
    with pytest.raises(UserError, match=r"s1.*user"):
        truths_of(sample)
