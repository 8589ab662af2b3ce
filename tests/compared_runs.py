"""Runs to compare, written by hand: their answers, and figures that fit these."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from run_folders import START, Line, MadeRun, answer_line, step_line

from finesight.evaluate.saved import read_answers
from finesight.evaluate.score import score
from finesight.report.histograms import half_octaves

RECIPE: dict[str, Any] = {
    "model": "Qwen/Qwen2-VL-2B-Instruct",
    "tune": {"language": "lora", "lora": {"rank": 8}},
    "eval": {"metric": "ocr", "max_new_tokens": 64},
}


def signs(folder: Path, marks: Sequence[float]) -> list[Line]:
    """Answers about pictures of signs: a mark is the share of the right text that is said."""
    lines = []
    for number, mark in enumerate(marks):
        path = folder / f"sign{number}.png"
        if not path.exists():
            Image.new("RGB", (90, 60), (3 * number % 256, 80, 120)).save(path)
        gold = f"sign number {number:03d}"
        box = {"image": 0, "label": "sign", "xyxy": [10, 10, 40, 40 + round(9 * mark)]}
        truth = box | {"xyxy": [10, 10, 40, 49]}
        said = gold[: round(mark * len(gold))]
        scores = {"similarity": mark, "exact": float(mark == 1)}
        line = answer_line(f"s{number}", said, gold, mark, image=str(path), scores=scores)
        lines.append(line | {"boxes": [box], "gold_boxes": [truth]})
    return lines


def run_with(
    folder: Path,
    answers: Sequence[Line],
    *,
    loss: float = 1.0,
    recipe: dict[str, Any] | None = None,
    start: Line | None = None,
    metric: str = "ocr",
) -> MadeRun:
    """A finished run of ten steps with these answers, and the figures that they have: as `ocr`
    scores them, or the mean of the score that is named like the metric."""
    run = MadeRun(folder)
    run.write("recipe.yaml", json.dumps(recipe or RECIPE))
    run.answered("before", answers)
    run.answered("after", answers)
    cases = [one.case for one in read_answers(folder / "predictions" / "after.jsonl")]
    own = sum(line["scores"].get(metric, 0.0) for line in answers) / len(answers)
    figures: Line = {"scores": {metric: own}, "headline": metric, "intervals": {}}
    if metric == "ocr":
        scored = score("ocr", cases)
        figures = {
            "scores": scored.scores,
            "headline": "similarity",
            "intervals": scored.intervals(),
        }
    before, after = ({"step": s, "held_out_loss": loss, "seconds": 4.0} | figures for s in (0, 10))
    steps = [step_line(step) for step in range(1, 11)]
    run.lines("metrics.jsonl", [start or begun(), before, *steps, after])
    run.finished(before=before, after=after, steps=10)
    return run


def begun(tokens: int = 400, fingerprint: str = "e7a1" * 16) -> Line:
    """What a run notes when it starts."""
    train = {
        "samples": 95,
        "tokens": 95 * tokens,
        "fingerprint": "7ra1" * 16,
    }
    held_out = {"samples": 12, "tokens": 9, "fingerprint": fingerprint}
    spread = {
        "tokens": half_octaves([tokens, tokens, 2 * tokens]),
        "patches": half_octaves([64, 128]),
    }
    return START | {"steps": 10, "data": {"train": train, "eval": held_out}, "spread": spread}
