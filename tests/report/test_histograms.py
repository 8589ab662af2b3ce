"""Tests of half-octave histograms."""

from __future__ import annotations

import json
import math
import random

from finesight.manifest import count_half_octaves
from finesight.report.charts import build_histogram, parse_counts


def test_values_fall_into_half_octave_bins() -> None:
    chance = random.Random(0)
    values = [chance.randint(1, 100_000) for _ in range(2000)] + [1, 2, 4, 1024, 65536]
    for value in values:
        (name,) = count_half_octaves([value])
        number = int(name)
        # Exactly: the square of 2^(k/2) is 2^k.
        assert 2**number <= value**2 < 2 ** (number + 1), value
    assert sum(count_half_octaves(values).values()) == len(values)
    assert count_half_octaves([0, -1]) == {}


def test_counts_roundtrip_and_reject_invalid_data() -> None:
    counts = count_half_octaves([3, 3, 500])
    assert parse_counts(json.loads(json.dumps(counts))) == counts
    odd = {"3": 1, "x": 1, "-1": 1, "999": 1, "4": -1, "5": "many", "6": None}
    assert parse_counts(odd) == {"3": 1}
    assert parse_counts([1]) == {}


def test_fractions_of_runs_share_bins() -> None:
    drawing = build_histogram(
        "Tokens", "", [("A", {"10": 1, "12": 3}), ("B", {}), ("C", {"11": 5})]
    )
    data = drawing.data
    assert [one["name"] for one in data["series"]] == ["A", "C"]
    assert [value for _, value, _ in data["series"][0]["points"]] == [25.0, 0.0, 75.0]
    assert [value for _, value, _ in data["series"][1]["points"]] == [0.0, 100.0, 0.0]
    assert data["labels"] == ["32 to 45", "46 to 63", "64 to 90"]
    assert math.ceil(2 ** (11 / 2)) == 46
    assert "A mostly 64 to 90" in drawing.summary
    assert build_histogram("Tokens", "", [("A", {})]) is None
