"""Names that benchmarks import, and those of programs in their results."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_results_name_existing_benchmarks():
    """A reader repeats a measurement with the command in its file."""
    results = (ROOT / "benchmarks" / "results").glob("*.json*")
    named = {
        name for file in results for name in re.findall(r"benchmarks/\w+\.py", file.read_text())
    }
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_imported_names_of_the_package_exist():
    """Also those within functions, and in scripts for other processes."""
    statement = re.compile(r"from finesight(?:\.[\w.]+)? import (?:\([^)]*\)|.+)")
    for file in (ROOT / "benchmarks").glob("*.py"):
        for line in statement.findall(file.read_text()):
            exec(line, {})  # raises ImportError
