"""Tests that missing packages of trackers are reported before the run starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import pytest
from tiny_task import TinyTask

from finesight.config import TrackerKind, TrackerSettings
from finesight.errors import UserError
from finesight.track.backends import TRACKERS, require_packages


@pytest.mark.parametrize("kind", get_args(TrackerKind))
def test_missing_package_error_names_the_extra(
    kind: TrackerKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    install = rf"{kind} is not[\s\S]*pip install 'finesight\[{TRACKERS[kind].extra}\]'"
    with pytest.raises(UserError, match=install):
        require_packages([TrackerSettings(kind=kind)])


def test_swanlab_dashboard_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("swanlab", reason="swanlab is not installed (extra `track`)")
    monkeypatch.setitem(sys.modules, "swanboard", None)
    require_packages([TrackerSettings(kind="swanlab", uri="offline")])
    with pytest.raises(UserError, match=r"swanboard is not[\s\S]*'swanlab\[dashboard\]'"):
        require_packages([TrackerSettings(kind="swanlab", uri="local")])


def test_run_with_missing_package_does_not_start(
    task: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        task.run(track=["wandb"])
    assert not (tmp_path / "run").exists()
