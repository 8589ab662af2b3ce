"""The trackers there are. A new one is a file with a `Writer` and a line in each table here, and a
name in `config.TrackerKind`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from finesight.config import Tracker, TrackerKind
from finesight.errors import UserError
from finesight.track.writer import Writer

EXTRAS: dict[TrackerKind, str] = {
    "swanlab": "track",
    "tensorboard": "track",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
"""What to install for each; the package is called as the tracker is."""

REPORTS_OFF: dict[TrackerKind, dict[str, str]] = {
    "swanlab": {},
    "tensorboard": {},
    "wandb": {"WANDB_ERROR_REPORTING": "false"},
    "mlflow": {"MLFLOW_DISABLE_TELEMETRY": "true"},
    "trackio": {"HF_HUB_DISABLE_TELEMETRY": "1"},
}
"""Environment variables that keep a package from reporting errors and usage to its makers, also
where it writes files alone. A variable that the user has set counts."""


def writer_of(kind: TrackerKind) -> Writer:
    """The tracker's package, imported. Raises ImportError without it."""
    match kind:
        case "swanlab":
            from finesight.track.swanlab import SwanLab

            return SwanLab()
        case "tensorboard":
            from finesight.track.tensorboard import TensorBoard

            return TensorBoard()
        case "wandb":
            from finesight.track.wandb import WeightsAndBiases

            return WeightsAndBiases()
        case "mlflow":
            from finesight.track.mlflow import MLflow

            return MLflow()
        case "trackio":
            from finesight.track.trackio import Trackio

            return Trackio()


def require_packages(trackers: Sequence[Tracker]) -> None:
    """Raises UserError for a tracker whose package is not installed; imports none of them."""
    for tracker in trackers:
        if find_spec(tracker.kind) is None:
            raise _missing(tracker.kind, tracker.kind, f"'finesight[{EXTRAS[tracker.kind]}]'")
        local = tracker.kind == "swanlab" and tracker.address == "local"
        if local and find_spec("swanboard") is None:
            raise _missing("swanlab", "swanboard", "'swanlab[dashboard]'")


def _missing(kind: TrackerKind, package: str, install: str) -> UserError:
    return UserError(
        f"{package} is not installed",
        where=f"track: {kind}",
        expected=f"the packages of {install}",
        remedy=f"pip install {install}, or leave {kind} out of track",
    )
