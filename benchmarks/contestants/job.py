"""What every contestant has to do, and where it says what it did."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RANK, ALPHA, DROPOUT, RATE = 64, 16, 0.05, 1e-4
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IN_THE_LANGUAGE_MODEL = rf".*language_model.*\.({'|'.join(LAYERS)})"
"""The tower of some families has layers of the same names."""

FIGURES = "figures.json"


class NotInstalled(Exception):
    """A contestant that cannot be measured here, because something is missing."""


@dataclass(frozen=True)
class Job:
    """One contestant's work: LoRA on all seven projections of the language model.

    `table` has a line for each sample, with its `messages` and `images`, whose one picture has been
    brought to its size beforehand. After `seconds` of training it ends with the step that it is at;
    `began` is the moment when its process was started. A batch has about `pack_tokens` tokens.
    `setting` is the contestant's own.
    """

    model: str
    table: str
    target: str
    batch: int
    steps: int
    seconds: float
    pack_tokens: int
    workers: int
    began: float = 0.0
    setting: Mapping[str, Any] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str, str]]:
        """Picture, question and answer of each sample."""
        rows = []
        for line in Path(self.table).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            asked, answered = (turn["content"] for turn in row["messages"])
            rows.append((row["images"][0], asked.removeprefix("<image>"), answered))
        return rows


def told() -> Job:
    """The job that this process was started with."""
    return Job(**json.loads(sys.argv[1]))


def as_argument(job: Job) -> str:
    """The job as `told` reads it."""
    return json.dumps(asdict(job))


def tell(job: Job, figures: dict[str, Any]) -> None:
    """Leave something for the process that started this one, beside what it left before; of several
    the first one does."""
    if os.environ.get("RANK", "0") != "0":
        return
    path = Path(job.target) / FIGURES
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(known | figures) + "\n", encoding="utf-8")


def versions(*packages: str) -> dict[str, str]:
    """The versions of these packages. Raises NotInstalled for one that is missing."""
    try:
        return {package: importlib.metadata.version(package) for package in packages}
    except importlib.metadata.PackageNotFoundError as error:
        raise NotInstalled(f"not installed: {error.name}") from error
