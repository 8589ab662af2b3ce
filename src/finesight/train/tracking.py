"""Interface of the training to the experiment trackers of its run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from finesight.satellites import load_satellite
from finesight.settings.config import Recipe
from finesight.tracker_components import AlertLevel


class RunTracking(Protocol):
    """What a training sends to the trackers of its run; `TrackerManager` implements it."""

    @property
    def is_active(self) -> bool:
        """True while any tracker accepts records."""
        ...

    def start_run(self, run_facts: Mapping[str, Any]) -> None:
        """Start or resume the run with facts such as the size of the model."""
        ...

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Send the metrics of a step."""
        ...

    def log_examples(
        self, step: int, before: Path, after: Path, sample_ids: Collection[str] | None
    ) -> None:
        """Send images of samples with the boxes of two prediction files.

        Args:
            before: Predictions before the training; the file may be missing.
            sample_ids: IDs of the samples that may be shown; None for all.
        """
        ...

    def send_alert(self, level: AlertLevel, title: str, text: str) -> None:
        """Send an alert about the current step."""
        ...


class NoTracking:
    """Tracking of a run without trackers."""

    is_active = False

    def start_run(self, run_facts: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def log_examples(
        self, step: int, before: Path, after: Path, sample_ids: Collection[str] | None
    ) -> None:
        """Do nothing."""

    def send_alert(self, level: AlertLevel, title: str, text: str) -> None:
        """Do nothing."""


def start_trackers(
    recipe: Recipe, run_dir: Path, step: int, log: Callable[[str], None]
) -> AbstractContextManager[RunTracking]:
    """Start the trackers of a recipe, and close their runs when the `with` block ends."""
    if not recipe.track:
        return nullcontext(NoTracking())
    tracking: AbstractContextManager[RunTracking] = load_satellite(
        "finesight.track.tracker_manager:start_trackers"
    )(recipe, run_dir, step, log)
    return tracking
