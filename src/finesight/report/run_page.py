"""HTML report of a run, also written during training."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from finesight.errors import Step, UserError
from finesight.evaluate.mathml import is_converter_installed
from finesight.evaluate.metrics.classification.score import OTHER_CLASS
from finesight.evaluate.regression_guard import GROUP_RESULTS, GroupResult
from finesight.evaluate.text_metrics import fold_text
from finesight.files.storage import check_new_path, write_new_file
from finesight.metric_components import get_metric
from finesight.report import metric_rows, summary
from finesight.report.charts import build_run_charts
from finesight.report.examples import (
    EXAMPLE_KINDS,
    ExampleDataBuilder,
    ExampleSet,
    ThumbnailCache,
    count_incorrect,
    find_image,
    read_examples,
    read_groups,
    read_image_paths,
    read_incorrect_lines,
)
from finesight.report.html import PageFile, render_page
from finesight.report.i18n import Language, detect_language, translate, use_language
from finesight.report.metric_rows import (
    MetricCell,
    MetricRow,
    format_metric_name,
    format_notes,
    iter_notes,
)
from finesight.report.run_reader import (
    JsonObject,
    RunRecord,
    as_object,
    list_image_folders,
    read_run,
)
from finesight.report.run_verdict import find_prediction_files, judge_run, select_evaluations
from finesight.report.summary import get_run_status
from finesight.samples.image_file import get_file
from finesight.settings.manifest import REPORT_FILE, RESPONSES_FILE

GENERIC_NAMES = ("run", "out", "output", "outputs")
"""Folder names that do not identify a run: the title includes the parent folder."""

MAX_EXAMPLES = 2000
"""Maximum number of examples in the report of a finished run.

