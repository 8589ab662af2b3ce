"""Evaluate integer arithmetic in shell scripts: `$((16 / N))` and `$(expr 16 / $N)`."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping

_ARITHMETIC = re.compile(
    r"\$\(\(((?:[^()]|\([^()]*\))*)\)\)"
    r"|\$\(\s*expr\s+([^()`;|&\n]*)\)"
    r"|`\s*expr\s+([^()`;|&\n]*)`"
)
_MAX_LENGTH = 200
_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}


def mark_arithmetic(script: str) -> str:
    """Replace each arithmetic expression of a script by one word such as `${=16/N}`.

    `evaluate_arithmetic` computes it when the variables are known. Expressions with other operators
    remain unchanged.
    """
    return _ARITHMETIC.sub(_mark_match, script)


def _mark_match(match: re.Match[str]) -> str:
    expression = next(group for group in match.groups() if group is not None)
    text = re.sub(r"[\s${}\\'\"]", "", expression)
    if len(text) > _MAX_LENGTH or not re.fullmatch(r"[\w+*/%()-]+", text):
        return match[0]
    # Parentheses would split the word.
    return "${=" + text.replace("(", "[").replace(")", "]") + "}"


def evaluate_arithmetic(text: str) -> int | None:
    """Evaluate the text between `${=` and `}` after variables were replaced by their values.

    Returns None for anything but integer arithmetic.
    """
    if len(text) > 2 * _MAX_LENGTH:
        return None
    try:
        tree = ast.parse(text.replace("[", "(").replace("]", ")"), mode="eval")
        return _evaluate_node(tree.body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _evaluate_node(node: ast.expr) -> int:
    """Evaluate a syntax tree of integer arithmetic. Raises ValueError for any other node."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate_node(node.left), _evaluate_node(node.right))
    raise ValueError(ast.dump(node))
