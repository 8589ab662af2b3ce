"""Tests of the OpenMP spin count: long only on idle cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finesight.cli import app as app_module
from finesight.cli.app import LONG_SPIN_COUNT, SHORT_SPIN_COUNT, configure_openmp_spin


@pytest.mark.parametrize(
    ("loadavg", "cores", "expected"),
    [
        ("1.90 1.20 0.80 1/345 6789\n", 2, LONG_SPIN_COUNT),
        ("0.00 0.00 0.00 2/345 6789\n", 2, SHORT_SPIN_COUNT),
        ("0.00 0.00 0.00 2/345 6789\n", 16, LONG_SPIN_COUNT),
        ("0.00 0.00 0.00 9/345 6789\n", 16, SHORT_SPIN_COUNT),
        ("", 2, SHORT_SPIN_COUNT),
        (None, 2, SHORT_SPIN_COUNT),
    ],
)
def test_spin_count_depends_on_current_load(
    loadavg: str | None,
    cores: int,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only currently running threads count, not the load average."""
    if loadavg is not None:
        (tmp_path / "loadavg").write_text(loadavg)
    monkeypatch.setattr(app_module, "LOADAVG_PATH", tmp_path / "loadavg")
    monkeypatch.setattr(app_module, "num_allowed_cpus", lambda: cores)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    configure_openmp_spin()
    assert os.environ["GOMP_SPINCOUNT"] == str(expected)


def test_user_spin_count_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    configure_openmp_spin()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


@pytest.mark.parametrize("count", ["2", "", "two"])
def test_multi_process_runs_use_short_spin_count(
    count: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher sets WORLD_SIZE; invalid values are reported later."""
    (tmp_path / "loadavg").write_text("0.00 0.00 0.00 1/345 6789\n")
    monkeypatch.setattr(app_module, "LOADAVG_PATH", tmp_path / "loadavg")
    monkeypatch.setenv("WORLD_SIZE", count)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    configure_openmp_spin()
    assert os.environ["GOMP_SPINCOUNT"] == str(SHORT_SPIN_COUNT)
