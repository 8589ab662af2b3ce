"""Measure the coverage of 95 % intervals by score, set size and population.

    python benchmarks/interval_coverage.py [--sets 500] [--only NAME ...] [--out FILE]
    python benchmarks/interval_coverage.py --table

Draws `--sets` sets of each size from each population, and computes the interval of every score by
two methods: `percentile` is the expanded percentile bootstrap of releases before the change, and
`now` is what `finesight eval` and `finesight compare` report. The population value is that of
100,000 samples; for proportions and for pairs without a difference it is exact. For average
precision it is precision times recall, which is its limit on large sets. Writes
results/interval_coverage.json: of every score, method and size the share of sets whose interval
contains the population value, the shares that lie wholly below and above it, the mean width, and
the share of sets without an interval. About an hour and a half on one core. `--table` prints the
coverage of FILE by family of scores, as `docs/en/metrics.md` reports it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.random import Generator

from finesight.evaluate.bleu import MAX_NGRAM_ORDER, estimate_bleu
from finesight.evaluate.bootstrap import (
    NON_NEGATIVE,
    UNBOUNDED,
    ConfidenceInterval,
    FloatArray,
    ResampleWeights,
    ScoreBounds,
    ScoreEstimator,
    compute_difference_intervals,
    compute_intervals,
    estimate_mean,
    safe_divide,
)
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.metrics.detection import score as detection
from finesight.evaluate.task_metrics import compute_metrics
from finesight.samples.sample import BoxPart

OUT = Path(__file__).parent / "results" / "interval_coverage.json"
SIZES = (5, 10, 20, 30, 100)
LARGE = 100_000
RESAMPLES = 1000

Method = Literal["percentile", "now"]
METHODS: tuple[Method, ...] = ("percentile", "now")

Resampled = Mapping[str, Callable[[ResampleWeights], FloatArray]]
"""Scores of resamples by name, (R, N) -> (R,), where they are not those of the estimators."""


@dataclass(frozen=True)
class Drawn:
    """A set of samples as the estimators of its scores."""

    estimators: Mapping[str, ScoreEstimator]
    resampled: Resampled = field(default_factory=dict)


@dataclass(frozen=True)
class Population:
    """Population of sample sets: one answer per sample, or a pair of answers before and after.

    `values` holds the population values that are known exactly.
    """

    name: str
    draw: Callable[[Generator, int], tuple[Drawn, ...]]
    values: Mapping[str, float] = field(default_factory=dict)
    sizes: tuple[int, ...] = SIZES


# Sets of samples.


def of_cases(metric: Any, cases: list[EvalCase]) -> Drawn:
    """A set as the task's measure scores it."""
    resampled: Resampled = {}
    if metric == "detection":
        ap = weighted_ap(detection.match_detections(cases))
        resampled = {name: ap[name] for name in ("ap", "ap_50", "ap_75")}
    estimators = compute_metrics(metric, cases).estimators
    return Drawn({n: e for n, e in estimators.items() if n != "ended_with_eos"}, resampled)


Rates = Callable[[Generator, FloatArray], FloatArray]
"""Error rates of texts of such lengths."""


def texts(chance: Generator, count: int, spread: float, rates: Rates) -> list[EvalCase]:
    """Transcriptions of lognormal length with so many wrong characters."""
    lengths = np.ceil(chance.lognormal(3, spread, count))
    wrong = chance.binomial(lengths.astype(int), np.clip(rates(chance, lengths), 0, 1))
    return [
        EvalCase("b" * edits + "a" * (length - edits), (), ("a" * length,), ())
        for edits, length in zip(wrong.tolist(), lengths.astype(int).tolist(), strict=True)
    ]


def transcribed(name: str, spread: float, rates: Rates) -> Population:
    return Population(name, lambda c, n: (of_cases("ocr", texts(c, n, spread, rates)),))


def unread(share: float) -> Rates:
    return lambda c, lengths: np.where(
        c.random(len(lengths)) < share, 1.0, c.beta(1, 19, len(lengths))
    )


Overlaps = Callable[[Generator, int], FloatArray]


def boxes(overlaps: FloatArray) -> list[EvalCase]:
    """Answers to grounding questions with such overlaps (IoU)."""
    truth = (BoxPart(xyxy=(0, 0, 1000, 1000)),)
    return [
        EvalCase("", (BoxPart(xyxy=(0, 0, 1000, 1000 * iou)),) if iou else (), ("",), truth)
        for iou in overlaps.tolist()
    ]


