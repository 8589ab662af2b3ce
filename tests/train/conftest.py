"""The tiny task for the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import Task


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(tmp_path)
