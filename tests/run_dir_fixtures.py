"""Synthetic run directories of any size."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finesight.storage import write_folder

JsonLine = dict[str, Any]

TUNE = {
    "vision": "frozen",
    "merger": "full",
    "language": "lora",
    "embeddings": "frozen",
    "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": None},
}
MANIFEST = {
    "format_version": 1,
    "family": "qwen2_vl",
    "base_model": "Qwen/Qwen2-VL-2B-Instruct",
    "base_fingerprint": "ba5e" * 16,
    "image_rule": {"min_pixels": 784, "max_pixels": 7840},
    "system_prompt": "You are a helpful assistant.",
    "eos_token": "<|im_end|>",
    "tune": TUNE,
    "versions": {"finesight": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
}
START_RECORD = {
    "step": 0,
    "started_at": "2026-01-02T03:04:05+00:00",
    "setup_s": 12.5,
    "total_steps": 60,
    "working_dir": "/somewhere",
    "device": "NVIDIA H200",
    "precision": "bf16",
    "versions": MANIFEST["versions"],
    "data": {
        "train": {"num_samples": 950, "num_tokens": 9, "fingerprint": "7ra1" * 16},
        "eval": {"num_samples": 50, "num_tokens": 9, "fingerprint": "e7a1" * 16},
    },
}
PARAM_AUDIT = [
    {
        "part": "vision",
        "is_trained": False,
        "num_tensors": 9,
        "num_params": 900,
        "num_changed": 0,
        "num_with_grad": 0,
    },
    {
        "part": "language",
        "is_trained": True,
        "num_tensors": 4,
        "num_params": 80,
        "num_changed": 4,
        "num_with_grad": 4,
    },
]


def make_prediction_line(name: str, answer: str, gold: str, score: float, **more: Any) -> JsonLine:
    """Make a prediction without image; `more` replaces and adds keys."""
    return {
        "id": name,
        "image": None,
        "prompt": "Write the formula.",
        "answer": answer,
        "raw_text": answer,
        "boxes": [],
        "gold": gold,
        "references": [],
        "gold_boxes": [],
        "scores": {"similarity": score, "exact": float(score == 1.0)},
        "num_tokens": 5,
        "finish_reason": "stop",
    } | more


def make_step_line(step: int, **more: Any) -> JsonLine:
    """Make the line of a regular training step."""
    return {
        "step": step,
        "epoch": round(step / 30, 4),
        "loss": 3.0 * math.exp(-step / 20) + 0.1,
        "grad_norm": 1.0 + 0.1 * math.sin(step),
        "lr": {"merger": 1e-4 * step, "language": 2e-4 * step},
        "num_samples": 16,
        "num_tokens": 1000,
        "num_supervised_tokens": 100,
        "skipped_samples": [],
        "skipped_steps": 0,
        "step_s": 0.5,
        "samples_per_s": 32.0,
        "tokens_per_s": 2000.0,
        "mfu": 0.4,
        "peak_memory_gb": 11.5,
    } | more


def make_evaluation_line(step: int, score: float, **more: Any) -> JsonLine:
    """Make the line of an evaluation."""
    return {
        "step": step,
        "validation_loss": 2.0 - score,
        "scores": {"similarity": score, "ended_with_eos": 1.0},
        "primary_metric": "similarity",
        "intervals": {"similarity": [score - 0.05, score + 0.05]},
        "eval_s": 4.0,
    } | more


class FakeRunDir:
    """Run directory with a manifest and a recipe; other files are written on demand."""

    def __init__(self, folder: Path, metric: str | None = "latex") -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.write("manifest.json", json.dumps(MANIFEST))
        recipe = f"model: Qwen/Qwen2-VL-2B-Instruct\neval: {{metric: {metric}}}\n"
        self.write("recipe.yaml", recipe if metric else "model: m\neval: null\n")

    def write(self, name: str, text: str) -> None:
        """Write a file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def write_lines(self, name: str, lines: Sequence[JsonLine]) -> None:
        """Write a JSON Lines file."""
        self.write(name, "".join(json.dumps(line) + "\n" for line in lines))

    def write_metrics(self, steps: int = 60, start: JsonLine | None = START_RECORD) -> None:
        """Write metrics with an evaluation before and after the steps."""
        self.write_lines(
            "metrics.jsonl",
            [
                *([start] if start else []),
                make_evaluation_line(0, 0.2),
                *(make_step_line(step) for step in range(1, steps + 1)),
                make_evaluation_line(steps, 0.9),
            ],
        )

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
        """Write a prediction file."""
        self.write_lines(f"predictions/{name}.jsonl", lines)
