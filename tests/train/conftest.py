"""Fixtures for the tests of training."""

from pathlib import Path

import pytest
from huggingface_hub import constants
from tiny_task import TinyTask


@pytest.fixture
def task(tmp_path: Path) -> TinyTask:
    return TinyTask(tmp_path)


@pytest.fixture(autouse=True)
def assets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty vision cache folder for each test and its subprocesses."""
    folder = tmp_path_factory.mktemp("assets")
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(folder))
    monkeypatch.setenv("HF_ASSETS_CACHE", str(folder))
    return folder
