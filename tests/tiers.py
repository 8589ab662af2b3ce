"""Test tiers: the slow tests, and the end-to-end test of each command in the default tier.

`make test` runs the default tier, `make test-slow` the slow one. `make test-core` runs those tests
of the default tier that need the core alone, in a copy without the other packages. Tests marked
`fuzz` in their file belong to the third tier, `make test-fuzz`.
"""

from collections.abc import Collection
from pathlib import Path

from case_files import load_cases
from core_copy import MARKERS

TESTS = Path(__file__).parent

# Prefixes of test IDs below tests/: folders, files, or single tests of a file.
SLOW = tuple(load_cases("slow_tests"))
SLOW_FIXTURES = {"browser"}
# Prefixes of tests that need a package besides the core.
SATELLITE = tuple(load_cases("satellite_tests"))
# Single tests that take 20 seconds or more, most of them alone.
LONGEST = tuple(load_cases("longest_tests"))

DEFAULT_MARKERS = "not slow and not fuzz"
CORE_MARKERS = MARKERS
SLOW_MARKERS = "slow"
"""Values of the option -m in the Makefile."""

END_TO_END = load_cases("end_to_end_tests")


def is_slow(test_id: str, fixtures: Collection[str] = ()) -> bool:
    """Check if a test, such as `cli/test_merge.py::test_run[a]`, belongs to the slow tier."""
    if test_id.partition("[")[0] in END_TO_END.values():
        return False
    return test_id.startswith(SLOW) or not SLOW_FIXTURES.isdisjoint(fixtures)


def needs_satellite(test_id: str) -> bool:
    """Check if a test needs a package besides the core."""
    return test_id.startswith(SATELLITE)


def is_longest(test_id: str) -> bool:
    """Check if a test takes so long that it has to start first."""
    return test_id.startswith(LONGEST)


def may_contain_tests(file: str, markers: str) -> bool:
    """Check if a file below tests/ can contain tests of the tier that `make` selects."""
    if markers == CORE_MARKERS and needs_satellite(file):
        return False
    if markers in (DEFAULT_MARKERS, CORE_MARKERS):
        is_end_to_end = any(test.startswith(f"{file}::") for test in END_TO_END.values())
        return is_end_to_end or not file.startswith(SLOW)
    if markers != SLOW_MARKERS or any(file.startswith(one.partition("::")[0]) for one in SLOW):
        return True
    texts = [
        path.read_text("utf-8")
        for path in (TESTS / file, (TESTS / file).with_name("conftest.py"))
        if path.is_file()
    ]
    forms = [f"def {one}(" for one in SLOW_FIXTURES] + [f"import {o} as {o}" for o in SLOW_FIXTURES]
    return any(form in text for form in forms for text in texts)
