"""`finesight compare`: the table, the page, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compared_runs import run_with, signs

from finesight.cli.app import run


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    made = [("first", [0.5] * 8), ("other", [1.0] * 8)]
    return [str(run_with(tmp_path / n, signs(tmp_path, marks)).folder) for n, marks in made]


def test_a_table_and_a_page(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    for _ in range(2):
        assert run(["compare", *runs, "--out", str(out), "--language", "en"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "figure", "value", "difference", "95", "%", "interval"]
    assert lines[2].startswith("B other  similarity     1.0000     +0.4667  ")
    assert lines[2].endswith("  better")
    assert lines[-1] == f"page: {out}"
    assert "Comparison of 2 runs" in out.read_text()
    assert run(["compare", *runs, "--out", str(out), "--language", "zh"]) == 0
    assert "2 个训练的比较" in out.read_text()


def test_for_machines(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", *runs, "--out", str(tmp_path / "page.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["path"] for one in told["runs"]] == runs
    found = told["runs"][1]["figures"]["similarity"]
    assert (found["value"], found["verdict"]) == (1.0, "better")
    assert "verdict" not in told["runs"][0]["figures"]["similarity"]


def test_nothing_is_written_for_what_is_refused(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    for given in ([runs[0]], [runs[0], runs[0]], [runs[0], str(tmp_path)]):
        assert run(["compare", *given, "--out", str(out)]) == 2
        assert "remedy: " in capsys.readouterr().err
    assert not out.exists()
    out.write_text("precious")
    assert run(["compare", *runs, "--out", str(out)]) == 2
    assert out.read_text() == "precious"
