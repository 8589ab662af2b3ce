"""Tests of the code measures: they detect violations. `make measures` measures the project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from each_value import each
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
    "colloquial words per 1,000 in docstrings": '"""What the picture says."""\n',
    "colloquial words per 1,000 in comments": "x = 1  # kept beside the picture\n",
    "colloquial words per 1,000 in string literals": "x = 'a picture'\n",
    "standard terms per 1,000 words of docstrings": '"""A thing."""\n' * 3,
    "share of identifiers with a colloquial word": "pictures = 1\n",
    "public class names defined twice": "\n".join(f"class A{n // 2}: ..." for n in range(142)),
    "share of poor docstring summaries": '"""What it is."""\n',
    "newcomer searches without a hit": GOOD,
    "misuses of glossary terms": "def f(tower: int) -> None: ...\n",
    "median lines of a function body": "def f() -> int:\n    return 1\n\n\n" * 3,
    "areas in a cycle of imports": "def f() -> None:\n    from finesight.b import x\n",
    "test lines per source line, least": GOOD * 3,
}
PAGE_OFFENCES = {
    "colloquial words per 1,000 in documentation": "Nobody keeps pictures.",
    "mean words of a sentence in documentation": "It is " + "very " * 28 + "long.",
    "share of sentences over 30 words": "It is " + "very " * 30 + "long.",
}
# These require the whole package.
OF_PACKAGE = {"newcomer searches without a hit", "unused glossary exceptions"}
TRAINER = """from typing import TYPE_CHECKING

from finesight.a import add

if TYPE_CHECKING:
    from finesight.b import A


def _short():
    from finesight.b import add
    return add


