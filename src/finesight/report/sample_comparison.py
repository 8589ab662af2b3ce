"""Compare the answers of several runs to the same validation samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finesight.report.compared_runs import ComparedRun, find_common_samples
from finesight.report.example_data import ExampleDataBuilder, JsonData
from finesight.report.examples import (
    MAX_SCORES,
    MIN_SCORE_CHANGE,
    read_scores,
    select_sample_metric,
)
from finesight.report.mathml import FormulaConverter
from finesight.report.run_reader import JsonObject

AgreementKind = Literal["differ", "wrong", "right"]
AGREEMENT_KINDS: tuple[AgreementKind, ...] = ("differ", "wrong", "right")
"""Classes of compared samples by score, in the order in which samples are selected.

- `differ`: the runs have different scores.
- `wrong`: all scores are equal and below the maximum.
- `right`: all scores are the maximum.
"""

MAX_SAMPLES = 600
"""Maximum number of samples on a comparison page.

With eight runs, their answers take a few megabytes.
"""


@dataclass(frozen=True)
class ComparedSample:
    """Validation sample with the predictions of all runs.

    Attributes:
        lines: Prediction of each run. None if missing.
        scores: Compared score of each prediction. None if unknown.
        kind: Class by score, see `AGREEMENT_KINDS`.
        score_range: Difference between the highest and the lowest score.
    """

    lines: list[JsonObject | None]
    scores: list[float | None]
    kind: AgreementKind
    score_range: float

    @property
    def question_line(self) -> JsonObject:
        """Any prediction of the sample, since all contain the same question."""
        return next(line for line in self.lines if line is not None)


@dataclass(frozen=True)
class ComparedSamples:
    """Validation samples of a comparison page.

    Attributes:
        displayed: Samples on the page, largest differences first.
        counts: Number of samples by class, including those that are not displayed.
        metric: Name of the compared per-sample score.
        max_score: Maximum of this score.
    """

    displayed: list[ComparedSample]
    counts: dict[AgreementKind, int]
    metric: str
    max_score: float

    @property
    def total(self) -> int:
        """Number of samples, including those that are not displayed."""
        return sum(self.counts.values())


def compare_samples(runs: Sequence[ComparedRun], max_samples: int = MAX_SAMPLES) -> ComparedSamples:
    """Compare the validation samples that the baseline and another run answered.

    Args:
        runs: Compared runs, the baseline first.
        max_samples: Maximum number of displayed samples.
    """
    reference_run = runs[0]
    common_keys = [
        set(reference_run.predictions),
        *(set(find_common_samples(reference_run, other_run)[0]) for other_run in runs[1:]),
    ]
    sample_keys = [
        key
        for key in reference_run.predictions
        if any(key in run_keys for run_keys in common_keys[1:])
    ]
    lines_by_sample = [
        [
            run.predictions[key].record if key in run_keys else None
            for run, run_keys in zip(runs, common_keys, strict=True)
        ]
        for key in sample_keys
    ]
    primary_metric = reference_run.evaluation.get("primary_metric")
    metric = select_sample_metric(
        primary_metric if isinstance(primary_metric, str) else None,
        [line for lines in lines_by_sample for line in lines if line is not None],
    )
    max_score = MAX_SCORES.get(metric, 1.0)
    samples = [_classify_sample(lines, metric, max_score) for lines in lines_by_sample]
    counts = Counter(sample.kind for sample in samples)
    return ComparedSamples(
        _select_samples(samples, max_samples),
        {kind: counts[kind] for kind in AGREEMENT_KINDS},
        metric,
        max_score,
    )


def _classify_sample(
    lines: list[JsonObject | None], metric: str, max_score: float
) -> ComparedSample:
    scores = [read_scores(line).get(metric) if line else None for line in lines]
    known_scores = [score for score in scores if score is not None]
    score_range = max(known_scores, default=0.0) - min(known_scores, default=0.0)
    kind: AgreementKind = (
        "right" if known_scores and min(known_scores) >= max_score - MIN_SCORE_CHANGE else "wrong"
    )
    return ComparedSample(
        lines, scores, "differ" if score_range > MIN_SCORE_CHANGE else kind, score_range
    )


def _select_samples(samples: Sequence[ComparedSample], max_samples: int) -> list[ComparedSample]:
    """Select at most `max_samples` samples, largest score differences first.

    Samples with different scores get half, the other classes a quarter each. Classes with more
    samples use the quotas of smaller ones.
    """
    groups = {
        kind: [sample for sample in samples if sample.kind == kind] for kind in AGREEMENT_KINDS
    }
    groups["differ"].sort(key=lambda sample: -sample.score_range)
    fixed_quotas = {
        "differ": max_samples // 2,
        "wrong": max_samples // 4,
        "right": max_samples // 4,
    }
    quotas = {kind: min(len(group), fixed_quotas[kind]) for kind, group in groups.items()}
    for kind, group in groups.items():
        quotas[kind] += min(len(group) - quotas[kind], max_samples - sum(quotas.values()))
    return [sample for kind, group in groups.items() for sample in group[: quotas[kind]]]


def build_sample_data(
    samples: ComparedSamples, folders: Sequence[Path], formula_converter: FormulaConverter | None
) -> JsonData:
    """Return page data with samples, and `images` to which the samples refer by index."""
    data_builder = ExampleDataBuilder(folders, formula_converter)
    thumbnails, image_indices = data_builder.build_thumbnails(
        sample.question_line for sample in samples.displayed
    )
    return {
        "images": thumbnails,
        "examples": [
            {
                **data_builder.build_question(sample.question_line, image_indices),
                "kind": sample.kind,
                "predictions": [data_builder.build_answer(line) for line in sample.lines],
                "scores": [None if score is None else round(score, 4) for score in sample.scores],
            }
            for sample in samples.displayed
        ],
    }
