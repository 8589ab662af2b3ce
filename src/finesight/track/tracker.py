"""Interface that each tracker package implements, and a helper for settings."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from finesight.track.tracker_records import (
    AlertRecord,
    FinishRecord,
    ImagesRecord,
    MetricsRecord,
    RunStarted,
    StartRecord,
)


class Tracker(ABC):
    """Interface to one tracker package; its methods run in the process of the tracker.

    An exception in a method stops this tracker, but not the training. A call may take up to
    `tracker_client.RESPONSE_TIMEOUT_S`.
    """

    @abstractmethod
    def start_run(self, record: StartRecord) -> RunStarted:
        """Create a run in the tracker, or resume the run with the id `record.id`."""

    @abstractmethod
    def log_metrics(self, record: MetricsRecord) -> None:
        """Log the metrics of one or more training steps."""

    @abstractmethod
    def log_images(self, record: ImagesRecord) -> None:
        """Log the images of an evaluation with their captions."""

    @abstractmethod
    def send_alert(self, record: AlertRecord) -> None:
        """Send an alert through the tracker.

        Trackers without an alert function log the text instead.
        """

    @abstractmethod
    def finish_run(self, record: FinishRecord) -> None:
        """Send buffered data and close the run."""


def flatten_settings(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested settings as pairs of dotted name and text, for packages without nesting."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)
