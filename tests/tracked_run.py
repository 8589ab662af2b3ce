"""What is known of a real run under all trackers: `track/conftest.py` makes it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from finesight.config import TrackerKind
from finesight.track.kinds import EXTRAS

METRIC = {"metric": "ocr", "every": 2, "max_new_tokens": 4}

PLANTED = {
    "variable": "planted-in-the-environment",
    "token": "hf_PlantedPlantedPlantedPlanted",
    "password": "planted-password",
    "query": "planted-in-a-query",
}
"""Secrets that the settings of the run contain."""

SCORE = "scores/similarity"

PROMPT = (
    f"Answer. {PLANTED['variable']} {PLANTED['token']}"
    f" s3://me:{PLANTED['password']}@store/x?token={PLANTED['query']}"
)


@dataclass(frozen=True)
class Tracked:
    """A run, what it showed on the screen before and after it was resumed, and where the trackers
    wrote."""

    run: Path
    screens: tuple[str, str]
    losses: dict[int, float]
    mlflow: str
    trackio: str

    def folder(self, kind: TrackerKind) -> Path:
        if find_spec(kind) is None:
            pytest.skip(f"{kind} is not installed (extra `{EXTRAS[kind]}`)")
        return self.run / "track" / kind

    def told(self, kind: str) -> list[str]:
        """The lines about a tracker on both screens."""
        lines = "\n".join(self.screens).splitlines()
        return [line for line in lines if line.lower().startswith(kind)]
