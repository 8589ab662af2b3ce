"""Tests of the test tiers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiers import END_TO_END, SLOW, is_slow
from typer.core import TyperGroup
from typer.main import get_command

from finesight.cli.app import app

TESTS = Path(__file__).parent


def _iter_commands(group: TyperGroup, prefix: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from _iter_commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}"


def test_each_command_has_an_end_to_end_test_in_the_default_tier() -> None:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    assert set(_iter_commands(group)) == set(END_TO_END)
    assert not any(is_slow(f"{test}[a]") for test in END_TO_END.values())


@pytest.mark.parametrize("test", [*SLOW, *END_TO_END.values()])
def test_listed_tests_exist(test: str) -> None:
    path, _, name = test.partition("::")
    assert (TESTS / path).is_dir() if test.endswith("/") else (TESTS / path).is_file()
    if name:
        nodes = ast.walk(ast.parse((TESTS / path).read_text("utf-8")))
        assert name in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_tests_in_a_browser_are_slow() -> None:
    assert is_slow("report/test_a.py::test_page", ["tmp_path", "browser"])
    assert not is_slow("report/test_a.py::test_page", ["tmp_path"])
