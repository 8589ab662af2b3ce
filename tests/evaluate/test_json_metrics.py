from __future__ import annotations

import json

import pytest

from finesight.evaluate.bootstrap import REASON_RARE_CLASS
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.json_metrics import MAX_LISTED_FIELDS, count_fields, parse_form, score_json


def _case(answer: object, *truths: object) -> EvalCase:
    texts = [one if isinstance(one, str) else json.dumps(one) for one in (answer, *truths)]
    return EvalCase(texts[0], (), tuple(texts[1:]), ())


def _fields(text: str) -> dict[tuple[str, str], int]:
    form = parse_form(text)
    assert form is not None, f"{text!r} is no form"
    return count_fields(form)


def test_json_fields_are_paths_and_values():
    form = {"shop": "A  B", "items": [{"price": 2.0, "n": 1}, {"price": 2}], "tip": None, "x": ""}
    assert _fields(json.dumps(form)) == {
        ("shop", "A B"): 1,
        ("items.price", "2"): 2,
        ("items.n", "1"): 1,
    }


@pytest.mark.parametrize(
    "text",
    [
        *("", "no", "3", '"a"', "{", '{"a": NaN}', '{"a": 1} and more', "```json\n{\n```"),
        "[" * 100_000,
        '{"a":' * 200 + "1" + "}" * 200,
        '{"a": ' + "9" * 5000 + "}",
        "```json" + "\n" * 100_000 + "{",
    ],
)
def test_invalid_json_is_none(text):
    assert parse_form(text) is None


def test_code_fence_is_removed():
    assert _fields('```json\n{"a": true}\n```') == {("a", "true"): 1}
    assert _fields("``` [1] ```") == {("", "1"): 1}
    assert _fields("[]") == {}


def test_micro_and_macro_f1():
    scored = score_json(
        [
            _case({"total": 5, "date": "1 May"}, {"total": 5, "date": "2 May"}),
            _case({"total": 7, "extra": 1}, {"total": 7, "date": "3 May"}),
            _case("no form", {"total": 9}),
        ]
    )
    # Right: total twice. Said: 4 values. Wanted: 5.
    assert scored.scores == pytest.approx(
        {
            "f1": 2 * 2 / (4 + 5),
            "f1_macro": (2 * 2 / (2 + 3) + 0.0) / 2,
            "exact": 0.0,
            "parse_rate": 2 / 3,
        }
    )
    assert [one["f1"] for one in scored.per_sample] == pytest.approx([0.5, 0.5, 0.0])
    fields = scored.details["fields"]
    assert fields["total"] == pytest.approx(
        {"f1": 0.8, "precision": 1.0, "recall": 2 / 3, "num_references": 3}
    )
    assert fields["date"]["f1"] == 0
    assert "extra" not in fields


def test_order_and_whitespace_are_ignored():
    right = _case('{"b": ["y", "x"], "a": " 1 "}', {"a": "1", "b": ["x", "y"]})
    assert score_json([right]).scores["exact"] == 1
    duplicate = _case({"b": ["x", "x"]}, {"b": ["x"]})
    assert score_json([duplicate]).scores["f1"] == pytest.approx(2 / 3)


def test_exact_match_compares_nested_objects():
    items = [{"name": "tea", "price": 2}, {"name": "milk", "price": 1}]
    swapped = [{"name": "tea", "price": 1}, {"name": "milk", "price": 2}]
    scores = score_json([_case({"items": swapped}, {"items": items})]).scores
    assert (scores["f1"], scores["exact"]) == (1, 0)
    # In another order, and with an empty value.
    turned = {"tip": None, "items": [items[1], items[0] | {"n": ""}]}
    assert score_json([_case(turned, {"items": items})]).scores["exact"] == 1


def test_scaling_and_most_frequent_fields():
    forms = [{"total": i} | {f"{i}.{k}": k for k in range(10)} for i in range(300)]
    scored = score_json([_case(form, form) for form in forms])
    assert scored.scores["f1_macro"] == 1
    # Each of most fields is in one form.
    assert scored.notes() == {"f1_macro": REASON_RARE_CLASS}
    assert len(scored.details["fields"]) == MAX_LISTED_FIELDS
    assert scored.details["fields"]["total"]["num_references"] == 300


def test_best_reference_counts():
    assert score_json([_case({"a": 1}, {"a": 2}, {"a": 1})]).scores["exact"] == 1
