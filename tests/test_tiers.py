"""Tests of the test tiers."""

import re

import pytest
import tiers

from finesight.operations import OPERATIONS


def test_each_command_has_an_end_to_end_test_in_the_default_tier() -> None:
    assert {name for group in OPERATIONS.values() for name in group} == set(tiers.END_TO_END)
    assert not any(tiers.is_slow(f"{test}[a]") for test in tiers.END_TO_END.values())


@pytest.mark.parametrize(
    "test", [*tiers.SLOW, *tiers.SATELLITE, *tiers.LONGEST, *tiers.END_TO_END.values()]
)
def test_listed_tests_exist(test: str) -> None:
    path, _, name = test.partition("[")[0].partition("::")
    assert (tiers.TESTS / path).is_dir() if test.endswith("/") else (tiers.TESTS / path).is_file()
    assert not name or f"\ndef {name}(" in (tiers.TESTS / path).read_text("utf-8")


def test_files_with_tests_of_a_tier_are_collected() -> None:
    """Slow fixtures have to be provided by the file or by the conftest.py of its folder."""
    for path in tiers.TESTS.rglob("test_*.py"):
        file, text = path.relative_to(tiers.TESTS).as_posix(), path.read_text("utf-8")
        slow = {tiers.is_slow(f"{file}::{name}") for name in re.findall(r"def (test_\w+)", text)}
        markers = (
            f"@pytest.mark.{tiers.SLOW_MARKERS}",
            *(f"{name}: " for name in tiers.SLOW_FIXTURES),
        )
        slow |= {True} if any(marker in text for marker in markers) else set()
        assert True not in slow or tiers.may_contain_tests(file, tiers.SLOW_MARKERS), file
        assert False not in slow or tiers.may_contain_tests(file, tiers.DEFAULT_MARKERS), file
