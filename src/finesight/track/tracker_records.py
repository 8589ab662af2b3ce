"""Messages between the training process and the process of a tracker.

Validation redacts secrets in all text fields, so that no record contains them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, TypeAdapter

from finesight.config import TrackerSettings
from finesight.track.redaction import redact, redact_tree

EXAMPLES_KEY = "examples"
"""Prefix of the names of example images in all trackers."""

RedactedText = Annotated[str, AfterValidator(redact)]
RedactedSettings = Annotated[dict[str, Any], AfterValidator(redact_tree)]


class _TrackerMessage(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        ser_json_bytes="base64",
        val_json_bytes="base64",
        # Non-finite steps have NaN metrics.
        ser_json_inf_nan="constants",
    )


class StartRecord(_TrackerMessage):
    """Record that starts or resumes a run in the tracker.

    Attributes:
        tracker: Settings of the tracker in the recipe.
        name: Name of the run.
        folder: Folder for local files of the tracker.
        settings: Recipe and facts about the run.
        step: Number of finished steps.
        id: Run id of the tracker; None for a new run.
    """

    type: Literal["start"] = "start"
    tracker: TrackerSettings
    name: RedactedText
    folder: Path
    settings: RedactedSettings
    step: int = 0
    id: str | None = None


class StepMetrics(_TrackerMessage):
    """Metrics of one training step, by name."""

    step: int
    values: dict[str, float]


class MetricsRecord(_TrackerMessage):
    """Record with the metrics of one or several training steps."""

    type: Literal["metrics"] = "metrics"
    steps: tuple[StepMetrics, ...]


class TrackedImage(_TrackerMessage):
    """An example image as JPEG, with its caption."""

    jpeg: bytes
    caption: RedactedText

    def decode(self) -> Image.Image:
        """Decode the JPEG data to an image."""
        return Image.open(io.BytesIO(self.jpeg))


class ImagesRecord(_TrackerMessage):
    """Record with the example images of an evaluation.

    The samples are the same at every evaluation of a run.
    """

    type: Literal["images"] = "images"
    step: int
    images: tuple[TrackedImage, ...]

    def iter_named(self) -> Iterator[tuple[str, TrackedImage]]:
        """Yield example images with stable names, so that trackers show them as one series."""
        for image_number, image in enumerate(self.images, 1):
            yield f"{EXAMPLES_KEY}/{image_number}", image


AlertLevel = Literal["info", "warning", "error"]


class AlertRecord(_TrackerMessage):
    """Record with an alert for the user, such as a stopped run."""

    type: Literal["alert"] = "alert"
    step: int
    level: AlertLevel
    title: RedactedText
    text: RedactedText


RunState = Literal["finished", "failed", "interrupted"]


class FinishRecord(_TrackerMessage):
    """Record that closes a run, with the reason if it failed or was interrupted."""

    type: Literal["finish"] = "finish"
    state: RunState
    reason: RedactedText = ""


TrackerRecord = Annotated[
    StartRecord | MetricsRecord | ImagesRecord | AlertRecord | FinishRecord, Discriminator("type")
]

RECORD_ADAPTER: TypeAdapter[TrackerRecord] = TypeAdapter(TrackerRecord)


class RunStarted(_TrackerMessage):
    """Response of a tracker after it started a run.

    Attributes:
        id: Run id for a later resume; None if the tracker does not support it.
        message: Message for the user with the address of the dashboard, or the folder.
    """

    id: str | None
    message: str


class RecordReply(_TrackerMessage):
    """Reply of the tracker process to one record.

    `started` is the response to a StartRecord, `error` the reason if the tracker failed.
    """

    started: RunStarted | None = None
    error: str | None = None
