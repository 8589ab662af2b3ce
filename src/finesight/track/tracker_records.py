"""Records that the training process sends to the process of a tracker.

Validation redacts secrets in all text fields, so that no record contains them. Three rules find
secrets: values of environment variables with names such as HF_TOKEN, known formats of tokens, and
settings with such names. Redaction is idempotent.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict

from finesight.settings.config import TrackerSettings
from finesight.tracker_components import AlertLevel

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

# Each character of a long text may start a scheme or a name, so that their lengths are limited.
_URL_CREDENTIALS = re.compile(r"([a-z][a-z0-9+.-]{0,30}://)[^/\s@]+@", re.IGNORECASE)
_QUERY_SECRET = re.compile(
    r"([?&](?>[^=&?\s]*?(?:key|token|secret|sig|password|credential))[^=&\s]{0,60}+=)[^&\s]+",
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
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class StartRecord(_TrackerMessage):
    """Record that starts or resumes a run in the tracker.

    Attributes:
        name: Name of the run, by the recipe or of its folder.
        description: Notes of the user on the run; may be empty.
        settings: Settings of the recipe, facts about the run, and values of the user.
        id: ID of the run, equal when it is resumed.
        step: Number of steps of the run before the start.
    """

    tracker: TrackerSettings
    name: RedactedText
    folder: Path
    description: RedactedText = ""
    settings: RedactedSettings
    id: str
    step: int = 0


class StepMetrics(_TrackerMessage):
    """Metrics of one training step, by name."""

    step: int
    values: dict[str, float]


class MetricsRecord(_TrackerMessage):
    """Record with the metrics of one or several training steps."""

    steps: tuple[StepMetrics, ...]


class TrackedImage(_TrackerMessage):
    """An RGB example image with its caption."""

    image: Image.Image
    caption: RedactedText


class ImagesRecord(_TrackerMessage):
    """Record with the example images of an evaluation.

    The samples are the same at every evaluation of a run.
    """

    step: int
    images: tuple[TrackedImage, ...]

    def iter_named(self) -> Iterator[tuple[str, TrackedImage]]:
        """Yield example images with stable names, so that trackers show them as one series."""
        for image_number, image in enumerate(self.images, 1):
            yield f"{EXAMPLES_KEY}/{image_number}", image


class AlertRecord(_TrackerMessage):
    """Record with an alert for the user, such as a stopped run."""

    step: int
    level: AlertLevel
    title: RedactedText
    text: RedactedText


RunState = Literal["finished", "failed", "interrupted"]


class FinishRecord(_TrackerMessage):
    """Record that closes a run, with the reason if it failed or was interrupted."""

    state: RunState
    reason: RedactedText = ""


TrackerRecord = StartRecord | MetricsRecord | ImagesRecord | AlertRecord | FinishRecord
