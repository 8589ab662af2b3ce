"""The house measures: what the code of this project must look like, in figures.

`python tools/house.py` prints them and exits with 1 when one is missed; tests/test_style.py holds
each. Only the syntax tree is read, nothing is imported.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = "finesight"
REFLECTION = {"getattr", "hasattr", "setattr", "delattr", "vars", "eval", "exec", "__import__"}
SETTINGS = {"recipe", "settings", "config", "tune", "data", "picture"}
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc", "shared", "stuff", "various"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Measure:
    """One figure, the bound it must keep, and the places that speak against it."""

    name: str
    value: float
    bound: float
    at_least: bool = False
    against: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        mark = "ok " if self.holds else "NOT"
        return f"{mark} {self.name:44} {self.value:8.4g}  {sign} {self.bound:g}"


@dataclass(frozen=True)
class Module:
    """A Python file: its path from the project's root, its lines and its syntax tree."""

    path: Path
    lines: tuple[str, ...]
    tree: ast.Module

    def at(self, node: ast.stmt | ast.expr) -> str:
        return f"{self.path}:{node.lineno}"


def read(root: Path, folder: str) -> list[Module]:
    """All modules below a folder of the project."""
    modules = []
    for path in sorted((root / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        modules.append(Module(path.relative_to(root), tuple(text.splitlines()), ast.parse(text)))
    return modules


def measure(root: Path) -> list[Measure]:
    """All measures of the project at `root`."""
    source, tests = read(root, "src"), read(root, "tests")
    everything = [*source, *tests, *read(root, "tools"), *read(root, "benchmarks")]
    return [
        *_sizes(source, everything),
        *_definitions(source),
        *_habits(source),
        _vague(everything),
        _cycles(source),
        Measure(
            "test lines to source lines",
            _count(tests) / _count(source),
            0.6,
            at_least=True,
        ),
    ]


def _count(modules: Sequence[Module]) -> int:
    return sum(len(module.lines) for module in modules)


def _share(part: Sequence[object], whole: Sequence[object]) -> float:
    return len(part) / len(whole) if whole else 0.0


def _sizes(source: Sequence[Module], everything: Sequence[Module]) -> Iterator[Measure]:
    wide = [
        f"{module.path}:{number}"
        for module in everything
        for number, line in enumerate(module.lines, 1)
        if len(line) > 100
    ]
    yield Measure("lines over 100 columns", len(wide), 0, against=tuple(wide))
    big = [f"{m.path}: {len(m.lines)} lines" for m in everything if len(m.lines) > 900]
    yield Measure("files over 900 lines", len(big), 0, against=tuple(big))
    functions = [(m, f) for m in source for f in ast.walk(m.tree) if isinstance(f, Function)]
    long = [(m, f) for m, f in functions if (f.end_lineno or f.lineno) - f.lineno + 1 > 60]
    names = tuple(f"{m.at(f)} {f.name}" for m, f in long)
    yield Measure("share of functions over 60 lines", _share(long, functions), 0.03, against=names)


def _definitions(source: Sequence[Module]) -> Iterator[Measure]:
    parameters = [
        (f"{m.at(f)} {p.arg}", p.annotation)
        for m in source
        for f in ast.walk(m.tree)
        if isinstance(f, Function)
        for p in _parameters(f)
    ]
    bare = tuple(place for place, annotation in parameters if annotation is None)
    annotated = 1 - _share(bare, parameters)
    yield Measure("share of parameters annotated", annotated, 0.95, at_least=True, against=bare)
    public = [(m, node) for m in source for node in _public(m.tree.body)]
    silent = tuple(f"{m.at(n)} {n.name}" for m, n in public if not ast.get_docstring(n))
    told = 1 - _share(silent, public)
    yield Measure("share of public names with docstring", told, 0.8, at_least=True, against=silent)


def _parameters(function: Function) -> list[ast.arg]:
    """All parameters but self and cls."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [arg for arg in every if arg is not None and arg.arg not in ("self", "cls")]


def _public(body: Sequence[ast.stmt]) -> Iterator[Function | ast.ClassDef]:
    """Functions, classes and their methods whose names do not begin with an underscore."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body)


def _habits(source: Sequence[Module]) -> Iterator[Measure]:
    nodes = [(m, node) for m in source for node in ast.walk(m.tree)]
    calls = [(m, n) for m, n in nodes if isinstance(n, ast.Call) and _name(n.func) in REFLECTION]
    places = tuple(f"{m.at(c)} {ast.unparse(c)}" for m, c in calls)
    yield Measure(
        "reflection a thousand lines", 1000 * len(calls) / _count(source), 1, against=places
    )
    on_settings = tuple(
        f"{m.at(c)} {ast.unparse(c)}"
        for m, c in calls
        if {n.id if isinstance(n, ast.Name) else n.attr for n in _names(c)} & SETTINGS
    )
    yield Measure("reflection on settings", len(on_settings), 0, against=on_settings)
    writes = tuple(place for module in source for place in _foreign_writes(module))
    yield Measure("writes on imported names", len(writes), 0, against=writes)
    raised = [
        (m, n.exc)
        for m, n in nodes
        if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call) and _says_something(n.exc)
    ]
    blind = tuple(f"{m.at(call)} {ast.unparse(call)}" for m, call in raised if not _shows(call))
    shown = 1 - _share(blind, raised)
    yield Measure(
        "share of raised messages that show a value", shown, 0.9, at_least=True, against=blind
    )
    asserts = [(m, n) for m, n in nodes if isinstance(n, ast.Assert)]
    mute = tuple(m.at(n) for m, n in asserts if n.msg is None)
    yield Measure("share of asserts without a message", _share(mute, asserts), 0.2, against=mute)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _names(call: ast.Call) -> list[ast.Name | ast.Attribute]:
    """Names and attributes in the first argument of a call."""
    first = call.args[:1]
    return [n for a in first for n in ast.walk(a) if isinstance(n, ast.Name | ast.Attribute)]


def _says_something(call: ast.Call) -> bool:
    return any(
        isinstance(n, ast.JoinedStr) or (isinstance(n, ast.Constant) and isinstance(n.value, str))
        for n in ast.walk(call)
    )


def _shows(call: ast.Call) -> bool:
    """Whether something other than fixed text is among the arguments."""
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    return any(not isinstance(argument, ast.Constant) for argument in arguments)


def _foreign_writes(module: Module) -> Iterator[str]:
    """Places that set an attribute or an item of an imported name, or of what hangs below it."""
    imports = [n for n in ast.walk(module.tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    imported = {(a.asname or a.name).split(".")[0] for node in imports for a in node.names}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        for target in targets:
            owner: ast.expr = target
            while isinstance(owner, ast.Attribute | ast.Subscript):
                owner = owner.value
            if owner is not target and _name(owner) in imported:
                yield f"{module.at(node)} {ast.unparse(target)}"


def _vague(everything: Sequence[Module]) -> Measure:
    vague = tuple(str(m.path) for m in everything if VAGUE & set(m.path.with_suffix("").parts))
    return Measure("vague names of files and folders", len(vague), 0, against=vague)


def _cycles(source: Sequence[Module]) -> Measure:
    """Areas (the first names below the package) must not import one another, not even around a
    corner; imports inside functions count, those for type checking alone do not."""
    graph: dict[str, set[str]] = {}
    for module in source:
        here = _area(module.path.with_suffix("").parts[1:])
        for name in _imported_modules(module.tree):
            there = _area(tuple(name.split(".")))
            if here and there and here != there:
                graph.setdefault(here, set()).add(there)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = [str(area) for area in error.args[1]]
        return Measure("areas in a cycle of imports", len(cycle) - 1, 0, against=tuple(cycle))
    return Measure("areas in a cycle of imports", 0, 0)


def _area(parts: Sequence[str]) -> str:
    inside = len(parts) > 1 and parts[0] == PACKAGE and not parts[1].startswith("__")
    return parts[1] if inside else ""


def _imported_modules(node: ast.AST) -> Iterator[str]:
    """Full names of all modules and names imported below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from _imported_modules(child)


def main() -> int:
    """Print every measure, and what speaks against those that are missed."""
    measures = measure(Path(__file__).resolve().parents[1])
    for one in measures:
        print(one)
        for place in () if one.holds else one.against:
            print(f"      {place}")
    return 0 if all(one.holds for one in measures) else 1


if __name__ == "__main__":
    sys.exit(main())
