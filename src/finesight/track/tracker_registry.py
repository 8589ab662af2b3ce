"""Registry of tracker packages: how to import, install and configure each.

A new tracker needs a module with a subclass of `Tracker`, an entry in each table below, and a name
in `config.TrackerKind`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from finesight.config import TrackerKind, TrackerSettings
from finesight.errors import UserError
from finesight.track.tracker import Tracker

TRACKER_EXTRAS: dict[TrackerKind, str] = {
    "swanlab": "track",
    "tensorboard": "track",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
"""Extra of finesight that installs the package of each tracker."""

TELEMETRY_OFF_ENV: dict[TrackerKind, dict[str, str]] = {
    "swanlab": {},
    "tensorboard": {},
    "wandb": {"WANDB_ERROR_REPORTING": "false"},
    "mlflow": {"MLFLOW_DISABLE_TELEMETRY": "true"},
    "trackio": {"HF_HUB_DISABLE_TELEMETRY": "1"},
}
"""Environment variables that disable error and usage reports of each package.

Variables that the user sets take precedence.
"""


def create_tracker(kind: TrackerKind) -> Tracker:
    """Import the package of a tracker, and create the tracker.

    Raises ImportError if the package is not installed.
    """
    match kind:
        case "swanlab":
            from finesight.track.swanlab import SwanLabTracker

            return SwanLabTracker()
        case "tensorboard":
            from finesight.track.tensorboard import TensorBoardTracker

            return TensorBoardTracker()
        case "wandb":
            from finesight.track.wandb import WandbTracker

            return WandbTracker()
        case "mlflow":
            from finesight.track.mlflow import MLflowTracker

            return MLflowTracker()
        case "trackio":
            from finesight.track.trackio import TrackioTracker

            return TrackioTracker()


def require_packages(trackers: Sequence[TrackerSettings]) -> None:
    """Raise UserError if the package of a tracker is not installed. Imports no package."""
    for tracker in trackers:
        if find_spec(tracker.kind) is None:
            raise _missing_package_error(
                tracker.kind, tracker.kind, f"'finesight[{TRACKER_EXTRAS[tracker.kind]}]'"
            )
        needs_dashboard = tracker.kind == "swanlab" and tracker.uri == "local"
        if needs_dashboard and find_spec("swanboard") is None:
            raise _missing_package_error("swanlab", "swanboard", "'swanlab[dashboard]'")


def _missing_package_error(kind: TrackerKind, package: str, install: str) -> UserError:
    return UserError(
        f"{package} is not installed",
        where=f"track: {kind}",
        expected=f"the packages of {install}",
        remedy=f"Run pip install {install}, or remove {kind} from track.",
    )
