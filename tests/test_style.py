"""Tests of the code measures: they detect violations. `make measures` measures the project."""

from __future__ import annotations

from pathlib import Path

import yaml
from module_loader import load_module

ROOT = Path(__file__).parents[1]
HOUSE = load_module("tools/house.py")

GOOD = '''"""Batch sizes."""


def add(a: int, b: int) -> int:
    """Add two batch sizes."""
    if a < 0:
        raise ValueError(f"a is {a}, below zero")
    assert b < 9, f"b is {b}"
    total = a
    total += b
    return total
'''
BAD = f"""{GOOD}
import os
from finesight.b import x


class WebPictures:
    def __init__(self, a, b):
        getattr(a.train, 'b')
        os.environ['A'] = 'what the picture says' + "{"-" * 100}"  # kept beside it
        raise ValueError('bad')
"""


def find_missed_measures(folder: Path, text: str, page: str) -> set[str]:
    files = {"src/finesight/a.py": text, "tests/test_a.py": GOOD, "README.md": page}
    files["src/finesight/b.py"] = '"""Uses a."""\n\nfrom finesight.a import add\n'
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return {one.name for one in HOUSE.measure_project(folder) if not one.is_met}


def test_violations_are_detected(tmp_path: Path) -> None:
    # These require the whole package.
    clean = {"newcomer searches without a hit", "unused glossary exceptions"}
    assert find_missed_measures(tmp_path / "good", GOOD, "The encoder has few layers.") == clean
    found = find_missed_measures(tmp_path / "bad", BAD, f"Nobody keeps {'very ' * 30} pictures.")
    assert len(found - clean) >= 12, found


def test_glossary_page_lists_the_avoided_terms() -> None:
    table = yaml.safe_load((ROOT / "tools" / "glossary.yaml").read_text("utf-8"))["terms"]
    rows = [f"| {term['use']} | {', '.join(term['not'])} |" for term in table]
    for language in ("en", "zh"):
        page = (ROOT / "docs" / language / "glossary.md").read_text("utf-8")
        assert page.rstrip().split("\n")[-len(rows) :] == rows
