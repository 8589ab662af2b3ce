"""Run folders written by hand: as training leaves them, at any size and with any answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finesight.storage import write_folder

Line = dict[str, Any]

TUNE = {
    "vision": "frozen",
    "merger": "full",
    "language": "lora",
    "embeddings": "frozen",
    "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": None},
}
MANIFEST = {
    "format": 1,
    "family": "qwen2_vl",
    "base": "Qwen/Qwen2-VL-2B-Instruct",
    "base_fingerprint": "ba5e" * 16,
    "picture": {"min_pixels": 784, "max_pixels": 7840},
    "system": "You are a helpful assistant.",
    "end_token": "<|im_end|>",
    "tune": TUNE,
    "versions": {"finesight": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
}
START = {
    "step": 0,
    "started": "2026-01-02T03:04:05+00:00",
    "prepared_s": 12.5,
    "steps": 60,
    "folder": "/somewhere",
    "device": "NVIDIA H200",
    "precision": "bf16",
    "versions": MANIFEST["versions"],
    "data": {
        "train": {"samples": 950, "tokens": 9, "fingerprint": "7ra1" * 16},
        "eval": {"samples": 50, "tokens": 9, "fingerprint": "e7a1" * 16},
    },
}
MOVED = [
    {"part": "vision", "trained": False, "tensors": 9, "numbers": 900, "changed": 0, "reached": 0},
    {"part": "language", "trained": True, "tensors": 4, "numbers": 80, "changed": 4, "reached": 4},
]


def answer_line(name: str, answer: str, gold: str, figure: float, **more: Any) -> Line:
    """A line of a file of answers about no picture; `more` replaces and adds keys."""
    return {
        "id": name,
        "image": None,
        "prompt": "Write the formula.",
        "answer": answer,
        "raw": answer,
        "boxes": [],
        "gold": gold,
        "references": [],
        "gold_boxes": [],
        "scores": {"similarity": figure, "exact": float(figure == 1.0)},
        "tokens": 5,
        "stopped": True,
    } | more


def step_line(step: int, **more: Any) -> Line:
    """A line of a training step in which all is well."""
    return {
        "step": step,
        "epoch": round(step / 30, 4),
        "loss": 3.0 * math.exp(-step / 20) + 0.1,
        "grad_norm": 1.0 + 0.1 * math.sin(step),
        "lr": {"merger": 1e-4 * step, "language": 2e-4 * step},
        "samples": 16,
        "tokens": 1000,
        "supervised": 100,
        "dropped": [],
        "skipped": 0,
        "seconds": 0.5,
        "samples_per_s": 32.0,
        "tokens_per_s": 2000.0,
        "utilisation": 0.4,
        "memory_gb": 11.5,
    } | more


def measured_line(step: int, figure: float, **more: Any) -> Line:
    """A line of a measurement."""
    return {
        "step": step,
        "held_out_loss": 2.0 - figure,
        "scores": {"similarity": figure, "stopped": 1.0},
        "headline": "similarity",
        "intervals": {"similarity": [figure - 0.05, figure + 0.05]},
        "seconds": 4.0,
    } | more


class MadeRun:
    """A run folder: the manifest and a recipe at first, the rest as it is asked for."""

    def __init__(self, folder: Path, metric: str | None = "latex") -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.write("manifest.json", json.dumps(MANIFEST))
        recipe = f"model: Qwen/Qwen2-VL-2B-Instruct\neval: {{metric: {metric}}}\n"
        self.write("recipe.yaml", recipe if metric else "model: m\neval: null\n")

    def write(self, name: str, text: str) -> None:
        """A file of the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def lines(self, name: str, lines: Sequence[Line]) -> None:
        """A file of the folder with a line of JSON each."""
        self.write(name, "".join(json.dumps(line) + "\n" for line in lines))

    def trained(self, steps: int = 60, start: Line | None = START) -> None:
        """Metrics of so many steps, measured before and after."""
        self.lines(
            "metrics.jsonl",
            [
                *([start] if start else []),
                measured_line(0, 0.2),
                *(step_line(step) for step in range(1, steps + 1)),
                measured_line(steps, 0.9),
            ],
        )

    def finished(self, **more: Any) -> None:
        """What the end of a run adds."""
        result = {"run": str(self.folder), "steps": 60, "before": None, "after": None}
        self.write("result.json", json.dumps(result | more))
        self.write("moved.json", json.dumps(MOVED))
        adapter = self.folder / "adapter"
        if not adapter.exists():
            with write_folder(adapter) as folder:
                (folder / "adapter_model.safetensors").write_bytes(b"weights")

    def answered(self, name: str, lines: Sequence[Line]) -> None:
        """A file of answers."""
        self.lines(f"predictions/{name}.jsonl", lines)
