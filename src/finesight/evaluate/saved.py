"""Answers with their scores in a file, a line of JSON each: written, and read again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from finesight.bounded_files import parse_json, read_lines
from finesight.data.sample import BoxPart
from finesight.errors import UserError
from finesight.evaluate.answered import Case, Scores
from finesight.infer.predict import Prediction


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer, what would have been right, and its own figures; `record` is its whole line."""

    case: Case
    scores: Scores
    record: dict[str, Any]


def line_of(prediction: Prediction, case: Case, scores: Scores) -> str:
    """A line of the file."""
    gold, *references = case.truths
    record = prediction.as_json() | {
        # Not rounded: whoever reads them again gets the same scores.
        "boxes": [_as_record(box) for box in case.boxes],
        "gold": gold,
        "references": references,
        "gold_boxes": [_as_record(box) for box in case.targets],
        "scores": scores,
        "tokens": prediction.tokens,
        "stopped": prediction.stopped,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_answers(path: Path) -> list[Answered]:
    """The answers of a file. Raises UserError naming the line that is none."""
    answers = []
    lines = read_lines(path, expected="answers as `finesight eval --out` writes them")
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
            checked = _Line.model_validate(record)
        except ValueError as error:
            raise UserError(
                f"no answer with its scores: {_reason(error)}",
                where=f"{path}:{number}",
                expected="a line as `finesight train` or `finesight eval --out` wrote it",
                remedy="make the file anew",
            ) from error
        case = Case(
            answer=checked.answer,
            boxes=checked.boxes,
            truths=(checked.gold, *checked.references),
            targets=checked.gold_boxes,
            id=checked.id,
            stopped=checked.stopped,
        )
        answers.append(Answered(case, checked.scores, record))
    return answers


def _as_record(box: BoxPart) -> dict[str, Any]:
    return {"image": box.image, "label": box.label, "xyxy": list(box.xyxy)}


class _Line(BaseModel):
    """Values of a line that are read again, with their types."""

    id: str
    answer: str
    boxes: tuple[BoxPart, ...]
    gold: str
    references: tuple[str, ...]
    gold_boxes: tuple[BoxPart, ...]
    scores: dict[str, float]
    stopped: bool


def _reason(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)[:80]
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"
