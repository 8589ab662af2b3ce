"""Check the events that a browser sends, before Gradio queues them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, computed_field

from finesight.web.limits import LONGEST_ANSWER, MOST_TEMPERATURE

SESSION = r"[A-Za-z0-9_-]{1,64}"
"""Names of sessions and events."""


class Upload(BaseModel):
    """A file of a message. Gradio knows it by its path."""

    model_config = ConfigDict(frozen=True)

    path: str

    @computed_field
    def meta(self) -> dict[str, str]:
        """The mark by which Gradio knows a file."""
        return {"_type": "gradio.FileData"}


class Question(BaseModel):
    """The value of the composer: a text and uploaded images."""

    model_config = ConfigDict(frozen=True)

    text: str = ""
    files: list[Upload] = []


MaxTokens = Annotated[FiniteFloat, Field(ge=1, le=LONGEST_ANSWER)]
Temperature = Annotated[FiniteFloat, Field(ge=0, le=MOST_TEMPERATURE)]

Inputs = TypeAdapter[Any]
"""The type of the data of an event."""

NOTHING: Inputs = TypeAdapter(tuple[()])
ASKED: Inputs = TypeAdapter(tuple[Question, bool, MaxTokens, Temperature])
ASKED_AGAIN: Inputs = TypeAdapter(tuple[bool, MaxTokens, Temperature])


class Event(BaseModel):
    """An event of the page. Other keys are dropped, since the page uses none of them."""

    model_config = ConfigDict(frozen=True)

    fn_index: int
    session_hash: str = Field(pattern=rf"^{SESSION}$")
    trigger_id: Annotated[int, Field(ge=0, le=2**31)] | None = None
    data: list[Any]


class Cancel(BaseModel):
    """The end of an event that is running."""

    model_config = ConfigDict(frozen=True)

    fn_index: int
    session_hash: str = Field(pattern=rf"^{SESSION}$")
    event_id: str = Field(pattern=rf"^{SESSION}$")


class Reset(BaseModel):
    """The end of the iterator of an event."""

    model_config = ConfigDict(frozen=True)

    event_id: str = Field(pattern=rf"^{SESSION}$")


class UnknownEvent(ValueError):
    """An event that the page does not have."""


def parse_event(body: bytes, inputs: Mapping[int, Inputs]) -> tuple[Event, list[Upload]]:
    """Validate an event and list the files that it names.

    `inputs` are the types of the data of each event, by its number. Raises ValueError.
    """
    event = Event.model_validate_json(body)
    if event.fn_index not in inputs:
        raise UnknownEvent(f"no event {event.fn_index}")
    adapter = inputs[event.fn_index]
    checked = adapter.validate_python(event.data)
    uploads = [file for item in checked if isinstance(item, Question) for file in item.files]
    return event.model_copy(update={"data": adapter.dump_python(checked, mode="json")}), uploads
