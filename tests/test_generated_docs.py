"""Tests of generated documentation: tables, commands, links, module list."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import generate_docs  # noqa: E402 (found by the line above)

from finesight.report.i18n import get_translations, use_language  # noqa: E402

DOCS = sorted((ROOT / "docs").rglob("*.md"))


def test_generated_pages_are_up_to_date() -> None:
    pages = generate_docs.generate_all()
    old = [path.name for path, text in pages.items() if text != path.read_text("utf-8")]
    assert old == [], "run: python tools/generate_docs.py"


def test_chinese_tables_are_fully_translated() -> None:
    translate, requested = generate_docs.get_translator("zh"), set()
    for table in generate_docs.TABLE_RENDERERS.values():
        table(lambda text: requested.add(text) or text)
    code = re.compile(r'"[^"]*"')
    for text in requested:
        missing = translate(text) == text and re.search("[a-z]{2}", code.sub("", text))
        assert not missing, f"tools/zh.yaml lacks: {text}"
    extra = set(generate_docs.load_extra_translations("zh"))
    assert extra <= requested, f"not used by any table: {extra - requested}"
    with use_language("zh"):
        assert not extra & set(get_translations()), "the report translations contain them"


def test_every_package_file_is_described() -> None:
    page = generate_docs.render_files(generate_docs.FILES_PAGE_HEADERS["en"])
    described = {"__init__.py", *re.findall(r"^\s+- `(\w+\.py)`: \S", page, re.MULTILINE)}
    assert {path.name for path in (ROOT / "src" / "finesight").rglob("*.py")} <= described


def test_every_package_is_documented() -> None:
    packages = [path.parent.name for path in (ROOT / "src" / "finesight").glob("*/__init__.py")]
    for language in ("en", "zh"):
        page = (ROOT / "docs" / language / "architecture.md").read_text("utf-8")
        rows = re.findall(r"^\| `(\w+)/", page, re.MULTILINE)
        assert set(packages) <= set(rows), language


def test_links_and_recipes_in_pages_exist() -> None:
    for page in (ROOT / "README.md", *DOCS):
        text = page.read_text("utf-8")
        links = [page.parent / target for target in re.findall(r"\]\(([^)#:]+)\)", text)]
        links += [ROOT / name for name in re.findall(r"recipes/\w+\.yaml", text)]
        assert [link for link in links if not link.exists()] == [], page.name
