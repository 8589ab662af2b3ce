"""What a tracker can be given, as it travels to the tracker's process and in no other form.

Texts are cleaned of secrets by their type: a record with one cannot be made.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, TypeAdapter

from finesight.config import Tracker
from finesight.track.secrets import cleaned, cleaned_tree

EXAMPLES = "examples"
"""What pictures of answers are called in every tracker."""

Text = Annotated[str, AfterValidator(cleaned)]
Settings = Annotated[dict[str, Any], AfterValidator(cleaned_tree)]


class _Message(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        ser_json_bytes="base64",
        val_json_bytes="base64",
        # A void step has NaN for its figures.
        ser_json_inf_nan="constants",
    )


class Begin(_Message):
    """A run begins or goes on after `step`, with these settings; files of its own the tracker
    keeps in `folder`. `id` is what the tracker called the run when it began, None of a new one."""

    type: Literal["begin"] = "begin"
    tracker: Tracker
    name: Text
    folder: Path
    settings: Settings
    step: int = 0
    id: str | None = None


class Row(_Message):
    """Figures by name as of `step` finished steps."""

    step: int
    values: dict[str, float]


class Figures(_Message):
    """Those of one step, or of several that waited for a slow tracker and go on together."""

    type: Literal["figures"] = "figures"
    rows: tuple[Row, ...]


class Picture(_Message):
    """A JPEG, and what it shows."""

    jpeg: bytes
    caption: Text

    def image(self) -> Image.Image:
        """The picture, decoded."""
        return Image.open(io.BytesIO(self.jpeg))


class Pictures(_Message):
    """Answers to the same questions at every evaluation, drawn."""

    type: Literal["pictures"] = "pictures"
    step: int
    pictures: tuple[Picture, ...]

    def named(self) -> Iterator[tuple[str, Picture]]:
        """Each with its name, the same one at every evaluation and in every tracker."""
        for number, picture in enumerate(self.pictures, 1):
            yield f"{EXAMPLES}/{number}", picture


Level = Literal["info", "warning", "error"]


class Alert(_Message):
    """Something that a person should hear of although nobody is looking."""

    type: Literal["alert"] = "alert"
    step: int
    level: Level
    title: Text
    text: Text


State = Literal["finished", "failed", "interrupted"]


class End(_Message):
    """The run is over, or this part of it; `reason` says why it failed."""

    type: Literal["end"] = "end"
    state: State
    reason: Text = ""


Record = Annotated[Begin | Figures | Pictures | Alert | End, Discriminator("type")]

RECORD: TypeAdapter[Record] = TypeAdapter(Record)


class Begun(_Message):
    """What a tracker calls the run, where it lets a later one go on with it, and where to look at
    it, for people."""

    id: str | None
    told: str


class Reply(_Message):
    """That a record has arrived; `failed` says what went wrong instead."""

    begun: Begun | None = None
    failed: str | None = None
