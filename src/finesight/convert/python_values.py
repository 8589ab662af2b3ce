"""Evaluate constant expressions of a Python script, which is never executed."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], object]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: lambda base, exponent: _raise_to_power(base, exponent),
}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], object]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_DTYPES = ("bfloat16", "float16", "float32")
_MAX_TEXT_CHARS = 10_000
_MAX_BASE = 1_000_000
_MAX_EXPONENT = 8
"""Limits of results, so that a hostile script takes no time or memory."""


def evaluate_constant(node: ast.expr, names: Mapping[str, object]) -> object:
    """Evaluate a literal, arithmetic, a path, or a name or attribute with a known value.

    Raises ValueError for every other expression: scripts are never executed.
    """
    if isinstance(node, ast.Name | ast.Attribute):
        name = ast.unparse(node)
        if name in names and not has_expressions(names[name]):
            return names[name]
        if name.removeprefix("torch.") in _DTYPES:
            return name.removeprefix("torch.")
    if isinstance(node, ast.List | ast.Tuple):
        return [evaluate_constant(item, names) for item in node.elts]
    if isinstance(node, ast.BinOp):
        with suppress(ArithmeticError, ValueError):
            return _evaluate_operation(node, names)
    if isinstance(node, ast.IfExp):
        condition = evaluate_condition(node.test, names)
        if condition is not None:
            return evaluate_constant(node.body if condition else node.orelse, names)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(_evaluate_part(part, names)) for part in node.values)
    if isinstance(node, ast.Call):
        with suppress(ValueError):
            return _evaluate_path(node, names)
    with suppress(ValueError):
        items = read_items(node, names)
        if not has_expressions(items):
            return items
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise ValueError(ast.unparse(node)) from error


def _evaluate_operation(node: ast.BinOp, names: Mapping[str, object]) -> object:
    """Evaluate arithmetic of numbers, or a sum of two texts or two lists."""
    left = evaluate_constant(node.left, names)
    right = evaluate_constant(node.right, names)
    is_number = isinstance(left, int | float) and isinstance(right, int | float)
    if is_number and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node.op, ast.Div) and isinstance(left, str) and isinstance(right, str):
        return f"{left.rstrip('/')}/{right}"  # of a pathlib.Path
    is_sum = isinstance(node.op, ast.Add) and type(left) is type(right)
    if is_sum and isinstance(left, str | list) and len(left) < _MAX_TEXT_CHARS:
        return operator.add(left, right)
    raise ValueError(ast.unparse(node))


def _raise_to_power(base: float, exponent: float) -> float:
    if not 0 <= exponent <= _MAX_EXPONENT or abs(base) > _MAX_BASE:
        raise ValueError(f"{base}**{exponent}")
    power: float = base**exponent
    return power


def _evaluate_part(node: ast.expr, names: Mapping[str, object]) -> object:
    """Evaluate a part of an f-string without a format."""
    if not isinstance(node, ast.FormattedValue):
        return evaluate_constant(node, names)
    if node.format_spec is not None or node.conversion != -1:
        raise ValueError(ast.unparse(node))
    return evaluate_constant(node.value, names)


def _evaluate_path(call: ast.Call, names: Mapping[str, object]) -> str:
    """Evaluate `os.path.join` and `str` of constants, and a model that the script downloads."""
    callee = ast.unparse(call.func).rpartition(".")[2]
    given = [*call.args, *(item.value for item in call.keywords if _names_repository(item))]
    if callee == "snapshot_download" and given:
        return str(evaluate_constant(given[0], names))
    if callee in ("join", "str", "Path") and call.args and not call.keywords:
        parts = [evaluate_constant(item, names) for item in call.args]
        is_path = callee != "join" or ast.unparse(call.func).endswith("path.join")
        if is_path and all(isinstance(part, str | int | float) for part in parts):
            return "/".join(str(part).rstrip("/") for part in parts)
    raise ValueError(ast.unparse(call))


def _names_repository(item: ast.keyword) -> bool:
    return item.arg in ("model_id", "repo_id")


def evaluate_condition(node: ast.expr, names: Mapping[str, object]) -> bool | None:
    """Return whether a condition holds, None if it is no constant."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = evaluate_condition(node.operand, names)
        return None if value is None else not value
    if isinstance(node, ast.BoolOp):
        values = [evaluate_condition(item, names) for item in node.values]
        decisive = isinstance(node.op, ast.Or)
        if decisive in values:
            return decisive
        return None if None in values else not decisive
    try:
        if isinstance(node, ast.Compare):
            comparison = _COMPARISONS.get(type(node.ops[0]))
            if len(node.ops) != 1 or comparison is None:
                return None
            left = evaluate_constant(node.left, names)
            return bool(comparison(left, evaluate_constant(node.comparators[0], names)))
        return bool(evaluate_constant(node, names))
    except (ValueError, TypeError):
        return None


def has_expressions(value: object) -> bool:
    """Return whether a dict has values that are not constant."""
    return isinstance(value, dict) and any(isinstance(item, ast.expr) for item in value.values())


def read_items(node: ast.expr, names: Mapping[str, object]) -> dict[str, object]:
    """Return the items of a dict, `dict(...)` or `a | b`; other values remain expressions.

    Raises ValueError for every other expression.
    """
    if isinstance(node, ast.Name | ast.Attribute):
        known = names.get(ast.unparse(node))
        if isinstance(known, dict):
            return known
    if isinstance(node, ast.Dict):
        keys = [key and evaluate_constant(key, names) for key in node.keys]
        if all(key is None or isinstance(key, str) for key in keys):
            return merge_items(zip(keys, node.values, strict=True), names)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict":
        merged = [(None, value) for value in node.args]
        return merge_items([*merged, *((item.arg, item.value) for item in node.keywords)], names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return merge_items([(None, node.left), (None, node.right)], names)
    raise ValueError(ast.unparse(node))


def merge_items(
    pairs: Iterable[tuple[Any, ast.expr]], names: Mapping[str, object]
) -> dict[str, object]:
    """Return values by name; of `**expression` without known items, the expression."""
    items: dict[str, object] = {}
    for name, node in pairs:
        try:
            if name is None:
                items |= read_items(node, names)
            else:
                items[name] = evaluate_constant(node, names)
        except ValueError:
            items[name or f"**{ast.unparse(node)}"] = node
    return items
