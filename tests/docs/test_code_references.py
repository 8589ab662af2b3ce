"""Tests of references to code: paths and modules named in pages and docstrings exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from docs_code_blocks import list_pages
from each_value import each

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "finesight"
PAGES = [
    *list_pages("en").values(),
    *list_pages("zh").values(),
    *(*sorted(ROOT.glob("README*.md")), ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"),
]
PATH = re.compile(r"(?<![\w./-])(?:[\w.-]+/)*[\w-]+\.py\b")
DOTTED_NAME = re.compile(r"`(?:finesight\.)?([a-z_]\w*(?:\.\w+)+)(?:\(\))?`")

PLACEHOLDERS = re.compile(r"NAME|FILE|AREA/test_[xX]\.py|AREA/x\.py")
USER_FILES = {
    *("ask.py", "draw.py", "metric.py", "train.py", "path/to/metric.py", "metrics/plates.py"),
    *("runs/from-a-colleague/metric.py", "convert_hf_to_gguf.py"),
    "llama.cpp/convert_hf_to_gguf.py",
}
"""Files that a reader writes or that belong to another project."""
OTHER_NAMES = {"model.encode"}
"""Dotted names whose first part is a variable of an example."""
FILE_SUFFIXES = (".py", ".json", ".jsonl", ".yaml", ".html", ".safetensors", ".gguf")

FILE_NAMES = {path.name for folder in ("src", "tests") for path in (ROOT / folder).rglob("*.py")}
SETTINGS = {
    node.target.id
    for node in ast.walk(ast.parse((PACKAGE / "config.py").read_text("utf-8")))
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
}


def exists_path(path: str) -> bool:
    """Check a path relative to the repository or the package; a bare name may be in any folder."""
    if path in USER_FILES or PLACEHOLDERS.search(path):
        return True
    if "/" not in path:
        return path in FILE_NAMES
    return any((root / path).is_file() for root in (ROOT, PACKAGE))


def exists_name(name: str) -> bool:
    """Check a dotted name: a module, a name that a module defines, or a setting."""
    folder, parts = PACKAGE, name.split(".")
    is_known = (PACKAGE / parts[0]).is_dir() or (PACKAGE / f"{parts[0]}.py").is_file()
    if not is_known or name.endswith(FILE_SUFFIXES) or name in OTHER_NAMES or parts[1] in SETTINGS:
        return True
    while parts and (folder / parts[0]).is_dir():
        folder /= parts.pop(0)
    if not parts:
        return True
    module = folder / f"{parts[0]}.py"
    if not module.is_file() or len(parts) == 1:
        return module.is_file()
    return defines(module, parts[1])


def defines(module: Path, name: str) -> bool:
    """Check if a module defines a function, class, method, constant or field of this name."""
    last = name.rpartition(".")[2]
    definition = rf"(?:\bdef|\bclass) {last}\b|^\s*(?:self\.)?{last}\b.*[:=]"
    return re.search(definition, module.read_text("utf-8"), re.MULTILINE) is not None


def iter_missing(text: str) -> Iterator[str]:
    yield from (path for path in PATH.findall(text) if not exists_path(path))
    yield from (name for name in DOTTED_NAME.findall(text) if not exists_name(name))


@each("page", PAGES)
def test_code_named_in_page_exists(page: Path) -> None:
    assert [*iter_missing(page.read_text("utf-8"))] == []


def test_code_named_in_docstrings_exists() -> None:
    missing = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {reference}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for reference in iter_missing(str(node.value.value))
    ]
    assert missing == []
