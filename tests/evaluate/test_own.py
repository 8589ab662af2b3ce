from __future__ import annotations

from pathlib import Path

import pytest

from finesight.errors import UserError
from finesight.evaluate.answered import Case
from finesight.evaluate.own import COPY, found, load, split
from finesight.evaluate.score import check_truths, headline_of, score

CASES = [Case("abc", (), ("abd",), (), "s1"), Case("x", (), ("x", "y"), (), "s2")]


def _written(folder: Path, text: str) -> str:
    (folder / "mine.py").write_text(text)
    return f"{folder / 'mine.py'}:score"


def test_one_number_is_named_after_its_function(tmp_path):
    metric = _written(tmp_path, "def score(case): return case.answer in case.truths")
    scored = score(metric, CASES)
    assert scored.scores == {"score": 0.5, "stopped": 1.0}
    assert headline_of(metric, scored.scores) == "score"
    assert set(scored.intervals()) == {"score", "stopped"}


def test_several_numbers_and_the_one_that_stands_for_all(tmp_path):
    metric = _written(
        tmp_path,
        "HEADLINE = 'same'\n"
        "def score(case):\n"
        "    return {'length': len(case.answer), 'same': case.answer == case.truths[0]}\n",
    )
    scored = score(metric, CASES)
    assert list(scored.scores.items()) == [("same", 0.5), ("length", 2.0), ("stopped", 1.0)]
    assert headline_of(metric, scored.scores) == "same"
    assert scored.each[0] == {"same": 0.0, "length": 3.0}


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("def score(case):\n    return 1 / 0\n", "mine.py:2", "ZeroDivisionError.*'s1'"),
        ("def score(case) return 1\n", "mine.py:1", "SyntaxError"),
        ("import nothing_of_this_name\n", "mine.py:1", "ModuleNotFoundError"),
        ("import sys\nsys.exit(3)\n", "mine.py:2", "SystemExit: 3"),
        ("def other(case): return 1\n", "mine.py", "no function 'score'"),
        ("def score(case): return 'good'\n", "mine.py", "'good' for sample 's1'"),
        ("def score(case): return float('nan')\n", "mine.py", "nan for sample"),
        ("def score(case): return {}\n", "mine.py", "no figure"),
        ("def score(case): return {case.id: 1.0}\n", "mine.py", "s2 after s1"),
        ("HEADLINE = 'a'\ndef score(case): return {'b': 1}\n", "mine.py", "HEADLINE is 'a'"),
    ],
)
def test_what_goes_wrong_is_told_with_its_place(tmp_path, text, where, what):
    metric = _written(tmp_path, text)
    with pytest.raises(UserError, match=what) as caught:
        score(metric, CASES)
    assert caught.value.where == str(tmp_path / where)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "none.py", "score")


def test_a_faulty_function_is_found_before_anything_is_answered(tmp_path):
    metric = _written(tmp_path, "def score(case): return case.no_such_thing\n")
    with pytest.raises(UserError, match="AttributeError"):
        check_truths(metric, [(("a",), ())])
    metric = _written(tmp_path, "def score(case): return case.answer.split()[0] == 'a'\n")
    with pytest.raises(UserError, match=r"IndexError.*answer ''"):
        check_truths(metric, [(("a",), ())])
    metric = _written(tmp_path, "def score(case): return case.answer == case.truths[0]\n")
    check_truths(metric, [(("",), ())])


@pytest.mark.parametrize("name", ["cer", "stopped"])
def test_figures_of_which_less_is_better_or_that_all_have_are_refused(tmp_path, name):
    metric = _written(tmp_path, f"def score(case): return {{'right': 1, '{name}': 0.5}}\n")
    with pytest.raises(UserError, match=f"a figure named {name}"):
        check_truths(metric, [(("a",), ())])


def test_names_and_paths_are_told_apart():
    assert split("captions") is None
    assert split("a/b.py:f") == (Path("a/b.py"), "f")
    assert split("~/b.py:f") == (Path("~/b.py").expanduser(), "f")


def test_the_copy_of_a_run_serves_where_the_file_is_gone(tmp_path):
    metric = _written(tmp_path, "def score(case): return 1\n")
    run = tmp_path / "run"
    run.mkdir()
    assert found(metric, run) == metric
    (run / COPY).write_text("def score(case): return 0\n")
    assert found(metric, run) == metric
    assert found(metric, run, copy_first=True) == f"{run / COPY}:score"
    (tmp_path / "mine.py").unlink()
    assert found(metric, run) == f"{run / COPY}:score"
    assert found("ocr", run) == "ocr"
