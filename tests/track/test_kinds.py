"""Packages of trackers that are missing are named before anything begins."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import pytest
from small_run import Task

from finesight.config import Tracker, TrackerKind
from finesight.errors import UserError
from finesight.track.kinds import EXTRAS, require_packages


@pytest.mark.parametrize("kind", get_args(TrackerKind))
def test_missing_package_says_what_to_install(
    kind: TrackerKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    install = rf"{kind} is not[\s\S]*pip install 'finesight\[{EXTRAS[kind]}\]'"
    with pytest.raises(UserError, match=install):
        require_packages([Tracker(kind=kind)])


def test_swanlab_s_own_page_has_a_package_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("swanlab", reason="swanlab is not installed (extra `track`)")
    monkeypatch.setitem(sys.modules, "swanboard", None)
    require_packages([Tracker(kind="swanlab", address="offline")])
    with pytest.raises(UserError, match=r"swanboard is not[\s\S]*'swanlab\[dashboard\]'"):
        require_packages([Tracker(kind="swanlab", address="local")])


def test_a_run_with_a_missing_package_does_not_begin(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        task.run(track=["wandb"])
    assert not (tmp_path / "run").exists()
