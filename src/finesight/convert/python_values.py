"""Evaluate constant expressions of a Python script, which is never executed."""

from __future__ import annotations

import ast
import operator
import posixpath
from collections.abc import Callable, Iterable, Mapping
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

# Results are limited, so that a hostile script takes no time or memory: 40 lines `x = x + x` or
# `x = [x, x]` would double a value to terabytes.
_MAX_TEXT_CHARS = 10_000
_MAX_ITEMS = 1_000
_MAX_NUMBER = 10**18
_MAX_EXPONENT = 64


def evaluate_constant(node: ast.expr, names: Mapping[str, object]) -> object:
    """Evaluate a literal, arithmetic, a path, or a name or attribute with a known value.

    Raises ValueError for every other expression, since scripts are never executed, and for a value
    over the limits.
    """
    if isinstance(node, ast.Name | ast.Attribute):
        return _look_up(node, names)
    if isinstance(node, ast.List | ast.Tuple):
        return _limit([evaluate_constant(item, names) for item in node.elts])
    if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.BitOr):
        return _evaluate_operation(node, names)
    if isinstance(node, ast.IfExp):
        condition = evaluate_condition(node.test, names)
        if condition is None:
            raise _build_error(node)
        return evaluate_constant(node.body if condition else node.orelse, names)
    if isinstance(node, ast.JoinedStr):
        return _join(_evaluate_part(part, names) for part in node.values)
    if isinstance(node, ast.Call) and ast.unparse(node.func) != "dict":
        return _evaluate_path(node, names)
    if isinstance(node, ast.Dict | ast.Call | ast.BinOp):
        items = read_items(node, names)
        if has_expressions(items):
            raise _build_error(node)
        return items
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise _build_error(node) from error
    if isinstance(value, int) and abs(value) > _MAX_NUMBER:
        raise _build_error(node)
    return value


def _build_error(node: ast.expr) -> ValueError:
    """Build the error for an expression that is no constant; its text may be very long."""
    return ValueError(f"{type(node).__name__} in line {node.lineno} is no constant")


def _look_up(node: ast.Name | ast.Attribute, names: Mapping[str, object]) -> object:
    """Return the value of a known name, or the name of a type of numbers."""
    name = ast.unparse(node)
    if name in names and not has_expressions(names[name]):
        return names[name]
    dtype = name.removeprefix("torch.")
    if dtype in _DTYPES:
        return dtype
    raise _build_error(node)


def _limit(value: object) -> object:
    """Return a value. Raises ValueError if it is too large.

    Values share their parts, so that counting stops at the limit.
    """
    num_chars = 0
    num_items = 0
    waiting = [value]
    while waiting:
        part = waiting.pop()
        num_items += 1
        if isinstance(part, str):
            num_chars += len(part)
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            waiting += part.values()
        if max(num_items, len(waiting)) > _MAX_ITEMS or num_chars > _MAX_TEXT_CHARS:
            raise ValueError("a value over the limits")
    return value


def _join(parts: Iterable[object]) -> str:
    """Join the texts of values. Raises ValueError as soon as the result is too long."""
    texts: list[str] = []
    num_chars = 0
    for part in parts:
        text = str(part)
        num_chars += len(text)
        if num_chars > _MAX_TEXT_CHARS:
            raise ValueError("a text over the limit")
        texts.append(text)
    return "".join(texts)


def _evaluate_operation(node: ast.BinOp, names: Mapping[str, object]) -> object:
    """Evaluate arithmetic of numbers, or a sum of two texts or two lists."""
    left = evaluate_constant(node.left, names)
    right = evaluate_constant(node.right, names)
    if isinstance(left, int | float) and isinstance(right, int | float):
        return _calculate(node, left, right)
    if isinstance(node.op, ast.Div) and isinstance(left, str) and isinstance(right, str):
        return _limit(posixpath.join(left, right))  # of a pathlib.Path
    is_sum = isinstance(node.op, ast.Add) and type(left) is type(right)
    if is_sum and isinstance(left, str | list):
        return _limit(operator.add(left, right))
    raise _build_error(node)


def _calculate(node: ast.BinOp, left: float, right: float) -> object:
    """Return the result of arithmetic. Raises ValueError for an unknown or too large one."""
    calculate = _OPERATORS.get(type(node.op))
    if calculate is None or max(abs(left), abs(right)) > _MAX_NUMBER:
        raise _build_error(node)
    try:
        return calculate(left, right)
    except ArithmeticError as error:
        raise _build_error(node) from error


