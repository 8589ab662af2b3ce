"""Tests of metric rows and their descriptions."""

import pytest

from finesight.report.metric_rows import (
    format_interval,
    read_interval,
)


@pytest.mark.parametrize("ends", [None, "ab", [1], [1, 2, 3], [None, 1], [1, float("nan")], 7])
def test_invalid_interval_is_hidden(ends: object) -> None:
    assert read_interval({"intervals": {"similarity": ends}}, "similarity") is None
    assert read_interval({}, "similarity") is None
    assert format_interval(None) == ""
