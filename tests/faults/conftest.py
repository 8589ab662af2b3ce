"""Fault injection tests. `--every-fault` tests every injection point."""

from pathlib import Path

import pytest
from huggingface_hub import constants
from tiny_task import TinyTask


@pytest.fixture
def every_point(request: pytest.FixtureRequest) -> bool:
    """Whether to try every point of a fault, which takes minutes, or a few of them."""
    return bool(request.config.getoption("--every-fault"))


@pytest.fixture(autouse=True)
def assets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty vision cache folder for each test and its subprocesses."""
    folder = tmp_path_factory.mktemp("assets")
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(folder))
    monkeypatch.setenv("HF_ASSETS_CACHE", str(folder))
    return folder


@pytest.fixture
def task(tmp_path: Path) -> TinyTask:
    return TinyTask(tmp_path)
