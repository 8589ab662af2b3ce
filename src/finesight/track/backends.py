"""Trackers: TensorBoard, SwanLab, Weights & Biases and MLflow.

A new tracker needs a subclass of `Tracker`, an entry in `TRACKERS`, and a name in
`config.TrackerName`. The main process uses this module as well, so tracker packages are imported in
methods only.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from finesight.config import TrackerSettings
from finesight.errors import UserError
from finesight.plugins import Registry
from finesight.track.tracker import Tracker
from finesight.track.trackers.mlflow import MLflowTracker
from finesight.track.trackers.swanlab import SwanLabTracker
from finesight.track.trackers.tensorboard import TensorBoardTracker
from finesight.track.trackers.wandb import WandbTracker

_BUILT_IN: dict[str, type[Tracker]] = {
    "swanlab": SwanLabTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "mlflow": MLflowTracker,
}
TRACKERS = Registry("trackers", Tracker, _BUILT_IN)


def require_packages(trackers: Sequence[TrackerSettings]) -> None:
    """Raise UserError if the package of a tracker is not installed. Imports no package."""
    for tracker in trackers:
        extra = TRACKERS[tracker.kind].extra
        packages = {}
        if extra:
            packages[tracker.kind] = f"'finesight[{extra}]'"
        if tracker.kind == "swanlab" and tracker.uri == "local":
            packages["swanboard"] = "'swanlab[dashboard]'"
        for package, install in packages.items():
            if find_spec(package) is None:
                raise UserError(
                    f"{package} is not installed",
                    where=f"track: {tracker.kind}",
                    expected=f"the packages of {install}",
                    remedy=f"Run pip install {install}, or remove {tracker.kind} from track.",
                )
