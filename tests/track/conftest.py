"""Shared run that is stopped, resumed and finished with all installed trackers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_task import TinyTask
from tracking_fixtures import TrackedRun, train_tracked_run


@pytest.fixture(scope="session")
def tracked_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackedRun]:
    yield from train_tracked_run(tmp_path_factory.mktemp("tracked"))


@pytest.fixture
def task(tmp_path: Path) -> TinyTask:
    return TinyTask(tmp_path)
