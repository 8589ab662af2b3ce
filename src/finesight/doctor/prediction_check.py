"""Check the validation predictions of a run.

Detects lower scores, unfinished completions and mismatched box conventions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, FiniteFloat, ValidationError

from finesight.check.box_hypothesis import (
    DEFAULT_CONVENTION,
    BoxClaim,
    BoxClaimTable,
    BoxFrame,
    BoxHypothesis,
    Floats,
    hypothesis_from_convention,
    pairwise_iou,
)
from finesight.config import ExactSize, LongestSide
from finesight.data.image_header import read_image_size
from finesight.data.sample import BoxPart
from finesight.doctor.diagnosis import Diagnosis, format_command, make_error, make_ok, make_warning
from finesight.doctor.rerun_commands import load_run_recipe, rerun_command, scale_duration
from finesight.errors import UserError
from finesight.report.run_reader import RunRecord, read_json_lines
from finesight.report.summary import get_last_start

MAX_UNFINISHED_FRACTION = 0.05
"""Maximum fraction of completions without an end token. More are an error."""

REPETITION_PATTERN = re.compile(r"(.{1,60}?)\1{3,}.{0,60}$", re.DOTALL)
"""Pattern of a completion that ends with a repeated text."""

MIN_BOXES = 8
"""Minimum number of predicted boxes for the comparison of box conventions."""

LOW_IOU, GOOD_IOU, MIN_IOU_GAIN = 0.5, 0.5, 0.2
"""Thresholds of the mean IoU for the comparison of box conventions.

