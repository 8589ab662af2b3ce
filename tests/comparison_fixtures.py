"""Synthetic runs for comparisons, with consistent predictions and metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from run_dir_fixtures import (
    START_RECORD,
    FakeRunDir,
    JsonLine,
    make_prediction_line,
    make_step_line,
)

from finesight.evaluate.metric_difference import read_predictions
from finesight.evaluate.task_metrics import compute_metrics
from finesight.manifest import count_half_octaves

RECIPE: dict[str, Any] = {
    "model": "Qwen/Qwen2-VL-2B-Instruct",
    "tune": {"language": "lora", "lora": {"rank": 8}},
    "eval": {"metric": "ocr", "max_new_tokens": 64},
}


def make_sign_answers(folder: Path, marks: Sequence[float]) -> list[JsonLine]:
    """Make predictions about images of signs; a mark is the fraction of correct text."""
    lines = []
    for number, mark in enumerate(marks):
        path = folder / f"sign{number}.png"
        if not path.exists():
            Image.new("RGB", (90, 60), (3 * number % 256, 80, 120)).save(path)
        gold = f"sign number {number:03d}"
        box = {"image": 0, "label": "sign", "xyxy": [10, 10, 40, 40 + round(9 * mark)]}
        truth = box | {"xyxy": [10, 10, 40, 49]}
        answer = gold[: round(mark * len(gold))]
        scores = {"similarity": mark, "exact": float(mark == 1)}
        line = make_prediction_line(
            f"s{number}", answer, gold, mark, image=str(path), scores=scores
        )
        lines.append(line | {"boxes": [box], "gold_boxes": [truth]})
    return lines


def make_run(
    folder: Path,
    answers: Sequence[JsonLine],
    *,
    loss: float = 1.0,
    recipe: dict[str, Any] | None = None,
    start: JsonLine | None = None,
    metric: str = "ocr",
) -> FakeRunDir:
    """Make a finished run of ten steps with predictions and their metrics.

    Metrics are those of `ocr`, or the mean of the score with the name of the metric.
    """
    run = FakeRunDir(folder)
    run.write("recipe.yaml", json.dumps(recipe or RECIPE))
    run.write_predictions("before", answers)
    run.write_predictions("after", answers)
    cases = [one.case for one in read_predictions(folder / "predictions" / "after.jsonl")]
    own = sum(line["scores"].get(metric, 0.0) for line in answers) / len(answers)
    metrics: JsonLine = {"scores": {metric: own}, "primary_metric": metric, "intervals": {}}
    if metric == "ocr":
        scored = compute_metrics("ocr", cases)
        metrics = {
            "scores": scored.scores,
            "primary_metric": "similarity",
            "intervals": scored.intervals(),
        }
    before, after = ({"step": s, "validation_loss": loss, "eval_s": 4.0} | metrics for s in (0, 10))
    steps = [make_step_line(step) for step in range(1, 11)]
    run.write_lines("metrics.jsonl", [start or start_record(), before, *steps, after])
    run.write_finished(before=before, after=after, steps=10)
    return run


def start_record(tokens: int = 400, fingerprint: str = "e7a1" * 16) -> JsonLine:
    """Make a start event."""
    train = {
        "num_samples": 95,
        "num_tokens": 95 * tokens,
        "fingerprint": "7ra1" * 16,
    }
    validation = {"num_samples": 12, "num_tokens": 9, "fingerprint": fingerprint}
    size_histograms = {
        "tokens": count_half_octaves([tokens, tokens, 2 * tokens]),
        "patches": count_half_octaves([64, 128]),
    }
    return START_RECORD | {
        "total_steps": 10,
        "data": {"train": train, "eval": validation},
        "size_histograms": size_histograms,
    }
