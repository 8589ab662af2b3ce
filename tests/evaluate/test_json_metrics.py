"""Scores of JSON answers by field."""

import json
from itertools import count

import pytest

from finesight.evaluate.bootstrap import REASON_RARE_CLASS
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.json_metrics import MAX_LISTED_FIELDS, count_fields, parse_form, score_json
from finesight.evaluate.metrics.tool_calls.score import score_tool_calls
from finesight.samples.boxes import iter_json_boxes
from finesight.samples.sample import BoxPart, ToolCallPart


def make_case(answer: object, *truths: object) -> EvalCase:
    texts = [one if isinstance(one, str) else json.dumps(one) for one in (answer, *truths)]
    return EvalCase(texts[0], (), tuple(texts[1:]), ())


FORM = {"shop": "A  B", "items": [{"price": 2.0, "n": 1}, {"price": 2}], "tip": None, "x": ""}


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (json.dumps(FORM), {("shop", "A B"): 1, ("items.price", "2"): 2, ("items.n", "1"): 1}),
        ('```json\n{"a": true}\n```', {("a", "true"): 1}),
        ("``` [1] ```", {("", "1"): 1}),
        ("[]", {}),
    ],
)
def test_json_fields_are_paths_and_values(text: str, fields: dict[tuple[str, str], int]) -> None:
    form = parse_form(text)
    assert form is not None
    assert count_fields(form) == fields


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
def test_invalid_json_is_none(text: str) -> None:
    assert parse_form(text) is None


def test_micro_and_macro_f1() -> None:
    scored = score_json(
        [
            make_case({"total": 5, "date": "1 May"}, {"total": 5, "date": "2 May"}),
            make_case({"total": 7, "extra": 1}, {"total": 7, "date": "3 May"}),
            make_case("no form", {"total": 9}),
        ]
    )
    # Right: total twice. Answered: 4 values. Expected: 5.
    macro = (2 * 2 / (2 + 3) + 0.0) / 2
    expected = {"f1": 2 * 2 / (4 + 5), "f1_macro": macro, "exact": 0.0, "parse_rate": 2 / 3}
    assert scored.scores == pytest.approx(expected)
    assert [one["f1"] for one in scored.per_sample] == pytest.approx([0.5, 0.5, 0.0])
    fields = scored.details["fields"]
    assert fields["total"] == pytest.approx(
        {"f1": 0.8, "precision": 1.0, "recall": 2 / 3, "num_references": 3}
    )
    assert fields["date"]["f1"] == 0
    assert "extra" not in fields


TOTAL = {"total": {"text": "12.50", "bbox_2d": [10, 10, 50, 30]}, "dots": {"point_2d": [5, 5]}}
BOXES = [(10, 10, 50, 30), (5, 5, 5, 5)]


@pytest.mark.parametrize(
    ("answer", "boxes", "scores"),
    [
        # The numbers are those of a family with thousandths; the boxes are in pixels.
        (TOTAL, BOXES, (1.0, 1.0, 1.0)),
        (TOTAL, [(10, 10, 50, 40), (5, 5, 5, 5)], (1.0, 1.0, (2 / 3 + 1) / 2)),
        (TOTAL, [(10, 10, 50, 90), (90, 90, 90, 90)], (1 / 3, 0.0, 0.125)),
        (TOTAL, [(10, 10, 50, 30)], (0.2, 0.0, 0.5)),
        ({"total": {"text": "12.50"}}, [], (0.5, 0.0, 0.0)),
        ({"total": {"text": "12.50", "bbox_2d": "(1,1),(5,3)"}}, [(10, 10, 50, 30)], (0.8, 0, 0.5)),
    ],
)
def test_boxes_in_json_are_correct_by_their_overlap(answer, boxes, scores):
    parts = tuple(BoxPart(label=key, xyxy=one) for key, one in zip(TOTAL, boxes, strict=False))
    own = tuple(BoxPart(label=key, xyxy=one) for key, one in zip(TOTAL, BOXES, strict=True))
    case = EvalCase(json.dumps(answer), parts, (json.dumps(TOTAL),), own, image_size=(100, 100))
    scored = score_json([case]).scores
    assert [scored[name] for name in ("f1", "exact", "mean_iou")] == pytest.approx(scores)


NEAR = [(10, 10, 50, 30), (11, 10, 51, 30)]