_short()
"""


def _project(folder: Path, text: str = GOOD, **others: str) -> Path:
    """Write a project with this module, and other files by path."""
    files = {"src/finesight/a.py": text, "tests/test_a.py": GOOD} | others
    files = {"src/finesight/b.py": '"""Uses a."""\n\nfrom finesight.a import add\n'} | files
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def _measure(project: Path) -> dict[str, Any]:
    return {one.name: one for one in HOUSE.measure_project(project)}


def _missed(project: Path) -> set[str]:
    return {name for name, measure in _measure(project).items() if not measure.is_met}


def test_clean_project_has_no_violations(tmp_path):
    assert _missed(_project(tmp_path)) == OF_PACKAGE


@each("name", sorted(OFFENCES))
def test_code_violation_is_detected(tmp_path, name):
    assert name in _missed(_project(tmp_path, OFFENCES[name]))


@each("name", sorted(PAGE_OFFENCES))
def test_page_violation_is_detected(tmp_path, name):
    assert name in _missed(_project(tmp_path, **{"README.md": PAGE_OFFENCES[name]}))


def test_violations_of_several_files_are_detected(tmp_path):
    twice = {f"src/finesight/{f}/m{n}.py": "" for f in ("one", "two") for n in range(55)}
    others = twice | {"src/finesight/utils.py": "", "tests/test_a.py": GOOD * 9}
    assert _missed(_project(tmp_path, **others)) >= {
        "module names used twice",
        "vague names of files and folders",
        "test lines per source line, most",
    }


def test_private_names_of_the_package_are_counted_in_tests(tmp_path):
    code = "_A = 1\n\n\nclass B:\n    def __init__(self) -> None:\n        self._c = self._d = 2\n"
    test = (
        "from finesight.a import _A, B\n\n\nclass Own:\n    def __init__(self) -> None:\n"
        "        self._d = B()._c\n\n\n"
        "def test_b(monkeypatch):\n"
        "    B()._c = 3\n"
        "    Own()._d = 3\n"
        "    monkeypatch.setattr('finesight.a._A', 2)\n"
        "    monkeypatch.setattr(B(), '_c', 2)\n"
    )
    project = _project(tmp_path, code, **{"tests/test_a.py": test})
    uses = _measure(project)["private names of the package used in tests"].violations
    lines = {int(where.split(" ")[0].rpartition(":")[2]) for where in uses}
    assert lines == {1, 6, 10, 12, 13}


GLOSSARY_MISUSES = {
    "src/finesight/a.py": "class WebPictures: ...",
    "src/finesight/b.py": "x = f'{1} pictures were found'",
    "src/finesight/check/a.py": "fault = 'grave'",
    "src/finesight/encode/a.py": "patch_bounds = (0, 4)",
    "src/finesight/infer/a.py": "def run(rows: int) -> None: ...",
    "src/finesight/model/lora/a.py": "update_TO = 1",
    "src/finesight/train/a.py": "self.place = 1",
    "tests/test_b.py": '"""Samples that are held\nout, two lines of text."""',
    "tests/infer/test_a.py": "# Neither of the two pages is free.",
    "docs/en/a.md": "The encoder learns, and 3 of 4 tokens are learned.",
    "docs/zh/a.md": "留出图像出现在训练数据中。",
    "docs/pictures/a.txt": "",
    "recipes/a.yaml": "# The card recomputes: train.recompute=true",
}
GLOSSARY_USES = {
    "src/finesight/a.py": "rows, page, seen, kept = [], 1, set(), ''\nseen.update(rows)",
    "src/finesight/check/a.py": "clipped_box = 'a box clipped to the first image'",
    "src/finesight/infer/a.py": "row_indices = ids_R[:1]  # one batch row, reader threads",
    "src/finesight/model/a.py": "recompute_h = True  # the mask is recomputed",
    "src/finesight/train/a.py": "learning_rate = 'the learning rate; dropped connections'",
    "tests/test_b.py": '"""Read the held-out split, together with the first box."""',
    "docs/en/a.md": "The backward pass recomputes activations. The model learns positions.",
}


@each(("name", "text"), GLOSSARY_MISUSES.items())
def test_glossary_misuse_is_detected(tmp_path, name, text):
    misuses = _measure(_project(tmp_path, **{name: text}))["misuses of glossary terms"].violations
    assert {violation.rpartition(": use")[0].split(":")[0] for violation in misuses} == {name}


def test_correct_use_is_no_misuse(tmp_path):
    project = _project(tmp_path, **GLOSSARY_USES)
    assert _measure(project)["misuses of glossary terms"].violations == ()


def test_glossary_page_lists_the_avoided_terms():
    table = yaml.safe_load((ROOT / "tools" / "glossary.yaml").read_text("utf-8"))["terms"]
    rows = [f"| {term['use']} | {', '.join(term['not'])} |" for term in table]
    for language in ("en", "zh"):
        page = (ROOT / "docs" / language / "glossary.md").read_text("utf-8")
        assert page.rstrip().split("\n")[-len(rows) :] == rows


def test_size_budgets(tmp_path):
    """The trainer imports itself and `a`; other imports are in a function or for types."""
    text = GOOD + "x = 1\n" * (60 - GOOD.count("\n"))
    others = {"src/finesight/train/trainer.py": TRAINER, "src/finesight/c.py": ""}
    measures = _measure(_project(tmp_path, text, **others))
    values = {
        "source files": 4,
        "files under 60 lines": 3,
        "private functions under 4 lines with one use": 1,
        "modules that the trainer imports": 2,
        "lines that the trainer imports": 60 + TRAINER.count("\n"),
    }
    assert {name: measures[name].value for name in values} == values


def test_each_package_has_a_budget(tmp_path):
    """Pages and tables count; modules of no listed package count together."""
    files = {f"src/finesight/{name}": "1\n" * 5 for name in ("cli/a.py", "web/a.html", "new/a.js")}
    hub = next(b for b in HOUSE.PACKAGE_BUDGETS if b.packages == ("hub",))
    files["src/finesight/hub/a.css"] = "1\n" * (hub.bound + 1)
    files["src/finesight/trainer_settings.yaml"] = "1\n" * 3
    measures = _measure(_project(tmp_path, "x = 1\n" * 4, **files))
    budgets = (*HOUSE.PACKAGE_BUDGETS, HOUSE.OTHER_MODULES)
    lines = {budget.packages[0]: measures[budget.name].value for budget in budgets}
    assert (lines["cli"], lines["doctor"]) == (10, 3)
    assert lines["other modules"] == 4 + 3 + 5
    assert [b.name for b in budgets if not measures[b.name].is_met] == ["lines of hub"]


def test_measures_are_printed_with_targets(tmp_path, monkeypatch, capsys):
    project = _project(tmp_path)
    monkeypatch.setattr(HOUSE, "ROOT", project)
    assert HOUSE.main() == 1
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line[:3] in ("ok ", "NOT")]
    assert lines == [str(one) for one in HOUSE.measure_project(project)]
    assert "(target 40)" in printed
