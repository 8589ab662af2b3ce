"""Tests of the code measures: they detect violations. `make measures` measures the project."""

import ast
from collections import Counter
from pathlib import Path

import house
import pytest
import yaml
from case_files import CASES_FOLDER
from code_measures import MAX_COLUMNS, count_columns, find_circles
from source_modules import SourceModule
from statement_measures import compute_density, count_constructs, is_within

ROOT = Path(__file__).parents[1]


BAD = f"""
import os
from finesight.b import x


class WebPictures:
    def __init__(self, a, b):
        first, second = a, b
        getattr(a.recipe, 'b')
        os.environ['A'] = 'what the picture says' + "{"-" * 100}"  # kept beside it
        assert first
        raise ValueError('bad')

    def _hidden(self, a):
        pairs = [[b for b in c] for c in a]
        return [1 if a else 2 if second else 3, *["kto"] * is_old, *[4]]
"""


def test_violations_are_detected(tmp_path: Path) -> None:
    """The measures of this project show that nothing else is detected."""
    files = {"src/finesight/a.py": BAD, "tests/test_a.py": "from finesight.a import _hidden\n" * 50}
    files["src/finesight/b.py"] = "from finesight.a import add\n"
    for number in range(6):
        files[f"src/finesight/c{number}.py"] = "from finesight import d\n"
    for number in range(12):
        files[f"src/finesight/utils{number}/e.py"] = f"from finesight.e{number + 1} import a\n"
        files[f"src/finesight/e{number}.py"] = f"from finesight.e{(number + 1) % 12} import a\n"
    files["src/finesight/page.css"] = f"/* {'长' * 50} */"
    files["README.md"] = f"Nobody keeps {'very ' * 30} pictures."
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    found = {one.name for one in house.measure_project(tmp_path) if not one.is_met}
    expected = {
        "files with denser statements",
        "files in circles of imports",
        "lines of pages and YAML files over 100 columns",
        "reflection on settings",
        "writes on imported names",
        "private names of the package used in tests",
        "share of raised messages that show a value",
        "share of asserts without a message",
        "share of sentences over 30 words",
        "newcomer searches without a hit",
        "colloquial words per 1,000 in comments",
    }
    assert expected - found == set()


@pytest.mark.parametrize(
    ("code", "kind", "count"),
    [
        ("a, b = 1, 2", "tuple assignments", 1),
        ("a, b = b, a", "tuple assignments", 0),
        ("a, b = pair", "tuple assignments", 0),
        ("a = 1 if b else 2", "conditional expressions", 1),
        ("a = [b for b in c]\nd = {e: f for e, f in g}", "comprehensions", 2),
        ("a = 1 if b else 2 if c else 3", "tricks", 1),
        ("a = 's' * (b == 1)", "tricks", 1),
        ("a = [1] * is_b", "tricks", 1),
        ("a = 's' * 3", "tricks", 0),
        ("a = [*(1, 2), 3]", "tricks", 1),
        ("a = [*b, 3]", "tricks", 0),
        ('"""A docstring."""\na = 1', "statements", 1),
    ],
)
def test_constructs_of_statements_are_counted(code: str, kind: str, count: int) -> None:
    module = SourceModule(Path("a.py"), tuple(code.splitlines()), ast.parse(code))
    counts = count_constructs(module)
    assert counts[kind] == count
    assert compute_density(counts) >= 0


@pytest.mark.parametrize(
    ("constructs", "statements", "is_accepted"),
    [
        (20, 200, True),
        (20, 150, True),  # code without constructs was removed
        (30, 400, True),  # code of a lower density was added
        (21, 200, False),
        (21, 205, False),
    ],
)
def test_file_may_not_get_denser_by_added_code(
    constructs: int, statements: int, is_accepted: bool
) -> None:
    count = Counter({"comprehensions": constructs, "statements": statements})
    assert is_within(count, {"constructs": 20, "density": 100.0}) is is_accepted
    assert not is_within(count, None)


def test_circles_are_found() -> None:
    edges = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    found = [group for group in find_circles(edges) if len(group) > 1]
    assert sorted(map(sorted, found)) == [["a", "b", "c"], ["d", "e"]]


def test_lines_of_case_files_have_at_most_100_columns() -> None:
    long_lines = [
        f"{path.relative_to(CASES_FOLDER)}:{number}"
        for path in sorted(CASES_FOLDER.rglob("*.yaml"))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if count_columns(line) > MAX_COLUMNS
    ]
    assert long_lines == []


def test_glossary_page_lists_the_avoided_terms() -> None:
    table = yaml.safe_load((ROOT / "tools" / "glossary.yaml").read_text("utf-8"))["terms"]
    rows = [f"| {term['use']} | {', '.join(term['not'])} |" for term in table]
    for language in ("en", "zh"):
        page = (ROOT / "docs" / language / "glossary.md").read_text("utf-8")
        assert page.rstrip().split("\n")[-len(rows) :] == rows
