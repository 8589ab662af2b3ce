"""Verdict on a run. All statements of pages and messages about its quality come from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from statistics import median

from pydantic import TypeAdapter, ValidationError

from finesight.errors import Step
from finesight.evaluate.bootstrap import clopper_pearson_interval
from finesight.evaluate.custom_metric import parse_metric_path
from finesight.evaluate.metric_difference import MetricDifference, count_correct
from finesight.evaluate.score_format import format_score
from finesight.evaluate.verdict import Verdict
from finesight.metric_components import get_score
from finesight.report import summary
from finesight.report.examples import AnswerCounts, estimate_differences, read_examples
from finesight.report.i18n import translate
from finesight.report.metric_rows import (
    MetricCell,
    MetricRow,
    build_metric_rows,
    describe_scale,
    format_metric_name,
    join_metric_names,
    read_metrics,
    read_sample_count,
)
from finesight.report.run_reader import (
    OTHER_SAMPLES,
    JsonObject,
    RunRecord,
    as_object,
    is_finite,
    pair_evaluations,
    rank_equal_sets,
)
from finesight.settings.manifest import RECIPE_FILE, find_next_run_dir

CONCLUSIONS: dict[Verdict, str] = {
    "better": "better in {}",
    "worse": "worse in {}",
    "no clear change": "no clear difference in {}",
}
"""Part of a conclusion about the metrics with a verdict."""

MIN_NEW_LABELS = 30
"""Minimum number of images that are proposed for labeling."""

GOOD_FRACTION = 0.9
"""Fraction of correct answers from which neither longer training nor more labels are proposed."""

_DIFFERENCES: TypeAdapter[list[MetricDifference]] = TypeAdapter(list[MetricDifference])


@dataclass(frozen=True)
class Proposal:
    """Proposed operation after a run.

    Attributes:
        step: Next operation. Its purpose consists of the two texts. None for no proposal.
        action: What to do, in the current language.
        reason: Reason as a sentence in the current language; empty for none.
    """

    step: Step | None = None
    action: str = ""
    reason: str = ""


@dataclass(frozen=True)
class RunVerdict:
    """Verdict on an evaluation or run in comparison with the first one.

    Attributes:
        names: Display names of the evaluations or runs.
        rows: Metrics of all evaluations or runs, the primary one first.
        num_samples: Number of samples of both. None if unknown.
        counts: Number of correct, partly correct and wrong answers of each evaluation. None if
            unknown, or if the metric has no correct answers.
        index: Position of the evaluation or run; by default the last one.
        proposal: Proposed next operation. It is empty without one.
        has_run_names: Whether the names are those of runs, which the conclusion contains.
    """

    names: Sequence[str]
    rows: Sequence[MetricRow]
    num_samples: int | None
    counts: Sequence[AnswerCounts | None] = ()
    index: int = -1
    proposal: Proposal = field(default_factory=Proposal)
    has_run_names: bool = False

    @property
    def next_step(self) -> Step | None:
        """Proposed next operation. None without a proposal."""
        return self.proposal.step

    @property
    def primary_row(self) -> MetricRow | None:
        """Primary metric; without one, the last metric, which is the validation loss."""
        primary = next((row for row in self.rows if row.is_primary), None)
        if primary is None and self.rows:
            primary = self.rows[-1]
        return primary

    @property
    def cell(self) -> MetricCell:
        """Value of the primary metric, with its difference and interval."""
        if self.primary_row is None:
            return MetricCell(None, None)
        return self.primary_row.cells[self.index]

    @property
    def level(self) -> Verdict:
        """Verdict on the primary metric; empty without a comparison that has an interval."""
        return self.cell.verdict

    @property
    def scores_text(self) -> str:
        """Values of the primary metric before and after; empty without any."""
        if self.primary_row is None:
            return ""
        texts = [cell.value_text for cell in self.primary_row.cells]
        return " → ".join(filter(None, texts))

    @property
    def sentence(self) -> str:
        """Quality of the answers in a sentence, with the first evaluation and an expectation."""
        before, after = self._get_counts()
        if after is None:
            return self._describe_score()
        text = "{:,} of {:,} answers are correct"
        if after.partly or (before is not None and before.partly):
            text = "{:,} of {:,} answers are entirely correct"
        result = translate(text, after.correct, after.total)
        if self.primary_row is not None and get_score(self.primary_row.name).condition:
            condition = translate(get_score(self.primary_row.name).condition)
            result = translate("{} at {}", result, condition)
        if before is not None:
            result = translate("{} ({}: {:,})", result, self.names[0], before.correct)
        low, high = clopper_pearson_interval(after.correct, after.total)
        bounds = math.floor(100 * low), math.ceil(100 * high)
        text = "{}. For new samples, expect {} to {} of 100 (95 % interval)."
        return translate(text, result, *bounds)

    def _get_counts(self) -> tuple[AnswerCounts | None, AnswerCounts | None]:
        """Return the counts of the first evaluation and of this one."""
        if not self.counts:
            return None, None
        before = self.counts[0] if len(self.counts) > 1 else None
        return before, self.counts[self.index]

    def _describe_score(self) -> str:
        """Describe the value of the primary metric, without a number of correct answers."""
        if self.primary_row is None:
            return ""
        name = format_metric_name(self.primary_row.name)
        cells = self.primary_row.cells
        if all(cell.value is None for cell in cells):
            return translate("The {} could not be computed from these answers.", name)
        first = cells[0]
        cell = self.cell
        if cell.value is None:
            return translate("The {} ({}) is {}.", name, self.names[0], first.value_text)
        result = translate("The {} is {}", name, cell.value_text)
        if len(cells) > 1 and first.value is not None:
            result = translate("{} ({}: {})", result, self.names[0], first.value_text)
        if not cell.interval_text:
            return translate("{}.", result)
        text = "{}. For new samples, expect {} (95 % interval)."
        return translate(text, result, cell.interval_text)

    @property
    def scale_text(self) -> str:
        """Scale of the primary metric; empty if the sentence counts correct answers."""
        if self.primary_row is None or self._get_counts()[1] is not None:
            return ""
        return describe_scale(self.primary_row.name)

    @property
    def changes_text(self) -> str:
        """Number of answers that became correct or incorrect; empty if it is unknown."""
        before, after = self._get_counts()
        if before is None or after is None or after.num_gained is None or after.num_lost is None:
            return ""
        # Otherwise, the changes are those of other answers than the counts.
        if after.correct - before.correct != after.num_gained - after.num_lost:
            return ""
        text = "Changed answers: {:,} became correct, {:,} became incorrect."
        return translate(text, after.num_gained, after.num_lost)

    @property
    def conclusion(self) -> str:
        """Metrics that differ from those of the first one, in a sentence; empty without two.

        Metrics whose difference has no interval, such as the validation loss, have no verdict.
        """
        if len(self.names) < 2 or not self.num_samples:
            return ""
        judged = [row for row in self.rows if row.cells[self.index].verdict]
        parts = []
        for verdict, text in CONCLUSIONS.items():
            shown = judged
            if verdict == "no clear change":
                shown = judged[:1]  # The first metric is the main one.
            found = [row.name for row in shown if row.cells[self.index].verdict == verdict]
            if found:
                parts.append(translate(text, join_metric_names(found)))
        result = translate("; ").join(parts) or translate("no verdict without confidence intervals")
        if self.has_run_names:
            text = "{} compared with {}, on {:,} validation samples: {}."
            return translate(text, self.names[self.index], self.names[0], self.num_samples, result)
        text = "Compared with {}, on {:,} validation samples: {}."
        return translate(text, self.names[0], self.num_samples, result)

    @property
    def change_text(self) -> str:
        """Change of the primary metric, its interval, and the role of chance."""
        if self.primary_row is None:
            return ""
        name = format_metric_name(self.primary_row.name)
        cells = self.primary_row.cells
        cell = self.cell
        if all(one.value is None for one in cells):
            return ""
        if any(one.note == OTHER_SAMPLES for one in cells):
            return translate("{}: {}", name, translate(OTHER_SAMPLES))
        for index, one in enumerate(cells):
            was_evaluated = any(row.cells[index].value is not None for row in self.rows)
            if one.value is None and was_evaluated:
                text = "The {} ({}) could not be computed, so there is no comparison."
                return translate(text, name, self.names[index])
        if cell.change is None:
            return translate("The {} was evaluated once, so there is no comparison yet.", name)
        if cell.change == 0:
            return translate("The {} did not change.", name)
        text = "The {} increased by {}" if cell.change > 0 else "The {} decreased by {}"
        change = format_score(abs(cell.change), cell.num_compared)
        change_text = translate(text, name, change)
        if cell.change_interval is None:
            text = "{}. The confidence interval of the difference is unknown."
            return translate(text, change_text)
        text = "{}: the 95 % interval of the difference is {}."
        interval_text = translate(text, change_text, cell.change_interval_text)
        is_chance = self.level == "no clear change"
        _, counts = self._get_counts()
        if counts is None or get_score(self.primary_row.name).counts_answers:
            text = "{} This is unlikely to be due to chance."
            if is_chance:
                text = "{} This may be due to chance."
            return translate(text, interval_text)
        # The sentence counts the answers by another score.
        text = "{} The change of the {} is unlikely to be due to chance."
        if is_chance:
            text = "{} The change of the {} may be due to chance."
        return translate(text, interval_text, name)


def compare_evaluations(
    run_record: RunRecord, counts: Sequence[AnswerCounts | None] = ()
) -> RunVerdict:
    """Return the verdict on a run without a next step.

    Args:
        counts: Counts of the answers of each evaluation.
    """
    evaluations = select_evaluations(run_record)
    rows = build_metric_rows(evaluations, _read_differences(run_record, evaluations))
    num_samples = None
    if evaluations:
        last = evaluations[-1]
        num_samples = read_sample_count(last, "num_samples")
        num_samples = num_samples or read_sample_count(last, "num_loss_samples")
    return RunVerdict(name_evaluations(run_record, evaluations), rows, num_samples, counts)


def judge_run(
    run_record: RunRecord,
    answer_counts: Sequence[AnswerCounts | None] | None = None,
    run: Path | None = None,
) -> RunVerdict:
    """Return the verdict on a run.

    Args:
        answer_counts: Counts of the answers in the first and the last prediction file. They are
            read by default.
        run: Path of the run in the next step, by default that of its record.
    """
    if answer_counts is None:
        files = find_prediction_files(run_record)
        times = tuple(file.stat().st_mtime_ns for file in files if file is not None)
        metric = run_record.primary_metric
        answer_counts = _read_counts(files, times, metric, run_record.max_bytes)
    # The prediction files are those of the first and of the last evaluation.
    before, after = answer_counts or (None, None)
    evaluations = select_evaluations(run_record)
    counts = []
    for line in evaluations:
        counts.append(_check_counts(run_record, line, after if line is evaluations[-1] else before))
    verdict = compare_evaluations(run_record, counts)
    row = verdict.primary_row
    if row is not None and any(cell.note == OTHER_SAMPLES for cell in row.cells):
        verdict = replace(verdict, counts=[None, *counts[1:]])  # counts of other samples
    return replace(verdict, proposal=propose_step(run_record, verdict, run or run_record.folder))


def find_prediction_files(run_record: RunRecord) -> tuple[Path | None, Path | None]:
    """Return the prediction files before training and of the latest evaluation."""
    files = run_record.predictions_files
    first = None
    last = None
    if files and files[0].stem == "before":
        first = files[0]
    if files and files[-1] != first:
        last = files[-1]
    return first, last


@lru_cache(maxsize=16)
def _read_counts(
    files: tuple[Path | None, Path | None],
    times: tuple[int, ...],
    metric: str | None,
    max_bytes: int | None,
) -> Sequence[AnswerCounts | None]:
    """Read the counts of the answers in the first and the last prediction file of a run.

    Args:
        times: Modification times of the files, which determine the validity of the cached result.
    """
    return read_examples(*files, metric, 0, max_bytes).answer_counts


def _check_counts(
    run_record: RunRecord, evaluation: JsonObject, counts: AnswerCounts | None
) -> AnswerCounts | None:
    """Return the counts of the answers of an evaluation, else those by its scores.

    Counts that do not agree with the evaluation are those of a damaged or shortened file.
    """
    num_samples = read_sample_count(evaluation, "num_samples")
    num_correct = None
    settings = as_object(run_record.recipe.get("eval"))
    # The mean of a custom score is no count: each of its values may be a fraction.
    if num_samples is not None and parse_metric_path(str(settings.get("metric"))) is None:
        num_correct = _count_by_score(evaluation, num_samples)
    has_all_answers = counts is not None and num_samples in (None, counts.total)
    if counts is not None and has_all_answers and num_correct in (None, counts.correct):
        return counts
    if num_correct is None or num_samples is None:
        return None
    return AnswerCounts(num_correct, 0, num_samples - num_correct)


def _count_by_score(evaluation: JsonObject, num_samples: int) -> int | None:
    """Return the number of correct answers by the score that counts them; None without one."""
    for name, score in read_metrics(evaluation).items():
        count = count_correct(name, score, num_samples)
        if count is not None:
            return count
    return None


def propose_step(run_record: RunRecord, verdict: RunVerdict, run: Path) -> Proposal:
    """Propose what to do with a finished run, by its losses and the verdict on it.

    The model is served only if neither its training nor its labels should change.
    """
    if run_record.result is None:
        return Proposal()
    counts = verdict.counts[-1] if verdict.counts else None
    is_good = counts is not None and counts.correct >= GOOD_FRACTION * counts.total
    output = f"output_dir={find_next_run_dir(run)}"
    early_stopping = ["eval.every=0.1", "eval.patience=2", output]
    can_stop = as_object(run_record.recipe.get("eval")).get("patience") is None
    overfitting = summary.find_overfitting(summary.list_lines_of_weights(run_record))
    # Early stopping does not help if the model before training is the best one.
    was_better = overfitting is not None and overfitting.best_step > 0
    train = Step("train", {"recipe": str(run / RECIPE_FILE), "overrides": early_stopping})
    stop_text = translate("train again, and stop at the best evaluation")
    if was_better and can_stop and not is_good:
        return _propose(train, stop_text, translate("The model overfits."))
    if verdict.level == "worse":
        reason = translate("The result is worse than before training.")
        if can_stop and summary.find_better_evaluation(run_record):
            return _propose(train, stop_text, reason)
        check = Step("doctor", {"subject": str(run)})
        return _propose(check, translate("search for the cause"), reason)
    has_reached_best = overfitting is not None or run_record.result.get("stopped_early")
    if not (is_good or has_reached_best) and _is_loss_falling(run_record):
        overrides = [*summary.scale_duration(run_record, 2), output]
        train = replace(train, arguments={**train.arguments, "overrides": overrides})
        reason = translate("The training loss still falls.")
        return _propose(train, translate("train twice as long"), reason)
    if not summary.is_native_run(run_record):
        return Proposal()  # The transformers backend neither suggests labels nor serves an API.
    label = Step("label", {"run_or_model": str(run), "sources": ["IMAGES"]})
    num_labels = max(MIN_NEW_LABELS, summary.count_training_samples(run_record) or 0)
    label_text = translate("label about {} more images", num_labels)
    if counts is not None and 2 * counts.correct < counts.total:
        reason = translate("{} of {} answers are correct.", counts.correct, counts.total)
        return _propose(label, label_text, reason)
    if verdict.level == "no clear change" and not is_good:
        return _propose(label, label_text, translate("There is no clear change."))
    return _propose(Step("serve", {"run_or_model": str(run)}), translate("use the model"))


def _propose(step: Step, action: str, reason: str = "") -> Proposal:
    """Return a proposal whose step has the action and the reason as its purpose."""
    purpose = translate("{}. {}", action, reason) if reason else action
    return Proposal(replace(step, purpose=purpose), action, reason)


def _is_loss_falling(run_record: RunRecord) -> bool:
    """Return whether the training loss of the last fifth of a run is clearly lower."""
    losses = [line["loss"] for line in run_record.steps if is_finite(line.get("loss"))]
    edge = len(losses) // 5
    return edge >= 4 and median(losses[-edge:]) < 0.9 * median(losses[-2 * edge : -edge])


def select_evaluations(run_record: RunRecord) -> list[JsonObject]:
    """Return the evaluation before training and the latest one, or the only one.

    In a finished run, the second is that of the final weights. The first is of the same samples;
    values of other samples are removed.
    """
    if run_record.result is not None:
        before = run_record.result.get("before")
        after = run_record.result.get("after")
        if isinstance(before, dict) and isinstance(after, dict):
            return pair_evaluations(before, after)
    evaluations = [x for x in run_record.evaluations if is_finite(x.get("validation_loss"))]
    if len(evaluations) < 2:
        return [as_object(line.get("full")) or line for line in evaluations]
    *earlier, latest = evaluations
    return pair_evaluations(max(earlier, key=lambda x: rank_equal_sets(x, latest)), latest)


def name_evaluations(run_record: RunRecord, evaluations: Sequence[JsonObject]) -> list[str]:
    """Return the display name of each evaluation, such as `before` or `after step 100`."""
    names = []
    for line in evaluations:
        step = line.get("step") or 0
        name = translate("before")
        if run_record.result is not None and step == summary.get_last_step(run_record):
            name = translate("after")
        elif step:
            name = translate("after step {:,}", step)
        names.append(name)
    return names


def _read_differences(
    run_record: RunRecord, evaluations: Sequence[JsonObject]
) -> Mapping[str, MetricDifference]:
    """Return the differences between the first and last evaluation by metric.

    A finished run has recorded them. For other runs, they are estimated from per-sample scores.
    """
    recorded = (run_record.result or {}).get("metric_differences")
    with suppress(ValidationError):
        differences = _DIFFERENCES.validate_python(recorded or [])
        if differences:
            return {difference.name: difference for difference in differences}
    files = run_record.predictions_files
    if len(files) < 2 or len(evaluations) < 2:
        return {}
    before, after = evaluations
    metrics = read_metrics(before), read_metrics(after)
    primary = str(after.get("primary_metric") or "")
    return estimate_differences(files[0], files[-1], *metrics, primary)
