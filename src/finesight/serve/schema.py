"""What a question over HTTP may say: the fields of OpenAI's chat completions, checked.

Fields that would change the answer and cannot be honoured are refused, those that say nothing
about it are taken and passed over, and unknown ones are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, ValidationError

from finesight.serve.errors import Refused
from finesight.serve.limits import Limits

Given = TypeVar("Given", bound=BaseModel)

LONGEST_NAME = 1000
"""Characters of the name of a model or function, and of the id of a file."""

LONGEST_URL = 8192
"""Characters of the address of an image on the web."""

LONGEST_STOP = 200
"""Characters of a stop text."""

IGNORED = (
    *("metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier"),
    *("service_tier", "store", "user"),
)
"""Fields that say nothing about the answer."""

MARKS = 300_000
"""Commas and opening brackets of a body, those in its texts included: each may be a value that
takes hundreds of bytes once it is read, and a kilobyte if it is wrong."""


class Strict(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: str | None = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class FileId(Strict):
    file_id: str = Field(max_length=LONGEST_NAME)


class FilePart(Strict):
    type: Literal["file"]
    file: FileId


Part = Annotated[TextPart | ImagePart | FilePart, Discriminator("type")]


class CalledFunction(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str | None = None


class UserMessage(Strict):
    role: Literal["user"]
    content: str | list[Part]
    name: str | None = None


class AssistantMessage(BaseModel):
    """An earlier answer as it was given: what came with its text (boxes, a refusal) is not read."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    role: Literal["assistant"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None


class ToolMessage(Strict):
    role: Literal["tool"]
    content: str | list[TextPart]
    tool_call_id: str | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Discriminator("role")
]


class NamedSchema(Strict):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """`boxes` is this server's own: boxes in the model's dialect and nothing else."""

    type: Literal["text", "json_object", "json_schema", "boxes"]
    json_schema: NamedSchema | None = None


class Function(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: str = Field(max_length=LONGEST_NAME)


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Parameters(Strict):
    """The body of POST /v1/chat/completions, except for its messages."""

    model: str = Field(max_length=LONGEST_NAME)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Of these, only the value that changes nothing.
    frequency_penalty: Literal[0, None] = None
    presence_penalty: Literal[0, None] = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    modalities: list[Literal["text"]] | None = None
    # Those of IGNORED.
    metadata: Any = None
    parallel_tool_calls: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    user: Any = None

    @property
    def stops(self) -> list[str]:
        """The stop texts."""
        given = self.stop or []
        return [given] if isinstance(given, str) else given

    @property
    def longest(self) -> int | None:
        """The tokens that the answer may have, where the request says so."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer


class Question(Parameters):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)

    @property
    def parameters(self) -> dict[str, Any]:
        """Fields of `Parameters` as JSON data, without those that say nothing about the answer."""
        ignored = {"messages", *IGNORED}
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude=ignored)


def parsed(kind: type[Given], body: bytes) -> Given:
    """The body as that kind. Raises Refused, naming the field and never its value."""
    marks = sum(body.count(mark) for mark in (b",", b"[", b"{"))
    if marks > MARKS:
        raise Refused(
            400, f"a body of {marks} commas and opening brackets, and at most {MARKS} are taken"
        )
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        unknown = first["type"] == "extra_forbidden"
        said = "no field that this server knows" if unknown else first["msg"][:200]
        raise Refused(400, f"{place or 'the body'}: {said}", place or None) from error
    except RecursionError as error:
        raise Refused(400, f"a body of {len(body)} bytes that is nested too deeply") from error


def check_limits(question: Question, limits: Limits, characters: int) -> None:
    """Raise Refused for a question that is larger than the limits allow.

    Args:
        question: The body of the request.
        limits: Limits of the server.
        characters: Limit of all texts, from the context length of the model.
    """
    contents = [message.content or "" for message in question.messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    calls = [
        call.function.arguments
        for message in question.messages
        if isinstance(message, AssistantMessage)
        for call in message.tool_calls or []
    ]
    texts = [content for content in contents if isinstance(content, str)]
    texts += [part.text for part in parts if isinstance(part, TextPart)]
    pictures = sum(not isinstance(part, TextPart) for part in parts)
    stops = question.stops
    tools = sum(len(tool.model_dump_json()) for tool in question.tools or [])
    schema = question.response_format and question.response_format.json_schema
    shape = len(schema.model_dump_json()) if schema else 0
    for param, unit, value, most in (
        ("messages", "messages", len(question.messages), limits.messages),
        ("messages", "pictures", pictures, limits.pictures),
        ("messages", "characters of text", sum(map(len, texts + calls)), characters),
        ("n", "choices", question.n or 1, limits.choices),
        ("top_logprobs", "tokens", question.top_logprobs or 0, limits.top_logprobs),
        ("stop", "texts", len(stops), limits.stops),
        ("stop", "characters", max(map(len, stops), default=0), LONGEST_STOP),
        ("max_tokens", "tokens", question.longest or 1, limits.answer_tokens),
        ("tools", "characters", tools, limits.schema_characters),
        ("response_format", "characters", shape, limits.schema_characters),
    ):
        if value > most:
            raise Refused(400, f"{param}: {value} {unit}, and at most {most} are taken", param)
    if "" in stops:
        raise Refused(400, f"stop text {stops.index('')} is empty", "stop")
    if question.top_logprobs and not question.logprobs:
        raise Refused(400, f"top_logprobs {question.top_logprobs} without logprobs", "top_logprobs")
