"""Differences between compared runs in settings, data, device and cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from finesight.report import summary
from finesight.report.compared_runs import ComparedRun
from finesight.report.i18n import translate
from finesight.report.run_reader import RunRecord

DiffRow = tuple[str, list[str]]
"""Row of the table of differences: a name, and its value in each run."""

MISSING_VALUE = "–"

IGNORED_SETTINGS = {"output_dir"}
"""Settings that are not compared because they always differ."""

DIGEST_CHARS = 12
"""Number of characters of a SHA-256 digest that are displayed."""

DATA_TITLES = {
    "train": {
        "num_samples": "training samples",
        "num_tokens": "training tokens",
        "fingerprint": "training data, SHA-256",
    },
    "eval": {
        "num_samples": "validation samples",
        "num_tokens": "validation tokens",
        "fingerprint": "validation data, SHA-256",
    },
}
"""Row titles of recorded data statistics, by data split and key."""


def diff_configs(runs: Sequence[ComparedRun]) -> list[DiffRow]:
    """Return the settings, data statistics and versions that differ between runs."""
    recipes = [_flatten_settings(run.run_record.recipe) if run.run_record else {} for run in runs]
    names = dict.fromkeys(name for recipe in recipes for name in recipe)
    rows = [
        (name, [recipe.get(name, MISSING_VALUE) for recipe in recipes])
        for name in names
        if name not in IGNORED_SETTINGS
    ]
    values_by_run = [_collect_run_facts(run.run_record) if run.run_record else {} for run in runs]
    for name in dict.fromkeys(name for run_values in values_by_run for name in run_values):
        rows.append((name, [run_values.get(name, MISSING_VALUE) for run_values in values_by_run]))
    return [(name, values) for name, values in rows if _has_differences(values, runs)]


def _has_differences(values: Sequence[str], runs: Sequence[ComparedRun]) -> bool:
    """Return whether runs differ in a value. Prediction files have no recorded values."""
    run_values = [
        value for value, run in zip(values, runs, strict=True) if run.run_record is not None
    ]
    return len(set(run_values)) > 1


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
    facts_by_title: dict[str, str] = {}
    for name, titles in DATA_TITLES.items():
        data = summary.get_data_stats(run_record, name)
        for key, title in titles.items():
            if isinstance(data.get(key), int):
                facts_by_title[translate(title)] = f"{data[key]:,}"
            elif data.get(key):
                facts_by_title[translate(title)] = str(data[key])[:DIGEST_CHARS]
    facts_by_title[translate("base model, SHA-256")] = str(
        run_record.manifest.get("base_fingerprint")
    )[:DIGEST_CHARS]
    for key, title in (
        ("device", "device"),
        ("precision", "dtype"),
        ("world_size", "world size"),
    ):
        if start.get(key) is not None:
            facts_by_title[translate(title)] = str(start[key])
    versions: Any = start.get("versions")
    for name, value in (versions or {}).items():
        facts_by_title[translate("version of {}", name)] = str(value)
    return facts_by_title


def get_size_histogram(run_record: RunRecord, name: str) -> object:
    """Return a histogram of the training samples that the run has recorded.

    Args:
        run_record: Content of the run directory.
        name: `tokens` per sample or `patches` per image.
    """
    size_histograms: Any = summary.get_last_start(run_record).get("size_histograms")
    return size_histograms.get(name) if isinstance(size_histograms, dict) else None


def compare_costs(runs: Sequence[ComparedRun]) -> list[DiffRow]:
    """Return the throughput, memory and time of each run."""
    values_by_run = [_collect_costs(run.run_record) if run.run_record else {} for run in runs]
    names = dict.fromkeys(name for run_values in values_by_run for name in run_values)
    return [
        (name, [run_values.get(name, MISSING_VALUE) for run_values in values_by_run])
        for name in names
    ]


def _collect_costs(run_record: RunRecord) -> dict[str, str]:
    total_s = sum(phase.seconds for phase in summary.compute_phases(run_record))
    num_devices = summary.get_last_start(run_record).get("world_size")
    num_devices = num_devices if isinstance(num_devices, int) else 1
    return {
        translate("total time"): summary.format_duration(total_s),
        translate("device hours"): f"{total_s * num_devices / 3600:,.3g}",
        **{phase.name: phase.duration_text for phase in summary.compute_phases(run_record)},
        **dict(summary.summarize_cost(run_record)),
    }
