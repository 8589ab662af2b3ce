"""Define the training job of all competitors and their result file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RANK, ALPHA, DROPOUT, LEARNING_RATE = 64, 16, 0.05, 1e-4
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LANGUAGE_MODEL_TARGETS = rf".*language_model.*\.({'|'.join(TARGET_MODULES)})"
"""The vision encoders of some families have layers with the same names."""

RESULT_FILE = "figures.json"


class MissingPackageError(Exception):
    """A package of the competitor is missing."""


@dataclass(frozen=True)
class CompetitorJob:
    """Job of one competitor: LoRA on all seven projections of the decoder.

    `dataset` has one line per sample with `messages` and `images`, with one resized image. Training
    stops after the step in which `time_limit_s` is exceeded; `started_at` is the start time of the
    process. A batch has about `max_pack_tokens` tokens. `settings` are specific to the competitor;
    `trainable: all` trains all parameters instead of LoRA.
    """

    model: str
    dataset: str
    output_dir: str
    batch_size: int
    num_steps: int
    time_limit_s: float
    max_pack_tokens: int
    num_workers: int
    started_at: float = 0.0
    learning_rate: float = LEARNING_RATE
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def load_rows(self) -> list[tuple[str, str, str]]:
        """Return image path, question and answer of each sample."""
        rows = []
        for line in Path(self.dataset).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            question, answer = (turn["content"] for turn in row["messages"])
            rows.append((row["images"][0], question.removeprefix("<image>"), answer))
        return rows


def read_job() -> CompetitorJob:
    """Read the job from the command line."""
    return CompetitorJob(**json.loads(sys.argv[1]))


def to_argument(job: CompetitorJob) -> str:
    """Format the job for `read_job`."""
    return json.dumps(asdict(job))


def write_results(job: CompetitorJob, results: dict[str, Any]) -> None:
    """Add results to the result file. Of several ranks, only rank 0 writes."""
    if os.environ.get("RANK", "0") != "0":
        return
    path = Path(job.output_dir) / RESULT_FILE
    previous = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(previous | results) + "\n", encoding="utf-8")


def package_versions(*packages: str) -> dict[str, str]:
    """Return package versions. Raises MissingPackageError if one is not installed."""
    try:
        return {package: importlib.metadata.version(package) for package in packages}
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingPackageError(f"not installed: {error.name}") from error
