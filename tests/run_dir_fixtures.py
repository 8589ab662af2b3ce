"""Synthetic run directories of any size."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from case_files import load_cases
from PIL import Image

from finesight.evaluate.prediction_file import read_predictions
from finesight.evaluate.task_metrics import compute_metrics
from finesight.files.storage import write_folder
from finesight.report.histogram_counts import count_half_octaves

JsonLine = dict[str, Any]

_CASES = load_cases("run_dir")
TUNE, MANIFEST = _CASES["tune"], _CASES["manifest"]
START_RECORD, PARAM_AUDIT = _CASES["start"], _CASES["param_audit"]


def make_prediction_line(name: str, answer: str, gold: str, score: float, **more: Any) -> JsonLine:
    """Make a prediction without image; `more` replaces and adds keys."""
    scores = {"similarity": score, "exact": float(score == 1.0)}
    line = {"id": name, "answer": answer, "raw_text": answer, "gold": gold, "scores": scores}
    return _CASES["prediction"] | line | more


def make_step_line(step: int, **more: Any) -> JsonLine:
    line = {"step": step, "epoch": round(step / 30, 4), "loss": 3.0 * math.exp(-step / 20) + 0.1}
    line |= {"grad_norm": 1.0 + 0.1 * math.sin(step)}
    line |= {"lr": {"merger": 1e-4 * step, "language": 2e-4 * step}}
    return _CASES["step"] | line | more


def make_evaluation_line(step: int, score: float, **more: Any) -> JsonLine:
    line = {"step": step, "validation_loss": 2.0 - score, "primary_metric": "similarity"}
    line |= {"scores": {"similarity": score, "ended_with_eos": 1.0}, "eval_s": 4.0}
    return line | {"intervals": {"similarity": [score - 0.05, score + 0.05]}} | more


class FakeRunDir:
    """Run directory with a manifest and a recipe; other files are written on demand."""

    def __init__(self, folder: Path, metric: str | None = "latex") -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.write("manifest.json", json.dumps(MANIFEST))
        recipe = f"model: Qwen/Qwen2-VL-2B-Instruct\neval: {{metric: {metric}}}\n"
        self.write("recipe.yaml", recipe if metric else "model: m\neval: null\n")

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def write_lines(self, name: str, lines: Sequence[JsonLine]) -> None:
        self.write(name, "".join(json.dumps(line) + "\n" for line in lines))

    def write_metrics(self, steps: int = 60, start: JsonLine | None = START_RECORD) -> None:
        """Write metrics with an evaluation before and after the steps."""
        lines = [start] if start else []
        lines += [make_evaluation_line(0, 0.2), *map(make_step_line, range(1, steps + 1))]
        self.write_lines("metrics.jsonl", [*lines, make_evaluation_line(steps, 0.9)])

    def write_finished(self, **more: Any) -> None:
        """Write the files of a finished run."""
        result = {"run_dir": str(self.folder), "steps": 60, "before": None, "after": None}
        self.write("result.json", json.dumps(result | more))
        self.write("param_audit.json", json.dumps(PARAM_AUDIT))
        adapter = self.folder / "adapter"
        if not adapter.exists():
            with write_folder(adapter) as folder:
                (folder / "adapter_model.safetensors").write_bytes(b"weights")

    def write_predictions(self, name: str, lines: Sequence[JsonLine]) -> None:
        self.write_lines(f"predictions/{name}.jsonl", lines)

    def write_rewards(self, rewards: Sequence[JsonLine], groups: Sequence[list[JsonLine]]) -> None:
        """Write steps with metrics of rewards, and a group of responses to each of the last."""
        self.write("recipe.yaml", json.dumps(RECIPE | {"train": {"batch_size": 4}}))
        steps = [
            make_step_line(n, **({"reward": 0.5} | one)) for n, one in enumerate(rewards, start=1)
        ]
        self.write_lines("metrics.jsonl", steps)
        start = len(rewards) - len(groups) + 1
        lines = [
            line | {"step": step, "response": number, "advantage": number - 0.5}
            for step, group in enumerate(groups, start=start)
            for number, line in enumerate(group)
        ]
        self.write_lines("responses.jsonl", lines)


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
        more = {"image": str(path), "scores": scores, "boxes": [box], "gold_boxes": [truth]}
        lines.append(make_prediction_line(f"s{number}", answer, gold, mark, **more))
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
    own = sum(line["scores"].get(metric, 0.0) for line in answers) / len(answers)
    metrics: JsonLine = {"scores": {metric: own}, "primary_metric": metric, "intervals": {}}
    if metric == "ocr":
        cases = [one.case for one in read_predictions(folder / "predictions" / "after.jsonl")]
        scored = compute_metrics("ocr", cases)
        metrics = {"scores": scored.scores, "intervals": scored.intervals()}
        metrics["primary_metric"] = "similarity"
    before, after = ({"step": s, "validation_loss": loss, "eval_s": 4.0} | metrics for s in (0, 10))
    steps = [make_step_line(step) for step in range(1, 11)]
    run.write_lines("metrics.jsonl", [start or start_record(), before, *steps, after])
    run.write_finished(before=before, after=after, steps=10)
    return run


def start_record(tokens: int = 400, fingerprint: str = "e7a1" * 16) -> JsonLine:
    train = START_RECORD["data"]["train"] | {"num_samples": 95, "num_tokens": 95 * tokens}
    validation = {"num_samples": 12, "num_tokens": 9, "fingerprint": fingerprint}
    sizes = {"tokens": [tokens, tokens, 2 * tokens], "patches": [64, 128]}
    histograms = {name: count_half_octaves(values) for name, values in sizes.items()}
    data = {"train": train, "eval": validation}
    return START_RECORD | {"total_steps": 10, "data": data, "size_histograms": histograms}
