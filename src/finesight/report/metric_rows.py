"""Metrics of a run before and after training, with differences and verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from finesight.evaluate.custom_metric import parse_metric_path
from finesight.evaluate.eval_case import group_notes
from finesight.evaluate.metric_difference import (
    REASON_UNSAMPLED,
    MetricDifference,
    build_unsampled_difference,
    count_correct,
)
from finesight.evaluate.verdict import Verdict
from finesight.metric_components import PAIR_METRICS, VALIDATION_LOSS, get_score
from finesight.report.i18n import translate
from finesight.report.run_reader import OTHER_SAMPLES, JsonObject, as_object, is_finite

IntervalBounds = tuple[float, float]


@dataclass(frozen=True)
class MetricCell:
    """Metric of an evaluation or a run, with its difference from the first one.

    Attributes:
        value: Value of the metric. None if unknown.
        interval: 95 % confidence interval of the value. None if unknown.
        difference: Difference from the first value. None for the first, or if not comparable.
        num_common: Number of samples of the difference if a run answered others, too; else 0.
        correct: Translated number of correct answers; empty if unknown.
    """

    value: float | None
    interval: IntervalBounds | None
    difference: MetricDifference | None = None
    note: str = ""
    num_common: int = 0
    correct: str = ""

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
                correct=_format_correct(line, name),
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


def _format_correct(line: JsonObject, name: str) -> str:
    """Return the translated number of correct answers of an evaluation; empty if unknown."""
    score = read_metrics(line).get(name)
    num_samples = line.get("num_samples")
    # Custom scores of a sample may be other values than 0 and 1.
    is_custom = parse_metric_path(str(line.get("metric"))) is not None
    if score is None or not isinstance(num_samples, int) or is_custom:
        return ""
    count = count_correct(name, score, num_samples)
    if count is None:
        return ""
    return translate("{:,} of {:,} correct", count, num_samples)


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
        texts.append(translate("{}: {}", _join_metric_names(names), translate(note)))
    return texts


def _join_metric_names(names: Iterable[str]) -> str:
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


def describe_change(row: MetricRow) -> str:
    """Describe in a sentence the change of a metric and its confidence interval."""
    name = format_metric_name(row.name)
    cell = row.cells[-1]
    if all(one.value is None for one in row.cells):
        return translate("The {} could not be computed from these answers.", name)
    if any(one.note == OTHER_SAMPLES for one in row.cells):
        return translate("{}: {}", name, translate(OTHER_SAMPLES))
    if cell.change is None:
        return translate("The {} was evaluated once, so there is no comparison yet.", name)
    if cell.change == 0:
        return translate("The {} did not change.", name)
    text = "The {} increased by {}" if cell.change > 0 else "The {} decreased by {}"
    change_text = translate(text, name, format_value(abs(cell.change)))
    if cell.change_interval is None:
        return translate("{}. The confidence interval of the difference is unknown.", change_text)
    text = "{}: the 95 % interval of the difference is {}."
    return translate(text, change_text, format_change_interval(cell.change_interval))


CONCLUSIONS: dict[Verdict, str] = {
    "better": "better in {}",
    "worse": "worse in {}",
    "no clear change": "no clear difference in {}",
}
"""Part of a conclusion about the metrics with a verdict."""


def conclude(
    rows: Sequence[MetricRow], names: Sequence[str], num_samples: object, index: int = -1
) -> str:
    """Describe in a sentence which metrics differ from those of the first one.

    The first one is the first evaluation or run in `names`.

    Metrics whose difference has no interval, such as the validation loss, have no verdict.

    Args:
        names: Names of the evaluations or runs.
        num_samples: Number of samples of both. Empty without any.
    """
    if len(names) < 2 or not num_samples:
        return ""
    judged = [row for row in rows if row.cells[index].verdict]
    parts = []
    for verdict, text in CONCLUSIONS.items():
        shown = judged
        if verdict == "no clear change":
            shown = judged[:1]  # The first metric is the main one.
        found = [row.name for row in shown if row.cells[index].verdict == verdict]
        if found:
            parts.append(translate(text, _join_metric_names(found)))
    result = translate("; ").join(parts) or translate("no verdict without confidence intervals")
    text = "{} compared with {} on {:,} validation samples: {}."
    return translate(text, names[index], names[0], num_samples, result)


def format_value(value: float) -> str:
    """Format a metric value with one to four decimals, depending on its size."""
    digits = 1
    if abs(value) < 10:
        digits = 4
    elif abs(value) < 100:
        digits = 2
    return f"{value:,.{digits}f}"


def format_change(value: float) -> str:
    """Format the difference of a metric with its sign."""
    return _get_sign(value) + format_value(abs(value))


def format_change_interval(interval: IntervalBounds) -> str:
    """Format the confidence interval of a difference, with signs."""
    low, high = interval
    return translate(
        "{} to {}",
        _get_sign(low) + format_bound(abs(low)),
        _get_sign(high) + format_bound(abs(high)),
    )


def _get_sign(value: float) -> str:
    return "−" if value < 0 else "+"


def format_interval(interval: IntervalBounds | None) -> str:
    """Format the confidence interval of a metric; empty if unknown."""
    if not interval:
        return ""
    low, high = interval
    return translate("{} to {}", format_bound(low), format_bound(high))


def format_bound(value: float) -> str:
    """Format one bound of a confidence interval."""
    if abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:,.1f}"
