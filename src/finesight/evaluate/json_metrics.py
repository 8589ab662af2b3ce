"""JSON extraction metrics: F1 over all fields and by field.

A field is the path of keys to a value without list indices (`items.price`). A predicted (field,
value) pair is correct as often as the reference contains it. Empty values (null, "", [] and {})
are ignored on both sides. Numeric values are compared numerically, texts with normalized
whitespace. A box or point (`bbox_2d`, `point_2d`) is one value, and correct if its overlap with a
reference of the field is at least 0.5. Relations between values, such as a name with its price, are
only evaluated by exact match.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from finesight.evaluate.bootstrap import (
    ClassCounts,
    SampleGroup,
    count_by_class,
    estimate_macro_f1,
    estimate_ratio,
)
from finesight.evaluate.box_metrics import match_boxes
from finesight.evaluate.eval_case import EvalCase, MetricResult, MetricValues, mean_metrics
from finesight.evaluate.text_metrics import compute_f1, normalize_text
from finesight.files.bounded_files import parse_json
from finesight.samples.boxes import iter_json_values, split_at_coordinates
from finesight.samples.sample import BoxPart

JsonForm = dict[str, Any] | list[Any]
"""Nested dicts and lists of strings in canonical form: without empty values, lists sorted."""

MAX_DEPTH = 64
"""Maximum nesting depth of an answer; a deeper answer is invalid."""

MAX_LISTED_FIELDS = 200

_CODE_FENCE = "```"

MIN_OVERLAP = 0.5
"""Overlap from which a predicted box equals a reference box."""


def parse_form(text: str) -> JsonForm | None:
    """Parse a JSON object or list, optionally in a ```json fence.

    Returns None for any other text and never raises for generated text.
    """
    text = text.strip()
    if text.startswith(_CODE_FENCE) and text.endswith(_CODE_FENCE):
        text = text[len(_CODE_FENCE) : -len(_CODE_FENCE)].removeprefix("json")
    try:
        value = parse_json(text)
        if isinstance(value, dict | list):
            form: JsonForm = normalize_value(value, 0)
            return form
    except ValueError:
        pass
    return None


def score_json(
    cases: Sequence[EvalCase], parse_form: Callable[[str], JsonForm | None] = parse_form
) -> MetricResult:
    """Compute F1 over all fields, macro F1 over fields, exact match and parse rate.

    If the references have boxes, `mean_iou` is their overlap, 0 for a missing or additional one.
    `details["fields"]` contains F1, precision and recall by field.
    """
    per_sample: list[MetricValues] = []
    pairs: list[tuple[ClassCounts, ClassCounts]] = []
    names: set[str] = set()
    totals: list[tuple[int, int]] = []
    overlaps: list[tuple[float, int]] = []
    for case in cases:
        answer, reference, overlap = name_boxes(case)
        num_boxes = max(len(case.boxes), len(case.reference_boxes))
        overlaps.append((overlap, num_boxes))
        predicted_form = parse_form(answer)
        forms = []
        for text in (reference, *case.references[1:]):
            form = parse_form(text)
            if form is not None:
                forms.append(form)
        assert forms, f"the reference {case.references[0]!r} is not JSON"
        predicted_fields: ClassCounts = Counter()
        if predicted_form is not None:
            predicted_fields = count_fields(predicted_form)
        alternatives = [*map(count_fields, forms)]
        for fields in alternatives:
            names.update(name for name, _ in fields)
        reference_fields = max(alternatives, key=partial(compute_f1, predicted_fields))
        per_sample.append(
            {
                "f1": compute_f1(predicted_fields, reference_fields),
                "exact": float(predicted_form in forms),
                "parse_rate": float(predicted_form is not None),
            }
        )
        pairs.append((predicted_fields, reference_fields))
        num_correct = (predicted_fields & reference_fields).total()
        totals.append((num_correct, predicted_fields.total() + reference_fields.total()))
    num_correct_N, num_total_N = np.array(totals, np.float64).T
    groups = count_by_class(pairs, names)
    f1_values = np.array([scores["f1"] for scores in per_sample])
    estimators = {
        "f1": estimate_ratio(2 * num_correct_N, num_total_N),
        "f1_macro": estimate_macro_f1([*groups.values()], f1_values, counts_predicted=False),
        **mean_metrics(per_sample, {"exact": "exact", "parse_rate": "parse_rate"}),
    }
    overlap_N, num_boxes_N = np.array(overlaps, np.float64).T
    if any(case.reference_boxes for case in cases):
        estimators["mean_iou"] = estimate_ratio(overlap_N, num_boxes_N)
    scored_fields = []
    for name, group in groups.items():
        num_references_M = group.values[:, 2]
        if num_references_M.any():
            scored_fields.append((name, _compute_field_scores(group)))
    scored_fields.sort(key=lambda field: -field[1]["num_references"])
    listed = dict(scored_fields[:MAX_LISTED_FIELDS])
    return MetricResult(per_sample, estimators, {"fields": listed})


def name_boxes(case: EvalCase) -> tuple[str, str, float]:
    """Return answer and reference with a text per box, and the sum of overlaps.

    Boxes of a field with an overlap of `MIN_OVERLAP` have the same text: coordinates in pixels. The
    text of the answer has those of the model family. Without fields, labels are compared.
    """
    if not case.reference_boxes:
        return case.answer, case.references[0], 0.0
    answer_pieces = [*split_at_coordinates(case.answer)]
    reference_pieces = [*split_at_coordinates(case.references[0])]
    answer_names = [*map(_name_box, case.boxes)]
    reference_names = [*map(_name_box, case.reference_boxes)]
    answer_fields = _list_fields(answer_pieces)
    reference_fields = _list_fields(reference_pieces)
    num_fields = len(answer_fields), len(reference_fields)
    labels: Sequence[Sequence[str]] = ()
    if num_fields == (len(case.boxes), len(case.reference_boxes)):
        labels = answer_fields, reference_fields
    pairs = match_boxes(case.boxes, case.reference_boxes, case.image_size, labels=labels)
    total = 0.0
    for i, j, overlap in pairs:
        total += overlap
        if overlap >= MIN_OVERLAP:
            answer_names[i] = reference_names[j]
    answer = _insert_names(answer_pieces, answer_names)
    reference = _insert_names(reference_pieces, reference_names)
    return answer, reference, total


def _name_box(box: BoxPart) -> str:
    """Return the coordinates of a box as a JSON text."""
    coordinates = [round(number, 1) for number in box.xyxy]
    return f'"{coordinates}"'


def _insert_names(pieces: Sequence[str], names: Sequence[str]) -> str:
    """Join the pieces of a text, with names in place of box coordinates."""
    pieces = [*pieces]
    # Without a box per coordinates, such as invalid ones, their order is unknown.
    if len(names) == len(pieces) // 2:
        pieces[1::2] = names
    return "".join(pieces)


def _list_fields(pieces: Sequence[str]) -> list[str]:
    """Return the fields of the coordinates at which a text is split; in invalid JSON, of parts."""
    values = [found.value for found in iter_json_values('"\ue000"'.join(pieces[::2]))]
    return [field for field, text in _iter_leaves(values, "") if text == "\ue000"]


def count_fields(form: JsonForm) -> ClassCounts:
    """Count the (field, value) pairs of a JSON document in canonical form."""
    return Counter(_iter_leaves(form, ""))


def normalize_value(value: Any, depth: int) -> Any:
    """Return the canonical form of a JSON value; empty for an empty value."""
    if depth > MAX_DEPTH:
        raise ValueError(f"deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        normalized = {}
        for name in sorted(value):
            child = normalize_value(value[name], depth + 1)
            if child:
                normalized[name] = child
        return normalized
    if isinstance(value, list):
        children = (normalize_value(inner, depth + 1) for inner in value)
        return sorted(filter(None, children), key=repr)
    if value is None:
        return ""
    return _format_scalar(value)


def _format_scalar(value: str | float | bool) -> str:
    if isinstance(value, str):
        return normalize_text(value)
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return str(int(value))
    return json.dumps(value, allow_nan=False)


def _iter_leaves(form: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(form, str):
        yield path, form
    elif isinstance(form, dict):
        for name, child in form.items():
            child_path = f"{path}.{name}" if path else name
            yield from _iter_leaves(child, child_path)
    elif isinstance(form, list):
        for child in form:
            yield from _iter_leaves(child, path)


def _compute_field_scores(counts: SampleGroup) -> dict[str, float]:
    num_correct, num_predicted, num_references = counts.values.sum(axis=0).tolist()
    precision = 0.0
    if num_predicted:
        precision = num_correct / num_predicted
    return {
        "f1": 2 * num_correct / (num_predicted + num_references),
        "precision": precision,
        "recall": num_correct / num_references,
        "num_references": num_references,
    }
