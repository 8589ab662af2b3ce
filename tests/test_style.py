"""Tests of the code measures: they detect violations. `make measures` measures the project."""

from pathlib import Path

import yaml
from module_loader import load_module

ROOT = Path(__file__).parents[1]
HOUSE = load_module("tools/house.py")

BAD = f"""
import os
from finesight.b import x


class WebPictures:
    def __init__(self, a, b):
        getattr(a.train, 'b')
        os.environ['A'] = 'what the picture says' + "{"-" * 100}"  # kept beside it
        raise ValueError('bad')
"""


def test_violations_are_detected(tmp_path: Path) -> None:
    """The measures of this project show that nothing else is detected."""
    files = {"src/finesight/a.py": BAD, "tests/test_a.py": ""}
    files["src/finesight/b.py"] = "from finesight.a import add\n"
    files["README.md"] = f"Nobody keeps {'very ' * 30} pictures."
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    found = {one.name for one in HOUSE.measure_project(tmp_path) if not one.is_met}
    assert len(found) >= 14, found


def test_glossary_page_lists_the_avoided_terms() -> None:
    table = yaml.safe_load((ROOT / "tools" / "glossary.yaml").read_text("utf-8"))["terms"]
    rows = [f"| {term['use']} | {', '.join(term['not'])} |" for term in table]
    for language in ("en", "zh"):
        page = (ROOT / "docs" / language / "glossary.md").read_text("utf-8")
        assert page.rstrip().split("\n")[-len(rows) :] == rows
