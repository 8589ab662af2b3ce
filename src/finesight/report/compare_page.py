"""HTML page of a comparison: metrics, settings and answers of several runs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finesight.check.check_issues import HistogramCounts, count_half_octaves
from finesight.evaluate.eval_case import note_lines
from finesight.evaluate.metric_difference import align_columns
from finesight.evaluate.task_metrics import VALIDATION_LOSS
from finesight.report import metric_rows, summary
from finesight.report.charts import (
    Chart,
    ChartSeries,
    build_chart,
    build_histograms,
    filter_finite,
    parse_counts,
    smooth_points,
)
from finesight.report.comparison import (
    MAX_SAMPLES,
    ComparedRun,
    compare_metrics,
    compare_samples,
    find_common_samples,
    list_warnings,
    read_compared_runs,
)
from finesight.report.examples import MAX_SCORES, ExampleDataBuilder, ExampleSet
from finesight.report.html import PageFile, render_page
from finesight.report.i18n import Language, detect_language, translate, use_language
from finesight.report.metric_rows import (
    MetricCell,
    MetricRow,
    conclude,
    format_metric_name,
    format_notes,
    iter_notes,
    read_metrics,
)
from finesight.report.run_page import render_run_page
from finesight.report.run_reader import (
    RunRecord,
    as_object,
    get_sample_set,
    list_comparable_evaluations,
    list_image_folders,
)
from finesight.worker_pool import JobOutput

IGNORED_SETTINGS = {"output_dir"}
"""Settings that are not compared because they always differ."""

DIGEST_CHARS = 12

MAX_JOB_BYTES = 1 << 24
"""Maximum number of bytes of each file of a run that a page of the studio reads."""

FACT_TITLES = {
    "data.train.num_samples": "training samples",
    "data.train.num_tokens": "training tokens",
    "data.train.fingerprint": "training data, SHA-256",
    "data.eval.num_samples": "validation samples",
    "data.eval.num_tokens": "validation tokens",
    "data.eval.fingerprint": "validation data, SHA-256",
    "base_fingerprint": "base model, SHA-256",
    "device": "device",
    "precision": "dtype",
    "world_size": "world size",
}
"""Row titles of recorded facts by their dotted names."""


def diff_configs(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """Return the settings, data statistics and versions that differ between runs.

    Prediction files have no recorded values.
    """
    rows = []
    for collect in (lambda record: _flatten_settings(record.recipe), _collect_run_facts):
        for name, values in _build_rows(runs, collect):
            recorded = {value for value, run in zip(values, runs, strict=True) if run.run_record}
            if len(recorded) > 1 and name not in IGNORED_SETTINGS:
                rows.append((name, values))
    return rows


def _build_rows(
    runs: Sequence[ComparedRun], collect: Callable[[RunRecord], dict[str, str]]
) -> list[tuple[str, list[str]]]:
    """Return one row per name that `collect` returns for any run."""
    values_by_run = [collect(run.run_record) if run.run_record else {} for run in runs]
    names = dict.fromkeys(name for run_values in values_by_run for name in run_values)
    return [(name, [run_values.get(name, "–") for run_values in values_by_run]) for name in names]


def _flatten_settings(content: object, prefix: str = "") -> dict[str, str]:
    """Convert nested settings to texts by dotted name.

    Lists and empty sections count as values.
    """
    if isinstance(content, dict) and content:
        flattened: dict[str, str] = {}
        for name, value in content.items():
            flattened |= _flatten_settings(value, f"{prefix}.{name}" if prefix else str(name))
        return flattened
    if isinstance(content, str):
        return {prefix: content}
    return {prefix: json.dumps(content, ensure_ascii=False, default=str)} if prefix else {}


def _collect_run_facts(run_record: RunRecord) -> dict[str, str]:
    start = summary.get_last_start(run_record)
    base_digest = run_record.manifest.get("base_fingerprint")
    recorded = _flatten_settings(start | {"base_fingerprint": base_digest})
    facts_by_title = {}
    for name, title in FACT_TITLES.items():
        value = recorded.get(name, "")
        if name.endswith("fingerprint"):
            value = value[:DIGEST_CHARS]
        if value:
            is_count = value.isdecimal() and name.startswith("data")
            facts_by_title[translate(title)] = f"{int(value):,}" if is_count else value
    for name, value in as_object(start.get("versions")).items():
        facts_by_title[translate("version of {}", name)] = str(value)
    return facts_by_title


def _collect_costs(run_record: RunRecord) -> dict[str, str]:
    phases = summary.compute_phases(run_record)
    total_s = sum(seconds for _, seconds in phases)
    num_devices = summary.get_last_start(run_record).get("world_size")
    num_devices = num_devices if isinstance(num_devices, int) else 1
    return {
        translate("total time"): summary.format_duration(total_s),
        translate("device hours"): f"{total_s * num_devices / 3600:,.3g}",
        **{name: summary.format_duration(seconds) for name, seconds in phases},
        **dict(summary.summarize_cost(run_record)),
    }


@dataclass(frozen=True)
class RunComparison:
    """Comparison of several runs. The first run is the baseline."""

    runs: list[ComparedRun]
    metric_rows: list[MetricRow]
    warnings: list[str]

    @property
    def conclusions(self) -> list[str]:
        """Comparison of each run with the baseline in a sentence, in the current language."""
        labels, (baseline, *others) = [run.label for run in self.runs], self.runs
        counts = [len(find_common_samples(baseline, other)[0]) for other in others]
        found = (conclude(self.metric_rows, labels, n, i) for i, n in enumerate(counts, 1))
        return [*filter(None, found)]

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as JSON data."""
        return {
            "runs": [
                {
                    "path": str(run.path),
                    "metric": run.metric,
                    "step": run.evaluation.get("step"),
                    "status": run.status.kind if run.status else None,
                    "metrics": {
                        row.name: _cell_to_dict(row.cells[run_index])
                        for row in self.metric_rows
                        if row.cells[run_index].value is not None
                    },
                }
                for run_index, run in enumerate(self.runs)
            ],
            "conclusions": self.conclusions,
            "warnings": self.warnings,
        }

    def format_table(self) -> str:
        """Format the conclusions, and primary metric and validation loss of each run as a table.

        Differences are relative to the baseline and have 95 % intervals. Prediction files do not
        record the primary metric: without a run, all metrics are listed. A metric that a prediction
        file cannot have, such as the validation loss, is omitted.
        """
        lines = [("run", "metric", "value", "difference", "95 % interval", "")]
        has_primary = any(row.is_primary for row in self.metric_rows)
        rows = [
            row
            for row in self.metric_rows
            if row.is_primary or row.name == VALIDATION_LOSS or not has_primary
        ]
        for row in rows:
            for run, cell in zip(self.runs, row.cells, strict=True):
                if cell.value is not None or run.run_record is not None:
                    lines.append((run.label, row.name, *_format_cell(cell)))
        notes = note_lines(iter_notes(rows))
        return "\n".join([*self.conclusions, align_columns(lines, 2), *notes])


