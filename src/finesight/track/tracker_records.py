"""Messages, with images, between the training process and the process of a tracker.

Validation redacts secrets in all text fields, so that no record contains them. Three rules find
secrets: values of environment variables with names such as HF_TOKEN, known formats of tokens, and
settings with such names. Redaction is idempotent.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, TypeAdapter

from finesight.config import TrackerSettings
from finesight.data.image_header import CorruptImageError, read_image_size
from finesight.data.sample import BoxPart
from finesight.infer.prediction import draw_boxes
from finesight.report.examples import pair_predictions, read_boxes, read_image_paths
from finesight.report.run_reader import JsonObject
from finesight.vision.image_processing import load_image

REDACTED = "[removed]"

_SECRET_NAME = re.compile(
    r"(?:^|[_-])(?:api_?key|key|token|secret|password|passwd|pass|pwd|credentials?)(?:$|[_-])",
    re.IGNORECASE,
)
"""Names of variables and settings with secret values, such as WANDB_API_KEY and HF_TOKEN.

`max_new_tokens` and `TOKENIZERS_PARALLELISM` do not match.
"""

MIN_SECRET_LENGTH = 8
"""Minimum number of characters of a redacted value.

Shorter values, such as that of `MY_KEY=on`, would remove common words.
"""

_URL_CREDENTIALS = re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE)
_QUERY_SECRET = re.compile(
    r"([?&][^=&\s]*(?:key|token|secret|signature|sig|password|credential)[^=&\s]*=)[^&\s]+",
    re.IGNORECASE,
)
_TOKEN_FORMATS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|sk-[A-Za-z0-9_-]{20,}"  # OpenAI and compatible
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|AKIA[0-9A-Z]{16}"  # AWS
    r"|xox[abprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|wandb_v\d_\w{20,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"  # JSON Web Tokens
    r"|(?<=Bearer )[\w.~+/=-]{8,}"
)
_HOME_FOLDERS = re.compile(r"(?<![\w.])/(?:home|Users)/[^/\s\"']+")


def redact(text: str) -> str:
    """Replace secrets in a text by `[removed]` and home folders by `~`."""
    for secret in _iter_secret_values():
        text = text.replace(secret, REDACTED)
    text = _URL_CREDENTIALS.sub(r"\1", text)
    text = _QUERY_SECRET.sub(rf"\1{REDACTED}", text)
    text = _TOKEN_FORMATS.sub(REDACTED, text)
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"(?<![\w.]){re.escape(home)}(?![\w.-])", "~", text)
    return _HOME_FOLDERS.sub("~", text)


def redact_tree(tree: dict[str, Any]) -> dict[str, Any]:
    """Redact all texts of nested settings, and the values of settings with names of secrets."""
    return {
        redact(name): REDACTED if _SECRET_NAME.search(name) else _redact_value(value)
        for name, value in tree.items()
    }


def _redact_value(value: object) -> object:
    match value:
        case str():
            return redact(value)
        case dict():
            return redact_tree(value)
        case list() | tuple():
            return [_redact_value(item) for item in value]
        case _:
            return value


def _iter_secret_values() -> Iterator[str]:
    """Yield the secret values of environment variables, longest first.

    A secret may contain a shorter one.
    """
    values = {
        v
        for name, v in os.environ.items()
        if _SECRET_NAME.search(name) and len(v) >= MIN_SECRET_LENGTH
    }
    yield from sorted(values, key=len, reverse=True)


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


MAX_SAMPLES = 8
"""Maximum number of rendered samples, evenly spaced over the validation data."""

MAX_PANEL_SIDE = 640
"""Maximum side length of a panel in pixels; each panel shows the image with one set of boxes."""

PANEL_GAP = 6
"""Gap between two panels in pixels."""

MAX_CAPTION_CHARS = 1000


def render_example_images(before: Path, after: Path) -> list[TrackedImage]:
    """Render validation samples with the boxes of two prediction files.

    Args:
        before: Prediction file before training; may be missing, or equal to `after`.

    Returns:
        One captioned image per sample. Samples without a readable image are skipped.
    """
    baseline = before if before.is_file() and before != after else None
    line_pairs = list(pair_predictions(baseline, after)) if after.is_file() else []
    num_samples = min(len(line_pairs), MAX_SAMPLES)
    images = []
    for n in range(num_samples):
        index = round(n * (len(line_pairs) - 1) / max(1, num_samples - 1))
        before_line, after_line = line_pairs[index]
        image = _render_example(before_line, after_line) if after_line is not None else None
        images += [] if image is None else [image]
    return images


def _render_example(before: JsonObject | None, after: JsonObject) -> TrackedImage | None:
    boxes_by_name = {
        "reference": read_boxes(after.get("gold_boxes")),
        "before": read_boxes((before or {}).get("boxes")),
        "after": read_boxes(after.get("boxes")),
    }
    paths = read_image_paths(after)
    # Of several images, use the one with boxes.
    image_index = next((one["image"] for boxes in boxes_by_name.values() for one in boxes), 0)
    if not 0 <= image_index < len(paths):
        return None
    try:
        image, scale = _open_resized(Path(paths[image_index]))
    except (CorruptImageError, OSError, ValueError):
        return None
    panels = {}
    for name, boxes in boxes_by_name.items():
        shown = [_scale_box(box, scale) for box in boxes if box["image"] == image_index]
        if boxes:
            panels[name] = draw_boxes(image, shown)
    width, height = image.size
    num_panels = max(1, len(panels))
    combined = Image.new("RGB", (num_panels * (width + PANEL_GAP) - PANEL_GAP, height), "white")
    for panel_index, panel in enumerate(panels.values() if panels else [image]):
        combined.paste(panel, (panel_index * (width + PANEL_GAP), 0))
    buffer = io.BytesIO()
    # Without chroma subsampling, so that thin lines keep their colors.
    combined.save(buffer, "JPEG", quality=88, subsampling=0)
    caption = _format_caption(before, after, ", ".join(panels))
    return TrackedImage(jpeg=buffer.getvalue(), caption=caption)


def _open_resized(path: Path) -> tuple[Image.Image, float]:
    """Return an image of at most MAX_PANEL_SIDE, and its scale relative to the original."""
    height, width = read_image_size(path)
    scale = min(1.0, MAX_PANEL_SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return load_image(path, min_side=min(size)).resize(size), scale


def _scale_box(box: JsonObject, scale: float) -> BoxPart:
    x1, y1, x2, y2 = (corner * scale for corner in box["xyxy"])
    return BoxPart(image=box["image"], label=box["label"] or None, xyxy=(x1, y1, x2, y2))


def _format_caption(before: JsonObject | None, after: JsonObject, panel_names: str) -> str:
    lines = {
        "id": after.get("id"),
        "question": after.get("prompt"),
        "reference": after.get("gold"),
        "before": None if before is None else before.get("answer"),
        "after": after.get("answer"),
        "boxes, left to right": panel_names or None,
    }
    return "\n".join(
        f"{name}: {str(text)[:MAX_CAPTION_CHARS]}" for name, text in lines.items() if text
    )