Their thumbnails take about 20 MB.
"""

MAX_LIVE_EXAMPLES = 200

NUM_WORST_EXAMPLES = 3
"""Number of incorrect answers with images in the result."""

MAX_DETAIL_ROWS = 20
"""Maximum number of rows in the tables of class confusions and of field scores."""

KIND_LABELS: dict[str, str] = {
    "better": "score increased",
    "worse": "score decreased",
    "wrong": "incorrect without change",
    "right": "still correct",
}
UNPAIRED_KIND_LABELS: dict[str, str] = {"wrong": "incorrect", "right": "correct"}


@dataclass
class LiveReportState:
    """Cache of the report that the training loop writes every `interval_s` seconds.

    Examples are rendered again only after new answers. Each thumbnail is created once.
    """

    interval_s: float
    _cache_key: Hashable = None
    _thumbnails: ThumbnailCache = field(default_factory=dict)
    _cached_examples: tuple[ExampleSet, JsonObject] = field(
        default_factory=lambda: (ExampleSet([], {}, "", False), {})
    )

    def get_examples(
        self, run_record: RunRecord, max_examples: int
    ) -> tuple[ExampleSet, JsonObject]:
        """Return the examples of a run and their HTML data.

        They are reused if no file has changed.
        """
        paths = *run_record.predictions_files, run_record.folder / RESPONSES_FILE
        file_versions = []
        for path in paths:
            if path.exists():
                file_versions.append((str(path), path.stat().st_mtime_ns))
        cache_key = max_examples, run_record.primary_metric, tuple(file_versions)
        if cache_key != self._cache_key:
            self._cached_examples = _build_examples(run_record, max_examples, self._thumbnails)
            self._cache_key = cache_key
        return self._cached_examples


def get_report_file(run_dir: Path, out: Path | None = None) -> PageFile:
    """Return the file of a report, by default `report.html` in the run folder."""
    return PageFile(out or run_dir / REPORT_FILE, "report", [run_dir])


def write_report(
    run_dir: Path,
    out: Path | None = None,
    max_examples: int = MAX_EXAMPLES,
    language: Language | None = None,
    live_state: LiveReportState | None = None,
) -> Path:
    """Write the HTML report of a run.

    Args:
        out: Output file; see `get_report_file`.
        live_state: Cache that the training process passes. None for a report after training.

    Returns:
        Path of the report.

    Raises:
        UserError: `run_dir` is not a run, or the file cannot be written.
    """
    target = get_report_file(run_dir, out)
    with use_language(language or detect_language()):
        target.write(render_run_page(run_dir, max_examples, live_state))
    return target.file


def write_incorrect_predictions(run_dir: Path, out: Path) -> int:
    """Write the incorrect answers of the latest evaluation as a prediction file (JSONL).

    An answer is incorrect if its score of the primary metric is below the maximum. Paths of images
    that exist are absolute, because recorded ones start at the working directory of the run.

    Returns:
        Number of answers.

    Raises:
        UserError: `run_dir` is not a run, or has no predictions with scores.
    """
    run_record = read_run(run_dir)
    if not run_record.predictions_files:
        raise UserError(
            f"{run_dir.name} has no predictions",
            where=str(run_dir),
            expected="a run with an evaluation",
            remedy=Step(
                "eval", {"run_or_model": str(run_dir)}, "set eval in the recipe, or evaluate it"
            ),
        )
    lines = read_incorrect_lines(run_record.predictions_files[-1], run_record.primary_metric)
    check_new_path(out)
    folders = list_image_folders([run_record])[::-1]
    for line in lines:
        found = [_make_absolute(path, folders) for path in read_image_paths(line)]
        if found:
            line["image"] = found if isinstance(line["image"], list) else found[0]
    write_new_file(out, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return len(lines)


def _make_absolute(path: str, folders: Sequence[Path]) -> str:
    """Return the absolute path of an image, or the given path if there is none."""
    file = find_image(path, folders)
    if get_file(file).exists():
        return os.path.abspath(file)
    return path


def render_run_page(
    run_dir: Path,
    max_examples: int = MAX_EXAMPLES,
    live_state: LiveReportState | None = None,
    max_bytes: int | None = None,
) -> str:
    """Render the report of a run in the current language. The run may be unfinished.

    Args:
        max_bytes: Maximum number of bytes of each file; see `read_run`.
    """
    run_record = read_run(run_dir, max_bytes=max_bytes)
    if live_state:
        examples, example_data = live_state.get_examples(run_record, max_examples)
    else:
        examples, example_data = _build_examples(run_record, max_examples)
    now = datetime.now(UTC)
    run_status = get_run_status(run_record, is_training=live_state is not None)
    charts = build_run_charts(run_record)
    result_context = _build_result_context(run_record, examples, example_data)
    evaluation_names = result_context["verdict"].names
    live_data = None
    if run_status.kind == "running":
        live_data = {"written_at": now.timestamp(), "interval_s": 0.0}
        if live_state:
            live_data["interval_s"] = live_state.interval_s
    examples_context = _build_examples_context(run_record, examples)
    displayed = example_data["examples"]
    example_question = ""
    if displayed:
        example_question = displayed[0]["question"]
    folder = run_record.folder.resolve()
    title = folder.name
    if folder.name in GENERIC_NAMES:
        title = "/".join(folder.parts[-2:])
    return render_page(
        "run",
        data={
            **example_data,
            "charts": [chart.data for chart in charts],
            "metric": format_metric_name(examples.metric),
            "evaluation_names": evaluation_names,
            "kind_labels": dict(examples_context["kind_labels"]),
            "worst": result_context["worst_examples"],
            "live": live_data,
        },
        assets=["charts", "results"],
        run_status=run_status,
        written_at=f"{now:%Y-%m-%d %H:%M:%S} UTC",
        live_state=live_state,
        title=title,
        run_record=run_record,
        evaluation_names=evaluation_names,
        reward_text=summary.describe_rewards(run_record),
        reward_signs=summary.list_reward_signs(run_record, example_data["groups"]),
        num_groups=len(example_data["groups"]),
        charts=charts,
        has_boxes=any(example["boxes"] for example in displayed),
        has_diff=any(map(_has_diff, displayed)),
        formulas_unavailable=_has_formulas(run_record) and not is_converter_installed(),
        report_command=Step("report", {"run": run_record.folder}),
        **result_context,
        **_build_guard_context(run_record),
        **examples_context,
        metrics=metric_rows,
        summary=summary,
        example_question=example_question,
    )


def _has_diff(example: JsonObject) -> bool:
    """Return whether an example has an answer that is compared with its reference as text."""
    return any(answer and answer["diff"] for answer in example["predictions"])


def _has_interval(row: MetricRow) -> bool:
    """Return whether a value of a metric, or its change, has a confidence interval."""
    return any(cell.interval or cell.change_interval for cell in row.cells)


def _build_result_context(
    run_record: RunRecord, examples: ExampleSet, example_data: JsonObject
) -> dict[str, Any]:
    """Return the template values of the result section."""
    verdict = judge_run(run_record, examples.answer_counts)
    evaluations = select_evaluations(run_record)
    last: JsonObject = {}
    if evaluations:
        last = evaluations[-1]
    details = _build_details(last)
    ranked = rank_incorrect_examples(example_data["examples"])
    error = find_main_error(details, example_data["examples"], ranked)
    is_complete = not examples.count_hidden()
    return {
        "verdict": verdict,
        "next_command": verdict.next_step and str(replace(verdict.next_step, purpose="")),
        "metric_rows": verdict.rows,
        "has_intervals": any(map(_has_interval, verdict.rows)),
        "notes": format_notes(iter_notes(verdict.rows)),
        "num_samples": verdict.num_samples,
        "frequent_errors": error.describe(examples.total if is_complete else None),
        "worst_examples": select_worst_examples(example_data, ranked, error.examples),
        **details,
    }


@dataclass(frozen=True)
class MainError:
    """Most frequent error of the answers: a field, or a confusion of two values.

    Attributes:
        field: Name of the field that is wrong in most answers; empty for none.
        prediction: Most frequent wrong value; empty if several values are missing or added.
        reference: Value of the reference instead of it.
        num_equal: Number of answers with this wrong value.
        examples: Indices of the examples on the page that have the error, the worst first.
    """

    field: str = ""
    prediction: str = ""
    reference: str = ""
    num_equal: int = 0
    examples: Sequence[int] = ()

    def describe(self, num_answers: int | None) -> list[str]:
        """Describe the error in the current language.

        Args:
            num_answers: Number of all answers. None if the page does not contain all of them.
        """
        texts = []
        if self.field and num_answers is None:
            texts.append(translate("in the field {}", self.field))
        elif self.field:
            text = "in the field {} ({:,} of {:,} answers)"
            texts.append(translate(text, self.field, len(self.examples), num_answers))
        if not self.num_equal:
            return texts
        values = self.prediction, self.reference
        if not self.field and num_answers is None:
            texts.append(translate("{} instead of {} ({:,} samples)", *values, self.num_equal))
        elif not self.field:
            text = "{} instead of {} ({:,} of {:,} answers)"
            texts.append(translate(text, *values, self.num_equal, num_answers))
        elif self.num_equal > 1:
            texts.append(translate("most often {} instead of {}", *values))
        else:
            texts.append(translate("for example {} instead of {}", *values))
        return texts


def find_main_error(
    details: Mapping[str, Any], shown: Sequence[JsonObject], ranked: Sequence[int]
) -> MainError:
    """Find the most frequent confusion of classes, else the field that is wrong most often.

    Args:
        shown: Page data of the examples.
        ranked: Indices of the incorrect examples, the worst first.
    """
    if details["confusions"]:
        reference, prediction, count = details["confusions"][0]
        found = []
        classes: set[str] = set()
        for example in shown:
            classes.update(map(fold_text, example["references"]))
        for index in ranked:
            references = map(fold_text, shown[index]["references"])
            answer = fold_text(_get_latest_answer(shown[index])["text"])
            is_other = prediction == OTHER_CLASS and answer not in classes
            if reference in references and (answer == prediction or is_other):
                found.append(index)
        return MainError("", prediction, reference, count, found)
    if not details["fields"]:
        return MainError()
    examples_by_field: defaultdict[str, list[int]] = defaultdict(list)
    values: defaultdict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for index in ranked:
        fields = _get_latest_answer(shown[index])["fields"] or {}
        for name, expected, predicted in fields.get("differences", ()):
            examples_by_field[name].append(index)
            if len(expected) == len(predicted) == 1:
                values[name][predicted[0], expected[0]] += 1
    if not examples_by_field:
        return MainError()
    name = max(examples_by_field, key=lambda one: len(examples_by_field[one]))
    prediction = ""
    reference = ""
    count = 0
    for pair, number in values[name].most_common(1):
        prediction, reference = pair
        count = number
    return MainError(name or "[ ]", prediction, reference, count, examples_by_field[name])


def _get_latest_answer(example: JsonObject) -> JsonObject:
    """Return the page data of the last answer of an example."""
    answers = [answer for answer in example["predictions"] if answer is not None]
    return as_object(answers[-1])


def rank_incorrect_examples(shown: Sequence[JsonObject]) -> list[int]:
    """Return the indices of the incorrect examples, those with the lowest scores first.

    The IoU ranks boxes that miss their reference, whose score is 0.
    """
    ranked = []
    for index, example in enumerate(shown):
        if example["is_incorrect"]:
            iou = _get_latest_answer(example)["scores"].get(format_metric_name("iou"), 0.0)
            known = [score for score in example["scores"] if score is not None]
            score = known[-1] if known else 0.0
            ranked.append((score, iou, example["row_index"], index))
    return [index for *_, index in sorted(ranked)]


def select_worst_examples(
    example_data: JsonObject, ranked: Sequence[int], preferred: Sequence[int]
) -> list[int]:
    """Return the first examples that have an image, those of `preferred` before others."""
    selected = []
    for index in dict.fromkeys([*preferred, *ranked]):
        images = [
            example_data["images"][image] for image in example_data["examples"][index]["images"]
        ]
        if any("src" in image for image in images):
            selected.append(index)
    return selected[:NUM_WORST_EXAMPLES]


def _build_guard_context(run_record: RunRecord) -> dict[str, Any]:
    """Return the template values of the regression guard: a row for each group of questions."""
    results: list[GroupResult] = []
    with suppress(ValidationError):
        results = GROUP_RESULTS.validate_python(run_record.guard.get("groups", []))
    rows = []
    for one in results:
        difference = one.difference
        name = f"{one.group}: {format_metric_name(difference.name)}"
        before = MetricCell(difference.before, None, num_samples=one.num_samples)
        after = MetricCell(difference.after, None, difference, num_samples=one.num_samples)
        rows.append(MetricRow(name, bool(one.problems), [before, after]))
    names = translate("base model"), translate("tuned model")
    return {"guard_results": results, "guard_rows": rows, "guard_names": names}


def _build_details(evaluation: JsonObject) -> dict[str, Any]:
    """Return the most frequent class confusions, and the fields with the lowest F1."""
    try:
        sections = _Details.model_validate(evaluation.get("details") or {})
    except ValidationError:
        sections = _Details()
    confusions = [row for row in sections.confusion if row[0] != row[1]]
    fields = sorted(sections.fields.items(), key=lambda pair: pair[1].f1)
    return {"confusions": confusions[:MAX_DETAIL_ROWS], "fields": fields[:MAX_DETAIL_ROWS]}


class _FieldScores(BaseModel):
    f1: float
    precision: float
    recall: float


class _Details(BaseModel):
    confusion: list[tuple[str, str, int]] = []
    fields: dict[str, _FieldScores] = {}


def _build_examples_context(run_record: RunRecord, examples: ExampleSet) -> dict[str, Any]:
    """Return the template values of the examples section."""
    kind_labels = KIND_LABELS if examples.is_paired else UNPAIRED_KIND_LABELS
    labels = {kind: translate(label) for kind, label in kind_labels.items()}
    text = "{:,} validation samples."
    if examples.metric and examples.is_paired:
        text = (
            "{:,} validation samples, classified by {}: the maximum is correct, and an answer that"
            " equals its reference; any other is incorrect."
        )
    elif examples.metric:
        text = "{:,} validation samples, classified by {}: the maximum is correct."
    note = translate(text, examples.total, format_metric_name(examples.metric))
    hidden_texts = []
    for kind, count in examples.count_hidden().items():
        hidden_texts.append(translate("{:,} {}", count, labels[kind]))
    if hidden_texts:
        text = " Not on this page: {}. The run folder contains all of them."
        note += translate(text, summary.join_words(hidden_texts))
    displayed_counts = dict.fromkeys(EXAMPLE_KINDS, 0)
    for example in examples.displayed:
        displayed_counts[example.kind] += 1
    displayed_counts["wrong"] = count_incorrect(examples.displayed)
    return {
        "examples": examples,
        "kind_labels": list(labels.items()),
        "displayed_counts": displayed_counts,
        "examples_note": note,
    }


def _get_metric(run_record: RunRecord) -> str | None:
    return as_object(run_record.recipe.get("eval")).get("metric")


def _has_formulas(run_record: RunRecord) -> bool:
    """Return whether the answers of a run are formulas."""
    return get_metric(_get_metric(run_record)).answer_content == "formula"


def _build_examples(
    run_record: RunRecord, max_examples: int, thumbnails: ThumbnailCache | None = None
) -> tuple[ExampleSet, JsonObject]:
    """Read examples from the predictions before training and the latest ones."""
    first, last = find_prediction_files(run_record)
    max_bytes = run_record.max_bytes
    examples = read_examples(first, last, run_record.primary_metric, max_examples, max_bytes)
    groups = read_groups(run_record.folder / RESPONSES_FILE, max_examples, max_bytes)
    has_formulas = _has_formulas(run_record) and is_converter_installed()
    folders = list_image_folders([run_record])
    builder = ExampleDataBuilder(folders, has_formulas, thumbnails)
    data = builder.build([*examples.displayed, *groups])
    num_examples = len(examples.displayed)
    data["groups"] = data["examples"][num_examples:]
    data["examples"] = data["examples"][:num_examples]
    return examples, data
