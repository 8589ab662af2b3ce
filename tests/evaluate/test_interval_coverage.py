"""How often intervals contain the population value: seeded simulations with statistical slack.

`benchmarks/interval_coverage.py` draws the sets; its results hold the population values.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from case_files import load_cases
from interval_coverage import (
    FAMILIES,
    POPULATIONS,
    UNUSUAL,
    Method,
    Population,
    coverage,
    coverage_cells,
)

CASES = load_cases("interval_coverage")

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "interval_coverage.json"
ROWS: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
BY_NAME = {one.name: one for one in POPULATIONS}


def known(population: Population) -> dict[str, float]:
    return {row["score"]: row["value"] for row in ROWS if row["population"] == population.name}


def least(sets: int, covered: float = 0.95) -> float:
    """A share below which not one in 10,000 simulations comes by chance."""
    return covered - 3.7 * math.sqrt(covered * (1 - covered) / sets)


def covered(name: str, samples: int, sets: int, score: str, method: Method) -> float:
    population = BY_NAME[name]
    values = {score: known(population)[score]}
    (row,) = coverage(population, samples, sets, values, [method])
    return float(row["covered"])


@pytest.mark.parametrize(
    ("name", "samples", "sets", "score"),
    CASES["test_intervals_cover_where_the_percentile_bootstrap_does_not"],
)
def test_intervals_cover_where_the_percentile_bootstrap_does_not(
    name: str, samples: int, sets: int, score: str
) -> None:
    assert covered(name, samples, sets, score, "percentile") < 0.88
    assert covered(name, samples, sets, score, "now") > least(sets)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", [one.name for one in POPULATIONS])
def test_intervals_cover_in_every_population(name: str) -> None:
    population = BY_NAME[name]
    sets = 200
    for row in coverage(population, 30, sets, known(population), ["now"]):
        given = round(sets * (1 - row["without"]))
        if given > 50 and (name, row["score"]) not in UNUSUAL:
            # Of 93 % on average: heavy tails cost one or two of 100.
            assert row["covered"] > least(given, 0.93), row


def test_the_results_on_record_hold_what_is_documented() -> None:
    assert {row["population"] for row in ROWS} == set(BY_NAME)
    now = [row for row in ROWS if row["method"] == "now" and row["without"] < 0.5]
    for row in now:
        if row["samples"] >= 30 and (row["population"], row["score"]) not in UNUSUAL:
            assert row["covered"] > 0.915, row
    small = [row for row in now if row["score"] == "exact" and row["samples"] <= 20]
    assert min(row["covered"] for row in small) > 0.93


@pytest.mark.parametrize(("language", "none"), [("en", "none"), ("zh", "无")])
def test_the_documented_coverage_is_that_of_the_results(language: str, none: str) -> None:
    page = (ROOT / "docs" / language / "confidence-intervals.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        cells = " | ".join(coverage_cells(ROWS, family, "now")).replace("none", none)
        assert f"| {cells} |" in page, family.name
