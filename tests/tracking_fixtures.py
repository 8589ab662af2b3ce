"""Data about the run of `track/conftest.py`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from finesight.config import TrackerKind
from finesight.track.backends import TRACKERS

METRIC = {"metric": "ocr", "every": 2, "max_new_tokens": 4}

PLANTED_SECRETS = {
    "variable": "planted-in-the-environment",
    "token": "hf_PlantedPlantedPlantedPlanted",
    "password": "planted-password",
    "query": "planted-in-a-query",
}
"""Secrets in the settings of the run."""

SCORE_KEY = "scores/similarity"

PROMPT = (
    f"Answer. {PLANTED_SECRETS['variable']} {PLANTED_SECRETS['token']}"
    f" s3://me:{PLANTED_SECRETS['password']}@store/x?token={PLANTED_SECRETS['query']}"
)


@dataclass(frozen=True)
class TrackedRun:
    """Run with its console outputs before and after a resume, and tracker folders."""

    run: Path
    console_outputs: tuple[str, str]
    losses: dict[int, float]
    mlflow: str
    trackio: str

    def folder(self, kind: TrackerKind) -> Path:
        if find_spec(kind) is None:
            pytest.skip(f"{kind} is not installed (extra `{TRACKERS[kind].extra}`)")
        return self.run / "track" / kind

    def console_lines(self, kind: str) -> list[str]:
        """Return console lines about a tracker."""
        lines = "\n".join(self.console_outputs).splitlines()
        return [line for line in lines if line.lower().startswith(kind)]
