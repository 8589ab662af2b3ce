"""Base class of trackers, and helpers for packages without nested settings."""

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
    """Interface to one tracker package.

    An exception of a method ends this tracker only. A call may take as long as the response timeout
    of the client.
    """

    @abstractmethod
    def start_run(self, record: StartRecord) -> RunStarted:
        """Create a run, or resume the run `record.id`."""

    @abstractmethod
    def log_metrics(self, record: MetricsRecord) -> None:
        """Log the metrics of one or more steps."""

    @abstractmethod
    def log_images(self, record: ImagesRecord) -> None:
        """Log images with captions."""

    @abstractmethod
    def send_alert(self, record: AlertRecord) -> None:
        """Send an alert, or log it if the package has no alerts."""

    @abstractmethod
    def finish_run(self, record: FinishRecord) -> None:
        """Flush buffered data and close the run."""


def flatten_settings(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield settings by dotted names, for packages without nested settings."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)
