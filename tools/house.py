"""Check code size, habits and language of the project against bounds.

`python tools/house.py` prints them and exits with 1 when one is missed; tests/test_style.py holds
each. Only the syntax tree is read, nothing is imported.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import yaml

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
        *_language(root, source),
        Measure(
            "test lines to source lines",
            _count(tests) / _count(source),
            0.6,
            at_least=True,
        ),
    ]


@dataclass(frozen=True)
class WordLists:
    """Word lists of `tools/language.yaml`."""

    colloquial: frozenset[str]
    standard: frozenset[str]
    searches: dict[str, str]

    @classmethod
    def load(cls) -> WordLists:
        path = Path(__file__).with_name("language.yaml")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return cls(
            frozenset(content["colloquial"].split()),
            frozenset(content["standard"].split()),
            content["searches"],
        )


@dataclass(frozen=True)
class Prose:
    """Texts of one kind, each with the place where it is written."""

    texts: tuple[tuple[str, str], ...]

    @cached_property
    def words(self) -> int:
        return sum(len(_words(text)) for _, text in self.texts)

    def per_thousand(self, listed: frozenset[str]) -> float:
        hits = sum(word in listed for _, text in self.texts for word in _words(text))
        return 1000 * hits / self.words if self.words else 0.0

    def with_words(self, listed: frozenset[str]) -> tuple[str, ...]:
        found = ((place, sorted(listed.intersection(_words(text)))) for place, text in self.texts)
        return tuple(f"{place}: {', '.join(words)}" for place, words in found if words)


def _words(text: str) -> list[str]:
    return [word.lower().strip("-'_") for word in re.findall(r"[A-Za-z][A-Za-z'_\-]*", text)]


def _name_parts(identifier: str) -> list[str]:
    """Split an identifier at underscores and capitals."""
    parts = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+", identifier)
    return [part.lower() for part in parts]


# Bounds of the language measures. They are lowered as areas are rewritten, never raised.
COLLOQUIAL_BOUNDS = {"docstrings": 41, "comments": 43, "string literals": 40, "documentation": 38.5}


def _language(root: Path, source: Sequence[Module]) -> Iterator[Measure]:
    """Measure names and prose against the word lists."""
    lists = WordLists.load()
    pages = _pages(root)
    prose = {
        "docstrings": Prose(tuple(_docstrings(source))),
        "comments": Prose(tuple(_comments(source))),
        "string literals": Prose(tuple(_strings(source))),
        "documentation": Prose(tuple(pages)),
    }
    for kind, texts in prose.items():
        yield Measure(
            f"colloquial words per 1,000 in {kind}",
            texts.per_thousand(lists.colloquial),
            COLLOQUIAL_BOUNDS[kind],
            against=texts.with_words(lists.colloquial),
        )
    yield Measure(
        "standard terms per 1,000 words of docstrings",
        prose["docstrings"].per_thousand(lists.standard),
        37,
        at_least=True,
    )
    yield from _sentences(pages)
    yield from _identifiers(source, lists)
    yield _summaries(source)
    code = "\n".join(line for module in source for line in module.lines)
    missed = tuple(name for name, regex in lists.searches.items() if not re.search(regex, code))
    yield Measure("newcomer searches without a hit", len(missed), 17, against=missed)


def _pages(root: Path) -> list[tuple[str, str]]:
    """Return the paragraphs of the English pages without code, tables and headings."""
    named = [root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    pages = []
    for path in [*named, *sorted((root / "docs" / "en").rglob("*.md"))]:
        if not path.is_file():
            continue
        text = re.sub(r"```.*?```", " ", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        text = re.sub(r"`[^`]*`", " x ", text)
        lines = [line for line in text.split("\n") if not line.lstrip().startswith(("|", "#", "<"))]
        pages.append((str(path.relative_to(root)), "\n".join(lines)))
    return pages


def _documented(module: Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function):
            text = ast.get_docstring(node)
            if text:
                yield (1 if isinstance(node, ast.Module) else node.lineno), text


def _docstrings(source: Sequence[Module]) -> Iterator[tuple[str, str]]:
    for module in source:
        for line, text in _documented(module):
            yield f"{module.path}:{line}", text


def _comments(source: Sequence[Module]) -> Iterator[tuple[str, str]]:
    for module in source:
        code = io.StringIO("\n".join(module.lines) + "\n")
        for token in tokenize.generate_tokens(code.readline):
            if token.type == tokenize.COMMENT:
                yield f"{module.path}:{token.start[0]}", token.string


def _strings(source: Sequence[Module]) -> Iterator[tuple[str, str]]:
    """Yield string literals with a space, docstrings included."""
    for module in source:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                yield module.at(node), node.value


def _sentences(pages: Sequence[tuple[str, str]]) -> Iterator[Measure]:
    lengths = [
        (f"{place}: {sentence[:80]}", len(sentence.split()))
        for place, text in pages
        for sentence in re.split(r"(?<=[.!?])\s+", text)
        if len(sentence.split()) > 2
    ]
    mean = sum(length for _, length in lengths) / len(lengths) if lengths else 0
    yield Measure("mean words of a sentence in documentation", mean, 22)
    long = tuple(place for place, length in lengths if length > 30)
    share = _share(long, lengths)
    yield Measure("share of sentences over 30 words", share, 0.205, against=long)


@dataclass
class Names:
    """Identifiers defined in a package, and its public classes and modules by name."""

    identifiers: set[str] = field(default_factory=set)
    classes: dict[str, list[str]] = field(default_factory=dict)
    modules: dict[str, list[str]] = field(default_factory=dict)

    def add(self, module: Module, node: ast.AST) -> None:
        if isinstance(node, ast.ClassDef):
            self.identifiers.add(node.name)
            if not node.name.startswith("_"):
                self.classes.setdefault(node.name, []).append(module.at(node))
        elif isinstance(node, Function):
            given = node.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
            self.identifiers.update([node.name, *(one.arg for one in every)])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            self.identifiers.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            self.identifiers.add(node.attr)


def _identifiers(source: Sequence[Module], lists: WordLists) -> Iterator[Measure]:
    names = Names()
    for module in source:
        if module.path.stem != "__init__":
            names.modules.setdefault(module.path.stem, []).append(str(module.path))
        for node in ast.walk(module.tree):
            names.add(module, node)
    bad = tuple(n for n in sorted(names.identifiers) if lists.colloquial & {*_name_parts(n)})
    share = len(bad) / len(names.identifiers) if names.identifiers else 0
    yield Measure("share of identifiers with a colloquial word", share, 0.052, against=bad)
    classes, modules = _repeated(names.classes), _repeated(names.modules)
    yield Measure("public class names defined twice", len(classes), 70, against=classes)
    yield Measure("module names used twice", len(modules), 54, against=modules)


def _repeated(by_name: dict[str, list[str]]) -> tuple[str, ...]:
    return tuple(f"{n}: {', '.join(at)}" for n, at in sorted(by_name.items()) if len(at) > 1)


POOR_START = re.compile(
    r"(What|Whether|How|Where|Which|Who|When|Of|That|Than|Those|These|It|As|Until|Before|With|From"
    r"|To|In|By|One|Every|Nothing|All)\b"
)


def _summaries(source: Sequence[Module]) -> Measure:
    """Measure docstring summaries that are too long or start with a word of POOR_START."""
    summaries = [
        (place, re.split(r"(?<=[.:])\s|\n\n", text.replace("\n", " "))[0].strip())
        for place, text in _docstrings(source)
    ]
    poor = tuple(
        f"{place} {text}"
        for place, text in summaries
        if POOR_START.match(text) or len(text.split()) > 15
    )
    return Measure(
        "share of poor docstring summaries", _share(poor, summaries), 0.432, against=poor
    )


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
