"""Sums of whole numbers in shell scripts, `$((16 / N))` and `$(expr 16 / $N)`: worked out here."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping

_SUM = re.compile(
    r"\$\(\(((?:[^()]|\([^()]*\))*)\)\)"
    r"|\$\(\s*expr\s+([^()`;|&\n]*)\)"
    r"|`\s*expr\s+([^()`;|&\n]*)`"
)
_LONGEST = 200
_SIGNS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}


def kept(script: str) -> str:
    """The script with each sum as one word, `${=16/N}`, for when its variables are known; what is
    no sum of numbers and variables stays."""
    return _SUM.sub(_kept, script)


def _kept(found: re.Match[str]) -> str:
    inner = next(group for group in found.groups() if group is not None)
    text = re.sub(r"[\s${}\\'\"]", "", inner)
    if len(text) > _LONGEST or not re.fullmatch(r"[\w+*/%()-]+", text):
        return found[0]
    # Brackets would end the word.
    return "${=" + text.replace("(", "[").replace(")", "]") + "}"


def value(text: str) -> int | None:
    """What a sum comes to, from between `${=` and `}`, its variables filled in; None for no sum."""
    if len(text) > 2 * _LONGEST:
        return None
    try:
        tree = ast.parse(text.replace("[", "(").replace("]", ")"), mode="eval")
        return _calculated(tree.body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _calculated(node: ast.expr) -> int:
    """Raises ValueError for anything but a sum of whole numbers."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
        return _SIGNS[type(node.op)](_calculated(node.left), _calculated(node.right))
    raise ValueError(ast.dump(node))
