"""Metrics of a run before and after training, with differences and verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from finesight.evaluate.eval_case import group_notes
from finesight.evaluate.metric_difference import (
    REASON_UNSAMPLED,
    MetricDifference,
    build_unsampled_difference,
)
from finesight.evaluate.score_format import format_score, format_score_change
from finesight.evaluate.verdict import Verdict
from finesight.metric_components import PAIR_METRICS, VALIDATION_LOSS, Score, get_score
from finesight.report.i18n import translate
from finesight.report.run_reader import JsonObject, as_object, is_finite

IntervalBounds = tuple[float, float]


@dataclass(frozen=True)
class MetricCell:
    """Metric of an evaluation or a run, with its difference from the first one.

    Attributes:
        value: Value of the metric. None if unknown.
        interval: 95 % confidence interval of the value. None if unknown.
        difference: Difference from the first value. None for the first, or if not comparable.
        num_common: Number of samples of the difference if a run answered others, too; else 0.
        num_samples: Number of samples of the value. None if unknown.
    """

    value: float | None
    interval: IntervalBounds | None
    difference: MetricDifference | None = None
    note: str = ""
    num_common: int = 0
    num_samples: int | None = None

    @property
    def change(self) -> float | None:
        """Value minus the first one, on common samples. None if unknown."""
        if self.difference is None:
            return None
        return self.difference.after - self.difference.before

    @property
    def change_interval(self) -> IntervalBounds | None:
        """95 % confidence interval of the difference. None if unknown."""
        if self.difference is None or self.difference.low is None or self.difference.high is None:
            return None
        return self.difference.low, self.difference.high

    @property
    def value_text(self) -> str:
        """Formatted value; empty if unknown."""
        if self.value is None:
            return ""
        return format_score(self.value, self.num_samples)

    @property
    def interval_text(self) -> str:
        """Formatted interval of the value; empty if unknown."""
        return format_interval(self.interval, self.num_samples)

    @property
    def change_text(self) -> str:
        """Formatted difference with its sign; empty if unknown."""
        if self.change is None:
            return ""
        return format_change(self.change, self.num_compared)

    @property
    def change_interval_text(self) -> str:
        """Formatted interval of the difference; empty if unknown."""
        if self.change_interval is None:
            return ""
        return format_change_interval(self.change_interval, self.num_compared)

    @property
    def common_texts(self) -> tuple[str, str]:
        """Formatted values of both on the common samples; empty without a difference."""
        if self.difference is None:
            return "", ""
        before = format_score(self.difference.before, self.num_compared)
        return before, format_score(self.difference.after, self.num_compared)

    @property
    def num_compared(self) -> int | None:
        """Number of samples of the difference. None if unknown."""
        return self.num_common or self.num_samples

    @property
    def verdict(self) -> Verdict:
        """Verdict on the difference, such as `better`. Empty without a confidence interval."""
        if self.difference is None or not self.change_interval:
            return ""
        return self.difference.verdict

    @property
    def verdict_text(self) -> str:
        """Translated verdict on the difference."""
        if not self.verdict:
            return ""
        return translate(self.verdict)

    @property
    def chip(self) -> str:
        """CSS class of the verdict. Empty without one."""
        if self.verdict == "no clear change":
            return "unsure"
        return self.verdict


@dataclass(frozen=True)
class MetricRow:
    """Row of a metric table: one metric of all evaluations or runs."""

    name: str
    is_primary: bool
    cells: list[MetricCell]


def iter_notes(rows: Sequence[MetricRow]) -> Iterator[tuple[str, str]]:
    """Yield (metric name, note) pairs of all metrics and their differences.

    A note explains a missing confidence interval or is a warning. Empty notes are included.
    """
    for row in rows:
        for cell in row.cells:
            yield row.name, cell.note
            if cell.difference is not None:
                yield row.name, cell.difference.note


def build_metric_rows(
    evaluations: Sequence[JsonObject], differences: Mapping[str, MetricDifference]
) -> list[MetricRow]:
    """Build the rows of a metric table from up to two evaluations.

    The primary metric is first, the validation loss last.

    Args:
        evaluations: Evaluation before and after training, or one of them.
        differences: Differences with confidence intervals by metric. A metric without an entry has
            no verdict.
    """
    if not evaluations:
        return []
    columns = [read_metrics(line) for line in evaluations]
    primary_metric = (evaluations[-1] or evaluations[0]).get("primary_metric")
    order = []
    if primary_metric:
        order.append(primary_metric)
    order += chain(*columns)
    order.append(VALIDATION_LOSS)
    metric_rows = []
    for name in sorted(dict.fromkeys(order), key=VALIDATION_LOSS.__eq__):
        cells = []
        for line, column in zip(evaluations, columns, strict=True):
            cell = MetricCell(
                column.get(name),
                read_interval(line, name),
                note=get_note(line, name),
                num_samples=count_samples(line, name),
            )
            cells.append(cell)
        before = cells[0].value
        after = cells[-1].value
        if len(cells) > 1 and before is not None and after is not None:
            note = REASON_UNSAMPLED if name == VALIDATION_LOSS else ""
            difference = build_unsampled_difference(name, before, after, note)
            if name in differences:
                difference = replace(differences[name], before=before, after=after)
            cells[-1] = replace(cells[-1], difference=difference)
        metric_rows.append(MetricRow(name, name == primary_metric, cells))
    return metric_rows


def count_samples(line: JsonObject, name: str) -> int | None:
    """Return the number of samples of a metric of an evaluation.

    It is None if it is unknown, and for the validation loss, which is a mean over tokens.
    """
    if name == VALIDATION_LOSS:
        return None
    if name in PAIR_METRICS and "num_loss_samples" in line:
        return read_sample_count(line, "num_loss_samples")
    return read_sample_count(line, "num_samples")


def read_sample_count(line: JsonObject, key: str) -> int | None:
    """Return a number of samples of an evaluation. None unless it is an integer above 0."""
    count = line.get(key)
    if isinstance(count, int) and count > 0:
        return count
    return None


def format_metric_name(metric: str) -> str:
    """Return the translated display name of a metric."""
    return translate(get_score(metric).title)


def describe_metric(metric: str) -> str:
    """Return the translated description of a metric, and whether lower or higher is better."""
    score = get_score(metric)
    direction = "lower is better" if score.lower_is_better else "higher is better"
    if not score.description:
        return translate(direction)
    return translate("{}; {}", translate(score.description), translate(direction))


def describe_scale(metric: str) -> str:
    """Return the display name and description of a metric, and the value of a perfect answer.

    The value is only that of a metric which states another one than the default.
    """
    text = translate("{}: {}", format_metric_name(metric), describe_metric(metric))
    maximum = get_score(metric).maximum
    if maximum == Score(title="").maximum:
        return translate("{}.", text)
    return translate("{}. The largest possible value is {:g}.", text, maximum)


def read_metrics(line: JsonObject) -> dict[str, float]:
    """Return all metrics of an evaluation that are finite, including the validation loss."""
    values = as_object(line.get("scores")) | {VALIDATION_LOSS: line.get(VALIDATION_LOSS)}
    loss_metrics = as_object(line.get("loss_metrics"))
    for name in PAIR_METRICS:
        values[name] = loss_metrics.get(name)
    return {str(name): float(value) for name, value in values.items() if is_finite(value)}


def read_interval(line: JsonObject, name: str) -> IntervalBounds | None:
    """Return the recorded 95 % confidence interval of a metric, or None."""
    return parse_interval(as_object(line.get("intervals")).get(name))


def get_note(line: JsonObject, name: str) -> str:
    """Return the note that an evaluation has recorded for a metric.

    A note explains a missing confidence interval or is a warning. It is empty for most metrics.
    """
    return str(as_object(line.get("notes")).get(name, ""))


def format_notes(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Format notes for display, each with all metrics to which it applies.

    Args:
        notes: Pairs of metric name and note. Empty notes are omitted.
    """
    texts = []
    for note, names in group_notes(notes).items():
        texts.append(translate("{}: {}", join_metric_names(names), translate(note)))
    return texts


