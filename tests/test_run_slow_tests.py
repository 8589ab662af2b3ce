"""Repetition of failed slow tests: only of no guarantee, and only if they pass alone."""

from pathlib import Path

import pytest
from run_slow_tests import MAX_FLAKY_TESTS, run_tests

FLAKY = """
from pathlib import Path

def test_flaky():
    first = Path("ran")
    if not first.exists():
        first.touch()
        raise AssertionError("the first time")

def test_passing():
    counter = Path("passed")
    assert not counter.exists(), "it was run again"
    counter.touch()
"""


def run(folder: Path, **files: str) -> int:
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    return run_tests(["-q", "-p", "no:xdist"], ["test_guarantee.py"], folder)


def test_failed_test_that_passes_alone_is_flaky(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, page=FLAKY) == 0
    assert "flaky: test_page.py::test_flaky" in capfd.readouterr().out


def test_failed_test_of_a_guarantee_is_not_repeated(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, guarantee=FLAKY) == 1
    assert "tests a guarantee: test_guarantee.py::test_flaky" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("text", "exit_code"),
    [
        ("def test_broken():\n    assert False\n", 1),
        ("import nothing_of_this_name\n", 2),
        ("def test_passing():\n    pass\n", 0),
        ("".join(f"def test_{n}():\n    assert False\n" for n in range(MAX_FLAKY_TESTS + 1)), 1),
    ],
)
def test_other_results_stay(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, exit_code: int
) -> None:
    assert run(tmp_path, page=text) == exit_code
    assert "flaky" not in capfd.readouterr().out
