"""Check how a run ended, its files, its loss curve and its validation predictions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ValidationError

from finesight.doctor.diagnosis import Diagnosis, describe_error, join_command, make_diagnosis
from finesight.errors import Step, UserError, format_count, shorten
from finesight.evaluate.score_format import format_score
from finesight.evaluate.verdict import Verdict
from finesight.files.storage import verify_folder
from finesight.model_folder import ModelFolder, resolve_model_path
from finesight.report import summary
from finesight.report.run_reader import (
    JsonObject,
    RunRecord,
    is_finite,
    read_json_lines,
)
from finesight.report.run_verdict import judge_run
from finesight.samples.boxes import pairwise_overlap
from finesight.samples.corpus import Corpus, load_corpus
from finesight.samples.frames import PIXELS, UNIT_FRAMES, Box, BoxFrame, Floats, ImageSize
from finesight.samples.image_file import read_image_size
from finesight.samples.marked_prompt import write_marked_prompt
from finesight.samples.prompt_format import DEFAULT_TEMPLATE, PromptFormat
from finesight.samples.question_forms import (
    draw_samples,
    find_question,
    get_system_prompt,
    read_prompt_format,
)
from finesight.samples.sample import BoxPart
from finesight.settings import manifest
from finesight.settings.config import (
    DataFileSettings,
    ExactSize,
    LongestSide,
)
from finesight.settings.recipe import load_recipe
from finesight.settings.setting_types import is_url

MAX_NONFINITE_STEPS = 5
"""Number of consecutive steps with a non-finite loss after which a run stops."""

MIN_STEPS = 12
"""Minimum number of steps for the checks of the loss curve."""

NUM_WINDOWS = 10
"""Maximum number of windows of the loss curve."""

FLAT_FRACTION = 0.02
"""Relative decrease below which a loss is flat."""

CONVERGED_LOSS_RATIO = 0.5
"""Maximum ratio of the final to the initial loss of a converged run."""

MAX_TRUNCATED_SHARE = 0.5
"""Share of truncated responses from which truncation explains missing rewards."""

MIN_COMPLETION_LENGTH = 64
"""Smallest proposed `max_completion_length`; nearly all short answers have fewer tokens."""

REPETITION_PATTERN = re.compile(r"(.{1,60}?)\1{3,}.{0,60}$", re.DOTALL)
"""Pattern of a completion that ends with a repeated text."""


def diagnose_run(
    run_record: RunRecord, code: str, is_error: bool | None = None, /, **values: Any
) -> Diagnosis:
    """Create a diagnosis of a run. Remedies contain its folder, its recipe and a new folder.

    The list `overrides` contains settings of the next run.
    """
    folder = run_record.folder
    suffix = 2
    while (output := folder.with_name(f"{folder.name}-{suffix}")).exists():
        suffix += 1
    values["overrides"] = [*values.get("overrides", ()), f"output_dir={output}"]
    recipe = folder / manifest.RECIPE_FILE
    values |= {"folder": folder, "quoted_folder": join_command(folder), "recipe": recipe}
    return make_diagnosis(code, is_error, **values)


def _get_learning_rates(run_record: RunRecord) -> dict[str, float]:
    """Return the learning rates of a run by part of the model, `default` first."""
    return summary.load_run_recipe(run_record).train.learning_rate.model_dump(exclude_none=True)


def _scale_learning_rates(run_record: RunRecord, factor: float | None = None) -> list[str]:
    """Return the overrides that multiply every learning rate of a run by a factor.

    The default factor is 0.1, or less for a maximum learning rate of 1e-3.
    """
    values = _get_learning_rates(run_record)
    factor = factor or min(0.1, 1e-3 / max(values.values()))
    overrides = []
    for part, value in values.items():
        scaled = float(f"{value * factor:.0e}")
        overrides.append(f"train.learning_rate.{part}={scaled:g}")
    return overrides


def check_run_end(run_record: RunRecord) -> list[Diagnosis]:
    """Check that a run has finished and that its files are complete."""
    status = summary.get_run_status(run_record)
    num_trailing = 0
    for line in reversed(run_record.steps):
        if not line.get("nonfinite_samples"):
            break
        num_trailing += 1
    diagnoses = [*_check_nonfinite_steps(run_record, num_trailing)]
    if status.kind in ("finished", "running"):
        text = summary.describe_progress(run_record)
        if status.kind == "running":
            text = "running"
        diagnoses.insert(0, make_diagnosis("run-end", status=text))
    elif num_trailing < MAX_NONFINITE_STEPS:
        diagnoses = [*_check_unfinished(run_record), *diagnoses]
    return [*diagnoses, *_check_files(run_record), *_check_skipped_samples(run_record)]


def _check_nonfinite_steps(run_record: RunRecord, num_trailing: int) -> Iterator[Diagnosis]:
    """Report steps with a non-finite loss, of which `num_trailing` are the last of the run."""
    lines = [line for line in run_record.steps if line.get("nonfinite_samples")]
    if not lines:
        return
    code = "not-finite.single"
    count = len(lines)
    if num_trailing >= MAX_NONFINITE_STEPS:
        code = "not-finite"
        count = num_trailing
    yield diagnose_run(
        run_record,
        code,
        samples=", ".join(map(str, lines[-1]["nonfinite_samples"][:4])),
        count=count,
        total=len(run_record.steps),
        overrides=[*_scale_learning_rates(run_record), "train.precision=bf16"],
    )


MEMORY_ERRORS = ("GPU memory is full", "CUDA out of memory")
"""Texts of the reason of a run that has ended for lack of GPU memory."""


def _check_unfinished(run_record: RunRecord) -> Iterator[Diagnosis]:
    """Report the end of an unfinished run, its newest checkpoint and how to resume."""
    folder = run_record.folder / manifest.CHECKPOINTS_FOLDER
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*")]
    steps = [0, *sorted(int(name) for name in names if name.isdecimal())]
    status = summary.get_run_status(run_record)
    num_lost_steps = summary.get_last_step(run_record) - steps[-1]
    code = "unfinished"
    if status.kind == "killed":
        code = "unfinished.killed"
    reason = status.reason or ""
    if any(text in reason for text in MEMORY_ERRORS):
        code = "unfinished.memory"
    checkpoint = "newest checkpoint: none"
    if steps[-1]:
        checkpoint = f"newest checkpoint: step {steps[-1]}"
    repeated = ""
    if num_lost_steps > 0:
        repeated = f"; {num_lost_steps} steps will be repeated"
    yield diagnose_run(
        run_record,
        code,
        progress=summary.describe_progress(run_record),
        checkpoint=checkpoint,
        kind="it was interrupted" if status.kind == "interrupted" else "it failed",
        reason=status.reason or "no recorded reason",
        repeated=repeated,
    )
    try:
        if steps[-1]:
            verify_folder(folder / f"step-{steps[-1]}")
    except UserError as error:
        problem = describe_error(error)
        previous = steps[-2] or "none"
        yield diagnose_run(run_record, "checkpoint-damaged", problem=problem, previous=previous)


def _check_files(run_record: RunRecord) -> Iterator[Diagnosis]:
    """Check base model, trained weights, records and recipe."""
    yield from _check_base_model(run_record)
    for name in (manifest.ADAPTER_FOLDER, manifest.MODEL_FOLDER):
        folder = run_record.folder / name
        try:
            if folder.is_dir():
                verify_folder(folder)
        except UserError as error:
            # A run without a result writes the final files again from the last checkpoint.
            remove = join_command("rm", "-r", folder, run_record.folder / manifest.RESULT_FILE)
            problem = describe_error(error)
            yield diagnose_run(run_record, "weights-damaged", problem=problem, remove=remove)
    if run_record.unreadable_files:
        files = ", ".join(run_record.unreadable_files)
        yield diagnose_run(run_record, "records-damaged", files=files)
    try:
        load_recipe(run_record.folder / manifest.RECIPE_FILE)
    except UserError as error:
        texts = {"problem": describe_error(error), "advice": error.remedy}
        yield diagnose_run(run_record, "recipe.run", run_record.result is None, **texts)


def _check_base_model(run_record: RunRecord) -> Iterator[Diagnosis]:
    """Check that the files of a local base model have not changed."""
    base_model = run_record.manifest.get("base_model")
    expected = run_record.manifest.get("base_fingerprint")
    path = resolve_model_path(str(base_model))
    if not isinstance(base_model, str) or not (path.is_absolute() or path.is_dir()):
        return
    code = "base-missing"
    fingerprint = ""
    if path.is_dir():
        code = "base-changed"
        try:
            fingerprint = ModelFolder(path).fingerprint()
        except UserError as error:
            fingerprint = error.what
    if fingerprint != expected:
        values = {"path": path, "fingerprint": fingerprint, "expected": str(expected)}
        yield diagnose_run(run_record, code, **values, name=join_command(path.name))


def _check_skipped_samples(run_record: RunRecord) -> Iterator[Diagnosis]:
    for split, title in (("train", "training"), ("eval", "validation")):
        rows = [row for row in run_record.skipped_samples if row.get("split", "train") == split]
        if not rows:
            continue
        record = replace(run_record, skipped_samples=rows)
        (largest, reason, ids), *_ = summary.list_skipped_samples(record)
        # Samples skipped at the start are not in the statistics.
        total = sum(row.get("step") is None for row in rows)
        num_samples = summary.get_data_stats(run_record, split).get("num_samples")
        if isinstance(num_samples, int):
            total += num_samples
        total = max(len(rows), total)
        code = "samples-skipped"
        overrides: list[str] = []
        match = re.fullmatch(r"over (\d+) tokens", reason)
        if match is not None:
            code = "samples-skipped.long"
            overrides = [f"data.max_length={2 * int(match[1])}"]
        texts = {"reason": reason, "samples": ids, "overrides": overrides}
        values = {"split": title, "count": len(rows), "total": total, "largest": largest}
        yield diagnose_run(run_record, code, len(rows) > 0.05 * total, **values, **texts)


def _finite_values(lines: Iterable[JsonObject], name: str) -> list[float]:
    return [float(line[name]) for line in lines if is_finite(line.get(name))]


def check_training(run_record: RunRecord) -> list[Diagnosis]:
    """Check the recorded metrics: rewards, if the run has any, instead of the loss of a policy."""
    diagnoses: list[Diagnosis] = []
    if summary.load_run_recipe(run_record).needs.rewards:
        diagnoses += _check_rewards(run_record)
    else:
        diagnoses += _check_loss_curve(run_record)
        diagnoses += _check_loss_spikes(run_record)
    diagnoses += _check_overfitting(run_record)
    return diagnoses


class _LossCurve(NamedTuple):
    """Loss over a run by windows of steps, in nats per token.

    Attributes:
        first: Loss of the first step.
        initial: Median loss of the first window.
        middle: Median loss of the window in the middle.
        final: Median loss of the last window.
        low: Lowest median loss of a window.
        high: Highest median loss of a window.
        noise: Standard deviation within windows, estimated from the median deviation.
    """

    first: float
    initial: float
    middle: float
    final: float
    low: float
    high: float
    noise: float

    @property
    def is_flat(self) -> bool:
        """True if the loss has not decreased by more than the noise."""
        return self.initial - self.final < max(FLAT_FRACTION * self.initial, self.noise)

    @classmethod
    def from_losses(cls, losses: Sequence[float]) -> _LossCurve:
        """Summarize the losses of at least three steps."""
        num_windows = min(NUM_WINDOWS, len(losses) // 3)
        ends = [round(len(losses) * index / num_windows) for index in range(num_windows + 1)]
        medians = []
        deviations = []
        for start, end in pairwise(ends):
            window = losses[start:end]
            center = median(window)
            medians.append(center)
            deviations += [abs(loss - center) for loss in window]
        return cls(
            first=losses[0],
            initial=medians[0],
            middle=medians[num_windows // 2],
            final=medians[-1],
            low=min(medians),
            high=max(medians),
            noise=1.4826 * median(deviations),
        )


def _check_loss_curve(run_record: RunRecord) -> Iterator[Diagnosis]:
    """Compare loss and gradient norms at the start and end of a run."""
    losses = _finite_values(run_record.steps, "loss")
    norms = _finite_values(run_record.steps, "grad_norm")
    if min(len(losses), len(norms)) < MIN_STEPS:
        counts = {"count": format_count(len(run_record.steps), "step"), "minimum": MIN_STEPS}
        overrides = summary.scale_duration(run_record, MIN_STEPS / max(1, len(run_record.steps)))
        yield diagnose_run(run_record, "too-short", **counts, overrides=overrides)
        return
    curve = _LossCurve.from_losses(losses)
    edge = max(2, len(norms) // NUM_WINDOWS)
    initial_norm = median(norms[:edge])
    final_norm = median(norms[-edge:])
    learning_rates = _get_learning_rates(run_record).values()
    values = {
        "first": curve.first,
        "initial": curve.initial,
        "last": curve.final,
        "low": curve.low,
        "high": curve.high,
        "initial_norm": initial_norm,
        "final_norm": final_norm,
        "rates": ", ".join(f"{value:g}" for value in learning_rates),
    }
    symptom = _find_symptom(curve, final_norm < 0.1 * initial_norm)
    if symptom is not None:
        has_recovered = symptom == "spike" and curve.final < CONVERGED_LOSS_RATIO * curve.first
        code = f"learning-rate-too-high.{symptom}"
        overrides = _scale_learning_rates(run_record)
        yield diagnose_run(run_record, code, not has_recovered, **values, overrides=overrides)
        return
    if not curve.is_flat:
        yield diagnose_run(run_record, "loss", **values)
        return
    if curve.initial < 0.05:  # nats per token: training has little effect
        yield diagnose_run(run_record, "low-initial-loss", **values)
        return
    # A low learning rate, or weights that changed by less than 2 %, indicate small updates.
    rows = [row for row in run_record.param_changes or () if row.get("is_trained")]
    change = max(_finite_values(rows, "relative_change"), default=math.inf)
    has_low_rate = max(learning_rates) < 5e-5
    code = "loss-flat.rate" if has_low_rate or change < 0.02 else "loss-flat"
    factor = 1e-4 / max(learning_rates) if has_low_rate else 10.0
    overrides = _scale_learning_rates(run_record, factor)
    yield diagnose_run(run_record, code, **values, overrides=overrides)


def _find_symptom(curve: _LossCurve, has_small_gradients: bool) -> str | None:
    """Return the symptom of a high learning rate in a loss curve; None without one.

    Args:
        has_small_gradients: Whether the final gradients are much smaller than the initial ones.
    """
    if curve.final > 1.25 * curve.low and curve.final - curve.low > 4 * curve.noise:
        return "rising"
    if curve.high > 1.5 * curve.first and curve.high - curve.first > 6 * curve.noise:
        return "spike"
    is_constant = abs(curve.middle - curve.final) < FLAT_FRACTION * curve.initial
    has_vanished = is_constant and has_small_gradients
    if has_vanished and curve.final > CONVERGED_LOSS_RATIO * curve.initial:
        return "vanished"
    return None


def _check_loss_spikes(run_record: RunRecord) -> Iterator[Diagnosis]:
    spikes = [line for line in run_record.steps if line.get("loss_spike_samples")]
    if len(spikes) >= 3:
        sample_ids: list[str] = []
        for line in spikes:
            sample_ids += map(str, line["loss_spike_samples"])
        yield diagnose_run(
            run_record,
            "loss-spikes",
            count=len(spikes),
            steps=", ".join(str(line["step"]) for line in spikes[:6]),
            samples=", ".join(sample_ids[:4]),
            overrides=[*_scale_learning_rates(run_record, 1 / 3), "train.warmup=0.1"],
        )


def _check_overfitting(run_record: RunRecord) -> Iterator[Diagnosis]:
    """Report the overfitting that the report of the run describes."""
    lines = [*run_record.steps, *run_record.evaluations]
    # Early stopping saves the weights of the best step: later losses do not matter.
    end = (run_record.result or {}).get("weights_step") or math.inf
    found = summary.find_overfitting([line for line in lines if line["step"] <= end])
    if found is None:
        return
    best = found[-1]
    overrides = _scale_learning_rates(run_record, 0.3)
    if run_record.recipe.get("eval"):
        overrides = ["eval.every=0.1", "eval.patience=2"]
    elif best:
        overrides = summary.scale_duration(run_record, best / int(run_record.steps[-1]["step"]))
    yield diagnose_run(run_record, "overfitted", sign=found[0], step=best, overrides=overrides)


def _check_rewards(run_record: RunRecord) -> Iterator[Diagnosis]:
    """Report the change of rewards, groups without gradient, and truncated responses."""
    (_, last), gains = summary.compare_rewards(run_record)
    equal = mean(_finite_values(last, "frac_reward_zero_std") or [1.0])
    truncated_shares = _finite_values(last, "completions/clipped_ratio")
    truncated = mean(truncated_shares or [1.0])
    is_better = any(verdict == "better" for _, verdict in gains.values())
    is_good = is_better and max(equal, truncated) <= 0.5
    change = summary.describe_rewards(run_record) or "no step with rewards"
    code = "rewards" if is_good else "rewards-flat"
    overrides: list[str] = []
    sampling = summary.load_run_recipe(run_record).needs.sampling
    assert sampling is not None, "rewards without responses"
    limit = sampling.max_completion_length
    if truncated_shares and truncated > MAX_TRUNCATED_SHARE:
        code = "rewards-truncated"
        longer = max(MIN_COMPLETION_LENGTH, 4 * limit)
        overrides = [f"{sampling.section}.max_completion_length={longer}"]
    values = {"change": change, "equal": equal, "truncated": truncated, "limit": limit}
    values["section"] = sampling.section
    yield diagnose_run(run_record, code, **values, overrides=overrides)


class SavedPrediction(BaseModel):
    """Validation prediction of a run with its reference, from a prediction file."""

    id: str = ""
    image: str | None = None
    answer: str = ""
    gold: str = ""
    boxes: tuple[BoxPart, ...] = ()
    gold_boxes: tuple[BoxPart, ...] = ()
    finish_reason: str = "stop"


def check_questions(run_record: RunRecord) -> list[Diagnosis]:
    """Check whether the validation questions have the form of the training questions."""
    data = summary.load_run_recipe(run_record).data
    try:
        training = PromptFormat.from_run(run_record.folder)
    except UserError:
        return []
    if not training.templates:
        corpus = _open_local_corpus(data.train)
        if corpus is None:
            return []
        training = read_prompt_format(corpus, range(len(corpus)))
        if training.templates and training.templates[0].template != DEFAULT_TEMPLATE:
            form = repr(training.templates[0].template)
            return [diagnose_run(run_record, "questions-unrecorded", form=form)]
    diagnoses = []
    for note in training.describe_forms():
        diagnoses.append(diagnose_run(run_record, "questions-several", note=str(note)))
    diagnoses += _check_validation_questions(run_record, training, data.eval)
    if diagnoses or not training.templates:
        return diagnoses
    form = repr(training.templates[0].template)
    return [make_diagnosis("questions", form=form)]


def _check_validation_questions(
    run_record: RunRecord, training: PromptFormat, files: Sequence[DataFileSettings]
) -> Iterator[Diagnosis]:
    """Report validation questions that no text gives in the form of the training."""
    corpus = _open_local_corpus(files)
    if corpus is None or not training.templates:
        return
    num_questions = 0
    example = ""
    num_different = 0
    for _, located in draw_samples(corpus, range(len(corpus))):
        content = find_question(located.sample)
        if content is None:
            continue
        num_questions += 1
        if not training.can_be_question(content, get_system_prompt(located.sample)):
            num_different += 1
            example = example or shorten(repr(write_marked_prompt(content)), 200)
    if num_different:
        known = ", ".join(repr(template.template) for template in training.templates)
        share = num_different / num_questions
        yield diagnose_run(
            run_record, "questions-differ", share=share, example=example, known=known
        )


def _open_local_corpus(files: Sequence[DataFileSettings]) -> Corpus | None:
    """Open data files; None without readable local files."""
    if not files or any(is_url(file.path) for file in files):
        return None
    try:
        return load_corpus(files)
    except UserError:
        return None


def check_predictions(run_record: RunRecord) -> list[Diagnosis]:
    """Check the validation predictions of a run and their scores."""
    if not run_record.evaluations:
        return [diagnose_run(run_record, "not-evaluated")]
    predictions = []
    for file in run_record.predictions_files[-1:]:
        for line in read_json_lines(file):
            try:
                predictions.append(SavedPrediction.model_validate(line))
            except ValidationError:
                continue
    diagnoses = [
        *_check_primary_metric(run_record),
        *_check_end_tokens(run_record, predictions),
        *_check_box_conventions(run_record, predictions),
    ]
    if not predictions:
        return [*diagnoses, make_diagnosis("predictions.none")]
    return diagnoses or [make_diagnosis("predictions", count=len(predictions))]


def _check_primary_metric(run_record: RunRecord) -> Iterator[Diagnosis]:
    """Report the change of the primary metric between the start and the end of training."""
    if run_record.result is None:
        return
    verdict = judge_run(run_record)
    row = verdict.primary_row
    difference = verdict.cell.difference
    if row is None or not row.is_primary or difference is None:
        return
    better = summary.find_better_evaluation(run_record)
    codes: dict[Verdict, str] = {
        "better": "metric",
        "worse": "metric-worse" if better is None else "metric-worse.peak",
        "no clear change": "metric-unclear",
        "": "metric-unjudged",
    }
    best, step = better or (math.nan, 0)
    before, after = verdict.cell.common_texts
    interval = ""
    if difference.interval_text:
        interval = f" ({difference.interval_text})"
    remedy = verdict.next_step
    if remedy is None or remedy.operation == "doctor":
        # The page of the run, which shows the answers and their references.
        remedy = Step("report", {"run": str(run_record.folder)})
    yield diagnose_run(
        run_record,
        codes[verdict.level],
        change=f"{row.name} {before} before, {after} after training",
        interval=interval,
        reason=difference.note or "no interval",
        best=format_score(best, verdict.cell.num_samples),
        step=step,
        remedy=replace(remedy, purpose=""),
    )


def _check_end_tokens(
    run_record: RunRecord, predictions: Sequence[SavedPrediction]
) -> Iterator[Diagnosis]:
    """Detect completions that reached the token limit without an end token."""
    unfinished = [prediction for prediction in predictions if prediction.finish_reason != "stop"]
    if len(unfinished) <= 0.05 * len(predictions):
        return
    settings = summary.load_run_recipe(run_record).eval
    limit = 512
    if settings is not None:
        limit = settings.max_new_tokens
    num_repeating = 0
    for prediction in unfinished:
        if REPETITION_PATTERN.search(prediction.answer[-400:]):
            num_repeating += 1
    longest = max(len(prediction.gold) for prediction in unfinished)
    shortest = min(len(prediction.answer) for prediction in unfinished)
    is_truncated = num_repeating * 2 < len(unfinished) and longest > 0.9 * shortest
    yield diagnose_run(
        run_record,
        "answers-truncated" if is_truncated else "answers-unfinished",
        count=len(unfinished),
        total=len(predictions),
        repetitive=num_repeating,
        limit=limit,
        higher=4 * limit,
        longest=longest,
        shortest=shortest,
        overrides=summary.scale_duration(run_record, 2.0),
    )


def _check_box_conventions(
    run_record: RunRecord, predictions: Sequence[SavedPrediction]
) -> Iterator[Diagnosis]:
    """Detect predicted boxes or labels that follow another box convention.

    If the boxes barely overlap, the coordinates of one side are converted from other conventions. A
    convention that makes them overlap is reported. Only predictions with the expected number of
    boxes and an existing image are used.
    """
    predicted_boxes: list[Box] = []
    label_boxes: list[Box] = []
    sizes: list[ImageSize] = []
    folder = Path(str(summary.get_last_start(run_record).get("working_dir") or "."))
    for one in predictions:
        if one.boxes and one.image and len(one.boxes) == len(one.gold_boxes):
            try:
                size = read_image_size(folder / one.image)
            except UserError:
                continue
            predicted_boxes += [box.xyxy for box in one.boxes]
            label_boxes += [box.xyxy for box in one.gold_boxes]
            sizes += [size] * len(one.boxes)
    if len(predicted_boxes) < 8:
        return
    predicted_N4 = np.array(predicted_boxes, np.float64)
    labels_N4 = np.array(label_boxes, np.float64)
    heights_N, widths_N = np.array(sizes, np.float64).T

    def mean_iou(coordinates_N4: Floats, others_N4: Floats, meaning: BoxFrame) -> float:
        # Conventions that do not apply to some coordinates give invalid boxes with IoU 0.
        with np.errstate(all="ignore"):
            boxes_N4 = meaning.to_fractions(coordinates_N4, heights_N, widths_N)
            other_boxes_N4 = PIXELS.to_fractions(others_N4, heights_N, widths_N)
            return float(np.nan_to_num(pairwise_overlap(boxes_N4, other_boxes_N4)).mean())

    current_iou = mean_iou(predicted_N4, labels_N4, PIXELS)
    candidates = []
    sides = (("predictions", predicted_N4, labels_N4), ("labels", labels_N4, predicted_N4))
    for subject, coordinates_N4, others_N4 in sides:
        hypotheses = _list_hypotheses(run_record, coordinates_N4, others_N4)
        for meaning, convention, options in hypotheses:
            iou = mean_iou(coordinates_N4, others_N4, meaning)
            candidates.append((iou, subject, convention, options))
    best, subject, convention, options = max(candidates)
    if current_iou < 0.5 and best >= max(0.5, current_iou + 0.2):
        values = {"subject": subject, "convention": convention, "options": options, "best": best}
        yield diagnose_run(run_record, "box-convention-mismatch", **values, current=current_iou)


def _list_hypotheses(
    run_record: RunRecord, coordinates_N4: Floats, references_N4: Floats
) -> Iterator[tuple[BoxFrame, str, str]]:
    """Yield the box conventions that coordinates may follow, with description and import options.

    These are another order of the values, thousandths, percent, fractions, pixels of the resized
    image of the recipe, and pixels of a copy with a constant scale.
    """
    yield BoxFrame("xywh"), "x, y, width, height", "--box-format xywh"
    yield BoxFrame("cxcywh"), "center, width, height", "--box-format cxcywh"
    yield BoxFrame("yxyx"), "y1, x1, y2, x2", "--box-format yxyx"
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = coordinates_N4 / references_N4
    valid_ratios = ratios[np.isfinite(ratios) & (ratios > 0)]
    scale = 1.0
    if len(valid_ratios):
        scale = float(np.median(valid_ratios))
    copy = "in pixels of a copy"
    pixels = "pixels of the original image"
    frames = [
        (UNIT_FRAMES["1000"], "in thousandths of the image", "--box-units 1000"),
        (UNIT_FRAMES["100"], "in percent of the image", "--box-units 100"),
        (UNIT_FRAMES["1"], "in fractions of the image", "--box-units 1"),
        (BoxFrame(base="factor", width=scale), f"{copy} scaled by {scale:.2g}", pixels),
    ]
    image = summary.load_run_recipe(run_record).image
    if isinstance(image, ExactSize):
        frame = BoxFrame(base="fixed", width=float(image.width), height=float(image.height))
        frames.append((frame, f"{copy} of {image.width} x {image.height}", pixels))
    if isinstance(image, LongestSide):
        frame = BoxFrame(base="longest", width=float(image.longest_side))
        frames.append((frame, f"{copy} whose longest side is {image.longest_side}", pixels))
    for frame, text, option in frames:
        yield frame, text, option
