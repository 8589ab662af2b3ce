"""Interface of trackers, and what several of them need.

Light halves of trackers import this module, so it does not import that of records with images.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from finesight.track.tracker_records import (
        AlertRecord,
        FinishRecord,
        ImagesRecord,
        MetricsRecord,
        StartRecord,
        TrackerRecord,
    )
    from finesight.tracker_components import AlertLevel

ALERT_LEVEL_NAMES: dict[AlertLevel, str] = {"info": "INFO", "warning": "WARN", "error": "ERROR"}
"""Names of the members of `AlertLevel` in packages that have this class."""

_NO_FILE_NAME = re.compile(r"^\.+|[^\w.-]")
"""Characters of a run name that its folder does not have."""

MAX_FILE_NAME_BYTES = 255
"""Maximum length of a file name in UTF-8 on Linux; 86 Chinese characters are longer."""


class Tracker(ABC):
    """Interface to one tracker package; its methods run in the process of the tracker.

    An exception in a method stops this tracker, but not the training. A call may take up to
    `tracker_manager.RESPONSE_TIMEOUT_S`.

    Attributes:
        extra: `TrackerComponent.extra` of a plug-in without a component.
        telemetry_off_env: `TrackerComponent.telemetry_off_env` of a plug-in without a component.
    """

    extra: ClassVar[str] = ""
    telemetry_off_env: ClassVar[Mapping[str, str]] = {}

    def handle(self, record: TrackerRecord) -> str | None:
        """Call the method for a record; return a message for the user, if any."""
        from finesight.track.tracker_records import (
            AlertRecord,
            FinishRecord,
            ImagesRecord,
            MetricsRecord,
            StartRecord,
        )

        methods: dict[type[TrackerRecord], Callable[[Any], str | None]] = {
            StartRecord: self.start_run,
            MetricsRecord: self.log_metrics,
            ImagesRecord: self.log_images,
            AlertRecord: self.send_alert,
            FinishRecord: self.finish_run,
        }
        return methods[type(record)](record)

    @abstractmethod
    def start_run(self, record: StartRecord) -> str:
        """Create a run in the tracker, or resume the run with the ID `record.id`.

        Returns:
            A message for the user with the address of the dashboard, or the folder.
        """

    @abstractmethod
    def log_metrics(self, record: MetricsRecord) -> None:
        """Log the metrics of one or more training steps."""

    @abstractmethod
    def log_images(self, record: ImagesRecord) -> None:
        """Log the images of an evaluation with their captions."""

    @abstractmethod
    def send_alert(self, record: AlertRecord) -> None:
        """Send an alert, or log its text if the tracker has no alert function."""

    @abstractmethod
    def finish_run(self, record: FinishRecord) -> None:
        """Send buffered data and close the run."""


class LoggingTracker(Tracker):
    """Base class of trackers whose run has a `log` method for metrics and images.

    Attributes:
        package: Name of the package, which has a class `Image`.
        image_options: Arguments of this class, besides image and caption.
    """

    package: ClassVar[str]
    image_options: ClassVar[Mapping[str, Any]] = {"file_type": "jpg"}
    _run: Any

    def log_values(self, step: int, values: dict[str, Any]) -> None:
        """Log values of a training step by name."""
        self._run.log(values, step=step)

    def log_metrics(self, record: MetricsRecord) -> None:
        for step_metrics in record.steps:
            self.log_values(step_metrics.step, dict(step_metrics.values))

    def log_images(self, record: ImagesRecord) -> None:
        # Separate names, since a package may resize the images of a list to one size.
        create_image = import_module(self.package).Image
        images = {
            name: create_image(example.image, caption=example.caption, **self.image_options)
            for name, example in record.iter_named()
        }
        self.log_values(record.step, images)


def make_folder_name(name: str, suffix: str = "") -> str:
    """Return a run name as the name of a folder, shortened before the suffix."""
    num_bytes = MAX_FILE_NAME_BYTES - len(suffix.encode())
    return _NO_FILE_NAME.sub("_", name).encode()[:num_bytes].decode(errors="ignore") + suffix


def flatten_settings(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested settings as pairs of dotted name and text, for packages without nesting."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)
