"""Answers with their scores in a file, a line of JSON each: written, and read again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finesight.data.jsonl import read_bytes
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
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            record = json.loads(line)
            case = Case(
                answer=record["answer"],
                boxes=_boxes(record["boxes"]),
                truths=(record["gold"], *record["references"]),
                targets=_boxes(record["gold_boxes"]),
                id=record["id"],
                stopped=record["stopped"],
            )
            answers.append(Answered(case, record["scores"], record))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"no answer with its scores: {type(error).__name__} {str(error)[:80]}",
                where=f"{path}:{number}",
                expected="a line as `finesight train` or `finesight eval --out` wrote it",
                remedy="make the file anew",
            ) from error
    return answers


def _as_record(box: BoxPart) -> dict[str, Any]:
    return {"image": box.image, "label": box.label, "xyxy": list(box.xyxy)}


def _boxes(records: list[dict[str, Any]]) -> tuple[BoxPart, ...]:
    return tuple(BoxPart(**record) for record in records)
