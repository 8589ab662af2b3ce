"""How many tokens samples have and how large pictures are: counted by a run, drawn by a page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from finesight.report.curves import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    ChartData,
    Drawing,
    Line,
    SeriesData,
    Tick,
    exact,
    round_ticks,
)
from finesight.report.language import say

Counts = Mapping[str, int]
"""How many values lie in each half octave, by its number: k holds 2^(k/2) and more, up to below
2^((k+1)/2). Text, as JSON has it."""


def half_octaves(values: Iterable[int]) -> dict[str, int]:
    """Positive values, counted."""
    found = Counter(math.floor(2 * math.log2(value) + 1e-9) for value in values if value > 0)
    return {str(number): found[number] for number in sorted(found)}


def read_counts(content: object) -> Counts:
    """Counts as a run has noted them; what is none is left out."""
    lines = content if isinstance(content, dict) else {}
    return {
        name: count
        for name, count in lines.items()
        if isinstance(name, str)
        and name.isdecimal()
        and int(name) < 120
        and isinstance(count, int)
        and count > 0
    }


def histogram(title: str, note: str, runs: Sequence[tuple[str, Counts]]) -> Drawing | None:
    """The share of values in each half octave, a stepped line for each run that has some."""
    known = [(name, counts) for name, counts in runs if counts]
    if not known:
        return None
    low = min(int(number) for _, counts in known for number in counts)
    high = max(int(number) for _, counts in known for number in counts)
    shares = [
        (name, [100 * counts.get(str(k), 0) / sum(counts.values()) for k in range(low, high + 1)])
        for name, counts in known
    ]
    up = round_ticks(0.0, max(max(values) for _, values in shares), 4, beyond=True)
    edges = [math.ceil(2 ** (k / 2) - 1e-9) for k in range(low, high + 2)]
    every = max(1, math.ceil(len(edges) / 7))
    scale = _Scale(len(edges) - 1, up[-1])
    return Drawing(
        title=title,
        note=note,
        summary=_summary(title, shares, edges),
        lines=tuple(Line(name, "line", scale.steps(values), (), ()) for name, values in shares),
        across=tuple(
            Tick(scale.x(k), f"{edge:,}") for k, edge in enumerate(edges) if k % every == 0
        ),
        up=tuple(Tick(scale.y(value), f"{value:g} %") for value in up),
        data=ChartData(
            x=[-0.5, len(edges) - 1.5],
            y=[0.0, up[-1]],
            series=[
                SeriesData(
                    name=name,
                    points=[(k, value, f"{exact(value)} %") for k, value in enumerate(values)],
                )
                for name, values in shares
            ],
            labels=[
                say("{:,} to {:,}", below, above - 1) if above - 1 > below else f"{below:,}"
                for below, above in pairwise(edges)
            ],
        ),
    )


class _Scale:
    def __init__(self, bins: int, most: float) -> None:
        self._bins, self._most = bins, most

    def x(self, edge: int) -> float:
        return round(LEFT + edge / self._bins * (WIDTH - LEFT - RIGHT), 1)

    def y(self, share: float) -> float:
        return round(HEIGHT - BOTTOM - share / self._most * (HEIGHT - TOP - BOTTOM), 1)

    def steps(self, shares: Sequence[float]) -> str:
        pieces = [f"M{self.x(0):g} {self.y(0):g}"]
        pieces += [f"V{self.y(value):g}H{self.x(k + 1):g}" for k, value in enumerate(shares)]
        return "".join([*pieces, f"V{self.y(0):g}"])


def _summary(title: str, shares: Sequence[tuple[str, Sequence[float]]], edges: list[int]) -> str:
    said = []
    for name, values in shares:
        k = max(range(len(values)), key=values.__getitem__)
        said.append(say("{} mostly {:,} to {:,}", name, edges[k], max(edges[k], edges[k + 1] - 1)))
    return say("{}: {}", title, say("; ").join(said))
