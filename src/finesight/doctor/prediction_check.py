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
    hypothesis_from_convention,
    pairwise_iou,
)
from finesight.config import ExactSize, LongestSide
from finesight.data.image_header import read_image_size
from finesight.data.sample import BoxPart
from finesight.doctor.diagnosis import Diagnosis, join_command, make_diagnosis
from finesight.doctor.run_check import (
    check_data_command,
    load_run_recipe,
    rerun_command,
    scale_duration,
)
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
"""Mean IoU below which boxes count as wrong, minimum mean IoU of a matching convention, and its
minimum gain over the current convention."""

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


def _parse_lines(model_type: type[RecordT], lines: object) -> Iterator[RecordT]:
    """Convert JSON objects to models. Corrupt ones are omitted."""
    for line in lines if isinstance(lines, list) else ():
        try:
            yield model_type.model_validate(line)
        except ValidationError:
            continue


def check_predictions(run_record: RunRecord) -> list[Diagnosis]:
    """Check the validation predictions of a run and their scores."""
    if not run_record.evaluations:
        overrides = ("data.eval=VALIDATION.jsonl", "eval.metric=captions")
        return [make_diagnosis("not-evaluated", remedy=rerun_command(run_record, *overrides))]
    files = run_record.predictions_files
    lines = list(read_json_lines(files[-1])) if files else []
    predictions = list(_parse_lines(SavedPrediction, lines))
    diagnoses = [
        *_check_primary_metric(run_record),
        *_check_unfinished(run_record, predictions),
        *_check_box_conventions(run_record, predictions),
    ]
    if not predictions:
        return [*diagnoses, make_diagnosis("predictions.none")]
    return diagnoses or [make_diagnosis("predictions", count=len(predictions))]


def _check_primary_metric(run_record: RunRecord) -> Iterator[Diagnosis]:
    """Report the change of the primary metric between the start and the end of training."""
    evaluations = run_record.evaluations
    primary = next((line.get("primary_metric") for line in reversed(evaluations)), None)
    differences = (run_record.result or {}).get("metric_differences")
    changes = (one for one in _parse_lines(RecordedDifference, differences) if one.name == primary)
    if (change := next(changes, None)) is None:
        return
    values = {"change": f"{primary} {change.before:.4f} before, {change.after:.4f} after training"}
    if change.verdict == "better":
        yield make_diagnosis("metric", **values)
    elif change.verdict == "worse":
        scores = [((line.get("scores") or {}).get(primary), line["step"]) for line in evaluations]
        numbers = [(value, s) for value, s in scores if s and isinstance(value, int | float)]
        best, step = max(numbers, default=(-math.inf, 0))
        if best > change.after:
            remedy = rerun_command(run_record, "eval.every=0.1", "eval.patience=2")
            yield make_diagnosis("metric-worse.peak", **values, best=best, step=step, remedy=remedy)
        else:
            remedy = join_command("finesight", "report", run_record.folder)
            yield make_diagnosis("metric-worse", **values, remedy=remedy)
    else:
        interval = ""
        if change.low is not None and change.high is not None:
            interval = f" ({change.low:+.4f} to {change.high:+.4f})"
        settings = load_run_recipe(run_record).eval
        remedy = rerun_command(run_record, *scale_duration(run_record, 2.0))
        if settings is not None and settings.limit:
            # The interval width is proportional to 1 / sqrt(number of samples).
            limit = 4 * settings.limit
            remedy = join_command("finesight", "eval", run_record.folder, "--limit", limit)
        yield make_diagnosis("metric-unclear", **values, interval=interval, remedy=remedy)


def _check_unfinished(
    run_record: RunRecord, predictions: Sequence[SavedPrediction]
) -> Iterator[Diagnosis]:
    """Detect completions that reached the token limit without an end token."""
    unfinished = [prediction for prediction in predictions if not prediction.stopped]
    if not predictions or len(unfinished) <= MAX_UNFINISHED_FRACTION * len(predictions):
        return
    counts = {"count": len(unfinished), "total": len(predictions)}
    settings = load_run_recipe(run_record).eval
    limit = settings.max_new_tokens if settings else DEFAULT_MAX_NEW_TOKENS
    answers = [prediction.answer for prediction in unfinished]
    num_repeating = sum(bool(REPETITION_PATTERN.search(answer[-2000:])) for answer in answers)
    longest, shortest = max(len(one.gold) for one in unfinished), min(map(len, answers))
    if num_repeating * 2 < len(unfinished) and longest > 0.9 * shortest:
        folder = run_record.folder
        options = ["--max-new-tokens", str(4 * limit), "--out", str(folder / "longer.jsonl")]
        remedy = join_command("finesight", "eval", folder, *options)
        lengths = {"limit": limit, "longest": longest, "shortest": shortest}
        yield make_diagnosis("answers-cut-off", **counts, **lengths, remedy=remedy)
        return
    repetitive = f", {num_repeating} of them repetitive" if num_repeating else ""
    remedy = rerun_command(run_record, *scale_duration(run_record, 2.0))
    yield make_diagnosis("answers-unfinished", **counts, repetitive=repetitive, remedy=remedy)


