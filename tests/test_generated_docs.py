"""Tests of generated documentation: tables, commands, links, module list."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import generate_docs  # noqa: E402 (found by the line above)

from finesight.report.i18n import get_translations, use_language  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


PAGES = [
    *("docs/en/data-check.md", "docs/zh/data-check.md"),
    *("docs/en/data-import.md", "docs/zh/data-import.md"),
    *("docs/en/serving.md", "docs/zh/serving.md"),
]


@pytest.fixture(scope="module")
def generated_pages() -> dict[Path, str]:
    return generate_docs.generate_all()


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_up_to_date(generated_pages: dict[Path, str], name: str) -> None:
    assert generated_pages[ROOT / name] == (ROOT / name).read_text("utf-8"), (
        "run: python tools/generate_docs.py"
    )


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
    lines = generate_docs.render_files(generate_docs.FILES_PAGE_HEADERS["en"]).splitlines()
    for path in (ROOT / "src" / "finesight").rglob("*.py"):
        if path.name != "__init__.py":
            assert any(re.match(rf"\s+- `{path.name}`: \S", line) for line in lines), path


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_package_is_in_architecture_page(language: str) -> None:
    page = (ROOT / "docs" / language / "architecture.md").read_text(encoding="utf-8")
    for path in (ROOT / "src" / "finesight").iterdir():
        if (path / "__init__.py").exists():
            assert re.search(rf"^\| `{path.name}/", page, re.MULTILINE), path


def test_every_command_is_documented() -> None:
    from finesight.cli.app import app, data_app

    registered = [*app.registered_commands, *data_app.registered_commands]
    names = {command.name or command.callback.__name__ for command in registered}
    assert {name.split()[-1] for name in generate_docs.COMMAND_NAMES if name} == names


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.name
)
def test_relative_links_are_valid(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_commands_in_readme_exist() -> None:
    named = set(re.findall(r"finesight (data \w+|[a-z]+)", "\n".join(_code(README))))
    assert named <= set(generate_docs.COMMAND_NAMES), (
        f"unknown: {named - set(generate_docs.COMMAND_NAMES)}"
    )


def _code(text: str) -> list[str]:
    """Return the lines of shell code blocks."""
    blocks = re.findall(r"```(?:sh)\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_recipes_named_in_docs_exist() -> None:
    pages_text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    named = set(re.findall(r"recipes/\w+\.yaml", pages_text + README))
    assert named, "the pages name no recipe"
    for name in named:
        assert (ROOT / name).exists(), name
