from __future__ import annotations

from typing import get_args

import pytest

from finesight.config import TaskName
from finesight.data.sample import BoxPart, Message, Sample, TextPart
from finesight.errors import UserError
from finesight.evaluate.answered import Case, truths_of
from finesight.evaluate.score import LOWER_IS_BETTER, TASKS, check_truths, score


def _case(answer: str, *truths: str) -> Case:
    return Case(answer, (), truths, ())


def test_every_metric_of_a_recipe_has_a_task():
    assert set(TASKS) == set(get_args(TaskName))


@pytest.mark.parametrize("metric", list(TASKS))
def test_the_headline_is_a_score_that_grows_with_quality(metric):
    target = BoxPart(xyxy=(0, 0, 10, 10))
    right, wrong = ('{"a": "b c d"}', '{"y": "z"}') if metric == "json" else ("a b c d", "y z")
    cases = [Case(right, (target,), (right,), (target,)), Case("x", (), (wrong,), (target,))]
    scored = score(metric, cases)
    assert TASKS[metric].headline in scored.scores
    assert TASKS[metric].headline not in LOWER_IS_BETTER
    assert len(scored.each) == 2


def test_ocr_rates_characters_over_the_whole_set():
    scored = score("ocr", [_case("ab", "abcd"), _case("Stop!", "STOP", "halt")])
    assert scored.scores["cer"] == pytest.approx((2 + 4) / (4 + 4))
    assert scored.scores["exact"] == 0
    assert scored.scores["exact_folded"] == 0.5
    assert scored.scores["wer"] == pytest.approx((1 + 1) / (1 + 1))
    assert scored.each[0]["cer"] == 0.5


def test_captions_score_higher_with_more_words_right():
    truths = ("a dog runs on the beach", "a dog on sand")
    better = score("captions", [_case("A dog runs.", *truths), _case("Two cats.", "two cats sit")])
    worse = score("captions", [_case("A bird sits.", *truths), _case("Two cats.", "two cats sit")])
    for name in ("bleu_1", "rouge_l", "cider_d"):
        assert better.scores[name] > worse.scores[name]


def test_answers_that_were_cut_off_are_counted():
    cases = [Case("a", (), ("a",), ()), Case("b", (), ("b",), (), stopped=False)]
    assert score("ocr", cases).scores["stopped"] == 0.5


def test_every_figure_has_an_interval_around_it():
    target = BoxPart(xyxy=(0, 0, 10, 10))
    near = BoxPart(xyxy=(0, 0, 10, 8))
    for metric in TASKS:
        text = '{"a": 1}' if metric == "json" else "a b c"
        cases = [
            Case(text, (near,), (text,), (target,)),
            Case("x", (), ("d e",) if metric == "captions" else (text,), (target,)),
            Case("y", (target, near), (text,), (target,)),
        ]
        scored = score(metric, 7 * cases)
        intervals = scored.intervals()
        assert intervals.keys() == scored.scores.keys()
        missing = {name for name, interval in intervals.items() if interval is None}
        assert missing <= scored.notes().keys()
        headline = TASKS[metric].headline
        assert intervals[headline].low < scored.scores[headline] < intervals[headline].high, metric


def test_a_form_that_is_none_is_refused_before_anything_is_answered():
    check_truths("json", [(('{"a": 1}',), ())])
    with pytest.raises(UserError, match="'a: 1' is no JSON"):
        check_truths("json", [(('{"a": 1}',), ()), (("a: 1",), ())])
    with pytest.raises(UserError, match="not one of 1 right answers holds a json"):
        check_truths("json", [(("a: 1",), ())])


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
