"""Pages that are made from the code are up to date: `python tools/pages.py` renews them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import pages  # noqa: E402 (found by the line above)

from finesight.report.language import speaking  # noqa: E402
from finesight.report.language import table as table_of_reports  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


PAGES = [
    "README.md",
    *("docs/en/data.md", "docs/zh/data.md"),
    *("docs/en/serving.md", "docs/zh/serving.md"),
]


@pytest.fixture(scope="module")
def made() -> dict[Path, str]:
    return pages.pages()


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_as_the_code_says(made: dict[Path, str], name: str) -> None:
    assert made[ROOT / name] == (ROOT / name).read_text("utf-8"), "run: python tools/pages.py"


def test_tables_in_chinese_say_everything_in_chinese() -> None:
    said, asked = pages.said_in("zh"), set()
    for table in pages.TABLES.values():
        table(lambda text: asked.add(text) or text)
    code = re.compile(r'"[^"]*"')
    for text in asked:
        untold = said(text) == text and re.search("[a-z]{2}", code.sub("", text))
        assert not untold, f"tools/zh.yaml lacks: {text}"
    beside = set(pages.words_beside("zh"))
    assert beside <= asked, f"no table says: {beside - asked}"
    with speaking("zh"):
        assert not beside & set(table_of_reports()), "reports have words for it"


def test_every_file_of_the_package_is_listed_with_a_line() -> None:
    lines = pages.files(pages.FILES["en"]).splitlines()
    for path in (ROOT / "src" / "finesight").rglob("*.py"):
        if path.name != "__init__.py":
            assert any(re.match(rf"\s+- `{path.name}`: \S", line) for line in lines), path


def test_every_area_is_in_the_readme_with_a_line() -> None:
    for path in (ROOT / "src" / "finesight").iterdir():
        if (path / "__init__.py").exists():
            assert re.search(rf"^  {path.name}/\s+\S", README, re.MULTILINE), path


def test_every_command_is_on_the_page() -> None:
    from finesight.cli.app import app, data

    registered = [*app.registered_commands, *data.registered_commands]
    names = {command.name or command.callback.__name__ for command in registered}
    assert {name.split()[-1] for name in pages.COMMANDS if name} == names


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_commands_named_in_the_readme_exist() -> None:
    named = set(re.findall(r"finesight (data \w+|[a-z]+)", "\n".join(_code(README))))
    assert named <= set(pages.COMMANDS), f"unknown: {named - set(pages.COMMANDS)}"


def _code(text: str) -> list[str]:
    """Lines of code blocks that are typed into a shell."""
    blocks = re.findall(r"```(?:sh)\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_recipes_named_on_the_pages_exist() -> None:
    pages_text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    named = set(re.findall(r"recipes/\w+\.yaml", pages_text + README))
    assert named, "the pages name no recipe"
    for name in named:
        assert (ROOT / name).exists(), name
