from __future__ import annotations

from typing import get_args

import pytest

from finesight.config import TaskName
from finesight.data.sample import BoxPart, Message, Sample, TextPart
from finesight.errors import UserError
from finesight.evaluate.eval_case import EvalCase, get_reference_answer
from finesight.evaluate.task_metrics import (
    LOWER_IS_BETTER,
    TASK_METRICS,
    check_references,
    compute_metrics,
)


def _case(answer: str, *truths: str) -> EvalCase:
    return EvalCase(answer, (), truths, ())


def test_every_recipe_metric_has_a_task():
    assert set(TASK_METRICS) == set(get_args(TaskName))


@pytest.mark.parametrize("metric", list(TASK_METRICS))
def test_primary_score_increases_with_quality(metric):
    target = BoxPart(xyxy=(0, 0, 10, 10))
    right, wrong = ('{"a": "b c d"}', '{"y": "z"}') if metric == "json" else ("a b c d", "y z")
    cases = [
        EvalCase(right, (target,), (right,), (target,)),
        EvalCase("x", (), (wrong,), (target,)),
    ]
    scored = compute_metrics(metric, cases)
    assert TASK_METRICS[metric].primary_metric in scored.scores
    assert TASK_METRICS[metric].primary_metric not in LOWER_IS_BETTER
    assert len(scored.per_sample) == 2


def test_ocr_character_error_rate_of_corpus():
    scored = compute_metrics("ocr", [_case("ab", "abcd"), _case("Stop!", "STOP", "halt")])
    assert scored.scores["cer"] == pytest.approx((2 + 4) / (4 + 4))
    assert scored.scores["exact"] == 0
    assert scored.scores["exact_folded"] == 0.5
    assert scored.scores["wer"] == pytest.approx((1 + 1) / (1 + 1))
    assert scored.per_sample[0]["cer"] == 0.5


def test_caption_scores_increase_with_correct_words():
    truths = ("a dog runs on the beach", "a dog on sand")
    better = compute_metrics(
        "captions", [_case("A dog runs.", *truths), _case("Two cats.", "two cats sit")]
    )
    worse = compute_metrics(
        "captions", [_case("A bird sits.", *truths), _case("Two cats.", "two cats sit")]
    )
    for name in ("bleu_1", "rouge_l", "cider_d"):
        assert better.scores[name] > worse.scores[name]


def test_truncated_answers_are_counted():
    cases = [EvalCase("a", (), ("a",), ()), EvalCase("b", (), ("b",), (), ended_with_eos=False)]
    assert compute_metrics("ocr", cases).scores["ended_with_eos"] == 0.5


def test_every_score_has_an_interval():
    target = BoxPart(xyxy=(0, 0, 10, 10))
    near = BoxPart(xyxy=(0, 0, 10, 8))
    for metric in TASK_METRICS:
        text = '{"a": 1}' if metric == "json" else "a b c"
        cases = [
            EvalCase(text, (near,), (text,), (target,)),
            EvalCase("x", (), ("d e",) if metric == "captions" else (text,), (target,)),
            EvalCase("y", (target, near), (text,), (target,)),
        ]
        scored = compute_metrics(metric, 7 * cases)
        intervals = scored.intervals()
        assert intervals.keys() == scored.scores.keys()
        missing = {name for name, interval in intervals.items() if interval is None}
        assert missing <= scored.notes().keys()
        headline = TASK_METRICS[metric].primary_metric
        assert intervals[headline].low < scored.scores[headline] < intervals[headline].high, metric


def test_invalid_json_reference_is_rejected_early():
    check_references("json", [(('{"a": 1}',), ())])
    with pytest.raises(UserError, match="'a: 1' is not JSON"):
        check_references("json", [(('{"a": 1}',), ()), (("a: 1",), ())])
    with pytest.raises(UserError, match="none of 1 references has json content"):
        check_references("json", [(("a: 1",), ())])


def test_references_include_answer_boxes_and_references():
    box = BoxPart(label="dog", xyxy=(1, 2, 3, 4))
    sample = Sample(
        id="s",
        messages=(
            Message(role="user", content=(TextPart(text="Where?"),)),
            Message(role="assistant", content=(TextPart(text="here: "), box)),
        ),
        references=("there",),
    )
    assert get_reference_answer(sample) == (("here: ", "there"), (box,))


def test_sample_without_answer_is_rejected():
    sample = Sample(id="s1", messages=(Message(role="user", content=(TextPart(text="Why?"),)),))
    with pytest.raises(UserError, match=r"s1.*user"):
        get_reference_answer(sample)
