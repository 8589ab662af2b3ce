"""Measures of code that no linter has: circles of files, names of components, habits.

ruff checks complexity and line lengths of Python, mypy annotations, import-linter the order of
packages. oxfmt and djangofmt format pages and YAML files, but keep long comments and texts.
"""

from __future__ import annotations

import ast
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from source_modules import PACKAGE, CodeMeasure, SourceModule, compute_ratio

REFLECTION_CALLS = {
    *("getattr", "hasattr", "setattr", "delattr"),
    *("vars", "eval", "exec", "__import__"),
}
SETTINGS_NAMES = {"recipe", "settings", "config", "tune", "data", "image"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "shared", "stuff", "various"}

MAX_FILES_IN_CIRCLES = 0
MAX_PRIVATE_NAMES_IN_TESTS = 40

COMPONENT_FILES = {"kto": 5, "pointing": 1, "mlflow": 2, "labelme": 1, "muon": 3, "qwen3_vl": 7}
"""A built-in component of each kind, and the maximum number of source files that name it.

An objective, metric, tracker, data format, optimizer and model family: what is added to the project
as often touches as many files. The target is the component's own file, and two for a family.
"""

TRANSLATIONS = "zh.yaml"

MAX_COLUMNS = 100
FORMATTED_SUFFIXES = {".css", ".html", ".js", ".yaml"}
"""Suffixes of pages and settings, whose lines are as short as those of Python files."""


def measure_code(
    root: Path,
    source: Sequence[SourceModule],
    tests: Sequence[SourceModule],
    everything: Sequence[SourceModule],
) -> Iterator[CodeMeasure]:
    """Compute the measures of the package, its tests and all Python files."""
    yield _measure_circles(source)
    yield from _measure_components(root)
    yield _measure_columns(root)
    yield from _measure_reflection(source)
    yield from _measure_messages(source)
    writes = tuple(location for module in source for location in _find_imported_writes(module))
    yield CodeMeasure("writes on imported names", len(writes), 0, violations=writes)
    yield _measure_private_names(source, tests)
    vague = []
    for module in everything:
        if VAGUE_NAMES.intersection(module.path.with_suffix("").parts):
            vague.append(str(module.path))
    yield CodeMeasure("vague names of files and folders", len(vague), 0, violations=tuple(vague))


def _measure_circles(source: Sequence[SourceModule]) -> CodeMeasure:
    """Count the files that import each other in a circle, also in functions and for types."""
    modules = {_module_name(module.path): module for module in source}
    imports: dict[str, set[str]] = {}
    for name, module in modules.items():
        imported = modules.keys() & set(_list_imports(module.tree))
        imports[name] = imported - {name}
    circles = [group for group in find_circles(imports) if len(group) > 1]
    count = sum(map(len, circles))
    found = tuple(", ".join(sorted(group)) for group in circles)
    return CodeMeasure("files in circles of imports", count, MAX_FILES_IN_CIRCLES, violations=found)


