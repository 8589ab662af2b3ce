"""Measures of how much each statement does, which no formatter changes.

Per 1,000 statements: assignments of several unrelated values, conditional expressions,
comprehensions, and tricks whose only effect is fewer lines. Kernels are exempt, because their
comments carry formulas.

A file must meet `MAX_CONSTRUCTS`, or have no more constructs or no higher density than recorded in
`tools/statement_bounds.yaml`. Either is enough: code without constructs may be removed, and new
code may have some. `python tools/statement_measures.py` lowers the records to those of the files,
and removes files that meet the goal.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import yaml
from source_modules import CodeMeasure, SourceModule, read_modules

BOUNDS_FILE = Path(__file__).with_name("statement_bounds.yaml")

GOALS = {"tuple assignments": 4, "conditional expressions": 24, "comprehensions": 40}
"""Goals of the project per 1,000 statements; torchtitan has 2, 15 and 18, and TRL 4, 22 and 32."""

MAX_CONSTRUCTS = sum(GOALS.values())
"""Maximum number of all constructs together per 1,000 statements of a file."""

MIN_STATEMENTS = 100
"""Smaller files count as this many statements, so that one construct does not decide."""


class Bound(TypedDict):
    """Number of constructs of a file, and number per 1,000 statements."""

    constructs: int
    density: float


EXEMPT_NAMES = {"kernels"}
"""Names of folders and modules of Triton kernels, where the formula decides the form."""

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def measure_statements(source: Sequence[SourceModule]) -> Iterator[CodeMeasure]:
    """Report the densities of the package, and the files that exceed their bound."""
    counts = {str(module.path): count_constructs(module) for module in _select(source)}
    total: Counter[str] = sum(counts.values(), Counter())
    for kind in GOALS:
        density = 1000 * total[kind] / max(1, total["statements"])
        yield CodeMeasure(f"{kind} per 1,000 statements", density, GOALS[kind], is_reported=True)
    tricks = tuple(f"{path}: {one['tricks']}" for path, one in counts.items() if one["tricks"])
    bounds = read_bounds()
    excess = []
    for path, count in counts.items():
        density = compute_density(count)
        if density > MAX_CONSTRUCTS and not is_within(count, bounds.get(path)):
            text = f"{count_all(count)} constructs, {density:.1f} per 1,000 statements"
            excess.append(f"{path}: {text}; recorded: {bounds.get(path)}")
    yield CodeMeasure("files with denser statements", len(excess), 0, violations=tuple(excess))
    yield CodeMeasure("tricks to save lines", total["tricks"], MAX_TRICKS, violations=tricks)


MAX_TRICKS = 0


def _select(source: Sequence[SourceModule]) -> Iterator[SourceModule]:
    return (
        module
        for module in source
        if not EXEMPT_NAMES.intersection(module.path.with_suffix("").parts)
    )


def is_within(count: Counter[str], bound: Bound | None) -> bool:
    """Return whether a file has no more constructs, or no higher density, than recorded."""
    if bound is None:
        return False
    has_no_more = count_all(count) <= bound["constructs"]
    return has_no_more or round(compute_density(count), 1) <= bound["density"]


def read_bounds() -> dict[str, Bound]:
    """Return the records of files that do not meet the goal."""
    return dict(yaml.safe_load(BOUNDS_FILE.read_text(encoding="utf-8")) or {})


def count_all(count: Counter[str]) -> int:
    """Return the number of constructs of all kinds of a file."""
    return sum(count[kind] for kind in GOALS) + count["tricks"]


def compute_density(count: Counter[str]) -> float:
    """Return the number of constructs per 1,000 statements of a file."""
    return 1000 * count_all(count) / max(MIN_STATEMENTS, count["statements"])


def count_constructs(module: SourceModule) -> Counter[str]:
    """Count statements, constructs that make them do much, and tricks of a file."""
    counts: Counter[str] = Counter()
    for node in module.nodes:
        if isinstance(node, ast.stmt) and not _is_docstring(node):
            counts["statements"] += 1
            counts["tuple assignments"] += _is_unrelated_tuple(node)
        counts["conditional expressions"] += isinstance(node, ast.IfExp)
        counts["comprehensions"] += isinstance(node, COMPREHENSIONS)
        counts["tricks"] += _is_trick(node)
    return counts


def _is_docstring(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return False
    return isinstance(node.value.value, str)


def _is_unrelated_tuple(node: ast.stmt) -> bool:
    """Return whether a statement assigns several values at once, other than a swap."""
    match node:
        case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
            return {ast.unparse(one) for one in names} != {ast.unparse(one) for one in values}
    return False


def _is_trick(node: ast.AST) -> bool:
    """Return whether code only saves lines.

    These are a conditional expression inside another, a text or list multiplied by a condition, and
    a starred literal inside a literal.
    """
    match node:
        case ast.IfExp():
            return any(isinstance(one, ast.IfExp) for one in ast.walk(node) if one is not node)
        case ast.BinOp(op=ast.Mult(), left=left, right=right):
            return (_is_text(left) and _is_condition(right)) or (
                _is_text(right) and _is_condition(left)
            )
        case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
            starred = [one.value for one in items if isinstance(one, ast.Starred)]
            return any(isinstance(one, ast.Tuple | ast.List) for one in starred)
    return False


def _is_text(node: ast.expr) -> bool:
    is_constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_constant or isinstance(node, ast.List | ast.JoinedStr)


def _is_condition(node: ast.expr) -> bool:
    text = ast.unparse(node)
    last_name = text.rsplit(".", 1)[-1]
    if isinstance(node, ast.Compare | ast.BoolOp) or last_name.startswith(("is_", "has_")):
        return True
    return text.startswith(("bool(", "not "))


def lower_bounds(root: Path) -> None:
    """Record the files that do not meet the goal, except for those above their record."""
    old_bounds = read_bounds()
    bounds: dict[str, Bound] = {}
    for module in _select(read_modules(root, "src")):
        path = str(module.path)
        count = count_constructs(module)
        density = round(compute_density(count), 1)
        if density <= MAX_CONSTRUCTS:
            continue
        old = old_bounds.get(path)
        if is_within(count, old):
            bounds[path] = {"constructs": count_all(count), "density": density}
        elif old is not None:
            bounds[path] = old
    text = "# Files above the goal; density is constructs per 1,000 statements.\n"
    BOUNDS_FILE.write_text(text + yaml.safe_dump(bounds), encoding="utf-8")


if __name__ == "__main__":
    lower_bounds(Path(__file__).resolve().parents[1])
