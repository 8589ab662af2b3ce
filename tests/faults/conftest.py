"""Fault injection tests. `--every-fault` tests every injection point."""

import pytest
from tiny_task import assets as assets
from tiny_task import task as task


@pytest.fixture
def every_point(request: pytest.FixtureRequest) -> bool:
    """Whether to try every point of a fault, which takes minutes, or a few of them."""
    return bool(request.config.getoption("--every-fault"))
