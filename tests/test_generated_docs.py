"""Tests of generated documentation: tables, commands, links, module list."""

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "finesight"
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


def find_definition(file: Path, dotted_name: str) -> ast.stmt | None:
    """Return a function or class of a file, such as `Class.method`; None if it does not exist."""
    node: Any = ast.parse(file.read_text("utf-8"))
    for name in dotted_name.split("."):
        named = [one for one in node.body if getattr(one, "name", None) == name]
        if not named:
            return None
        node = named[0]
    return node


def test_source_map_has_every_folder_and_existing_functions() -> None:
    content = generate_docs.load_source_map()
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    listed = content["core"] + content["aliases"] + content["satellites"]
    assert sorted(listed) == sorted(folders)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (independent,) = (one["modules"] for one in contracts if one["type"] == "independence")
    assert sorted(independent) == sorted(f"finesight.{name}" for name in content["satellites"])
    for steps in content["paths"].values():
        for step in steps:
            file, name = step.split()
            assert find_definition(SOURCE / file, name), step


def test_files_and_names_of_the_architecture_exist() -> None:
    for language in ("en", "zh"):
        page = (ROOT / "docs" / language / "architecture.md").read_text("utf-8")
        found = re.findall(r"`([\w/]+/\w+\.py)`(?: ?[(（]((?:`[\w.]+`(?:, |、)?)+)[)）])?", page)
        assert len(found) > 100, language
        for file, names in found:
            if "NAME" in file or file.startswith(("tests/", "tools/", "benchmarks/")):
                continue
            text = (SOURCE / file).read_text("utf-8")
            for name in re.findall(r"`([\w.]+)`", names):
                assert re.search(rf"\b{name.rpartition('.')[2]}\b", text), (language, file, name)


def test_links_and_recipes_in_pages_exist() -> None:
    for page in (ROOT / "README.md", *DOCS):
        text = page.read_text("utf-8")
        links = [page.parent / target for target in re.findall(r"\]\(([^)#:]+)\)", text)]
        links += [ROOT / name for name in re.findall(r"recipes/\w+\.yaml", text)]
        assert [link for link in links if not link.exists()] == [], page.name
