"""Validate events from the browser before Gradio queues them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, computed_field

from finesight.web.web_limits import MAX_NEW_TOKENS, MAX_TEMPERATURE

ID_PATTERN = r"[A-Za-z0-9_-]{1,64}"
"""Pattern of Gradio session IDs and event IDs."""


class Upload(BaseModel):
    """Reference to an uploaded file in a message, by its path on the server."""

    model_config = ConfigDict(frozen=True)

    path: str

    @computed_field
    def meta(self) -> dict[str, str]:
        """Marker by which Gradio recognizes a file."""
        return {"_type": "gradio.FileData"}


class Question(BaseModel):
    """Message of the user: a text and uploaded images."""

    model_config = ConfigDict(frozen=True)

    text: str = ""
    files: list[Upload] = []


MaxTokens = Annotated[FiniteFloat, Field(ge=1, le=MAX_NEW_TOKENS)]
Temperature = Annotated[FiniteFloat, Field(ge=0, le=MAX_TEMPERATURE)]

Inputs = TypeAdapter[Any]
"""Validator for the input data of an event."""

EMPTY_INPUT: Inputs = TypeAdapter(tuple[()])
QUESTION_INPUT: Inputs = TypeAdapter(tuple[Question, bool, MaxTokens, Temperature])
REGENERATE_INPUT: Inputs = TypeAdapter(tuple[bool, MaxTokens, Temperature])


class Event(BaseModel):
    """Event that the page sends to Gradio, without fields that are not used."""

    model_config = ConfigDict(frozen=True)

    fn_index: int
    session_hash: str = Field(pattern=rf"^{ID_PATTERN}$")
    trigger_id: Annotated[int, Field(ge=0, le=2**31)] | None = None
    data: list[Any]


class Cancel(BaseModel):
    """Request to cancel a running event."""

    model_config = ConfigDict(frozen=True)

    fn_index: int
    session_hash: str = Field(pattern=rf"^{ID_PATTERN}$")
    event_id: str = Field(pattern=rf"^{ID_PATTERN}$")


class Reset(BaseModel):
    """Request to reset the iterator of an event."""

    model_config = ConfigDict(frozen=True)

    event_id: str = Field(pattern=rf"^{ID_PATTERN}$")


class UnknownEvent(ValueError):
    """Raised when the page does not have the requested event."""


def parse_event(body: bytes, inputs: Mapping[int, Inputs]) -> tuple[Event, list[Upload]]:
    """Validate an event from the browser and list its uploaded files.

    Args:
        body: JSON text of the event.
        inputs: Validators of the input data by event number.

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
