"""Tests of the code measures: they detect violations. `make measures` measures the project."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from module_loader import load_module

ROOT = Path(__file__).parents[1]


CODE_MEASURES = load_module("tools/house.py")

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


def _project(folder: Path, text: str, name: str = "a") -> Path:
    package = folder / "src" / "finesight"
    package.mkdir(parents=True)
    (package / f"{name}.py").write_text(text, encoding="utf-8")
    (package / "b.py").write_text('"""Uses a."""\n\nfrom finesight.a import add\n')
    (folder / "tests").mkdir()
    (folder / "tests" / "test_a.py").write_text(GOOD)
    return folder


PAGE_OFFENCES = {
    "colloquial words per 1,000 in documentation": "Nobody keeps pictures.",
    "mean words of a sentence in documentation": "It is " + "very " * 28 + "long.",
    "share of sentences over 30 words": "It is " + "very " * 30 + "long.",
}
# These require the whole package.
OF_PACKAGE = {"newcomer searches without a hit", "unused glossary exceptions"}


def _missed(project: Path) -> set[str]:
    return {one.name for one in CODE_MEASURES.measure_project(project) if not one.is_met}


def test_clean_project_has_no_violations(tmp_path):
    assert _missed(_project(tmp_path, GOOD)) == OF_PACKAGE


@pytest.mark.parametrize("name", sorted(OFFENCES))
def test_code_violation_is_detected(tmp_path, name):
    assert name in _missed(_project(tmp_path, OFFENCES[name]))


@pytest.mark.parametrize("name", sorted(PAGE_OFFENCES))
def test_page_violation_is_detected(tmp_path, name):
    project = _project(tmp_path, GOOD)
    assert name not in _missed(project)
    (project / "README.md").write_text(PAGE_OFFENCES[name])
    assert name in _missed(project)


def test_repeated_module_names_are_detected(tmp_path):
    project = _project(tmp_path, GOOD)
    for folder in ("one", "two"):
        (project / "src" / "finesight" / folder).mkdir()
        for number in range(55):
            (project / "src" / "finesight" / folder / f"m{number}.py").write_text("")
    assert "module names used twice" in _missed(project)


def test_too_many_test_lines_are_detected(tmp_path):
    project = _project(tmp_path, GOOD)
    (project / "tests" / "test_a.py").write_text(GOOD * 2)
    assert "test lines per source line, most" in _missed(project)


def test_private_names_of_the_package_are_counted_in_tests(tmp_path):
    code = "_A = 1\n\n\nclass B:\n    def __init__(self) -> None:\n        self._c = self._d = 2\n"
    project = _project(tmp_path, code)
    (project / "tests" / "test_a.py").write_text(
        "from finesight.a import _A, B\n\n\nclass Own:\n    def __init__(self) -> None:\n"
        "        self._d = B()._c\n\n\n"
        "def test_b(monkeypatch):\n"
        "    B()._c = 3\n"
        "    Own()._d = 3\n"
        "    monkeypatch.setattr('finesight.a._A', 2)\n"
        "    monkeypatch.setattr(B(), '_c', 2)\n"
    )
    measures = {one.name: one for one in CODE_MEASURES.measure_project(project)}
    uses = measures["private names of the package used in tests"]
    lines = {int(where.split(" ")[0].rpartition(":")[2]) for where in uses.violations}
    assert lines == {1, 6, 10, 12, 13}


def test_vague_names_are_detected(tmp_path):
    assert "vague names of files and folders" in _missed(_project(tmp_path, GOOD, "utils"))


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


def _misuses(project: Path) -> tuple[str, ...]:
    measures = {one.name: one for one in CODE_MEASURES.measure_project(project)}
    return measures["misuses of glossary terms"].violations


@pytest.mark.parametrize("name", GLOSSARY_MISUSES)
def test_glossary_misuse_is_detected(tmp_path, name):
    project = _project(tmp_path, GOOD)
    (project / name).parent.mkdir(parents=True, exist_ok=True)
    (project / name).write_text(GLOSSARY_MISUSES[name], encoding="utf-8")
    assert {name} == {
        violation.rpartition(": use")[0].split(":")[0] for violation in _misuses(project)
    }


@pytest.mark.parametrize("name", GLOSSARY_USES)
def test_correct_use_is_no_misuse(tmp_path, name):
    project = _project(tmp_path, GOOD)
    (project / name).parent.mkdir(parents=True, exist_ok=True)
    (project / name).write_text(GLOSSARY_USES[name], encoding="utf-8")
    assert _misuses(project) == ()


def test_glossary_page_lists_the_avoided_terms():
    table = yaml.safe_load((ROOT / "tools" / "glossary.yaml").read_text("utf-8"))["terms"]
    rows = [f"| {term['use']} | {', '.join(term['not'])} |" for term in table]
    for language in ("en", "zh"):
        page = (ROOT / "docs" / language / "glossary.md").read_text("utf-8")
        assert page.rstrip().split("\n")[-len(rows) :] == rows


BUDGETS = {
    "source files",
    "files under 60 lines",
    "private functions under 4 lines with one use",
    "modules that the trainer imports",
    "lines that the trainer imports",
}
TRAINER = """from typing import TYPE_CHECKING

