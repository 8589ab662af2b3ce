"""Forms read into JSON: which fields are right, as F1 over all of them and by field.

A field is the path of names to a value, places in lists left out (`items.price`); with its value
it is right as often as the truth holds the same. Empty values (null, "", [] and {}) say nothing and
are left out on both sides; numbers are equal as numbers, texts but for white space. Which values
stand together, a name with its price, only the comparison of whole forms sees.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from finesight.evaluate.answered import Case, Scored, Scores, means
from finesight.evaluate.bootstrap import (
    EMPTY,
    Array,
    Estimator,
    SampleGroup,
    divided,
    grouped_sums,
    ratio,
    typical_classes,
)
from finesight.evaluate.text import plain_text

Form = dict[str, Any] | list[Any]
"""Names and lists, with texts at the ends: all empty ones left out, lists in order of what they
hold, so that forms which say the same are equal."""

Fields = Counter[tuple[str, str]]
"""How often a form holds each (field, value)."""

DEEPEST = 64
"""Levels of nesting that an answer may have."""

SHOWN = 200
"""Most fields that `details` holds, those that are wanted most often."""

_FENCE = "```"


def score(cases: Sequence[Case]) -> Scored:
    """F1 over all fields, its mean over the fields of the truth, forms that are right as a whole
    (in whatever order), and the share of answers that are JSON. `details` holds F1, precision and
    recall by field."""
    each: list[Scores] = []
    pairs: list[tuple[Fields, Fields]] = []
    for case in cases:
        said = form_of(case.answer)
        truths = [form for text in case.truths if (form := form_of(text)) is not None]
        assert truths, f"the right answer {case.truths[0]!r} is no JSON"
        found = Counter() if said is None else fields_of(said)
        truth = max(map(fields_of, truths), key=lambda fields: _f1(found, fields))
        exact, parsed = float(said in truths), float(said is not None)
        each.append({"f1": _f1(found, truth), "exact": exact, "parsed": parsed})
        pairs.append((found, truth))
    right = np.array([(said & truth).total() for said, truth in pairs], np.float64)
    both = np.array([said.total() + truth.total() for said, truth in pairs], np.float64)
    counts = {name: one for name, one in _counts(pairs).items() if one.values[:, 2].any()}

    estimators = {
        "f1": ratio(2 * right, both),
        "f1_macro": _macro(counts, np.array([scores["f1"] for scores in each])),
        **means(each, {"exact": "exact", "parse_rate": "parsed"}),
    }
    rows = {name: _by_field(one) for name, one in counts.items()}
    shown = sorted(rows, key=lambda name: -rows[name]["wanted"])[:SHOWN]
    return Scored(each, estimators, {"fields": {name: rows[name] for name in shown}})


def form_of(text: str) -> Form | None:
    """The JSON object or list that a text is, alone or in a ```json fence; None for anything else.

    Text from models: nothing in it may raise.
    """
    text = text.strip()
    if text.startswith(_FENCE) and text.endswith(_FENCE):
        text = text[len(_FENCE) : -len(_FENCE)].removeprefix("json")
    try:
        value = json.loads(text, parse_constant=_refuse)
        return _said(value, 0) if isinstance(value, dict | list) else None
    except (ValueError, RecursionError):
        return None


def fields_of(form: Form) -> Fields:
    """The fields of a form."""
    return Counter(_leaves(form, ""))


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _said(value: Any, depth: int) -> Any:
    """What a value says, in one form; empty if it says nothing."""
    if depth > DEEPEST:
        raise ValueError(f"deeper than {DEEPEST} levels")
    if isinstance(value, dict):
        named = {name: _said(value[name], depth + 1) for name in sorted(value)}
        return {name: inner for name, inner in named.items() if inner}
    if isinstance(value, list):
        return sorted(filter(None, (_said(inner, depth + 1) for inner in value)), key=repr)
    return "" if value is None else _as_text(value)


def _as_text(value: str | float | bool) -> str:
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return str(int(value))
    return json.dumps(value)


def _leaves(form: Form | str, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(form, str):
        yield path, form
    elif isinstance(form, dict):
        for name, inner in form.items():
            yield from _leaves(inner, f"{path}.{name}" if path else name)
    else:
        for inner in form:
            yield from _leaves(inner, path)


def _f1(said: Fields, truth: Fields) -> float:
    both = said.total() + truth.total()
    return 2 * (said & truth).total() / both if both else 1.0


def _counts(pairs: Sequence[tuple[Fields, Fields]]) -> dict[str, SampleGroup]:
    """Of every field that is said or wanted; by name."""
    rows: dict[str, dict[int, list[int]]] = defaultdict(dict)
    for i, (said, truth) in enumerate(pairs):
        for column, fields in enumerate((said & truth, said, truth)):
            for (name, _), count in fields.items():
                rows[name].setdefault(i, [0, 0, 0])[column] += count
    return {
        name: SampleGroup(np.array(list(own)), np.array(list(own.values()), np.float64))
        for name, own in sorted(rows.items())
    }


def _macro(counts: dict[str, SampleGroup], rates: Array) -> Estimator:
    """Return the estimator of the mean F1 of the fields; `rates` are the F1 of each sample.

    A group holds the right, said and wanted values of a field. The typical sample says as many
    values as it should.
    """
    groups = list(counts.values())
    sizes, undefined = np.zeros(0), EMPTY
    if groups:
        having = [int(np.count_nonzero(group.values[:, 2])) for group in groups]
        parts, undefined = typical_classes(having, len(rates))
        sizes = parts * [group.values[:, 2].sum() for group in groups] / having

    def value(sums: Array) -> Array:
        right, said, wants = np.moveaxis(sums.reshape(len(sums), len(groups), 3), 2, 0)
        found = np.where(wants > 0, divided(2 * right, said + wants), 0.0)
        return divided(found.sum(axis=1), (wants > 0).sum(axis=1) * 1.0)

    return Estimator(
        sums=grouped_sums(groups, len(rates)),
        value=value,
        rates=rates,
        biased=True,
        worst=np.outer(sizes, [0, 1, 1]).ravel(),
        slope=np.outer(sizes, [1, 0, 0]).ravel(),
        undefined=undefined,
    )


def _by_field(counts: SampleGroup) -> dict[str, float]:
    right, said, wanted = (float(total) for total in counts.values.sum(axis=0))
    return {
        "f1": 2 * right / (said + wanted),
        "precision": right / said if said else 0.0,
        "recall": right / wanted,
        "wanted": wanted,
    }