def find_circles(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the strongly connected components of a graph, by the algorithm of Tarjan (1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components: list[set[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in edges.get(node, ()):
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            start = stack.index(node)
            components.append(set(stack[start:]))
            del stack[start:]

    for node in edges:
        if node not in order:
            visit(node)
    return components


def _module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts[1:]).removesuffix(".__init__")


def _list_imports(tree: ast.Module) -> Iterator[str]:
    """Yield the full names of all modules and names that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _measure_components(root: Path) -> Iterator[CodeMeasure]:
    """Count the source files that name a built-in component, apart from translations."""
    texts = {}
    for path in sorted((root / "src").rglob("*")):
        if path.suffix in (".py", ".yaml", ".html", ".js", ".j2") and path.name != TRANSLATIONS:
            texts[str(path.relative_to(root))] = path.read_text(encoding="utf-8")
    for name, bound in COMPONENT_FILES.items():
        word = re.compile(rf"\b{name}\b", re.IGNORECASE)
        files = tuple(path for path, text in texts.items() if word.search(text))
        yield CodeMeasure(f"source files that name {name}", len(files), bound, violations=files)


def _measure_columns(root: Path) -> CodeMeasure:
    """Count the long lines of pages and YAML files."""
    found = []
    for path in sorted((root / "src").rglob("*")):
        if path.suffix not in FORMATTED_SUFFIXES:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            columns = count_columns(line)
            if columns > MAX_COLUMNS:
                found.append(f"{path.relative_to(root)}:{number} {columns} columns")
    name = f"lines of pages and YAML files over {MAX_COLUMNS} columns"
    return CodeMeasure(name, len(found), 0, violations=tuple(found))


def count_columns(line: str) -> int:
    """Return the columns of a line in a terminal; a wide character has two."""
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in line)


def _measure_reflection(source: Sequence[SourceModule]) -> Iterator[CodeMeasure]:
    """Count calls such as getattr, and those on settings, whose fields are typed."""
    found, on_settings = [], []
    num_statements = 0
    for module in source:
        for node in module.nodes:
            num_statements += isinstance(node, ast.stmt)
            if not isinstance(node, ast.Call) or _get_name(node.func) not in REFLECTION_CALLS:
                continue
            location = f"{module.location(node)} {ast.unparse(node)}"
            found.append(location)
            if SETTINGS_NAMES.intersection(_list_names(node.args[:1])):
                on_settings.append(location)
    share = 1000 * len(found) / max(1, num_statements)
    yield CodeMeasure("reflection per 1,000 statements", share, 1, violations=tuple(found))
    yield CodeMeasure("reflection on settings", len(on_settings), 0, violations=tuple(on_settings))


def _measure_messages(source: Sequence[SourceModule]) -> Iterator[CodeMeasure]:
    """Measure the share of raised messages without a value, and of asserts without a message."""
    raised, blind, asserts, mute = [], [], [], []
    for module in source:
        for node in module.nodes:
            if isinstance(node, ast.Assert):
                asserts.append(node)
                if node.msg is None:
                    mute.append(module.location(node))
            elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                call = node.exc
                if not _has_message(call):
                    continue
                raised.append(call)
                if not _has_variable_argument(call):
                    blind.append(f"{module.location(call)} {ast.unparse(call)}")
    shown = 1 - compute_ratio(blind, raised)
    yield CodeMeasure(
        "share of raised messages that show a value",
        shown,
        0.9,
        is_minimum=True,
        violations=tuple(blind),
    )
    share = compute_ratio(mute, asserts)
    yield CodeMeasure("share of asserts without a message", share, 0.2, violations=tuple(mute))


def _get_name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _list_names(nodes: Sequence[ast.expr]) -> Iterator[str]:
    """Yield the names and attributes in expressions."""
    for expression in nodes:
        for node in ast.walk(expression):
            if isinstance(node, ast.Name):
                yield node.id
            elif isinstance(node, ast.Attribute):
                yield node.attr


def _has_message(call: ast.Call) -> bool:
    for node in ast.walk(call):
        if isinstance(node, ast.JoinedStr):
            return True
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return True
    return False


def _has_variable_argument(call: ast.Call) -> bool:
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    return any(not isinstance(argument, ast.Constant) for argument in arguments)


def _find_imported_writes(module: SourceModule) -> Iterator[str]:
    """Yield locations that assign or delete an attribute or item of an imported name."""
    imported = set()
    for node in module.nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
    for node in module.nodes:
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
            if owner is not target and _get_name(owner) in imported:
                yield f"{module.location(node)} {ast.unparse(target)}"


def _measure_private_names(
    source: Sequence[SourceModule], tests: Sequence[SourceModule]
) -> CodeMeasure:
    """Count uses of private names of the package in tests."""
    private = set()
    for module in source:
        for node in module.nodes:
            private.update(filter(_is_private, _list_defined_names(node)))
    uses = []
    for module in tests:
        for used in _find_uses(module, private):
            uses.append(f"{module.location(used)} {ast.unparse(used)}")
    return CodeMeasure(
        "private names of the package used in tests",
        len(uses),
        MAX_PRIVATE_NAMES_IN_TESTS,
        violations=tuple(uses),
    )


def _is_private(name: str) -> bool:
    """Return whether a name is private. Notebooks call `_repr_html_`, which is not."""
    return name.startswith("_") and not name.startswith("__") and not name.endswith("_")


def _list_defined_names(node: ast.AST) -> tuple[str, ...]:
    """Return the names of functions, classes, variables and attributes that a node defines."""
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return (name,)
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
            return (name,)
    return ()


def _find_uses(module: SourceModule, names: set[str]) -> Iterator[ast.expr | ast.stmt]:
    """Yield imports, attributes and strings (for `monkeypatch.setattr`) with one of the names.

    Names that the module defines itself do not count.
    """
    own = set()
    for node in module.nodes:
        if not _is_foreign(node):
            own.update(_list_defined_names(node))
    foreign = names - own
    for node in module.nodes:
        match node:
            case ast.ImportFrom(module=str(path)) if path.split(".")[0] == PACKAGE:
                yield from (node for alias in node.names if _is_private(alias.name))
            case ast.Attribute(attr=name) if name in foreign:
                yield node
            case ast.Constant(value=str(text)) if text.rpartition(".")[2] in foreign:
                yield node


def _is_foreign(node: ast.AST) -> bool:
    """Return whether a node is an attribute of another object than `self`."""
    if not isinstance(node, ast.Attribute):
        return False
    return _get_name(node.value) not in ("self", "cls")