from finesight.a import add

if TYPE_CHECKING:
    from finesight.b import A


def _short():
    from finesight.b import add
    return add


_short()
"""


def test_size_budgets(tmp_path):
    """The trainer imports itself and `a`; other imports are in a function or for types."""
    project = _project(tmp_path, GOOD + "x = 1\n" * (60 - GOOD.count("\n")))
    package = project / "src" / "finesight"
    (package / "train").mkdir()
    (package / "train" / "trainer.py").write_text(TRAINER)
    (package / "c.py").write_text("")
    measures = {one.name: one.value for one in CODE_MEASURES.measure_project(project)}
    lines = {m: len((package / f"{m}.py").read_text().splitlines()) for m in ("a", "b")}
    num_trainer_lines = TRAINER.count("\n")
    assert {name: measures[name] for name in BUDGETS} == {
        "source files": 4,
        "files under 60 lines": 3,
        "private functions under 4 lines with one use": 1,
        "modules that the trainer imports": 2,
        "lines that the trainer imports": lines["a"] + num_trainer_lines,
    }


def test_each_package_has_a_budget(tmp_path):
    """Pages and tables count; modules of no listed package count together."""
    project = _project(tmp_path, "x = 1\n" * 4)
    package = project / "src" / "finesight"
    for folder, name in (("web", "a.html"), ("cli", "a.py"), ("hub", "a.json"), ("new", "a.js")):
        (package / folder).mkdir()
        (package / folder / name).write_text("1\n" * 5)
    (package / "trainer_settings.yaml").write_text("1\n" * 3)
    budgets = (*CODE_MEASURES.PACKAGE_BUDGETS, CODE_MEASURES.OTHER_MODULES)
    measures = {one.name: one for one in CODE_MEASURES.measure_project(project)}
    lines = {b.packages[0]: measures[b.name].value for b in budgets}
    other_lines = 4 + len((package / "b.py").read_text().splitlines()) + 5
    assert {package: value for package, value in lines.items() if value} == {
        "cli": 10,
        "doctor": 3,
        "other modules": other_lines,
    }
    hub = next(b for b in budgets if b.packages == ("hub",))
    (package / "hub" / "a.css").write_text("1\n" * (hub.bound + 1))
    measures = {one.name: one for one in CODE_MEASURES.measure_project(project)}
    assert [b.name for b in budgets if not measures[b.name].is_met] == ["lines of hub"]


def test_every_measure_has_a_violation_case(tmp_path):
    others = {
        *("vague names of files and folders", "module names used twice"),
        *("glossary exceptions", "unused glossary exceptions"),
        *("test lines per source line, most", "private names of the package used in tests"),
        *BUDGETS,
        *(b.name for b in CODE_MEASURES.PACKAGE_BUDGETS),
        CODE_MEASURES.OTHER_MODULES.name,
    }
    measures = CODE_MEASURES.measure_project(_project(tmp_path, GOOD))
    assert {one.name for one in measures} == {*OFFENCES, *PAGE_OFFENCES, *others}


def test_measures_are_printed_with_targets(tmp_path, monkeypatch, capsys):
    project = _project(tmp_path, GOOD)
    monkeypatch.setattr(CODE_MEASURES, "ROOT", project)
    assert CODE_MEASURES.main() == 1
    printed = capsys.readouterr().out
    measures = CODE_MEASURES.measure_project(project)
    assert [line for line in printed.splitlines() if line[:3] in ("ok ", "NOT")] == [
        str(one) for one in measures
    ]
    assert "(target 40)" in printed