def _raise_to_power(base: float, exponent: float) -> float:
    if not 0 <= exponent <= _MAX_EXPONENT:
        raise ValueError(f"{base}**{exponent}")
    power: float = base**exponent
    return power


def _evaluate_part(node: ast.expr, names: Mapping[str, object]) -> object:
    """Evaluate a part of an f-string without a format."""
    if not isinstance(node, ast.FormattedValue):
        return evaluate_constant(node, names)
    if node.format_spec is not None or node.conversion != -1:
        raise _build_error(node)
    return evaluate_constant(node.value, names)


def _evaluate_path(call: ast.Call, names: Mapping[str, object]) -> str:
    """Evaluate `os.path.join`, `Path` and `str`, and a model that the script downloads."""
    name = ast.unparse(call.func)
    callee = name.rpartition(".")[2]
    if callee == "snapshot_download":
        given = list(call.args)
        for keyword in call.keywords:
            if keyword.arg in ("model_id", "repo_id"):
                given.append(keyword.value)
        if given:
            return str(evaluate_constant(given[0], names))
    if not call.args or call.keywords:
        raise _build_error(call)
    if callee == "str" and len(call.args) == 1:
        return _evaluate_text(call.args[0], names)
    if name.endswith("path.join"):
        return _join_paths(call.args, names)
    if callee == "Path":
        path = _join_paths(call.args, names)
        return path.rstrip("/") or path[:1]
    raise _build_error(call)


def _join_paths(nodes: Iterable[ast.expr], names: Mapping[str, object]) -> str:
    """Join parts of a path. Raises ValueError as soon as the result is too long."""
    path = ""
    for node in nodes:
        path = posixpath.join(path, _evaluate_text(node, names))
        _limit(path)
    return path


def _evaluate_text(node: ast.expr, names: Mapping[str, object]) -> str:
    part = evaluate_constant(node, names)
    if not isinstance(part, str | int | float):
        raise _build_error(node)
    return str(part)


def evaluate_condition(node: ast.expr, names: Mapping[str, object]) -> bool | None:
    """Return whether a condition holds, None if it is no constant."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = evaluate_condition(node.operand, names)
        if value is None:
            return None
        return not value
    if isinstance(node, ast.BoolOp):
        values = [evaluate_condition(item, names) for item in node.values]
        decisive = isinstance(node.op, ast.Or)
        if decisive in values:
            return decisive
        if None in values:
            return None
        return not decisive
    try:
        if isinstance(node, ast.Compare):
            return _compare(node, names)
        return bool(evaluate_constant(node, names))
    except (ValueError, TypeError):
        return None


def _compare(node: ast.Compare, names: Mapping[str, object]) -> bool | None:
    """Return the result of one comparison, None for another one."""
    comparison = _COMPARISONS.get(type(node.ops[0]))
    if len(node.ops) != 1 or comparison is None:
        return None
    left = evaluate_constant(node.left, names)
    right = evaluate_constant(node.comparators[0], names)
    return bool(comparison(left, right))


def has_expressions(value: object) -> bool:
    """Return whether a dict has values that are not constant."""
    return isinstance(value, dict) and any(isinstance(item, ast.expr) for item in value.values())


def read_items(node: ast.expr, names: Mapping[str, object]) -> dict[str, object]:
    """Return the items of a dict, `dict(...)` or `a | b`; other values remain expressions.

    Raises ValueError for every other expression, and for a dict over the limits.
    """
    if isinstance(node, ast.Name | ast.Attribute):
        known = names.get(ast.unparse(node))
        if isinstance(known, dict):
            return known
        raise _build_error(node)
    pairs: list[tuple[Any, ast.expr]] = []
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            name = None if key is None else evaluate_constant(key, names)
            if name is not None and not isinstance(name, str):
                raise _build_error(node)
            pairs.append((name, value))
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "dict":
        pairs += [(None, value) for value in node.args]
        pairs += [(item.arg, item.value) for item in node.keywords]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        pairs += [(None, node.left), (None, node.right)]
    else:
        raise _build_error(node)
    items = merge_items(pairs, names)
    _limit(items)
    return items


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
