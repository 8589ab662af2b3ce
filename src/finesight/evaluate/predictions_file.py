"""Prediction files: predictions with references and scores, one JSON object per line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from finesight.bounded_files import parse_json, read_lines
from finesight.data.sample import BoxPart
from finesight.errors import UserError
from finesight.evaluate.eval_case import EvalCase, MetricValues
from finesight.infer.prediction import Prediction


@dataclass(frozen=True, slots=True)
class ScoredPrediction:
    """A prediction with references and scores; `record` is the complete JSON object."""

    case: EvalCase
    scores: MetricValues
    record: dict[str, Any]


def format_prediction_line(prediction: Prediction, case: EvalCase, scores: MetricValues) -> str:
    """Format a prediction with its references and scores as one line of JSON."""
    gold, *references = case.references
    record = prediction.as_json() | {
        # Boxes are not rounded, so that scores computed from the file are identical.
        "boxes": [_box_to_record(box) for box in case.boxes],
        "gold": gold,
        "references": references,
        "gold_boxes": [_box_to_record(box) for box in case.reference_boxes],
        "scores": scores,
        "num_tokens": prediction.num_tokens,
        "stopped": prediction.stopped,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_predictions(path: Path) -> list[ScoredPrediction]:
    """Read the predictions, references and scores of a prediction file.

    Raises:
        UserError: A line is invalid. The message contains the line number.
    """
    predictions = []
    lines = read_lines(path, expected="predictions in the format of `finesight eval --out`")
    for line_number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
            record_fields = _PredictionRecord.model_validate(record)
        except ValueError as error:
            raise UserError(
                f"not a scored prediction: {_describe_error(error)}",
                where=f"{path}:{line_number}",
                expected="a line in the format of `finesight train` or `finesight eval --out`",
                remedy="create the file again",
            ) from error
        case = EvalCase(
            answer=record_fields.answer,
            boxes=record_fields.boxes,
            references=(record_fields.gold, *record_fields.references),
            reference_boxes=record_fields.gold_boxes,
            id=record_fields.id,
            stopped=record_fields.stopped,
        )
        predictions.append(ScoredPrediction(case, record_fields.scores, record))
    return predictions


def _box_to_record(box: BoxPart) -> dict[str, Any]:
    return {"image": box.image, "label": box.label, "xyxy": list(box.xyxy)}


class _PredictionRecord(BaseModel):
    """Validated fields of one line of a prediction file."""

    id: str
    answer: str
    boxes: tuple[BoxPart, ...]
    gold: str
    references: tuple[str, ...]
    gold_boxes: tuple[BoxPart, ...]
    scores: dict[str, float]
    stopped: bool


def _describe_error(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)[:80]
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"