def join_metric_names(names: Iterable[str]) -> str:
    """Join the translated display names of metrics with commas."""
    return translate(", ").join(map(format_metric_name, names))


def parse_interval(content: object) -> IntervalBounds | None:
    """Return the bounds of a recorded interval, or None if it is invalid."""
    if not isinstance(content, Sequence) or isinstance(content, str) or len(content) != 2:
        return None
    low, high = content
    if not is_finite(low) or not is_finite(high):
        return None
    return float(low), float(high)


def format_value(value: float, num_samples: int | None = None) -> str:
    """Format a metric value of a template with as many digits as its samples support."""
    return format_score(value, num_samples)


def format_change(value: float, num_samples: int | None = None) -> str:
    """Format the difference of a metric with its sign."""
    return format_score_change(value, num_samples).replace("-", "−")


def format_change_interval(interval: IntervalBounds, num_samples: int | None = None) -> str:
    """Format the confidence interval of a difference, with signs."""
    low, high = interval
    return translate("{} to {}", format_change(low, num_samples), format_change(high, num_samples))


def format_interval(interval: IntervalBounds | None, num_samples: int | None = None) -> str:
    """Format the confidence interval of a metric; empty if unknown."""
    if not interval:
        return ""
    low, high = interval
    return translate("{} to {}", format_score(low, num_samples), format_score(high, num_samples))
