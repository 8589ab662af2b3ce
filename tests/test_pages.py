"""Pages that are made from the code are up to date: `python tools/pages.py` renews them."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import pages  # noqa: E402 (found by the line above)

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tree_in_the_readme_is_that_of_the_files():
    assert pages.with_tree(README) == README, "run: python tools/pages.py"


def test_every_file_of_the_package_is_in_the_tree_with_a_line():
    lines = pages.tree().splitlines()
    for path in (ROOT / "src" / "finesight").rglob("*.py"):
        if path.name != "__init__.py":
            assert any(re.match(rf"\s+{path.name}\s+\S", line) for line in lines), path


def test_page_of_commands_is_what_they_print():
    pinned = re.search(r"^typer==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None, "constraints.txt does not pin typer"
    if importlib.metadata.version("typer") != pinned[1]:
        pytest.skip(f"help looks as typer {pinned[1]} prints it")
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert pages.commands() == page, "run: python tools/pages.py"


def test_every_command_is_on_the_page():
    from finesight.cli.app import app, data

    registered = [*app.registered_commands, *data.registered_commands]
    names = {command.name or command.callback.__name__ for command in registered}
    assert {name.split()[-1] for name in pages.COMMANDS if name} == names


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_commands_named_in_the_readme_exist():
    named = set(re.findall(r"finesight (data \w+|[a-z]+)", "\n".join(_code(README))))
    assert named <= set(pages.COMMANDS), f"unknown: {named - set(pages.COMMANDS)}"


def _code(text: str) -> list[str]:
    """Lines of code blocks that are typed into a shell."""
    blocks = re.findall(r"```(?:sh)\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_recipes_named_on_the_pages_exist():
    pages_text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    named = set(re.findall(r"recipes/\w+\.yaml", pages_text + README))
    assert named, "the pages name no recipe"
    for name in named:
        assert (ROOT / name).exists(), name
