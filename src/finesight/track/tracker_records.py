"""Records sent to the process of a tracker.

Text fields redact secrets on validation, so a record cannot contain them.
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
"""Key of example images in all trackers."""

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
    """Start or resume of a run after `step` steps.

    Attributes:
        folder: Folder for files of the tracker.
        id: Run ID of the tracker. None for a new run.
    """

    type: Literal["start"] = "start"
    tracker: TrackerSettings
    name: RedactedText
    folder: Path
    settings: RedactedSettings
    step: int = 0
    id: str | None = None


class StepMetrics(_TrackerMessage):
    """Metrics by name after `step` steps."""

    step: int
    values: dict[str, float]


class MetricsRecord(_TrackerMessage):
    """Metrics of one step, or of several queued steps."""

    type: Literal["metrics"] = "metrics"
    steps: tuple[StepMetrics, ...]


class TrackedImage(_TrackerMessage):
    """JPEG image with a caption."""

    jpeg: bytes
    caption: RedactedText

    def decode(self) -> Image.Image:
        """Return the decoded image."""
        return Image.open(io.BytesIO(self.jpeg))


class ImagesRecord(_TrackerMessage):
    """Rendered answers to the same samples at every evaluation."""

    type: Literal["images"] = "images"
    step: int
    images: tuple[TrackedImage, ...]

    def iter_named(self) -> Iterator[tuple[str, TrackedImage]]:
        """Yield images with names that are equal at every evaluation and in every tracker."""
        for image_number, image in enumerate(self.images, 1):
            yield f"{EXAMPLES_KEY}/{image_number}", image


AlertLevel = Literal["info", "warning", "error"]


class AlertRecord(_TrackerMessage):
    """Alert for the user."""

    type: Literal["alert"] = "alert"
    step: int
    level: AlertLevel
    title: RedactedText
    text: RedactedText


RunState = Literal["finished", "failed", "interrupted"]


class FinishRecord(_TrackerMessage):
    """End of the run, with the reason of a failure."""

    type: Literal["finish"] = "finish"
    state: RunState
    reason: RedactedText = ""


TrackerRecord = Annotated[
    StartRecord | MetricsRecord | ImagesRecord | AlertRecord | FinishRecord, Discriminator("type")
]

RECORD_ADAPTER: TypeAdapter[TrackerRecord] = TypeAdapter(TrackerRecord)


class RunStarted(_TrackerMessage):
    """Response of a tracker to the start of a run.

    Attributes:
        id: Run ID for a later resume, if the tracker supports it.
        message: Location of the dashboard or files, for the user.
    """

    id: str | None
    message: str


class RecordReply(_TrackerMessage):
    """Reply to a record, with an error if it failed."""

    started: RunStarted | None = None
    error: str | None = None