def grounded(name: str, overlaps: Overlaps) -> Population:
    return Population(name, lambda c, n: (of_cases("grounding", boxes(overlaps(c, n))),))


def mixed(share: float, usual: Overlaps, other: Overlaps) -> Overlaps:
    return lambda c, n: np.where(c.random(n) < share, usual(c, n), other(c, n))


def constant(value: float) -> Overlaps:
    return lambda _, n: np.full(n, value)


def beta(a: float, b: float) -> Overlaps:
    return lambda c, n: c.beta(a, b, n)


def proportions(share: float) -> Population:
    def draw(chance: Generator, count: int) -> tuple[Drawn, ...]:
        return (Drawn({"exact": estimate_mean((chance.random(count) < share).astype(float))}),)

    return Population(f"share {share}", draw, {"exact": share})


def classified(name: str, shares: Iterable[float], accuracies: Iterable[float]) -> Population:
    """Classes of such shares that are right so often; wrong answers name any class."""
    chances, right = np.array(list(shares)), np.array(list(accuracies))
    chances = chances / chances.sum()

    def draw(chance: Generator, count: int) -> tuple[Drawn, ...]:
        wanted = chance.choice(len(chances), count, p=chances)
        hit = chance.random(count) < right[wanted]
        output = np.where(hit, wanted, chance.integers(0, len(chances) + 1, count))
        pairs = zip(output.tolist(), wanted.tolist(), strict=True)
        cases = [EvalCase(f"c{s}", (), (f"c{w}",), ()) for s, w in pairs]
        return (of_cases("classification", cases),)

    return Population(name, draw)


def forms(name: str, rates: tuple[float, ...], present: tuple[float, ...]) -> Population:
    """Forms whose fields are there, and right, so often; hard forms have more wrong fields."""

    def draw(chance: Generator, count: int) -> tuple[Drawn, ...]:
        cases = []
        for ease in chance.beta(4, 1, count):
            there = [k for k in range(len(rates)) if chance.random() < present[k]] or [0]
            truth = {f"f{k}": 1 for k in there}
            output = {f"f{k}": int(chance.random() < rates[k] * ease) for k in there}
            cases.append(EvalCase(json.dumps(output), (), (json.dumps(truth),), ()))
        return (of_cases("json", cases),)

    return Population(name, draw)


def averaged(name: str, draw: Overlaps, bounds: ScoreBounds) -> Population:
    return Population(name, lambda c, n: (Drawn({"mean": estimate_mean(draw(c, n), bounds)}),))


def captioned(name: str, match: float) -> Population:
    """Captions as the counts that BLEU is computed from; difficult images match less."""

    def draw(chance: Generator, count: int) -> tuple[Drawn, ...]:
        lengths = chance.poisson(9, count) + 4
        closest = np.maximum(4, lengths + chance.integers(-3, 4, count))
        share, columns, offered = match * chance.beta(6, 2, count), [], []
        words = lengths
        for order in range(MAX_NGRAM_ORDER):
            offered.append(lengths - order)
            words = chance.binomial(np.minimum(words, offered[-1]), share)
            columns.append(words)
        rows = np.stack([*columns, *offered, lengths, closest], axis=1).astype(float)
        return (Drawn({f"bleu_{n}": estimate_bleu(rows, n) for n in (1, 4)}),)

    return Population(name, draw)


@dataclass(frozen=True)
class Kind:
    """Objects of one class: expected count, recall, false positives, overlaps."""

    wanted: float
    hit: float
    false: float
    overlap: tuple[float, float] = (8, 2)


