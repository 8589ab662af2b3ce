"""HTML page of a comparison: metrics, settings and answers of several runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from finesight.evaluate.eval_case import note_lines
from finesight.evaluate.metric_difference import align_columns
from finesight.evaluate.score_format import format_score_change
from finesight.files.worker_pool import JobOutput
from finesight.metric_components import VALIDATION_LOSS, get_metric, get_score
from finesight.report import metric_rows, summary
from finesight.report.charts import (
    Chart,
    ChartSeries,
    build_chart,
    build_histograms,
    parse_counts,
    read_metric_points,
    read_points,
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
from finesight.report.examples import ExampleDataBuilder, ExampleSet
from finesight.report.histogram_counts import HistogramCounts, count_half_octaves
from finesight.report.html import PageFile, render_page
from finesight.report.i18n import Language, detect_language, translate, use_language
from finesight.report.metric_rows import (
    MetricCell,
    MetricRow,
    format_metric_name,
    format_notes,
    iter_notes,
)
from finesight.report.run_page import render_run_page
from finesight.report.run_reader import (
    RunRecord,
    as_object,
    get_sample_set,
    list_comparable_evaluations,
    list_image_folders,
)
from finesight.report.run_verdict import RunVerdict

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
    for collect in (_collect_settings, _collect_run_facts):
        for name, values in _build_rows(runs, collect):
            recorded = {value for value, run in zip(values, runs, strict=True) if run.run_record}
            if len(recorded) > 1 and name not in IGNORED_SETTINGS:
                rows.append((name, values))
    return rows


def _build_rows(
    runs: Sequence[ComparedRun], collect: Callable[[RunRecord], dict[str, str]]
) -> list[tuple[str, list[str]]]:
    """Return one row per name that `collect` returns for any run."""
    values_by_run: list[dict[str, str]] = []
    for run in runs:
        values_by_run.append(collect(run.run_record) if run.run_record else {})
    rows = []
    for name in dict.fromkeys(chain.from_iterable(values_by_run)):
        rows.append((name, [run_values.get(name, "–") for run_values in values_by_run]))
    return rows


def _collect_settings(run_record: RunRecord) -> dict[str, str]:
    return _flatten_settings(run_record.recipe)


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
    if not prefix:
        return {}
    return {prefix: json.dumps(content, ensure_ascii=False, default=str)}


def _collect_run_facts(run_record: RunRecord) -> dict[str, str]:
    start = summary.get_last_start(run_record)
    base_digest = run_record.manifest.get("base_fingerprint")
    recorded = _flatten_settings(start | {"base_fingerprint": base_digest})
    facts_by_title = {}
    for name, title in FACT_TITLES.items():
        value = recorded.get(name, "")
        if name.endswith("fingerprint"):
            value = value[:DIGEST_CHARS]
        if value.isdecimal() and name.startswith("data"):
            value = f"{int(value):,}"
        if value:
            facts_by_title[translate(title)] = value
    for name, value in as_object(start.get("versions")).items():
        facts_by_title[translate("version of {}", name)] = str(value)
    return facts_by_title


def _collect_costs(run_record: RunRecord) -> dict[str, str]:
    phases = summary.compute_phases(run_record)
    total_s = sum(seconds for _, seconds in phases)
    num_devices = summary.get_last_start(run_record).get("world_size")
    if not isinstance(num_devices, int):
        num_devices = 1
    costs = {
        translate("total time"): summary.format_duration(total_s),
        translate("device hours"): f"{total_s * num_devices / 3600:,.3g}",
    }
    for name, seconds in phases:
        costs[name] = summary.format_duration(seconds)
    costs.update(summary.summarize_cost(run_record))
    return costs


@dataclass(frozen=True)
class RunComparison:
    """Comparison of several runs. The first run is the baseline."""

    runs: list[ComparedRun]
    metric_rows: list[MetricRow]
    warnings: list[str]

    @property
    def conclusions(self) -> list[str]:
        """Comparison of each run with the baseline in a sentence, in the current language."""
        baseline, *others = self.runs
        labels = [run.label for run in self.runs]
        texts = []
        for index, other in enumerate(others, 1):
            keys, _ = find_common_samples(baseline, other)
            verdict = RunVerdict(
                labels, self.metric_rows, len(keys), index=index, has_run_names=True
            )
            if verdict.conclusion:
                texts.append(verdict.conclusion)
        return texts

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as JSON data."""
        entries = []
        for run_index, run in enumerate(self.runs):
            metrics = {}
            for row in self.metric_rows:
                cell = row.cells[run_index]
                if cell.value is not None:
                    metrics[row.name] = _cell_to_dict(cell)
            entry = {
                "path": str(run.path),
                "metric": run.metric,
                "step": run.evaluation.get("step"),
                "status": run.status.kind if run.status else None,
                "metrics": metrics,
            }
            entries.append(entry)
        return {
            "runs": entries,
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
        rows = self.metric_rows
        if any(row.is_primary for row in rows):
            rows = [row for row in rows if row.is_primary or row.name == VALIDATION_LOSS]
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
    warnings: list[str] = []
    for other_run in other_runs:
        warnings += list_warnings(reference_run, other_run)
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
    """Render a report or a comparison of runs as job of a worker process."""
    with use_language(language):
        if len(folders) == 1:
            page = render_run_page(folders[0], max_examples, max_bytes=MAX_JOB_BYTES)
            return JobOutput(page)
        return JobOutput(render_compare_page(compare_runs(folders, MAX_JOB_BYTES)))


def render_compare_page(comparison: RunComparison, max_samples: int = MAX_SAMPLES) -> str:
    """Render the comparison of runs as an HTML page in the current language."""
    runs = comparison.runs
    samples = compare_samples(runs, max_samples)
    labels = []
    sizes = []
    records = []
    file_folders = []
    for run in runs:
        labels.append(run.label)
        sizes.append((run.label, _count_sizes(run)))
        if run.run_record is None:
            file_folders.append(run.path.parent)
        else:
            records.append(run.run_record)
    folders = [*list_image_folders(records), *file_folders]
    has_formulas = any(get_metric(run.metric).answer_content == "formula" for run in runs)
    data_builder = ExampleDataBuilder(folders, has_formulas)
    charts = _build_charts(runs)
    histograms = build_histograms(HISTOGRAM_TITLES, sizes)
    metric_name = format_metric_name(samples.metric)
    return render_page(
        "compare",
        data={
            **data_builder.build(samples.displayed),
            "charts": [chart.data for chart in (*charts, *histograms)],
            "runs": labels,
            "metric": metric_name,
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
        has_unknown_config=bool(file_folders),
        costs=_build_rows(runs, _collect_costs),
        charts=charts,
        histograms=histograms,
        samples=samples,
        max_score=get_score(samples.metric).maximum,
        note=_describe_selection(samples),
        metric_name=metric_name or translate("score"),
        notes=format_notes(iter_notes(comparison.metric_rows)),
        metrics=metric_rows,
    )


def _describe_selection(samples: ExampleSet) -> str:
    text = "{:,} validation samples, sorted by the difference in {} between the runs."
    note = translate(text, samples.total, format_metric_name(samples.metric))
    num_hidden = samples.total - len(samples.displayed)
    if num_hidden:
        note += translate(" {:,} more are not on this page.", num_hidden)
    return note


def _build_charts(runs: Sequence[ComparedRun]) -> list[Chart]:
    """Return charts of training loss, validation loss and primary metric, one line per run.

    Charts without values are omitted.
    """
    recorded = []
    training = []
    primary_metrics = set()
    for run in runs:
        if run.run_record is not None:
            recorded.append((run.label, run.run_record))
            losses = read_points(run.run_record.steps, "loss")
            training.append(ChartSeries(run.label, smooth_points(losses) or losses))
            primary_metrics.add(str(run.evaluation.get("primary_metric")))
    validation = _build_evaluation_series(recorded, VALIDATION_LOSS, "num_loss_samples")
    others_text = ""
    if len(validation) < len(recorded):
        others_text = translate("; without runs evaluated on other samples")
    loss_caption = translate("nats per supervised token") + others_text
    charts = [
        build_chart(translate("Loss"), training, translate("training, smoothed")),
        build_chart(translate("Validation loss"), validation, loss_caption),
    ]
    if len(primary_metrics) == 1:
        [primary_metric] = primary_metrics
        scores = _build_evaluation_series(recorded, primary_metric, "num_samples")
        caption = translate("validation") + others_text
        charts.append(build_chart(format_metric_name(primary_metric), scores, caption))
    return [chart for chart in charts if chart is not None]


def _build_evaluation_series(
    recorded: Sequence[tuple[str, RunRecord]], name: str, count: str
) -> list[ChartSeries]:
    """Return the curves of a metric, without runs evaluated on other samples.

    Args:
        recorded: Label and content of each run.
        count: Key of the number of samples: `num_loss_samples`, or `num_samples` for scores.
    """
    series = []
    sample_sets: list[object] = []
    for label, run_record in recorded:
        # The evaluations of each line, and of all lines of a chart, have the same samples.
        lines = list_comparable_evaluations(run_record.evaluations, count)
        sample_sets.append(get_sample_set(lines[-1], count) if lines else None)
        if sample_sets[-1] == sample_sets[0]:
            series.append(ChartSeries(label, read_metric_points(lines, name), "points"))
    return series


HISTOGRAM_TITLES = {
    "tokens": ("Tokens per sample", "share of training samples"),
    "patches": ("Patches per image", "share of training images"),
    "answers": ("Tokens per answer", "share of validation samples"),
}
"""Title and caption of each histogram."""


def _count_sizes(run: ComparedRun) -> dict[str, HistogramCounts]:
    """Return the histograms of tokens per sample, patches per image and tokens per answer."""
    recorded: dict[str, Any] = {}
    if run.run_record is not None:
        recorded |= as_object(summary.get_last_start(run.run_record).get("size_histograms"))
    lengths = []
    for prediction in run.predictions.values():
        num_tokens = prediction.record.get("num_tokens")
        if isinstance(num_tokens, int):
            lengths.append(num_tokens)
    recorded["answers"] = count_half_octaves(lengths)
    return {name: parse_counts(recorded.get(name)) for name in HISTOGRAM_TITLES}


def _cell_to_dict(cell: MetricCell) -> dict[str, Any]:
    values: dict[str, Any] = {"value": cell.value, "interval": cell.interval}
    note = cell.note
    if not note and cell.difference is not None:
        note = cell.difference.note
    if note:
        values["note"] = note
    if cell.difference is not None:
        values |= {
            "difference": cell.change,
            "difference_interval": cell.change_interval,
            "verdict": cell.difference.verdict,
            "p_value": cell.difference.p_value,
        }
        if cell.num_common:
            scores = {"before": cell.difference.before, "after": cell.difference.after}
            values["common_samples"] = scores | {"num_samples": cell.num_common}
    return values


def _format_cell(cell: MetricCell) -> tuple[str, str, str, str]:
    value = cell.value_text or "-"
    if cell.difference is None or cell.change is None:
        return value, "", "", ""
    verdict: str = cell.difference.verdict
    if cell.num_common:
        before, after = cell.common_texts
        verdict += f" ({before} and {after} on {cell.num_common} common samples)"
    change = format_score_change(cell.change, cell.num_compared)
    return value, change, cell.difference.interval_text, verdict
