"""Threads spin long only where the cores are free."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finesight.cli import spinning
from finesight.cli.spinning import LONG, SHORT, set_spinning


@pytest.mark.parametrize(
    ("loadavg", "cores", "expected"),
    [
        ("1.90 1.20 0.80 1/345 6789\n", 2, LONG),
        ("0.00 0.00 0.00 2/345 6789\n", 2, SHORT),
        ("0.00 0.00 0.00 2/345 6789\n", 16, LONG),
        ("0.00 0.00 0.00 9/345 6789\n", 16, SHORT),
        ("", 2, SHORT),
        (None, 2, SHORT),
    ],
)
def test_what_runs_now_decides(
    loadavg: str | None,
    cores: int,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What has run a minute ago does not."""
    if loadavg is not None:
        (tmp_path / "loadavg").write_text(loadavg)
    monkeypatch.setattr(spinning, "RUNNING", tmp_path / "loadavg")
    monkeypatch.setattr(spinning, "allowed_cores", lambda: cores)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    set_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == str(expected)


def test_who_has_chosen_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    set_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


@pytest.mark.parametrize("count", ["2", "", "two"])
def test_processes_of_one_run_do_not_wait_for_long(
    count: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever starts them says how many there are; what is no number is told of later."""
    monkeypatch.setattr(spinning, "_running", lambda: 0)
    monkeypatch.setenv("WORLD_SIZE", count)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    set_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == str(SHORT)
