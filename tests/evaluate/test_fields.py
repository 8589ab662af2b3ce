from __future__ import annotations

import json

import pytest

from finesight.evaluate.answered import Case
from finesight.evaluate.bootstrap import RARE
from finesight.evaluate.fields import SHOWN, fields_of, form_of, score


def _case(answer: object, *truths: object) -> Case:
    texts = [one if isinstance(one, str) else json.dumps(one) for one in (answer, *truths)]
    return Case(texts[0], (), tuple(texts[1:]), ())


def _fields(text: str) -> dict[tuple[str, str], int]:
    form = form_of(text)
    assert form is not None, f"{text!r} is no form"
    return fields_of(form)


def test_fields_are_paths_and_values():
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
def test_what_is_no_form_is_none_and_never_an_error(text):
    assert form_of(text) is None


def test_a_fence_is_looked_through():
    assert _fields('```json\n{"a": true}\n```') == {("a", "true"): 1}
    assert _fields("``` [1] ```") == {("", "1"): 1}
    assert _fields("[]") == {}


def test_f1_over_all_and_by_field():
    scored = score(
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
    assert [one["f1"] for one in scored.each] == pytest.approx([0.5, 0.5, 0.0])
    fields = scored.details["fields"]
    assert fields["total"] == pytest.approx(
        {"f1": 0.8, "precision": 1.0, "recall": 2 / 3, "wanted": 3}
    )
    assert fields["date"]["f1"] == 0
    assert "extra" not in fields


def test_order_and_white_space_do_not_matter_and_repeats_count():
    right = _case('{"b": ["y", "x"], "a": " 1 "}', {"a": "1", "b": ["x", "y"]})
    assert score([right]).scores["exact"] == 1
    twice = _case({"b": ["x", "x"]}, {"b": ["x"]})
    assert score([twice]).scores["f1"] == pytest.approx(2 / 3)


def test_a_form_is_right_as_a_whole_if_the_same_values_stand_together():
    items = [{"name": "tea", "price": 2}, {"name": "milk", "price": 1}]
    swapped = [{"name": "tea", "price": 1}, {"name": "milk", "price": 2}]
    scores = score([_case({"items": swapped}, {"items": items})]).scores
    assert (scores["f1"], scores["exact"]) == (1, 0)
    # In another order, and with an empty value.
    turned = {"tip": None, "items": [items[1], items[0] | {"n": ""}]}
    assert score([_case(turned, {"items": items})]).scores["exact"] == 1


def test_many_fields_cost_what_they_hold_and_the_most_frequent_are_listed():
    forms = [{"total": i} | {f"{i}.{k}": k for k in range(10)} for i in range(300)]
    scored = score([_case(form, form) for form in forms])
    assert scored.scores["f1_macro"] == 1
    # Each of most fields is in one form.
    assert scored.notes() == {"f1_macro": RARE}
    assert len(scored.details["fields"]) == SHOWN
    assert scored.details["fields"]["total"]["wanted"] == 300


def test_the_best_reference_counts():
    assert score([_case({"a": 1}, {"a": 2}, {"a": 1})]).scores["exact"] == 1