They are the value below which boxes count as wrong, the minimum of a matching convention, and its
minimum gain over the current convention.
"""

DEFAULT_MAX_NEW_TOKENS = 512
"""Limit on new tokens of a run whose recipe has no evaluation settings."""


class SavedPrediction(BaseModel):
    """Validation prediction of a run with its reference, from a prediction file."""

    id: str = ""
    image: str | None = None
    answer: str = ""
    gold: str = ""
    boxes: tuple[BoxPart, ...] = ()
    gold_boxes: tuple[BoxPart, ...] = ()
    stopped: bool = True


class RecordedDifference(BaseModel):
    """Difference of a metric before and after training, from the result of a run."""

    name: str
    before: FiniteFloat
    after: FiniteFloat
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    verdict: str = ""


RecordT = TypeVar("RecordT", bound=BaseModel)


def _parse_line(model_type: type[RecordT], line: object) -> RecordT | None:
    """Convert a JSON line to a model, or return None if it is corrupt."""
    try:
        return model_type.model_validate(line)
    except ValidationError:
        return None


def check_predictions(run_record: RunRecord) -> list[Diagnosis]:
    """Check the validation predictions of a run and their scores."""
    if not run_record.evaluations:
        return [
            make_warning(
                "not-evaluated",
                "the run was not evaluated",
                why="the effect of training is unknown; set validation samples (data.eval)"
                " and a metric",
                remedy=rerun_command(
                    run_record, "data.eval=VALIDATION.jsonl", "eval.metric=captions"
                ),
            )
        ]
    diagnoses = list(_check_primary_metric(run_record))
    lines = (
        read_json_lines(run_record.predictions_files[-1]) if run_record.predictions_files else ()
    )
    predictions = [
        prediction
        for line in lines
        if (prediction := _parse_line(SavedPrediction, line)) is not None
    ]
    diagnoses += [
        *_check_unfinished(run_record, predictions),
        *_check_box_frames(run_record, predictions),
    ]
    if not predictions:
        return [
            *diagnoses,
            make_ok("predictions", "only the validation loss was computed: eval.metric is not set"),
        ]
    return diagnoses or [
        make_ok("predictions", f"{len(predictions)} validation predictions without problems")
    ]


def _check_primary_metric(run_record: RunRecord) -> Iterator[Diagnosis]:
    """Report the change of the primary metric between the start and the end of training."""
    primary_metric = next(
        (line.get("primary_metric") for line in reversed(run_record.evaluations)), None
    )
    differences = (run_record.result or {}).get("metric_differences")
    changes = [
        _parse_line(RecordedDifference, change)
        for change in (differences if isinstance(differences, list) else ())
    ]
    change = next(
        (change for change in changes if change is not None and change.name == primary_metric), None
    )
    if change is None:
        return
    description = f"{change.name} {change.before:.4f} before, {change.after:.4f} after training"
    if change.verdict == "worse":
        yield _diagnose_worse(run_record, change, description)
    elif change.verdict == "better":
        yield make_ok("metric", description)
    else:
        yield _diagnose_unclear(run_record, description, change)


def _diagnose_worse(
    run_record: RunRecord, change: RecordedDifference, description: str
) -> Diagnosis:
    scores_by_step = [
        (line.get("scores") or {}, line["step"]) for line in run_record.evaluations if line["step"]
    ]
    values = [(scores.get(change.name), step) for scores, step in scores_by_step]
    measured = [(value, step) for value, step in values if isinstance(value, int | float)]
    best, step = max(measured, default=(-math.inf, 0))
    if best > change.after:
        return make_error(
            "metric-worse",
            f"{description}: worse; it was {best:.4f} after step {step}",
            why="the run continued after its best checkpoint; early stopping keeps the best"
            " weights",
            remedy=rerun_command(run_record, "eval.every=0.1", "eval.patience=2"),
        )
    return make_error(
        "metric-worse",
        f"{description}: worse",
        why="the training samples differ from the task of the evaluation: compare the worse"
        " completions with their references",
        remedy=format_command("finesight", "report", str(run_record.folder)),
    )


def _diagnose_unclear(
    run_record: RunRecord, description: str, change: RecordedDifference
) -> Diagnosis:
    interval_note = ""
    if change.low is not None and change.high is not None:
        interval_note = f" ({change.low:+.4f} to {change.high:+.4f})"
    settings = load_run_recipe(run_record).eval
    if settings is not None and settings.limit:
        # The interval width is proportional to 1 / sqrt(number of samples).
        remedy = format_command(
            "finesight", "eval", str(run_record.folder), "--limit", str(4 * settings.limit)
        )
    else:
        remedy = rerun_command(run_record, *scale_duration(run_record, 2.0))
    return make_warning(
        "metric-unclear",
        f"{description}: the difference is within noise{interval_note}",
        why="four times as many validation samples halve the interval; or the run was too short",
        remedy=remedy,
    )


def _check_unfinished(
    run_record: RunRecord, predictions: Sequence[SavedPrediction]
) -> Iterator[Diagnosis]:
    """Detect completions that reached the token limit without an end token."""
    unfinished = [prediction for prediction in predictions if not prediction.stopped]
    if not predictions or len(unfinished) <= MAX_UNFINISHED_FRACTION * len(predictions):
        return
    description = f"{len(unfinished)} of {len(predictions)} completions have no end token"
    settings = load_run_recipe(run_record).eval
    limit = settings.max_new_tokens if settings else DEFAULT_MAX_NEW_TOKENS
    repeating = [
        prediction
        for prediction in unfinished
        if REPETITION_PATTERN.search(prediction.answer[-2000:])
    ]
    max_reference_length = max(len(prediction.gold) for prediction in unfinished)
    min_answer_length = min(len(prediction.answer) for prediction in unfinished)
    if len(repeating) * 2 < len(unfinished) and max_reference_length > 0.9 * min_answer_length:
        out = str(run_record.folder / "longer.jsonl")
        options = ["--max-new-tokens", str(4 * limit), "--out", out]
        yield make_error(
            "answers-cut-off",
            f"{description}: truncated at {limit} tokens (eval.max_new_tokens)",
            why=f"their references have up to {max_reference_length} characters, the shortest"
            f" completion has {min_answer_length}",
            remedy=format_command("finesight", "eval", str(run_record.folder), *options),
        )
        return
    repeat_note = f", {len(repeating)} of them repetitive" if repeating else ""
    yield make_error(
        "answers-unfinished",
        f"{description}{repeat_note}",
        why="the model has not learned the end token: the run was too short, or the training"
        " answers end inconsistently",
        remedy=rerun_command(run_record, *scale_duration(run_record, 2.0)),
    )


def _check_box_frames(
    run_record: RunRecord, predictions: Sequence[SavedPrediction]
) -> Iterator[Diagnosis]:
    """Detect predicted boxes or labels that follow another box convention.

    If the boxes barely overlap, the coordinates of one side are converted from other conventions. A
    convention that makes them overlap is reported.
    """
    predicted_claims, label_claims = _collect_claims(run_record, predictions)
    if len(predicted_claims) < MIN_BOXES:
        return
    current = hypothesis_from_convention(DEFAULT_CONVENTION)
    predicted, labels = BoxClaimTable(predicted_claims), BoxClaimTable(label_claims)
    current_iou = float(_compute_ious(current, predicted, current, labels).mean())
    if current_iou >= LOW_IOU:
        return
    hypotheses = _list_hypotheses(run_record, predicted, labels)
    candidates = [
        (
            float(_compute_ious(hypothesis, predicted, current, labels).mean()),
            hypothesis,
            "predictions",
        )
        for hypothesis in hypotheses
    ]
    hypotheses = _list_hypotheses(run_record, labels, predicted)
    candidates += [
        (float(_compute_ious(current, predicted, hypothesis, labels).mean()), hypothesis, "labels")
        for hypothesis in hypotheses
    ]
    best_iou, hypothesis, subject = max(candidates, key=lambda candidate: candidate[0])
    if best_iou < max(GOOD_IOU, current_iou + MIN_IOU_GAIN):
        return
    yield make_error(
        "box-convention-mismatch",
        f"the boxes of the {subject} are {_describe_hypothesis(hypothesis)}: with this"
        f" convention, the mean IoU is {best_iou:.2f} instead of {current_iou:.2f}",
        why="training and validation data were imported with different options: import both"
        f" again with {_suggest_options(hypothesis)}",
        remedy=format_command("finesight", "data", "check", str(run_record.folder / "recipe.yaml")),
    )


def _collect_claims(
    run_record: RunRecord, predictions: Sequence[SavedPrediction]
) -> tuple[list[BoxClaim], list[BoxClaim]]:
    """Collect the coordinates of predicted boxes and of their labels.

    Only predictions with the expected number of boxes and an existing image are used.
    """
    predicted, labels = [], []
    folder = Path(str(get_last_start(run_record).get("working_dir") or "."))
    for prediction in predictions:
        if (
            not prediction.boxes
            or len(prediction.boxes) != len(prediction.gold_boxes)
            or not prediction.image
        ):
            continue
        path = folder / prediction.image
        try:
            size = read_image_size(path)
        except UserError:
            continue
        predicted += [_build_claim(prediction, path, size, box) for box in prediction.boxes]
        labels += [_build_claim(prediction, path, size, box) for box in prediction.gold_boxes]
    return predicted, labels


def _build_claim(
    prediction: SavedPrediction, path: Path, size: tuple[int, int], box: BoxPart
) -> BoxClaim:
    return BoxClaim("predictions", prediction.id, path, size, 1, box.xyxy)


def _compute_ious(
    predicted_hypothesis: BoxHypothesis,
    predicted: BoxClaimTable,
    label_hypothesis: BoxHypothesis,
    labels: BoxClaimTable,
) -> Floats:
    # Conventions that do not apply to some coordinates give invalid boxes with IoU 0.
    with np.errstate(all="ignore"):
        return np.nan_to_num(
            pairwise_iou(
                predicted_hypothesis.normalize_boxes(predicted),
                label_hypothesis.normalize_boxes(labels),
            )
        )


def _list_hypotheses(
    run_record: RunRecord, claims: BoxClaimTable, reference: BoxClaimTable
) -> list[BoxHypothesis]:
    """List the box conventions that coordinates may follow.

    These are another order of the values, thousandths, fractions, pixels of the resized image of
    the recipe, and pixels of a copy with a constant scale.
    """
    hypotheses = [BoxHypothesis("xywh"), BoxHypothesis("cxcywh")]
    hypotheses += [BoxHypothesis("xyxy", BoxFrame("fixed", side, side)) for side in (1000.0, 1.0)]
    image_rule = load_run_recipe(run_record).image
    if isinstance(image_rule, ExactSize):
        hypotheses.append(
            BoxHypothesis(
                "xyxy", BoxFrame("fixed", float(image_rule.width), float(image_rule.height))
            )
        )
    if isinstance(image_rule, LongestSide):
        hypotheses.append(
            BoxHypothesis("xyxy", BoxFrame("longest", float(image_rule.longest_side)))
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = claims.coordinates / reference.coordinates
    valid_ratios = ratios[np.isfinite(ratios) & (ratios > 0)]
    factor = float(np.median(valid_ratios)) if len(valid_ratios) else 1.0
    return [*hypotheses, BoxHypothesis("xyxy", BoxFrame("factor", factor))]


def _describe_hypothesis(hypothesis: BoxHypothesis) -> str:
    if hypothesis.box_format != "xyxy":
        return {"xywh": "x, y, width, height", "cxcywh": "center, width, height"}[
            hypothesis.box_format
        ]
    frame = hypothesis.frame
    if frame.base == "factor":
        return f"in pixels of a copy scaled by {frame.frame_width:.2g}"
    if frame.base == "longest":
        return f"in pixels of a copy whose longest side is {frame.frame_width:g}"
    units = {1000.0: "in thousandths of the image", 1.0: "in fractions of the image"}
    if frame.frame_width == frame.frame_height and frame.frame_width in units:
        return units[frame.frame_width]
    return f"in pixels of a copy of {frame.frame_width:g} x {frame.frame_height:g}"


def _suggest_options(hypothesis: BoxHypothesis) -> str:
    if hypothesis.box_format != "xyxy":
        return f"--box-format {hypothesis.box_format}"
    if hypothesis.frame.base == "fixed" and hypothesis.frame.frame_width in (1.0, 1000.0):
        return f"--box-units {hypothesis.frame.frame_width:g}"
    return "coordinates converted to pixels of the original image"