def scene(chance: Generator, kinds: tuple[Kind, ...], gains: tuple[float, ...]) -> list[EvalCase]:
    """Image with the answers of models whose recall differs by `gains`; errors are correlated."""
    truth: list[BoxPart] = []
    found: list[list[BoxPart]] = [[] for _ in gains]
    column = 0
    for kind, one in enumerate(kinds):
        for _ in range(chance.poisson(one.wanted)):
            column += 1
            left = 200.0 * column
            truth.append(BoxPart(label=f"c{kind}", xyxy=(left, 0, left + 100, 100)))
            luck, iou = chance.random(), chance.beta(*one.overlap)
            for boxed, gain in zip(found, gains, strict=True):
                own = luck if chance.random() < 0.6 else chance.random()
                if own < one.hit + gain:
                    height = 100 * min(1.0, max(0.01, iou + chance.normal(0, 0.03)))
                    boxed.append(BoxPart(label=f"c{kind}", xyxy=(left, 0, left + 100, height)))
        for boxed in found:
            for _ in range(chance.poisson(one.false)):
                column += 1
                left = 200.0 * column
                boxed.append(BoxPart(label=f"c{kind}", xyxy=(left, 0, left + 100, 100)))
    for boxed in found:
        chance.shuffle(boxed)  # type: ignore[arg-type]
    return [EvalCase("", tuple(boxed), ("",), tuple(truth)) for boxed in found]


def detected(
    name: str, *kinds: Kind, gains: tuple[float, ...] = (0.0,), sizes: tuple[int, ...] = SIZES
) -> Population:
    def draw(chance: Generator, count: int) -> tuple[Drawn, ...]:
        scenes = [scene(chance, kinds, gains) for _ in range(count)]
        return tuple(of_cases("detection", list(cases)) for cases in zip(*scenes, strict=True))

    same = len(gains) > 1 and gains[0] == gains[1]
    names = ("ap", "ap_50", "ap_75", "f1_at_0.5", "mean_iou")
    return Population(name, draw, dict.fromkeys(names, 0.0) if same else {}, sizes)


def changed_shares(gained: float, lost: float) -> Population:
    """Pairs of which so many become right, and wrong; half of the others are right."""

    def draw(chance: Generator, count: int) -> tuple[Drawn, ...]:
        luck, other = chance.random(count), chance.random(count) < 0.5
        before = np.where(luck < gained, False, np.where(luck < gained + lost, True, other))
        after = np.where(luck < gained, True, np.where(luck < gained + lost, False, other))
        return tuple(Drawn({"exact": estimate_mean(one.astype(float))}) for one in (before, after))

    return Population(f"pairs: {gained} gained, {lost} lost", draw, {"exact": gained - lost})


def changed_texts(name: str, gain: float, same: float) -> Population:
    """Transcriptions of which some stay and the others have other errors, fewer by `gain`."""

    def draw(chance: Generator, count: int) -> tuple[Drawn, ...]:
        lengths = np.ceil(chance.lognormal(3, 1, count)).astype(int)
        before = chance.binomial(lengths, chance.beta(1, 9, count))
        other = chance.binomial(lengths, (1 - gain) * chance.beta(1, 9, count))
        after = np.where(chance.random(count) < same, before, other)
        return tuple(
            of_cases(
                "ocr",
                [
                    EvalCase("b" * e + "a" * (n - e), (), ("a" * n,), ())
                    for e, n in zip(edits.tolist(), lengths.tolist(), strict=True)
                ],
            )
            for edits in (before, after)
        )

    names = ("similarity", "cer", "exact")
    return Population(name, draw, dict.fromkeys(names, 0.0) if gain == 0 else {})


def changed_means(
    name: str, changes: Overlaps, bounds: ScoreBounds = UNBOUNDED, value: float | None = None
) -> Population:
    def draw(chance: Generator, count: int) -> tuple[Drawn, ...]:
        before = chance.normal(0, 1, count)
        after = before + changes(chance, count)
        return tuple(Drawn({"mean": estimate_mean(one, bounds)}) for one in (before, after))

    return Population(f"pairs: {name}", draw, {} if value is None else {"mean": value})