def _check_box_conventions(
    run_record: RunRecord, predictions: Sequence[SavedPrediction]
) -> Iterator[Diagnosis]:
    """Detect predicted boxes or labels that follow another box convention.

    If the boxes barely overlap, the coordinates of one side are converted from other conventions. A
    convention that makes them overlap is reported.
    """
    claims = _collect_claims(run_record, predictions)
    if len(claims) < MIN_BOXES:
        return
    predicted, labels = (BoxClaimTable(list(side)) for side in zip(*claims, strict=True))
    current = hypothesis_from_convention(DEFAULT_CONVENTION)

    def mean_iou(of_predicted: BoxHypothesis, of_labels: BoxHypothesis) -> float:
        # Conventions that do not apply to some coordinates give invalid boxes with IoU 0.
        with np.errstate(all="ignore"):
            boxes = of_predicted.normalize_boxes(predicted), of_labels.normalize_boxes(labels)
            return float(np.nan_to_num(pairwise_iou(*boxes)).mean())

    current_iou = mean_iou(current, current)
    if current_iou >= LOW_IOU:
        return
    for_predicted = _list_hypotheses(run_record, predicted, labels)
    for_labels = _list_hypotheses(run_record, labels, predicted)
    candidates = [(mean_iou(one, current), one, "predictions") for one in for_predicted]
    candidates += [(mean_iou(current, one), one, "labels") for one in for_labels]
    best_iou, hypothesis, subject = max(candidates, key=lambda candidate: candidate[0])
    if best_iou >= max(GOOD_IOU, current_iou + MIN_IOU_GAIN):
        convention, options = _describe_hypothesis(hypothesis)
        yield make_diagnosis(
            "box-convention-mismatch",
            subject=subject,
            convention=convention,
            best=best_iou,
            current=current_iou,
            options=options,
            remedy=check_data_command(run_record),
        )


def _collect_claims(
    run_record: RunRecord, predictions: Sequence[SavedPrediction]
) -> list[tuple[BoxClaim, BoxClaim]]:
    """Collect pairs of the coordinates of a predicted box and of its label.

    Only predictions with the expected number of boxes and an existing image are used.
    """
    claims = []
    folder = Path(str(get_last_start(run_record).get("working_dir") or "."))
    for one in predictions:
        if not one.boxes or len(one.boxes) != len(one.gold_boxes) or not one.image:
            continue
        path = folder / one.image
        try:
            size = read_image_size(path)
        except UserError:
            continue
        for boxes in zip(one.boxes, one.gold_boxes, strict=True):
            predicted, label = (
                BoxClaim("predictions", one.id, path, size, 1, box.xyxy) for box in boxes
            )
            claims.append((predicted, label))
    return claims


def _list_hypotheses(
    run_record: RunRecord, claims: BoxClaimTable, reference: BoxClaimTable
) -> list[BoxHypothesis]:
    """List the box conventions that coordinates may follow.

    These are another order of the values, thousandths, fractions, pixels of the resized image of
    the recipe, and pixels of a copy with a constant scale.
    """
    frames = [BoxFrame("fixed", side, side) for side in (1000.0, 1.0)]
    image_rule = load_run_recipe(run_record).image
    if isinstance(image_rule, ExactSize):
        frames.append(BoxFrame("fixed", float(image_rule.width), float(image_rule.height)))
    if isinstance(image_rule, LongestSide):
        frames.append(BoxFrame("longest", float(image_rule.longest_side)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = claims.coordinates / reference.coordinates
    valid_ratios = ratios[np.isfinite(ratios) & (ratios > 0)]
    frames.append(BoxFrame("factor", float(np.median(valid_ratios)) if len(valid_ratios) else 1.0))
    hypotheses = [BoxHypothesis("xywh"), BoxHypothesis("cxcywh")]
    return hypotheses + [BoxHypothesis("xyxy", frame) for frame in frames]


def _describe_hypothesis(hypothesis: BoxHypothesis) -> tuple[str, str]:
    """Describe a box convention and the import options for it."""
    if hypothesis.box_format != "xyxy":
        texts = {"xywh": "x, y, width, height", "cxcywh": "center, width, height"}
        return texts[hypothesis.box_format], f"--box-format {hypothesis.box_format}"
    frame, options = hypothesis.frame, "coordinates converted to pixels of the original image"
    width = frame.frame_width
    if frame.base == "factor":
        return f"in pixels of a copy scaled by {width:.2g}", options
    if frame.base == "longest":
        return f"in pixels of a copy whose longest side is {width:g}", options
    units = {1000.0: "in thousandths of the image", 1.0: "in fractions of the image"}
    if width == frame.frame_height and width in units:
        return units[width], f"--box-units {width:g}"
    return f"in pixels of a copy of {width:g} x {frame.frame_height:g}", options
