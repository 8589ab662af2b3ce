"""Fault tests: each says what it breaks and what survives. `--every-fault` tries every point."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants
from small_run import Task


@pytest.fixture
def every(request: pytest.FixtureRequest) -> bool:
    """Whether to try every point of a fault, which takes minutes, or a few of them."""
    return bool(request.config.getoption("--every-fault"))


@pytest.fixture(autouse=True)
def assets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runs keep features of pictures: empty for each test, also for processes it starts."""
    folder = tmp_path_factory.mktemp("assets")
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(folder))
    monkeypatch.setenv("HF_ASSETS_CACHE", str(folder))
    return folder


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(tmp_path)