POPULATIONS = [
    *(proportions(share) for share in (0.005, 0.02, 0.05, 0.2, 0.5, 0.8, 0.95, 0.98, 0.995)),
    transcribed("texts, skewed lengths", 1, lambda c, n: c.beta(1, 9, len(n))),
    transcribed("texts, very skewed lengths", 1.5, lambda c, n: c.beta(1, 9, len(n))),
    transcribed(
        "texts, 70 % without an error",
        1,
        lambda c, n: np.where(c.random(len(n)) < 0.7, 0.0, c.beta(1, 4, len(n))),
    ),
    transcribed("texts, 5 % unread", 1, unread(0.05)),
    transcribed(
        "texts, longer ones worse", 1, lambda c, n: 0.02 + 0.003 * n * c.beta(2, 2, len(n))
    ),
    grounded("boxes, most good, 20 % missed", mixed(0.8, beta(8, 2), constant(0))),
    grounded("boxes, 95 % perfect", mixed(0.95, constant(1), beta(1, 1))),
    grounded("boxes, alike", beta(20, 3)),
    grounded("boxes, 2 % missed", mixed(0.98, beta(50, 1), constant(0))),
    classified("classes, 3 alike", [1, 1, 1], [0.9, 0.8, 0.7]),
    classified("classes, 3 nearly always right", [1, 1, 1], [0.98, 0.97, 0.99]),
    classified("classes, 9 to 1", [9, 1], [0.95, 0.5]),
    classified("classes, 10 uneven", 1 / np.arange(1, 11), np.linspace(0.9, 0.5, 10)),
    forms("forms, 5 fields", (0.99, 0.95, 0.9, 0.8, 0.7), (1, 1, 1, 0.8, 0.6)),
    averaged("like CIDEr-D", lambda c, n: np.minimum(10, c.gamma(0.7, 1.2, n)), NON_NEGATIVE),
    averaged(
        "like edit distances",
        lambda c, n: np.where(c.random(n) < 0.6, 0.0, c.geometric(0.1, n)),
        NON_NEGATIVE,
    ),
    averaged("normal, no bounds", lambda c, n: c.normal(3, 1, n), UNBOUNDED),
    captioned("captions, counts of BLEU", 0.8),
    detected("objects, 1 class", Kind(2, 0.7, 0.6, (6, 2))),
    detected("objects, 1 class, easy", Kind(2, 0.85, 0.3, (12, 2))),
    detected("objects, 1 class, hard", Kind(2, 0.4, 1.0, (4, 2))),
    detected("objects, 3 classes", Kind(1, 0.8, 0.3), Kind(0.7, 0.6, 0.4), Kind(0.4, 0.5, 0.2)),
    detected("objects, 10 to 1", Kind(2, 0.8, 0.3), Kind(0.2, 0.5, 0.1)),
    detected("objects, 10 classes", *[Kind(0.4, 0.7, 0.2)] * 10, sizes=(30, 100)),
    *(
        changed_shares(gained, lost)
        for gained, lost in ((0.02, 0.02), (0.1, 0.1), (0.1, 0.0), (0.3, 0.05), (0.9, 0.0))
    ),
    changed_texts("pairs: texts, no difference", 0.0, 0.5),
    changed_texts("pairs: texts, 30 % fewer errors", 0.3, 0.3),
    changed_means("small changes of all", lambda c, n: c.normal(0, 0.05, n), value=0.0),
    changed_means(
        "few large changes",
        lambda c, n: c.choice([-1.0, 0.0, 1.0], p=[0.02, 0.88, 0.1], size=n),
        value=0.08,
    ),
    changed_means("some gain much", mixed(0.8, lambda c, n: c.normal(0, 0.02, n), beta(2, 1))),
    detected("pairs: objects, no difference", Kind(1, 0.8, 0.3), Kind(0.7, 0.6, 0.4), gains=(0, 0)),
    detected("pairs: objects, a gain", Kind(1, 0.7, 0.3), Kind(0.7, 0.6, 0.4), gains=(0, 0.15)),
]

# Methods.


def percentile(
    resampled: Mapping[str, Callable[[ResampleWeights], FloatArray]], samples: int
) -> Any:
    """The earlier method: the expanded percentile interval (Hesterberg 2015)."""
    drawn = np.random.default_rng(0).integers(0, samples, (RESAMPLES, samples))
    locations = (drawn + samples * np.arange(RESAMPLES)[:, None]).ravel()
    counts = np.bincount(locations, minlength=RESAMPLES * samples).reshape(RESAMPLES, samples)
    tail = 0.0
    if samples > 1:
        tail = NormalDist().cdf(-math.sqrt(samples / (samples - 1)) * _student(samples - 1))
    found = {}
    for name, of in resampled.items():
        low, high = np.quantile(of(counts.astype(float)), [tail, 1 - tail])
        found[name] = ConfidenceInterval(float(low), float(high))
    return found


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (series of Fisher and Cornish)."""
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def weighted_ap(
    classes: list[detection.ClassDetections],
) -> dict[str, Callable[[ResampleWeights], FloatArray]]:
    """COCO's average precision of resamples, as the earlier method had it."""
    memory: dict[int, FloatArray] = {}

    def by_threshold(weights: ResampleWeights) -> FloatArray:
        if id(weights) not in memory:
            memory.clear()
            total = np.zeros((len(weights), len(detection.IOU_THRESHOLDS)))
            present = np.zeros(len(weights))
            for one in classes:
                wanted = weights @ one.num_references
                total += _class_ap(one, weights, wanted)
                present += wanted > 0
            memory[id(weights)] = safe_divide(total, np.broadcast_to(present[:, None], total.shape))
        return memory[id(weights)]

    return {
        "ap": lambda weights: by_threshold(weights).mean(axis=1),
        "ap_50": lambda weights: by_threshold(weights)[:, 0],
        "ap_75": lambda weights: by_threshold(weights)[:, 5],
    }


