"""The metric of each task: primary score, intervals and required references."""

import pytest

from finesight.errors import UserError
from finesight.evaluate.eval_case import EvalCase, get_reference_answer
from finesight.evaluate.task_metrics import check_references, compute_metrics
from finesight.metric_components import METRICS, get_score
from finesight.samples.sample import BoxPart, Message, Sample, TextPart, ToolCallPart


@pytest.mark.parametrize("metric", METRICS)
def test_every_score_of_a_task_has_an_interval(metric: str) -> None:
    target, near = BoxPart(xyxy=(0, 0, 10, 10)), BoxPart(xyxy=(0, 0, 10, 8))
    texts = {"json": '{"a": 1}', "tool_calls": ToolCallPart(name="a").to_text()}
    text = texts.get(metric, "a b c")
    cases = [
        EvalCase(text, (near,), (text,), (target,)),
        EvalCase("x", (), ("d e",) if metric == "captions" else (text,), (target,)),
        EvalCase("y", (target, near), (text,), (target,)),
    ]
    scored = compute_metrics(metric, 7 * cases)
    intervals, headline = scored.intervals(), METRICS[metric].primary_score
    assert not get_score(headline).lower_is_better
    assert intervals.keys() == scored.scores.keys()
    missing = {name for name, interval in intervals.items() if interval is None}
    assert missing <= scored.notes().keys()
    low, high = intervals[headline] or (1, 0)
    assert low < scored.scores[headline] < high, metric
    assert len(scored.per_sample) == len(7 * cases)


def test_ocr_character_error_rate_of_corpus() -> None:
    cases = [EvalCase("ab", (), ("abcd",), ()), EvalCase("Stop!", (), ("STOP", "halt"), ())]
    scored = compute_metrics("ocr", cases)
    assert scored.scores["cer"] == pytest.approx((2 + 4) / (4 + 4))
    assert scored.scores["exact"] == 0
    assert scored.scores["exact_folded"] == 0.5
    assert scored.scores["wer"] == pytest.approx((1 + 1) / (1 + 1))
    assert scored.per_sample[0]["cer"] == 0.5


def test_invalid_json_reference_is_rejected_early() -> None:
    check_references("json", [(('{"a": 1}',), ())])
    with pytest.raises(UserError, match="'a: 1' of reference 2 is not JSON"):
        check_references("json", [(('{"a": 1}',), ()), (("a: 1",), ())])
    box = BoxPart(xyxy=(1, 2, 3, 4))
    for first in (('{"a": 1}',), ()), (("",), (box,)):
        with pytest.raises(UserError, match=r"'s\d' is a plain list of boxes(?s:.*): detection$"):
            check_references("json", [first, (("",), (box,))], ["s0", "s1"])
    with pytest.raises(UserError, match="none of 1 references has json content"):
        check_references("json", [(("a: 1",), ())])


def test_references_include_answer_boxes_and_references() -> None:
    box = BoxPart(label="dog", xyxy=(1, 2, 3, 4))
    question = Message(role="user", content=(TextPart(text="Where?"),))
    answer = Message(role="assistant", content=(TextPart(text="here: "), box))
    sample = Sample(id="s", messages=(question, answer), references=("there",))
    assert get_reference_answer(sample) == (("here: ", "there"), (box,))
    with pytest.raises(UserError, match=r"s1.*user"):
        get_reference_answer(Sample(id="s1", messages=(question,)))
