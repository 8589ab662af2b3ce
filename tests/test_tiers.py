"""Tests of the test tiers."""

from __future__ import annotations

import ast
import re

from each_value import each
from tiers import (
    DEFAULT_MARKERS,
    END_TO_END,
    LONGEST,
    SLOW,
    SLOW_FIXTURES,
    SLOW_MARKERS,
    TESTS,
    is_slow,
    may_contain_tests,
)

from finesight.operations import OPERATIONS


def test_each_command_has_an_end_to_end_test_in_the_default_tier() -> None:
    assert {name for group in OPERATIONS.values() for name in group} == set(END_TO_END)
    assert not any(is_slow(f"{test}[a]") for test in END_TO_END.values())


@each("test", [*SLOW, *LONGEST, *END_TO_END.values()])
def test_listed_tests_exist(test: str) -> None:
    path, _, name = test.partition("::")
    assert (TESTS / path).is_dir() if test.endswith("/") else (TESTS / path).is_file()
    if name:
        nodes = ast.walk(ast.parse((TESTS / path).read_text("utf-8")))
        assert name in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_files_with_tests_of_a_tier_are_collected() -> None:
    """Slow fixtures have to be provided by the file or by the conftest.py of its folder."""
    for path in TESTS.rglob("test_*.py"):
        file, text = path.relative_to(TESTS).as_posix(), path.read_text("utf-8")
        slow = {is_slow(f"{file}::{name}") for name in re.findall(r"def (test_\w+)", text)}
        if (
            any(f"{name}: " in text for name in SLOW_FIXTURES)
            or f"@pytest.mark.{SLOW_MARKERS}" in text
        ):
            slow.add(True)
        assert True not in slow or may_contain_tests(file, SLOW_MARKERS), file
        assert False not in slow or may_contain_tests(file, DEFAULT_MARKERS), file
