"""Parsed Python files of the project, and measures with their bounds."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "finesight"
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class CodeMeasure:
    """A measured value, its bound, the violations, and the target of a bound to be lowered.

    `is_reported` measures are printed with their goal, and may miss it.
    """

    name: str
    value: float
    bound: float
    is_minimum: bool = False
    violations: tuple[str, ...] = ()
    target: float | None = None
    is_reported: bool = False

    @property
    def is_met(self) -> bool:
        if self.is_reported:
            return True
        return self.value >= self.bound if self.is_minimum else self.value <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.is_minimum else "<="
        mark = "ok " if self.is_met else "NOT"
        if self.is_reported:
            mark = "   "
        value = f"{self.value:.5g}"
        target = "" if self.target is None else f"  (target {self.target:g})"
        return f"{mark} {self.name:44} {value:>8}  {sign} {self.bound:g}{target}"


STRING_OR_COMMENT = re.compile(
    r"""(?s:(?P<quotes>\"{3}|'{3})(?:\\.|[^\\])*?(?P=quotes))"""
    r"""|(?s:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|(?P<comment>#[^\n]*)"""
)
"""A string, in which `#` starts no comment, or a comment."""


@dataclass(frozen=True)
class SourceModule:
    """A parsed Python file with its path relative to the project root."""

    path: Path
    lines: tuple[str, ...]
    tree: ast.Module

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        return tuple(ast.walk(self.tree))

    @cached_property
    def comments(self) -> tuple[tuple[int, str], ...]:
        """Comments with the numbers of their lines; `tokenize` takes ten times as long."""
        code, number, start, found = "\n".join(self.lines), 1, 0, []
        for match in STRING_OR_COMMENT.finditer(code):
            if match["comment"]:
                number += code.count("\n", start, match.start())
                start = match.start()
                found.append((number, match["comment"]))
        return tuple(found)

    def location(self, node: ast.stmt | ast.expr) -> str:
        return f"{self.path}:{node.lineno}"


def read_modules(root: Path, subdir: str) -> list[SourceModule]:
    """Read all modules below a folder of the project."""
    modules = []
    for path in sorted((root / subdir).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        modules.append(
            SourceModule(path.relative_to(root), tuple(text.splitlines()), ast.parse(text))
        )
    return modules


def compute_ratio(part: Sequence[object], total: Sequence[object]) -> float:
    """Return the ratio of two numbers of items; 0 without items."""
    return len(part) / len(total) if total else 0.0
