"""Run the slow tests, and run failed ones of no guarantee once more, alone.

    python tools/run_slow_tests.py PYTEST_OPTIONS

Slow tests wait for browsers, servers and other processes, on machines whose speed varies by a
factor of two. A failed test that passes alone is printed as flaky, and the exit code is 0. Tests of
a guarantee, which `tests/cases/guarantee_tests.yaml` lists, are not run again: faults, invariants,
parity and access.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
GUARANTEES_FILE = ROOT / "tests" / "cases" / "guarantee_tests.yaml"

EXIT_TESTS_FAILED = 1
"""Exit code of pytest if it has collected and run all tests, and some of them failed."""

MAX_FLAKY_TESTS = 5
"""Maximum number of failed tests that are run again; more have a common cause."""


def run_tests(options: Sequence[str], guarantees: Sequence[str], folder: Path = ROOT) -> int:
    """Run pytest in a folder, and return its exit code, or 0 if all failed tests are flaky.

    Args:
        options: Options of pytest.
        guarantees: Prefixes of the IDs of tests that are not run again.
    """
    with tempfile.TemporaryDirectory() as cache:
        exit_code = _run_pytest([*options, "-o", f"cache_dir={cache}"], folder)
        if exit_code != EXIT_TESTS_FAILED:
            return exit_code
        failed = _read_failed_tests(Path(cache))
    for test in failed:
        if test.startswith(tuple(guarantees)):
            print(f"not run again, because it tests a guarantee: {test}", flush=True)
            return exit_code
    if not 0 < len(failed) <= MAX_FLAKY_TESTS:
        return exit_code
    print(f"running {len(failed)} failed tests again, alone", flush=True)
    # Without the options: one process, and no marker deselects the tests.
    repeated_code = _run_pytest(["-m", "", *failed], folder)
    if repeated_code == 0:
        for test in failed:
            print(f"flaky: {test}", flush=True)
    return repeated_code


def _run_pytest(options: Sequence[str], folder: Path) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", *options], cwd=folder).returncode


def _read_failed_tests(cache: Path) -> list[str]:
    """Return the IDs of the tests that failed in the last run."""
    file = cache / "v" / "cache" / "lastfailed"
    if not file.is_file():
        return []
    return sorted(json.loads(file.read_text(encoding="utf-8")))


def main() -> int:
    """Run the slow tests with the options of the command line."""
    guarantees = yaml.safe_load(GUARANTEES_FILE.read_text(encoding="utf-8"))
    return run_tests(sys.argv[1:], [f"tests/{name}" for name in guarantees])


if __name__ == "__main__":
    sys.exit(main())