def compare_runs(paths: Sequence[Path], max_bytes: int | None = None) -> RunComparison:
    """Compare runs and prediction files. The first one is the baseline.

    Args:
        max_bytes: Maximum number of bytes of each file of a run; see `read_run`.

    Raises:
        UserError: An input is invalid, as in `read_compared_runs`.
    """
    runs = read_compared_runs(paths, max_bytes)
    reference_run, *other_runs = runs
    warnings = [
        text for other_run in other_runs for text in list_warnings(reference_run, other_run)
    ]
    return RunComparison(runs, compare_metrics(runs), list(dict.fromkeys(warnings)))


def write_compare_page(
    paths: Sequence[Path], out: Path, language: Language | None = None
) -> RunComparison:
    """Compare runs and write the comparison as an HTML page.

    Args:
        paths: Run directories and prediction files. The first one is the baseline.

    Raises:
        UserError: An input is invalid, or the file cannot be written.
    """
    page = PageFile(out, "compare", paths)
    page.check()
    with use_language(language or detect_language()):
        comparison = compare_runs(paths)
        page.write(render_compare_page(comparison))
    return comparison


def render_report(
    state: Any, folders: Sequence[Path], max_examples: int, language: Language
) -> JobOutput:
    """Render the report of a run, or the comparison of several, as job of a worker process."""
    with use_language(language):
        if len(folders) == 1:
            page = render_run_page(folders[0], max_examples, max_bytes=MAX_JOB_BYTES)
            return JobOutput(page)
        return JobOutput(render_compare_page(compare_runs(folders, MAX_JOB_BYTES)))


def render_compare_page(comparison: RunComparison, max_samples: int = MAX_SAMPLES) -> str:
    """Render the comparison of runs as an HTML page in the current language."""
    runs = comparison.runs
    samples = compare_samples(runs, max_samples)
    records = [run.run_record for run in runs if run.run_record is not None]
    file_folders = [run.path.parent for run in runs if run.run_record is None]
    folders = [*list_image_folders(records), *file_folders]
    has_latex = any(run.metric == "latex" for run in runs)
    data_builder = ExampleDataBuilder(folders, has_latex)
    charts = [chart for chart in _build_charts(runs) if chart is not None]
    histograms = build_histograms(
        HISTOGRAM_TITLES, [(run.label, _count_sizes(run)) for run in runs]
    )
    labels = [run.label for run in runs]
    return render_page(
        "compare",
        data={
            **data_builder.build(samples.displayed),
            "charts": [chart.data for chart in (*charts, *histograms)],
            "runs": labels,
            "metric": format_metric_name(samples.metric),
        },
        assets=["charts", "results"],
        title=translate("Comparison of {} runs", len(runs)),
        runs=runs,
        labels=labels,
        get_model_name=summary.get_model_name,
        metric_rows=comparison.metric_rows,
        conclusions=comparison.conclusions,
        warnings=comparison.warnings,
        config_diff=diff_configs(runs),
        has_unknown_config=any(run.run_record is None for run in runs),
        costs=_build_rows(runs, _collect_costs),
        charts=charts,
        histograms=histograms,
        samples=samples,
        max_score=MAX_SCORES.get(samples.metric, 1.0),
        note=_describe_selection(samples),
        metric_name=format_metric_name(samples.metric) or translate("score"),
        notes=format_notes(iter_notes(comparison.metric_rows)),
        metrics=metric_rows,
    )


