"""Tests of references to code: files named in pages and docstrings exist."""

import ast
import re
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
PLACEHOLDERS = re.compile(r"NAME|FILE|AREA/test_[xX]\.py|AREA/x\.py")
USER_FILES = {
    *("ask.py", "draw.py", "metric.py", "train.py", "path/to/metric.py", "metrics/plates.py"),
    *("runs/from-a-colleague/metric.py", "convert_hf_to_gguf.py"),
    "llama.cpp/convert_hf_to_gguf.py",
}
"""Files that a reader writes or that belong to another project."""
FILE_NAMES = {path.name for folder in ("src", "tests") for path in (ROOT / folder).rglob("*.py")}


def exists_path(path: str) -> bool:
    """Check a path relative to the repository or the package; a bare name may be in any folder."""
    if path in USER_FILES or PLACEHOLDERS.search(path):
        return True
    if "/" not in path:
        return path in FILE_NAMES
    return any((root / path).is_file() for root in (ROOT, PACKAGE))


def list_missing(text: str) -> list[str]:
    return [path for path in PATH.findall(text) if not exists_path(path)]


@each("page", PAGES)
def test_code_named_in_page_exists(page: Path) -> None:
    assert list_missing(page.read_text("utf-8")) == []


def test_code_named_in_docstrings_exists() -> None:
    missing = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {reference}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for reference in list_missing(str(node.value.value))
    ]
    assert missing == []
