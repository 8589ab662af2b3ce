"""The house measures hold here, and are missed where they should be."""

from __future__ import annotations

from pathlib import Path

import pytest
from by_path import loaded

ROOT = Path(__file__).parents[1]


HOUSE = loaded("tools/house.py")
MEASURES = {one.name: one for one in HOUSE.measure(ROOT)}


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_measure_holds(name):
    one = MEASURES[name]
    assert one.holds, f"{one}\n" + "\n".join(one.against)


GOOD = '''"""A module."""


def add(a: int, b: int) -> int:
    """The sum."""
    if a < 0:
        raise ValueError(f"a is {a}, below zero")
    assert b < 9, f"b is {b}"
    return a + b
'''

OFFENCES = {
    "lines over 100 columns": GOOD + "x = 1  # " + "-" * 100 + "\n",
    "files over 900 lines": GOOD + "x = 1\n" * 900,
    "share of functions over 60 lines": GOOD + "def long() -> None:\n" + "    x = 1\n" * 60,
    "share of parameters annotated": "def f(a, b): pass\n",
    "share of public names with docstring": "class A:\n    def f(self) -> None: pass\n",
    "reflection a thousand lines": "def f(a: str) -> None:\n    getattr(a, 'b')\n",
    "reflection on settings": "def f(recipe: str) -> None:\n    getattr(recipe.train, 'b')\n",
    "writes on imported names": "import os\nos.environ['A'] = 'b'\n",
    "share of raised messages that show a value": "raise ValueError('bad', where='here')\n",
    "share of asserts without a message": "assert 1\n",
    "areas in a cycle of imports": "def f() -> None:\n    from finesight.b import x\n",
    "test lines to source lines": GOOD * 3,
}


def _project(folder: Path, text: str, name: str = "a") -> Path:
    package = folder / "src" / "finesight"
    package.mkdir(parents=True)
    (package / f"{name}.py").write_text(text, encoding="utf-8")
    (package / "b.py").write_text('"""Uses a."""\n\nfrom finesight.a import add\n')
    (folder / "tests").mkdir()
    (folder / "tests" / "test_a.py").write_text(GOOD)
    return folder


def _missed(project: Path) -> set[str]:
    return {one.name for one in HOUSE.measure(project) if not one.holds}


def test_good_code_misses_nothing(tmp_path):
    assert _missed(_project(tmp_path, GOOD)) == set()


@pytest.mark.parametrize("name", sorted(OFFENCES))
def test_offence_is_seen(tmp_path, name):
    assert name in _missed(_project(tmp_path, OFFENCES[name]))


def test_vague_names_are_seen(tmp_path):
    assert "vague names of files and folders" in _missed(_project(tmp_path, GOOD, "utils"))


def test_every_measure_has_an_offence():
    assert set(MEASURES) == {*OFFENCES, "vague names of files and folders"}


def test_figures_are_printed(capsys):
    HOUSE.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in MEASURES)
