"""Validation of browser events before Gradio queues them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, computed_field

from finesight.web.web_limits import MAX_NEW_TOKENS, MAX_TEMPERATURE

ID_PATTERN = r"[A-Za-z0-9_-]{1,64}"
"""Pattern of session and event IDs."""


class Upload(BaseModel):
    """Uploaded file of a message, identified by its path."""

    model_config = ConfigDict(frozen=True)

    path: str

    @computed_field
    def meta(self) -> dict[str, str]:
        """Marker by which Gradio identifies a file."""
        return {"_type": "gradio.FileData"}


class Question(BaseModel):
    """Value of the composer: a text and uploaded images."""

    model_config = ConfigDict(frozen=True)

    text: str = ""
    files: list[Upload] = []


MaxTokens = Annotated[FiniteFloat, Field(ge=1, le=MAX_NEW_TOKENS)]
Temperature = Annotated[FiniteFloat, Field(ge=0, le=MAX_TEMPERATURE)]

Inputs = TypeAdapter[Any]
"""Type of the input data of an event."""

EMPTY_INPUT: Inputs = TypeAdapter(tuple[()])
QUESTION_INPUT: Inputs = TypeAdapter(tuple[Question, bool, MaxTokens, Temperature])
REGENERATE_INPUT: Inputs = TypeAdapter(tuple[bool, MaxTokens, Temperature])


class Event(BaseModel):
    """Event of the page. Other keys are dropped, since the page does not use them."""

    model_config = ConfigDict(frozen=True)

    fn_index: int
    session_hash: str = Field(pattern=rf"^{ID_PATTERN}$")
    trigger_id: Annotated[int, Field(ge=0, le=2**31)] | None = None
    data: list[Any]


class Cancel(BaseModel):
    """Cancellation of a running event."""

    model_config = ConfigDict(frozen=True)

    fn_index: int
    session_hash: str = Field(pattern=rf"^{ID_PATTERN}$")
    event_id: str = Field(pattern=rf"^{ID_PATTERN}$")


class Reset(BaseModel):
    """Reset of the iterator of an event."""

    model_config = ConfigDict(frozen=True)

    event_id: str = Field(pattern=rf"^{ID_PATTERN}$")


class UnknownEvent(ValueError):
    """The page does not have this event."""


def parse_event(body: bytes, inputs: Mapping[int, Inputs]) -> tuple[Event, list[Upload]]:
    """Validate an event and list its uploaded files.

    Args:
        body: JSON of the event.
        inputs: Types of the input data by event number.

    Raises:
        ValueError: The event is invalid or unknown.
    """
    event = Event.model_validate_json(body)
    if event.fn_index not in inputs:
        raise UnknownEvent(f"unknown event {event.fn_index}")
    adapter = inputs[event.fn_index]
    checked = adapter.validate_python(event.data)
    uploads = [file for item in checked if isinstance(item, Question) for file in item.files]
    return event.model_copy(update={"data": adapter.dump_python(checked, mode="json")}), uploads
