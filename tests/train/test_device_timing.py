"""Time that the device waits for data."""

from types import SimpleNamespace
from typing import Any

import pytest

from finesight.train.device_timing import compute_idle_seconds


def test_gpu_wait_starts_after_queued_work():
    """The GPU is busy all along, done on the way, idle from the start, or for another reason."""
    first: Any = SimpleNamespace(elapsed_time=lambda other: other.at - 1000.0)
    for blocked_s, arrived_ms, expected in (
        (0.5, 1000.01, 0.0),
        (0.5, 1200.0, 0.2),
        (0.5, 1500.1, 0.5),
        (0.001, 1050.0, 0.001),
    ):
        found = compute_idle_seconds(blocked_s, first, SimpleNamespace(at=arrived_ms))
        assert found == pytest.approx(expected, abs=1e-4)
