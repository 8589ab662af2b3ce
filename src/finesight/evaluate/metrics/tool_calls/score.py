"""Metric of tool calls: F1 of functions and arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence

from finesight.evaluate.eval_case import EvalCase, MetricResult
from finesight.evaluate.json_metrics import JsonForm, normalize_value, score_json
from finesight.samples.sample import find_tool_calls, parse_tool_call


def score_tool_calls(cases: Sequence[EvalCase]) -> MetricResult:
    """Compute the scores of `score_json` for the tool calls of answers.

    The fields are `function`, the names of functions, and `NAME.ARGUMENT`. Calls may have any
    order, and lists are compared as a whole. An answer without calls equals such a reference.
    """
    return score_json(cases, _parse_calls)


def _parse_calls(text: str) -> JsonForm | None:
    """Return the canonical form of the tool calls in a text; None if one of them is invalid."""
    forms = []
    for call_text in find_tool_calls(text):
        call = parse_tool_call(call_text)
        if call is None:
            return None
        values = {}
        for name, value in call.arguments.items():
            # As a text, a list is compared as a whole.
            values[name] = json.dumps(value) if isinstance(value, list) else value
        forms.append({"function": call.name, call.name: values})
    try:
        return normalize_value(forms, 0)  # type: ignore[no-any-return]  # a list
    except ValueError:
        return None
