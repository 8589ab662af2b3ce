"""Prediction files: one scored answer per line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ValidationError

from finesight.errors import UserError
from finesight.evaluate.eval_case import EvalCase, MetricValues
from finesight.files.bounded_files import parse_json, read_edge_lines, read_lines
from finesight.samples.frames import ImageSize
from finesight.samples.image_file import DEFAULT_SIZE
from finesight.samples.sample import BoxPart, Regions

if TYPE_CHECKING:
    from finesight.infer.prediction import Prediction


@dataclass(frozen=True, slots=True)
class ScoredPrediction:
    """A prediction with references and scores; `record` is the complete JSON object."""

    case: EvalCase
    scores: MetricValues
    record: dict[str, Any]


def create_case(
    prediction: Prediction, references: tuple[tuple[str, ...], tuple[BoxPart, ...]]
) -> EvalCase:
    """Create the case of a predicted answer and its references (`get_reference_answer`)."""
    ending = prediction.finish_reason == "stop", prediction.image_size
    reward = None
    if prediction.episode is not None:
        reward = prediction.episode.reward
    return EvalCase(
        prediction.answer, prediction.boxes, *references, prediction.id, *ending, reward
    )


def format_prediction_line(
    prediction: Prediction, case: EvalCase, scores: MetricValues, **further: float
) -> str:
    """Format a prediction with its references, scores and further values as one line of JSON."""
    gold, *references = case.references
    # Boxes are not rounded, so that scores computed from the file are identical.
    boxes, gold_boxes = (
        [{"image": box.image, "label": box.label, "xyxy": list(box.xyxy)} for box in several]
        for several in (case.boxes, case.reference_boxes)
    )
    record = prediction.as_json() | {
        "boxes": boxes,
        "gold": gold,
        "references": references,
        "gold_boxes": gold_boxes,
        "scores": scores,
        "num_tokens": prediction.num_tokens,
        "finish_reason": prediction.finish_reason,
        "image_size": case.image_size,
        "question": prediction.question,
        **further,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_predictions(path: Path, max_bytes: int | None = None) -> list[ScoredPrediction]:
    """Read the predictions, references and scores of a prediction file.

    Args:
        max_bytes: Maximum number of bytes, of a larger file those at both ends. None: all lines.

    Raises:
        UserError: A line is invalid. The message contains the line number.
    """
    predictions = []
    expected = "predictions in the format of an evaluation"
    lines = read_lines(path, expected=expected)
    if max_bytes is not None:
        lines = read_edge_lines(path, max_bytes, expected=expected)
    for line_number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
            fields = _PredictionRecord.model_validate(record)
        except ValueError as error:
            problem = str(error)[:80]
            if isinstance(error, ValidationError):
                first = error.errors(include_url=False)[0]
                problem = f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"
            raise UserError(
                f"not a scored prediction: {problem}",
                where=f"{path}:{line_number}",
                expected="a line in the format of a training run or an evaluation",
                remedy="create the file again",
            ) from error
        predictions.append(ScoredPrediction(fields.as_case(), fields.scores, record))
    return predictions


class _EpisodeFields(BaseModel):
    """Validated fields of the turns of a prediction."""

    reward: float | None = None


class _PredictionRecord(BaseModel):
    """Validated fields of one line of a prediction file."""

    id: str
    answer: str
    boxes: Regions
    gold: str
    references: tuple[str, ...]
    gold_boxes: Regions
    scores: dict[str, float]
    finish_reason: Literal["stop", "length"]
    image_size: ImageSize = DEFAULT_SIZE
    episode: _EpisodeFields | None = None

    def as_case(self) -> EvalCase:
        references, has_ended = (self.gold, *self.references), self.finish_reason == "stop"
        reward = None
        if self.episode is not None:
            reward = self.episode.reward
        ending = self.id, has_ended, self.image_size, reward
        return EvalCase(self.answer, self.boxes, references, self.gold_boxes, *ending)