def _describe_selection(samples: ExampleSet) -> str:
    text = "{:,} validation samples, sorted by the difference in {} between the runs."
    note = translate(text, samples.total, format_metric_name(samples.metric))
    num_hidden = samples.total - len(samples.displayed)
    return note + (translate(" {:,} more are not on this page.", num_hidden) if num_hidden else "")


def _build_charts(runs: Sequence[ComparedRun]) -> list[Chart | None]:
    """Return charts of training loss, validation loss and primary metric, one line per run."""
    recorded = [(run, run.run_record) for run in runs if run.run_record is not None]
    training: list[ChartSeries] = []
    validation: list[ChartSeries] = []
    scores: list[ChartSeries] = []
    sample_sets: defaultdict[str, list[object]] = defaultdict(list)
    primary_metrics = {str(run.evaluation.get("primary_metric")) for run, _ in recorded}
    for run, run_record in recorded:
        losses = filter_finite((line.get("step"), line.get("loss")) for line in run_record.steps)
        training.append(ChartSeries(run.label, smooth_points(losses) or losses))
        curves = (VALIDATION_LOSS, validation), (min(primary_metrics), scores)
        for (name, series), count in zip(curves, ("num_loss_samples", "num_samples"), strict=True):
            lines = list_comparable_evaluations(run_record.evaluations, count)
            points = filter_finite(
                (line.get("step"), read_metrics(line).get(name)) for line in lines
            )
            # The evaluations of each line, and of all lines of a chart, have the same samples.
            sample_sets[count].append(get_sample_set(lines[-1], count) if lines else None)
            if sample_sets[count][-1] == sample_sets[count][0]:
                series.append(ChartSeries(run.label, points, "marks"))
    is_partial = len(validation) < len(recorded)
    others_text = translate("; without runs evaluated on other samples") if is_partial else ""
    loss_caption = translate("nats per supervised token") + others_text
    charts = [
        build_chart(translate("Loss"), training, translate("training, smoothed")),
        build_chart(translate("Validation loss"), validation, loss_caption),
    ]
    if len(primary_metrics) == 1:
        title = format_metric_name(min(primary_metrics))
        charts.append(build_chart(title, scores, translate("validation") + others_text))
    return charts


HISTOGRAM_TITLES = {
    "tokens": ("Tokens per sample", "share of training samples"),
    "patches": ("Patches per image", "share of training images"),
    "answers": ("Tokens per answer", "share of validation samples"),
}
"""Title and caption of each histogram."""


def _count_sizes(run: ComparedRun) -> dict[str, HistogramCounts]:
    """Return the histograms of tokens per sample, patches per image and tokens per answer."""
    start = summary.get_last_start(run.run_record) if run.run_record else {}
    lengths = [prediction.record.get("num_tokens") for prediction in run.predictions.values()]
    answers = count_half_octaves([length for length in lengths if isinstance(length, int)])
    recorded = as_object(start.get("size_histograms")) | {"answers": answers}
    return {name: parse_counts(recorded.get(name)) for name in HISTOGRAM_TITLES}


def _cell_to_dict(cell: MetricCell) -> dict[str, Any]:
    values: dict[str, Any] = {"value": cell.value, "interval": cell.interval}
    note = cell.note or (cell.difference.note if cell.difference else "")
    if note:
        values["note"] = note
    if cell.difference is not None:
        values |= {
            "difference": cell.change,
            "difference_interval": cell.change_interval,
            "verdict": cell.difference.verdict,
        }
        if cell.num_common:
            scores = {"before": cell.difference.before, "after": cell.difference.after}
            values["common_samples"] = scores | {"num_samples": cell.num_common}
    return values


def _format_cell(cell: MetricCell) -> tuple[str, str, str, str]:
    value = "-" if cell.value is None else f"{cell.value:.4f}"
    if cell.difference is None or cell.change is None:
        return value, "", "", ""
    difference = cell.difference
    interval = "" if difference.low is None else f"{difference.low:+.4f} to {difference.high:+.4f}"
    scores = f"{difference.before:.4f} and {difference.after:.4f}"
    note = f" ({scores} on {cell.num_common} common samples)" if cell.num_common else ""
    return value, f"{cell.change:+.4f}", interval, f"{difference.verdict}{note}"
