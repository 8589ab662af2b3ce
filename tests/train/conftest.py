"""Fixtures for the tests of training."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tiny_task import TinyTask


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests without a GPU."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


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
