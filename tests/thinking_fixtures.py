"""Runs of a tiny Qwen3.5 model that has learned one answer in both thinking modes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_model import create_tiny_model
from tiny_task import TinyTask

THOUGHT, ANSWER = "It is plain.\nSo say it.", "Red it is."
FULL = {"language": "full", "embeddings": "full"}


def train_run(
    folder: Path,
    *,
    model: Path | None = None,
    num_thoughts: int = 6,
    steps: int = 40,
    tune: dict[str, Any] | None = None,
) -> Path:
    """Train a run with reasoning in some of its 11 samples; six make thinking its default mode.

    The chat template defines reasoning efforts, as that of Qwen3.8.
    """
    task = TinyTask(folder)
    if model is None:
        model = create_tiny_model(folder / "qwen3_8", "qwen3_5")
        template = model / "chat_template.json"
        content = json.loads(template.read_text())
        content["chat_template"] += "{# reasoning_effort #}"
        template.write_text(json.dumps(content))
        (model / "sha256.json").unlink()
    data = folder / "train.jsonl"
    samples = [json.loads(line) for line in data.read_text().splitlines()]
    for number, sample in enumerate(samples):
        thought = f"<think>\n{THOUGHT}\n</think>\n\n" if number < num_thoughts else ""
        sample["messages"][-1]["content"] = thought + ANSWER
    data.write_text("\n".join(map(json.dumps, samples)) + "\n")
    name = f"run-{num_thoughts}"
    task.recipe |= {"model": str(model), "tune": tune or FULL, "data": {"train": str(data)}}
    task.run(
        "train.epochs=null",
        f"train.steps={steps}",
        "train.save_every=null",
        "train.seed=1",
        name=name,
    )
    return folder / name