@pytest.mark.parametrize(
    ("answer", "boxes", "scores"),
    [
        # A wrong text beside a box, and similar boxes of different fields.
        (
            {"total": {"label": "z", "bbox_2d": [1, 1]}, "n": {"bbox_2d": [2]}},
            NEAR[::-1],
            (2 / 3, 39 / 41),
        ),
        ({"total": {"label": "x", "bbox_2d": [1, 1]}}, NEAR[:1], (0.8, 0.5)),
        ({"n": {"bbox_2d": [1]}, "total": {"label": "x", "bbox_2d": [2]}}, NEAR[::-1], (1.0, 1.0)),
        ({"n": {"bbox_2d": [1]}, "other": {"bbox_2d": [2]}}, NEAR[::-1], (0.4, 0.5)),
    ],
)
def test_boxes_in_json_match_by_field(answer, boxes, scores):
    truth = {"total": {"label": "x", "bbox_2d": [1, 1]}, "n": {"bbox_2d": [2, 2]}}
    parts, own = (
        tuple(
            BoxPart(label=found.label, xyxy=xyxy)
            for found, xyxy in zip(iter_json_boxes(value), several, strict=True)
        )
        for value, several in ((answer, boxes), (truth, NEAR))
    )
    case = EvalCase(json.dumps(answer), parts, (json.dumps(truth),), own, image_size=(100, 100))
    scored = score_json([case]).scores
    assert (scored["f1"], scored["mean_iou"]) == pytest.approx(scores)


ITEMS = [{"name": "tea", "price": 2}, {"name": "milk", "price": 1}]
SWAPPED = [{"name": "tea", "price": 1}, {"name": "milk", "price": 2}]


@pytest.mark.parametrize(
    ("case", "f1", "exact"),
    [
        # Order, whitespace and empty values are ignored.
        (make_case('{"b": ["y", "x"], "a": " 1 "}', {"a": "1", "b": ["x", "y"]}), 1, 1),
        (make_case({"tip": None, "items": ITEMS[::-1]}, {"items": ITEMS}), 1, 1),
        (make_case({"items": [ITEMS[0] | {"n": ""}]}, {"items": ITEMS[:1]}), 1, 1),
        (make_case({"b": ["x", "x"]}, {"b": ["x"]}), 2 / 3, 0),
        (make_case({"items": SWAPPED}, {"items": ITEMS}), 1, 0),
        # The best reference counts.
        (make_case({"a": 1}, {"a": 2}, {"a": 1}), 1, 1),
    ],
)
def test_exact_match_compares_nested_objects(case: EvalCase, f1: float, exact: float) -> None:
    scores = score_json([case]).scores
    assert (scores["f1"], scores["exact"]) == (pytest.approx(f1), exact)


def test_scaling_and_most_frequent_fields() -> None:
    forms = [{"total": i} | {f"{i}.{k}": k for k in range(10)} for i in range(300)]
    scored = score_json([make_case(form, form) for form in forms])
    assert scored.scores["f1_macro"] == 1
    # Most fields are in one form each.
    assert scored.notes() == {"f1_macro": REASON_RARE_CLASS}
    assert len(scored.details["fields"]) == MAX_LISTED_FIELDS
    assert scored.details["fields"]["total"]["num_references"] == 300


def write_call(name: str, **arguments: object) -> str:
    return ToolCallPart(name=name, arguments=arguments).to_text()


ZOOM = write_call("zoom", box=[1, 2], s="5")


@pytest.mark.parametrize(
    ("answer", "reference", "scores"),
    [
        (ZOOM + write_call("x"), write_call("x") + ZOOM, (1, 1, 1)),
        (
            "<tool_call>\n<function=zoom>\n<parameter=box>\n[1, 2]\n</parameter>\n"
            "<parameter=s>\n5\n</parameter>\n</function>\n</tool_call>",
            ZOOM,
            (1, 1, 1),
        ),
        (write_call("zoom", box=[2, 1], s="5"), ZOOM, (2 / 3, 0, 1)),
        (write_call("zoom", box=[1, 2], s="6"), ZOOM, (2 / 3, 0, 1)),
        ("Done.", "All done.", (1, 1, 1)),
        ("Done.", ZOOM, (0, 0, 1)),
        ("<tool_call>x</tool_call>", "Done.", (1, 0, 0)),
        (f"{ZOOM}{'<tool_call>' * 200_000}", ZOOM, (1, 1, 1)),
        (" " * 400_000 + ZOOM, ZOOM, (1, 1, 1)),
    ],
    ids=count(),
)
def test_tool_calls(answer: str, reference: str, scores: tuple[float, ...]) -> None:
    found = score_tool_calls([make_case(answer, reference)]).per_sample[0]
    assert tuple(found[name] for name in ("f1", "exact", "parse_rate")) == scores