def _class_ap(
    one: detection.ClassDetections, weights: ResampleWeights, wanted: FloatArray
) -> FloatArray:
    drawn = weights[:, one.sample_indices]
    ranked = np.cumsum(drawn, axis=1)
    result = np.zeros((len(weights), len(detection.IOU_THRESHOLDS)))
    for t, right in enumerate(one.is_correct):
        locations = np.flatnonzero(right)
        if not len(locations):
            continue
        hits = np.cumsum(drawn[:, locations], axis=1)
        precision = hits / (ranked[:, locations] + np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = safe_divide(hits, np.broadcast_to(wanted[:, None], hits.shape))
        reached = np.searchsorted(detection.RECALL_LEVELS, recall, side="right") * (hits > 0)
        steps = np.diff(reached, axis=1, prepend=0)
        result[:, t] = (steps * best).sum(axis=1) / len(detection.RECALL_LEVELS)
    return result


def resampled_of(drawn: tuple[Drawn, ...]) -> Resampled:
    """Scores, or differences of scores, as functions of the weights."""

    def one_of(part: Drawn, name: str) -> Callable[[ResampleWeights], FloatArray]:
        one = part.estimators[name]
        return part.resampled.get(
            name, lambda weights: one.score_from_sums(one.weighted_sums(weights))
        )

    def of(name: str) -> Callable[[ResampleWeights], FloatArray]:
        several = [one_of(part, name) for part in drawn]
        if len(several) == 1:
            return several[0]
        return lambda weights: several[1](weights) - several[0](weights)

    return {name: of(name) for name in drawn[0].estimators}


def found_by(method: Method, drawn: tuple[Drawn, ...], samples: int) -> Mapping[str, Any]:
    """The intervals of a set by a method."""
    if method == "percentile":
        return percentile(resampled_of(drawn), samples)
    if len(drawn) == 1:
        return compute_intervals(drawn[0].estimators)
    return compute_difference_intervals(drawn[0].estimators, drawn[1].estimators)


# Coverage.


def population_values(population: Population, large: int = LARGE) -> dict[str, float]:
    """The population value of every score, or of its difference."""
    if population.values and set(population.values) == {"exact"}:
        return dict(population.values)
    drawn = population.draw(np.random.default_rng(99), large)
    values = {
        name: sum(
            sign * part.estimators[name].plug_in_score
            for sign, part in zip((1,) if len(drawn) == 1 else (-1, 1), drawn, strict=True)
        )
        for name in drawn[0].estimators
    }
    return values | dict(population.values)


def coverage(
    population: Population,
    samples: int,
    sets: int,
    values: Mapping[str, float],
    methods: Iterable[Method] = METHODS,
) -> list[dict[str, Any]]:
    """Rows of results: one for each score and method, of so many sets of so many samples."""
    chance = np.random.default_rng([7, samples])
    ends: dict[tuple[str, Method], list[ConfidenceInterval | None]] = {}
    scores: dict[str, list[float]] = {}
    for _ in range(sets):
        drawn = population.draw(chance, samples)
        for name in values:
            parts = [part.estimators[name].score for part in drawn]
            scores.setdefault(name, []).append(parts[-1] - (parts[0] if len(parts) > 1 else 0.0))
        for method in methods:
            found = found_by(method, drawn, samples)
            for name in values:
                ends.setdefault((name, method), []).append(found[name])
    rows = []
    for (name, method), several in ends.items():
        known = [one for one in several if one is not None]
        value = values[name]
        below = sum(one.high < value - 1e-9 for one in known)
        above = sum(one.low > value + 1e-9 for one in known)
        row: dict[str, Any] = {
            "population": population.name,
            "score": name,
            "samples": samples,
            "sets": sets,
            "value": round(value, 4),
            "mean_score": round(float(np.mean(scores[name])), 4),
            "method": method,
            "without": round(1 - len(known) / sets, 4),
        }
        if known:
            row |= {
                "covered": round(1 - (below + above) / len(known), 4),
                "below": round(below / len(known), 4),
                "above": round(above / len(known), 4),
                "width": round(float(np.mean([one.high - one.low for one in known])), 4),
            }
        rows.append(row)
    return rows


# Results.


@dataclass(frozen=True)
class Family:
    """Scores whose coverage is reported together; `populations` is a regular expression."""

    name: str
    populations: str
    scores: tuple[str, ...]

    def has(self, row: Mapping[str, Any]) -> bool:
        known = re.match(self.populations, row["population"]) and row["score"] in self.scores
        return bool(known) and (row["population"], row["score"]) not in UNUSUAL


UNUSUAL = {
    # Errors grow with the square of a skewed length: a few texts of the population decide.
    ("texts, longer ones worse", "cer"),
    # Sets in which the rare class is not rare, or does not occur.
    ("classes, 9 to 1", "f1_macro"),
    ("classes, 10 uneven", "f1_macro"),
}
"""Populations and scores for which no interval covers; `docs/en/metrics.md` names them."""

RATIOS = ("f1", "f1_at_0.5", "precision_at_0.5", "recall_at_0.5")
AVERAGE_PRECISION = ("ap", "ap_50", "ap_75")
FAMILIES = [
    Family("shares", "share", ("exact",)),
    Family("differences of shares", r"pairs: \d", ("exact",)),
    Family("means from 0 to 1", "boxes|texts|objects", ("mean_iou", "similarity")),
    Family("ratios of sums", "forms|objects", RATIOS),
    Family("error rates", "texts", ("cer",)),
    Family("BLEU", "captions", ("bleu_1", "bleu_4")),
    Family("scores without an upper bound", "like|normal", ("mean",)),
    Family("f1_macro", "classes|forms", ("f1_macro",)),
    Family("average precision", "objects", AVERAGE_PRECISION),
    Family(
        "other differences",
        "pairs: [a-z]",
        ("similarity", "cer", "mean", "mean_iou", *RATIOS, *AVERAGE_PRECISION),
    ),
]
REPORTED_SIZES = (10, 30, 100)


def coverage_cells(rows: Iterable[Mapping[str, Any]], family: Family, method: Method) -> list[str]:
    """Return the lowest and the highest coverage of a family at each reported size.

    Leaves out scores that have no interval in half of the sets or more.
    """
    known = [
        row for row in rows if family.has(row) and row["method"] == method and row["without"] < 0.5
    ]
    cells = []
    for samples in REPORTED_SIZES:
        found = [round(100 * row["covered"]) for row in known if row["samples"] == samples]
        ends = sorted({min(found), max(found)}) if found else []
        cells.append(f"{'-'.join(map(str, ends))} %" if ends else "none")
    return cells


def as_table(rows: list[dict[str, Any]]) -> str:
    """Return the coverage of every family by both methods as a Markdown table."""
    sizes = [f"{method}, n = {samples}" for method in METHODS for samples in REPORTED_SIZES]
    lines = [["scores", *sizes], ["---"] * (len(sizes) + 1)]
    for family in FAMILIES:
        cells = [cell for method in METHODS for cell in coverage_cells(rows, family, method)]
        lines.append([family.name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", type=int, default=500)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(as_table(json.loads(args.out.read_text(encoding="utf-8"))["rows"]))
        return
    start, rows = time.perf_counter(), []
    for population in POPULATIONS:
        if args.only and not any(part in population.name for part in args.only):
            continue
        values = population_values(population)
        for samples in population.sizes:
            rows += coverage(population, samples, args.sets, values)
            for row in rows[-2 * len(values) :]:
                print(json.dumps(row), flush=True)
    result = {
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "command": " ".join(["python benchmarks/interval_coverage.py", *sys.argv[1:]]),
        "seconds": round(time.perf_counter() - start),
    }
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps(result, indent=1)[:-2]
    args.out.write_text(f'{head},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
