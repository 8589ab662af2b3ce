"""Tests of `finesight compare`: table, page, invalid arguments."""

from pathlib import Path

import pytest
from run_dir_fixtures import make_run, make_sign_answers

PAGE = ("--out", "page.html", "--language", "en")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Make two runs in the working directory, with half of each answer correct, and all of it."""
    monkeypatch.chdir(tmp_path)
    for name, fraction in (("first", 0.5), ("other", 1.0)):
        make_run(Path(name), make_sign_answers(tmp_path, [fraction] * 8))
    return ["first", "other"]


def test_comparison_table_and_page(runs, cli):
    page = Path("page.html")
    cli("compare", *runs, *PAGE)
    lines = cli("compare", *runs, *PAGE).lines
    conclusion = lines.pop(0)
    assert conclusion.startswith(
        "B other compared with A first, on 8 validation samples: better in"
    )
    assert lines[0].split() == ["run", "metric", "value", "difference", "95", "%", "interval"]
    assert lines[2].startswith("B other  similarity       1.0000     +0.4667  ")
    assert lines[2].endswith("  better")
    assert lines[-1] == f"page: {page}"
    text = page.read_text()
    assert "Comparison of 2 runs" in text
    assert conclusion in text
    assert "Unknown for prediction files" not in text
    cli("compare", *runs, "--out", page, "--language", "zh")
    assert "2 个训练的比较" in page.read_text()
    result = cli("compare", *runs, *PAGE, "--json").json
    assert result["conclusions"] == [conclusion]
    first, other = result["runs"]
    assert [first["path"], other["path"]] == runs
    found = other["metrics"]["similarity"]
    assert (found["value"], found["verdict"]) == (1.0, "better")
    assert found["p_value"] < 0.05
    assert "verdict" not in first["metrics"]["similarity"]


def test_no_page_is_written_for_invalid_arguments(runs, cli):
    page = Path("page.html")
    for given in (["first"], ["first", "first"], ["first", "."]):
        assert "remedy: " in cli("compare", *given, *PAGE, code=2).err
    assert not page.exists()
    page.write_text("precious")
    cli("compare", *runs, *PAGE, code=2)
    assert page.read_text() == "precious"
