"""Measures of names and prose: colloquial words, standard terms, sentences, glossary.

`tools/language.yaml` contains the word lists, `tools/glossary.yaml` the misuses of terms.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml
from source_modules import CodeMeasure, FunctionNode, SourceModule, compute_ratio


@dataclass(frozen=True)
class WordLists:
    """Word lists of `tools/language.yaml`."""

    colloquial: frozenset[str]
    standard: frozenset[str]
    search_patterns: dict[str, str]

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
class ProseTexts:
    """Texts of one kind, each with its source location."""

    texts: tuple[tuple[str, str], ...]

    @cached_property
    def num_words(self) -> int:
        return sum(len(_split_words(text)) for _, text in self.texts)

    def rate_per_thousand(self, listed: frozenset[str]) -> float:
        hits = sum(word in listed for _, text in self.texts for word in _split_words(text))
        return 1000 * hits / self.num_words if self.num_words else 0.0

    def find_words(self, listed: frozenset[str]) -> tuple[str, ...]:
        matches = (
            (location, sorted(listed.intersection(_split_words(text))))
            for location, text in self.texts
        )
        return tuple(f"{location}: {', '.join(words)}" for location, words in matches if words)


def _split_words(text: str) -> list[str]:
    return [word.lower().strip("-'_") for word in re.findall(r"[A-Za-z][A-Za-z'_\-]*", text)]


def _name_parts(identifier: str) -> list[str]:
    """Split an identifier at underscores and capitals."""
    parts = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+", identifier)
    return [part.lower() for part in parts]


# Bounds of the language measures. They are lowered as areas are rewritten, never raised.
GENERATED_PAGES = ("commands.md", "files.md")

COLLOQUIAL_BOUNDS = {"docstrings": 4, "comments": 5, "string literals": 4, "documentation": 4}


def measure_language(root: Path, source: Sequence[SourceModule]) -> Iterator[CodeMeasure]:
    """Measure names and prose against the word lists."""
    lists = WordLists.load()
    pages = _documentation_paragraphs(root)
    prose = {
        "docstrings": ProseTexts(tuple(_docstrings(source))),
        "comments": ProseTexts(tuple(_comments(source))),
        "string literals": ProseTexts(tuple(_string_literals(source))),
        "documentation": ProseTexts(tuple(pages)),
    }
    for kind, texts in prose.items():
        yield CodeMeasure(
            f"colloquial words per 1,000 in {kind}",
            texts.rate_per_thousand(lists.colloquial),
            COLLOQUIAL_BOUNDS[kind],
            violations=texts.find_words(lists.colloquial),
        )
    yield CodeMeasure(
        "standard terms per 1,000 words of docstrings",
        prose["docstrings"].rate_per_thousand(lists.standard),
        65,
        is_minimum=True,
    )
    yield from _sentence_measures(pages)
    yield from _identifier_measures(source, lists)
    yield _summary_measure(source)
    yield _measure_documented_names(source)
    code = "\n".join(line for module in source for line in module.lines)
    missed = tuple(
        name for name, regex in lists.search_patterns.items() if not re.search(regex, code)
    )
    yield CodeMeasure("newcomer searches without a hit", len(missed), 0, violations=missed)


def _documentation_paragraphs(root: Path) -> list[tuple[str, str]]:
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


def _iter_docstrings(module: SourceModule) -> Iterator[tuple[int, str]]:
    for node in module.nodes:
        if isinstance(node, ast.Module | ast.ClassDef | FunctionNode):
            text = ast.get_docstring(node)
            if text:
                yield (1 if isinstance(node, ast.Module) else node.lineno), text


def _docstrings(source: Sequence[SourceModule]) -> Iterator[tuple[str, str]]:
    for module in source:
        for line, text in _iter_docstrings(module):
            yield f"{module.path}:{line}", text


def _comments(source: Sequence[SourceModule]) -> Iterator[tuple[str, str]]:
    for module in source:
        for number, comment in module.comments:
            yield f"{module.path}:{number}", comment


def _string_literals(source: Sequence[SourceModule]) -> Iterator[tuple[str, str]]:
    """Yield string literals with a space, docstrings included."""
    for module in source:
        for node in module.nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                yield module.location(node), node.value


def _sentence_measures(pages: Sequence[tuple[str, str]]) -> Iterator[CodeMeasure]:
    lengths = [
        (f"{location}: {sentence[:80]}", len(sentence.split()))
        for location, text in pages
        for sentence in re.split(r"(?<=[.!?])\s+", text)
        if len(sentence.split()) > 2
    ]
    mean = sum(length for _, length in lengths) / len(lengths) if lengths else 0
    yield CodeMeasure("mean words of a sentence in documentation", mean, 18)
    long = tuple(location for location, length in lengths if length > 30)
    share = compute_ratio(long, lengths)
    yield CodeMeasure("share of sentences over 30 words", share, 0.08, violations=long)


@dataclass
class DefinedNames:
    """Identifiers defined in a package, and its public classes and modules by name."""

    identifiers: set[str] = field(default_factory=set)
    classes: dict[str, list[str]] = field(default_factory=dict)
    modules: dict[str, list[str]] = field(default_factory=dict)

    def add_node(self, module: SourceModule, node: ast.AST) -> None:
        if isinstance(node, ast.ClassDef):
            self.identifiers.add(node.name)
            if not node.name.startswith("_"):
                self.classes.setdefault(node.name, []).append(module.location(node))
        elif isinstance(node, FunctionNode):
            given = node.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
            self.identifiers.update([node.name, *(one.arg for one in every)])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            self.identifiers.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            self.identifiers.add(node.attr)


def _identifier_measures(source: Sequence[SourceModule], lists: WordLists) -> Iterator[CodeMeasure]:
    names = DefinedNames()
    # Components have the names of their settings, and parallel heavy halves, such as `score.py`.
    components = {module.path for module in source if _defines_component(module)}
    for module in source:
        is_parallel = components & {module.path, module.path.parent / "__init__.py"}
        if module.path.stem != "__init__" and not is_parallel:
            names.modules.setdefault(module.path.stem, []).append(str(module.path))
        for node in module.nodes:
            names.add_node(module, node)
    bad = tuple(n for n in sorted(names.identifiers) if lists.colloquial & {*_name_parts(n)})
    share = len(bad) / len(names.identifiers) if names.identifiers else 0
    yield CodeMeasure("share of identifiers with a colloquial word", share, 0.003, violations=bad)
    classes, modules = _duplicates(names.classes), _duplicates(names.modules)
    yield CodeMeasure("public class names defined twice", len(classes), 8, violations=classes)
    yield CodeMeasure("module names used twice", len(modules), 8, violations=modules)


def _defines_component(module: SourceModule) -> bool:
    """Return whether a module is the light half of a component."""
    names = [node for node in module.nodes if isinstance(node, ast.Name)]
    return any(one.id == "COMPONENT" and isinstance(one.ctx, ast.Store) for one in names)


def _duplicates(by_name: dict[str, list[str]]) -> tuple[str, ...]:
    return tuple(f"{n}: {', '.join(at)}" for n, at in sorted(by_name.items()) if len(at) > 1)


POOR_SUMMARY_START = re.compile(
    r"(What|Whether|How|Where|Which|Who|When|Of|That|Than|Those|These|It|As|Until|Before|With|From"
    r"|To|In|By|One|Every|Nothing|All)\b"
)


def _summary_measure(source: Sequence[SourceModule]) -> CodeMeasure:
    """Measure docstring summaries that are too long or start with a word of POOR_START."""
    summaries = [
        (location, re.split(r"(?<=[.:])\s|\n\n", text.replace("\n", " "))[0].strip())
        for location, text in _docstrings(source)
    ]
    poor = tuple(
        f"{location} {text}"
        for location, text in summaries
        if POOR_SUMMARY_START.match(text) or len(text.split()) > 15
    )
    return CodeMeasure(
        "share of poor docstring summaries", compute_ratio(poor, summaries), 0.06, violations=poor
    )


def _measure_documented_names(source: Sequence[SourceModule]) -> CodeMeasure:
    """Measure the share of public functions, classes and methods with a docstring."""
    public, silent = [], []
    for module in source:
        for node in _iter_public_definitions(module.tree.body):
            public.append(node)
            if not ast.get_docstring(node):
                silent.append(f"{module.location(node)} {node.name}")
    share = 1 - compute_ratio(silent, public)
    return CodeMeasure(
        "share of public names with docstring",
        share,
        0.8,
        is_minimum=True,
        violations=tuple(silent),
    )


def _iter_public_definitions(body: Sequence[ast.stmt]) -> Iterator[FunctionNode | ast.ClassDef]:
    for node in body:
        if isinstance(node, FunctionNode | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _iter_public_definitions(node.body)


MAX_GLOSSARY_EXCEPTIONS = 15
PAGE_SUFFIXES = {".md", ".yaml", ".html", ".js", ".cff", ".po", ".ipynb"}


@dataclass(frozen=True)
class SearchText:
    """Names or prose of a file, as lines with their numbers."""

    path: str
    kind: str
    lines: tuple[tuple[int, str], ...]

    @cached_property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def find(self, regex: re.Pattern[str]) -> Iterator[tuple[str, str]]:
        """Yield the location and the line of each match."""
        for match in regex.finditer(self.text):
            number, line = self.lines[self.text.count("\n", 0, match.start())]
            yield f"{self.path}:{number}", line.strip()


def measure_glossary(root: Path, modules: Sequence[SourceModule]) -> Iterator[CodeMeasure]:
    """Search names, prose and paths for the misuses in `tools/glossary.yaml`."""
    content = yaml.safe_load(Path(__file__).with_name("glossary.yaml").read_text("utf-8"))
    rules = [
        (term["use"], re.compile(rule.get("in", "")), kind, _compile_misuse(rule, kind))
        for term in content["terms"]
        for rule in term["find"]
        for kind in ("names", "prose")
        if rule.keys() & {kind, "any"}
    ]
    misuses = {
        (location, use, line)
        for searched in _iter_search_texts(root, modules)
        for use, paths, kind, regex in rules
        if kind == searched.kind and paths.search(searched.path)
        for location, line in searched.find(regex)
    }
    unused = []
    for exception in content["exceptions"]:
        paths, text = re.compile(exception["in"]), re.compile(exception["text"], re.IGNORECASE)
        excepted = {
            m for m in misuses if paths.search(m[0].rpartition(":")[0]) and text.search(m[2])
        }
        misuses -= excepted
        if not excepted:
            unused.append(exception["reason"])
    found = tuple(f"{where}: use {use}: {line[:90]}" for where, use, line in sorted(misuses))
    yield CodeMeasure("misuses of glossary terms", len(found), 0, violations=found)
    num_exceptions = len(content["exceptions"])
    yield CodeMeasure("glossary exceptions", num_exceptions, MAX_GLOSSARY_EXCEPTIONS)
    yield CodeMeasure("unused glossary exceptions", len(unused), 0, violations=tuple(unused))


def _compile_misuse(rule: dict[str, str], kind: str) -> re.Pattern[str]:
    """Compile the expression of a rule; in prose a space matches any white space."""
    pattern = rule.get(kind) or rule["any"]
    if kind == "prose":
        pattern = re.sub(r" (?!\?)", r"\\s+", pattern)
    return re.compile(pattern, re.IGNORECASE | re.MULTILINE)


def _iter_search_texts(root: Path, modules: Sequence[SourceModule]) -> Iterator[SearchText]:
    """Yield names and prose of modules, prose of pages, and paths of all files."""
    for module in modules:
        path, names = module.path.as_posix(), {}
        for node in module.nodes:
            for name in _node_names(node):
                names.setdefault(name, getattr(node, "lineno", 0))
        words = ((number, " ".join(_name_parts(name))) for name, number in names.items())
        yield SearchText(path, "names", tuple(words))
        yield SearchText(path, "prose", tuple(_prose_lines(module)))
    folders = ("src", "tests", "benchmarks", "tools", "pretraining", "examples", "recipes", "docs")
    for path in [*root.glob("*.*"), *(p for folder in folders for p in (root / folder).rglob("*"))]:
        is_generated = path.parent.parent.name == "docs" and path.name in GENERATED_PAGES
        if not path.is_file() or "__pycache__" in path.parts or is_generated:
            continue
        relative = path.relative_to(root)
        words = " ".join(_name_parts(relative.with_suffix("").as_posix()))
        yield SearchText(relative.as_posix(), "names", ((0, words),))
        if path.suffix in PAGE_SUFFIXES:
            lines = path.read_text("utf-8").replace("_", " ").split("\n")
            yield SearchText(relative.as_posix(), "prose", tuple(enumerate(lines, 1)))


def _node_names(node: ast.AST) -> tuple[str, ...]:
    """Return the identifiers that a node of the syntax tree defines or uses."""
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return (name,)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return (name,)
        case ast.arg(arg=str(name)) | ast.keyword(arg=str(name)):
            return (name,)
        case ast.alias(name=name, asname=asname):
            return (name, asname or "")
    return ()


def _prose_lines(module: SourceModule) -> Iterator[tuple[int, str]]:
    """Yield the lines of string literals, separated by a null character, and of comments."""
    for node in module.nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from enumerate(node.value.replace("_", " ").split("\n"), node.lineno)
            yield node.lineno, "\0"
    for number, comment in module.comments:
        yield number, comment.lstrip("# ").replace("_", " ")
