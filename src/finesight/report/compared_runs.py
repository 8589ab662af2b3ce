"""Inputs of `finesight compare`: runs and prediction files, each with its last evaluation."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finesight.errors import UserError, suggest_similar_path
from finesight.evaluate import custom_metric
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.metric_difference import ScoredPrediction, index_by_sample, read_predictions
from finesight.evaluate.task_metrics import TASK_METRICS
from finesight.report.i18n import translate
from finesight.report.metrics import read_metrics
from finesight.report.run_reader import JsonObject, RunRecord, read_run
from finesight.report.run_status import RunStatus, get_run_status
from finesight.report.summary import get_data_stats

COMMAND = "finesight compare"

MAX_RUNS = 8
"""Maximum number of compared runs, since a page has limited columns and colors."""

SampleKey = tuple[str, int]
"""Key of a validation sample: its ID, and the number of earlier duplicates.

IDs need not be unique.
"""


@dataclass(frozen=True)
class ComparedRun:
    """Input of a comparison: a run or a prediction file.

    Attributes:
        letter: Letter that identifies the run on the page.
        name: Shortest path suffix that is unique among the inputs.
        path: Run directory or prediction file.
        run_record: Content of the run directory. None for a prediction file.
        status: Status of the run. None for a prediction file.
        evaluation: Evaluation of the final weights, or the last one. Empty for a prediction file.
        metric: Task metric. None if unknown.
        predictions: Predictions of the evaluation by sample.
    """

    letter: str
    name: str
    path: Path
    run_record: RunRecord | None
    status: RunStatus | None
    evaluation: JsonObject
    metric: str | None
    predictions: dict[SampleKey, ScoredPrediction]

    @property
    def label(self) -> str:
        """Display name of the run: its letter and its name."""
        return f"{self.letter} {self.name}"

    def get_setting(self, group: str, name: str) -> object:
        """Return a recipe setting of the run, or None if it is not recorded."""
        settings: Any = self.run_record.recipe.get(group) if self.run_record else None
        return settings.get(name) if isinstance(settings, dict) else None


def read_compared_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """Read the runs and prediction files of a comparison.

    Raises:
        UserError: There are fewer than two or more than `MAX_RUNS` inputs, an input is duplicated
            or invalid, or a run has no evaluation.
    """
    if not 2 <= len(paths) <= MAX_RUNS:
        raise UserError(
            f"unexpected number of runs: {len(paths)}",
            where=COMMAND,
            expected=f"2 to {MAX_RUNS} runs",
            remedy="Give the directories of the runs.",
        )
    for path, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            raise UserError(
                f"{path} is given {count} times",
                where=COMMAND,
                expected="different runs",
                remedy="Give each run only once.",
            )
    runs = [
        _read_compared_run(*arguments)
        for arguments in zip(
            string.ascii_uppercase, _shortest_unique_names(paths), paths, strict=False
        )
    ]
    return [_infer_metric(run, runs) for run in runs]


def _shortest_unique_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest suffix of each path that distinguishes it from the others."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts))):
        suffixes = ["/".join(path_parts[-count:]) for path_parts in parts]
        if len(set(suffixes)) == len(suffixes):
            return suffixes
    return [str(path) for path in paths]


def _read_compared_run(letter: str, name: str, path: Path) -> ComparedRun:
    if path.is_file():
        return ComparedRun(
            letter, name, path, None, None, {}, None, _index_by_sample(read_predictions(path))
        )
    if not path.exists():
        raise UserError(
            f"no such file or directory: {path}",
            where=COMMAND,
            expected="a run directory, or a file of `finesight eval --out`",
            remedy=suggest_similar_path(path),
        )
    run_record = read_run(path, COMMAND)
    if not run_record.evaluations:
        raise UserError(
            f"{path} has no evaluation",
            where=COMMAND,
            expected="runs with validation samples (data.eval) and at least one evaluation",
            remedy=f"Omit it, or evaluate it with finesight eval {path} --data FILE --metric NAME"
            " --out predictions.jsonl and give predictions.jsonl instead.",
        )
    final_evaluation = (run_record.result or {}).get("after")
    evaluation = (
        final_evaluation if isinstance(final_evaluation, dict) else run_record.evaluations[-1]
    )
    predictions_files = run_record.predictions_files
    predictions = (
        _index_by_sample(read_predictions(predictions_files[-1]))
        if predictions_files and read_metrics(evaluation)
        else {}
    )
    settings = run_record.recipe.get("eval")
    metric = settings.get("metric") if isinstance(settings, dict) else None
    metric_name = metric if isinstance(metric, str) else None
    return ComparedRun(
        letter,
        name,
        path,
        run_record,
        get_run_status(run_record),
        evaluation,
        metric_name,
        predictions,
    )


def _infer_metric(run: ComparedRun, runs: Sequence[ComparedRun]) -> ComparedRun:
    """Set the task metric of a prediction file.

    The file does not record it. It is the metric of a run whose predictions have the same score
    names.
    """
    names = {name for prediction in run.predictions.values() for name in prediction.scores}
    for other_run in runs:
        other_names = {
            name for prediction in other_run.predictions.values() for name in prediction.scores
        }
        if run.run_record is None and other_run.metric is not None and other_names == names:
            return replace(run, metric=other_run.metric)
    return run


def _index_by_sample(predictions: Sequence[ScoredPrediction]) -> dict[SampleKey, ScoredPrediction]:
    return index_by_sample(predictions, lambda prediction: prediction.case.id)


def find_common_samples(
    reference_run: ComparedRun, other_run: ComparedRun
) -> tuple[list[SampleKey], int]:
    """Return the validation samples that two runs answered, and the number of mismatched samples.

    Mismatched samples have equal IDs, but different questions or references.
    """
    common_keys = [key for key in reference_run.predictions if key in other_run.predictions]
    same_keys = [
        key
        for key in common_keys
        if _get_question(reference_run.predictions[key])
        == _get_question(other_run.predictions[key])
    ]
    return same_keys, len(common_keys) - len(same_keys)


def _get_question(prediction: ScoredPrediction) -> tuple[object, ...]:
    case: EvalCase = prediction.case
    return prediction.record.get("prompt"), case.references, case.reference_boxes


def is_custom_metric(metric: str | None) -> bool:
    """Return whether a metric is unknown or a user-defined program.

    Reports never execute such programs.
    """
    return (
        metric is None
        or custom_metric.parse_metric_path(metric) is not None
        or metric not in TASK_METRICS
    )


def list_warnings(reference_run: ComparedRun, other_run: ComparedRun) -> list[str]:
    """Return warnings about differences that limit the comparison of two runs."""
    warnings = []
    common_keys, num_mismatched = find_common_samples(reference_run, other_run)
    names = reference_run.label, other_run.label
    if reference_run.metric != other_run.metric:
        metrics = (
            reference_run.metric or translate("unknown"),
            other_run.metric or translate("unknown"),
        )
        text = "{} uses the metric {}, {} uses {}: their scores are not compared."
        warnings.append(translate(text, names[0], metrics[0], names[1], metrics[1]))
    elif not common_keys:
        warnings.append(
            translate(
                "{} and {} have no validation samples in common and are not compared.", *names
            )
        )
    elif (counts := (len(reference_run.predictions), len(other_run.predictions))) != (
        len(common_keys),
        len(common_keys),
    ):
        text = "{} and {} are compared on the {:,} samples that both answered, of {:,} and {:,}."
        warnings.append(translate(text, *names, len(common_keys), *counts))
    if reference_run.metric == other_run.metric == "detection" and len(
        reference_run.predictions
    ) != len(other_run.predictions):
        text = (
            "Average precision decreases with the size of a dataset. {} and {} answered {:,} and"
            " {:,} samples, so their AP values are not comparable. The differences use the samples"
            " that both answered."
        )
        warnings.append(
            translate(text, *names, len(reference_run.predictions), len(other_run.predictions))
        )
    if num_mismatched:
        text = (
            "{} and {}: {:,} samples of the same ID differ in question or reference answers and are"
            " excluded."
        )
        warnings.append(translate(text, *names, num_mismatched))
    max_new_tokens = [
        run.get_setting("eval", "max_new_tokens") for run in (reference_run, other_run)
    ]
    if None not in max_new_tokens and max_new_tokens[0] != max_new_tokens[1]:
        text = (
            "{} generated at most {} tokens per answer, {} at most {}. Truncated answers count as"
            " incorrect."
        )
        warnings.append(translate(text, names[0], max_new_tokens[0], names[1], max_new_tokens[1]))
    if reason := explain_loss_mismatch(reference_run, other_run):
        text = "The validation losses of {} and {} are not compared: {}."
        warnings.append(translate(text, *names, translate(reason)))
    return warnings


def explain_loss_mismatch(reference_run: ComparedRun, other_run: ComparedRun) -> str:
    """Return the reason why the validation losses of two runs are not comparable.

    Returns an empty string if they are comparable.
    """
    reference_record, other_record = reference_run.run_record, other_run.run_record
    if reference_record is None or other_record is None:
        return ""
    fingerprints = [_get_eval_fingerprint(record) for record in (reference_record, other_record)]
    if fingerprints[0] != fingerprints[1]:
        return "the validation data differ"
    if reference_record.manifest.get("family") != other_record.manifest.get("family"):
        return "the model families use different tokenizers"
    if reference_record.manifest.get("system_prompt") != other_record.manifest.get("system_prompt"):
        return "the system prompts differ"
    return ""


def _get_eval_fingerprint(run_record: RunRecord) -> object:
    return get_data_stats(run_record, "eval").get(
        "fingerprint"
    ) or run_record.checkpoint_identity.get("data.eval")
