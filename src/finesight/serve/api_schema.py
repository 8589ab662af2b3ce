"""Limits, errors and chat completion requests of the server, a subset of the OpenAI API.

Request fields that cannot influence the completion are accepted and ignored. Unknown fields with a
value, and unsupported fields that would influence it, are rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ValidationError,
    model_validator,
)

from finesight.encode.family import MAX_SAMPLED_FRAMES, MIN_SAMPLED_FRAMES, ThinkingOptions
from finesight.errors import UserError
from finesight.samples.image_file import MAX_IMAGE_PIXELS
from finesight.samples.sample import DEFAULT_FPS

MIB = 2**20

MAX_NAME_CHARS = 1000
"""Maximum length of model names, function names and file IDs in characters."""

MAX_URL_CHARS = 8192

# Bounds of the frame rate of a video file. The maximum selects all frames, up to their limit.
MIN_FPS = 1e-3
MAX_FPS = 1000.0

MAX_FRAMES = 100_000


IGNORED_FIELDS = (
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "cache_salt",
    "priority",
    "request_id",
    "rid",
)
"""Request fields that are ignored, since they cannot influence the completion."""

MAX_JSON_SEPARATORS = 300_000
"""Maximum number of commas and opening brackets in a request body.

Each may start a JSON value, which takes hundreds of bytes after parsing, and a kilobyte if it is
invalid. Characters within texts count as well.
"""


def _limit(default: Any, description: str) -> Any:
    """Declare a limit with its description. Some are options of `serve` of the same name."""
    return field(default=default, metadata={"description": description})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Limits of the inference server. The metadata of each field describes it."""

    max_num_seqs: int = _limit(64, "concurrently generated answers")
    max_queue: int = _limit(256, "requests in the queue; the next one gets status 429")
    timeout: float = _limit(300.0, "request timeout in seconds, from its first byte on")
    max_completion_tokens: int = _limit(
        16_384, "tokens that a request may ask for; 4,096 by default"
    )
    max_connections: int = _limit(
        512,
        "concurrent connections; the next one takes the place of the oldest without a complete"
        " request header, or gets status 503",
    )
    max_body_bytes: int = _limit(64 * MIB, "size of a request body; a larger one gets status 413")
    max_total_body_bytes: int = _limit(
        1024 * MIB,
        "size of all request bodies and decoded images in memory; beyond it, requests get status"
        " 503",
    )
    header_timeout_s: float = _limit(
        15.0, "seconds to receive a request header; then the connection is closed"
    )
    body_timeout_s: float = _limit(
        120.0, "seconds to receive a request body; then the request gets status 408"
    )
    keep_alive_timeout_s: float = _limit(15.0, "seconds that an idle connection stays open")
    send_timeout_s: float = _limit(
        30.0, "seconds without progress in sending a response; then the connection is closed"
    )
    shutdown_timeout_s: float = _limit(60.0, "seconds for running answers to complete at shutdown")
    max_text_chars: int = _limit(
        1_000_000,
        "characters of all texts of a request, and at most 16 per token of the context length",
    )
    max_images: int = _limit(32, "images, videos and fetched video frames of a request")
    max_image_bytes: int = _limit(
        32 * MIB, "size of an image or video file: uploaded, fetched or in a data URL"
    )
    max_image_pixels: int = _limit(
        MAX_IMAGE_PIXELS, "pixels of an image or frame, read from its header before decoding"
    )
    max_video_frames: int = _limit(
        MAX_SAMPLED_FRAMES, "frames of all videos of a request, after sampling"
    )
    max_video_s: float = _limit(3600.0, "seconds of a video file")
    max_label_studio_answers: int = _limit(
        2000,
        "answers that requests of Label Studio wait for, one per task and control; a request with"
        " more gets status 400, further requests get status 429",
    )
    max_schema_chars: int = _limit(100_000, "characters of a JSON schema, or of all tools, as JSON")
    fetch_timeout_s: float = _limit(
        20.0, "seconds to fetch an image from an allowed host, with redirects"
    )
    max_files: int = _limit(1000, "stored uploaded files")
    max_total_file_bytes: int = _limit(2048 * MIB, "size of all stored files")
    num_reader_threads: int = _limit(
        4,
        "worker processes that decode images and videos, and as many that parse and tokenize;"
        " other requests wait, but none without images waits for images",
    )
    max_image_cpu_s: float = _limit(
        2.0, "CPU seconds to parse a body, read a file header, decode an image, or tokenize"
    )
    max_request_cpu_s: float = _limit(
        20.0, "CPU seconds to preprocess a request with all of its images and videos"
    )
    max_worker_memory_bytes: int = _limit(
        1024 * MIB, "memory of a worker process; a request that exceeds it gets status 400"
    )
    max_schema_cpu_s: float = _limit(
        2.0, "CPU seconds for compiling a schema, and for each token of constrained decoding"
    )
    max_constraint_cpu_s: float = _limit(30.0, "CPU seconds for the schema constraint of an answer")
    max_schema_memory_bytes: int = _limit(256 * MIB, "memory of the process of a schema constraint")

    @property
    def max_requests(self) -> int:
        """Maximum number of admitted requests: generating, in preprocessing or queued."""
        return self.max_num_seqs + self.max_queue


ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Field `type` of an error, by HTTP status. Other errors are `invalid_request_error` (status 4xx)
or `server_error`."""


@dataclass(slots=True, eq=False)
class ApiError(Exception):
    """Raised to respond to a request with an error in the OpenAI format.

    Attributes:
        code: Machine-readable code, such as `model_not_found`.
        retry_after_s: Seconds until the client may retry.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """Error body in the format of the OpenAI API."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        fields = {"message": self.message, "type": ERROR_TYPES.get(self.status, default)}
        return {"error": {**fields, "param": self.param, "code": self.code}}

    @property
    def response_headers(self) -> dict[str, str]:
        """HTTP headers of the error response, with `Retry-After` if a retry is useful."""
        if self.retry_after_s is None:
            return self.headers
        return {**self.headers, "Retry-After": str(self.retry_after_s)}


class ClientDisconnectedError(Exception):
    """Raised when the client disconnects before its response is complete."""


def from_user_error(error: UserError, param: str | None = None, hidden_path: str = "") -> ApiError:
    """Convert a `UserError` about a request, without the name of the server's `hidden_path`."""
    text = error.what
    if error.where and not error.where.startswith("/"):
        text = f"{error.where}: {text}"
    if error.expected:
        text = f"{text}; expected {error.expected}"
    if hidden_path:
        text = text.replace(hidden_path, "")
    return ApiError(400, text, param)


def internal_error() -> ApiError:
    """Return the response for an internal error. Only the server log has its details."""
    return ApiError(500, "internal server error; see the server log")


class StrictModel(BaseModel):
    """Base class of request objects that reject unknown fields with a value."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    ignored_fields: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _remove_fields(cls, values: Any) -> Any:
        """Remove ignored fields, and unknown ones without a value, which clients may send."""
        if not isinstance(values, dict):
            return values
        return {
            name: value
            for name, value in values.items()
            if (name in cls.model_fields or value not in (None, "", [], {}))
            and name not in cls.ignored_fields
        }


class TextContent(StrictModel):
    type: Literal["text"]
    text: str


class MediaURL(StrictModel):
    url: str
    detail: str | None = None


class ImageContent(StrictModel):
    type: Literal["image_url"]
    image_url: MediaURL


class FileReference(StrictModel):
    file_id: str = Field(max_length=MAX_NAME_CHARS)


class FileData(StrictModel):
    file_data: str
    filename: str | None = None


class FileContent(StrictModel):
    type: Literal["file"]
    file: FileReference | FileData


UNSET = BeforeValidator(lambda value: None if value == -1 else value)
NumFrames = Annotated[int | None, Field(ge=MIN_SAMPLED_FRAMES, le=MAX_FRAMES), UNSET]


class VideoSampling(StrictModel):
    """Sampling of a video, with the names of Qwen. As in vLLM, -1 means unset."""

    fps: Annotated[float | None, Field(ge=MIN_FPS, le=MAX_FPS), UNSET] = None
    max_frames: NumFrames = None


class VideoURLContent(VideoSampling):
    """Video of vLLM: a file, or JPEG frames in a data URL, joined by commas."""

    type: Literal["video_url"]
    video_url: MediaURL

    @property
    def video(self) -> str | list[str]:
        """URL of the video file, or data URLs of the frames."""
        media_type, _, frames = self.video_url.url.partition(",")
        if media_type.lower() != "data:video/jpeg;base64":
            return self.video_url.url
        return [f"data:image/jpeg;base64,{frame}" for frame in frames.split(",")]


class VideoContent(VideoSampling):
    """Video with the names of Qwen: URL of a file, or URLs of frames."""

    type: Literal["video"]
    video: str | Annotated[list[str], Field(min_length=1)]


MediaContent = ImageContent | FileContent | VideoURLContent | VideoContent
UserContentPart = Annotated[TextContent | MediaContent, Discriminator("type")]


class FunctionCall(StrictModel):
    name: str
    arguments: str


class ToolCall(StrictModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class SystemMessage(StrictModel):
    role: Literal["system", "developer"]
    content: str | list[TextContent]
    name: str | None = None


class UserMessage(StrictModel):
    role: Literal["user"]
    content: str | list[UserContentPart]
    name: str | None = None


class AssistantMessage(BaseModel):
    """Assistant message of an earlier turn.

    Additional fields, such as `boxes` and `refusal`, are ignored, so that clients can send a
    response back.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    role: Literal["assistant"]
    content: str | list[TextContent] | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ToolMessage(StrictModel):
    role: Literal["tool"]
    content: str | list[UserContentPart]
    tool_call_id: str | None = None


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Discriminator("role")
]


class JsonSchemaFormat(StrictModel):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class UnstructuredFormat(StrictModel):
    type: Literal["text"]


class StructuredFormat(StrictModel):
    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


class GrammarFormat(StrictModel):
    """Any JSON object, or boxes or points in the format of the family, an extension of the API."""

    type: Literal["json_object", "boxes", "points"]


ResponseFormat = Annotated[
    UnstructuredFormat | StructuredFormat | GrammarFormat, Discriminator("type")
]


class FunctionDefinition(StrictModel):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictModel):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(StrictModel):
    name: str = Field(max_length=MAX_NAME_CHARS)


class NamedToolChoice(StrictModel):
    type: Literal["function"]
    function: NamedFunction


class StreamOptions(StrictModel):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class ChatTemplateArguments(StrictModel):
    """Arguments of the chat template, with the names of vLLM and SGLang."""

    enable_thinking: bool | None = None
    reasoning_effort: str | None = Field(default=None, max_length=MAX_NAME_CHARS)


class VideoArguments(VideoSampling):
    """Sampling of all videos of a request, with the names of vLLM.

    `num_frames` is exact, or with `fps` the maximum. `do_sample_frames` changes nothing.
    """

    num_frames: NumFrames = None
    do_sample_frames: bool | None = None


StopString = Annotated[str, Field(min_length=1, max_length=200)]


class NeutralParameters(StrictModel):
    """Parameters of vLLM and SGLang that clients send with values that change nothing."""

    min_p: Literal[0, None] = None
    min_tokens: Literal[0, None] = None
    length_penalty: Literal[1, None] = None
    typical_p: Literal[1, None] = None
    best_of: Literal[1, None] = None
    use_beam_search: Literal[False, None] = None
    ignore_eos: Literal[False, None] = None
    include_stop_str_in_output: Literal[False, None] = None
    spaces_between_special_tokens: bool | None = None
    add_generation_prompt: Literal[True, None] = None
    continue_final_message: Literal[False, None] = None
    add_special_tokens: Literal[False, None] = None
    echo: Literal[False, None] = None
    include_reasoning: Literal[True, None] = None
    separate_reasoning: Literal[True, None] = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=0)
    bad_words: list[str] | None = Field(default=None, max_length=0)
    prompt_logprobs: Literal[None] = None
    frequency_penalty: Literal[0, None] = None
    presence_penalty: Literal[0, None] = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium", None] = None
    function_call: Literal["none", None] = None
    return_token_ids: Literal[False, None] = None
    return_tokens_as_token_ids: Literal[False, None] = None
    return_hidden_states: Literal[False, None] = None


class ChatCompletionParameters(NeutralParameters):
    """Fields of a chat completion request, except for its messages."""

    ignored_fields = IGNORED_FIELDS

    model: str = Field(max_length=MAX_NAME_CHARS)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    skip_special_tokens: bool | None = None
    seed: int | None = None
    stop: Literal[""] | StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    n: int | None = Field(default=None, ge=1, le=8)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: str | None = Field(default=None, max_length=MAX_NAME_CHARS)
    chat_template_kwargs: ChatTemplateArguments | None = None
    mm_processor_kwargs: VideoArguments | None = None
    media_io_kwargs: dict[Literal["video"], VideoArguments] | None = None

    @property
    def stop_strings(self) -> list[str]:
        """Stop strings of the request as a list."""
        stop = self.stop or []
        if isinstance(stop, str):
            return [stop]
        return stop

    @property
    def max_new_tokens(self) -> int | None:
        """Maximum number of generated tokens. None if the request does not set it."""
        if self.max_completion_tokens is None:
            return self.max_tokens
        return self.max_completion_tokens

    @property
    def thinking(self) -> ThinkingOptions:
        """Thinking mode and reasoning effort of the request."""
        arguments = self.chat_template_kwargs or ChatTemplateArguments()
        effort = self.reasoning_effort or arguments.reasoning_effort
        return ThinkingOptions(enable_thinking=arguments.enable_thinking, reasoning_effort=effort)

    def get_sampling(self, part: VideoURLContent | VideoContent) -> tuple[float, int | None]:
        """Return the frame rate and the maximum number of frames of a video."""
        processor = self.mm_processor_kwargs or VideoArguments()
        reader = (self.media_io_kwargs or {}).get("video") or VideoArguments()
        num_frames = processor.num_frames or reader.num_frames
        max_frames = part.max_frames or processor.max_frames or reader.max_frames
        is_exact = num_frames and isinstance(part.video, str)
        fps = part.fps or processor.fps or reader.fps or (MAX_FPS if is_exact else DEFAULT_FPS)
        return fps, min(filter(None, (num_frames, max_frames)), default=None)


class ChatCompletionRequest(ChatCompletionParameters):
    """Body of a chat completion request (POST /v1/chat/completions)."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)

    @property
    def parameters(self) -> dict[str, Any]:
        """Fields of `ChatCompletionParameters` as JSON data."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"messages"})


def parse_chat_request(body: bytes | bytearray) -> ChatCompletionRequest:
    """Parse and validate a JSON request body.

    Raises:
        ApiError: The body is invalid. The message names the field, but not its value.
    """
    num_separators = sum(body.count(separator) for separator in (b",", b"[", b"{"))
    if num_separators > MAX_JSON_SEPARATORS:
        raise ApiError(
            400,
            f"the body has {num_separators} commas and opening brackets; expected at most"
            f" {MAX_JSON_SEPARATORS}",
        )
    try:
        return ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        parent = errors[0]["loc"][:-1]
        # Of the members of a union, the one with the deepest error matches best.
        group = [one for one in errors if parent and one["loc"][: len(parent)] == parent]
        first = max(group or errors[:1], key=lambda one: len(one["loc"]))
        location = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
        is_unknown_field = first["type"] == "extra_forbidden"
        message = "unknown field" if is_unknown_field else first["msg"][:200]
        raise ApiError(400, f"{location or 'body'}: {message}", location or None) from error
    except RecursionError as error:
        raise ApiError(400, f"the body ({len(body)} bytes) is nested too deeply") from error


class _ContentSize(NamedTuple):
    """Size of the messages of a request.

    Attributes:
        num_images: Number of images and videos, and of video frames outside of the request.
        num_frames: Number of video frames given as images.
        num_chars: Number of characters of texts, reasoning, and arguments of tool calls.
    """

    num_images: int
    num_frames: int
    num_chars: int


def _measure_content(messages: Sequence[ChatMessage]) -> _ContentSize:
    num_images = 0
    num_frames = 0
    num_chars = 0
    for message in messages:
        content: str | Sequence[UserContentPart] = message.content or ""
        if isinstance(content, str):
            num_chars += len(content)
            content = []
        for part in content:
            if isinstance(part, TextContent):
                num_chars += len(part.text)
                continue
            num_images += 1
            if isinstance(part, VideoURLContent | VideoContent):
                video = part.video
                if isinstance(video, list):
                    num_frames += len(video)
                    num_images += sum(frame[:5].lower() != "data:" for frame in video)
        if isinstance(message, AssistantMessage):
            num_chars += len(message.reasoning_content or "")
            for call in message.tool_calls or []:
                num_chars += len(call.function.arguments)
    return _ContentSize(num_images, num_frames, num_chars)


def check_limits(
    chat_request: ChatCompletionRequest, limits: ServerLimits, max_text_chars: int
) -> None:
    """Raise ApiError if a chat completion request exceeds a limit.

    `max_text_chars` limits the length of all texts. It depends on the context length of the model.
    """
    size = _measure_content(chat_request.messages)
    tool_chars = sum(len(tool.model_dump_json()) for tool in chat_request.tools or [])
    schema_chars = 0
    if isinstance(chat_request.response_format, StructuredFormat):
        schema_chars = len(chat_request.response_format.json_schema.model_dump_json())
    for param, unit, value, max_value in (
        ("messages", "images", size.num_images, limits.max_images),
        ("messages", "video frames", size.num_frames, limits.max_video_frames),
        ("messages", "characters of text", size.num_chars, max_text_chars),
        ("max_tokens", "tokens", chat_request.max_new_tokens or 1, limits.max_completion_tokens),
        ("tools", "characters", tool_chars, limits.max_schema_chars),
        ("response_format", "characters", schema_chars, limits.max_schema_chars),
    ):
        if value > max_value:
            raise ApiError(400, f"{param}: {value} {unit}; expected at most {max_value}", param)
    template_arguments = chat_request.chat_template_kwargs or ChatTemplateArguments()
    efforts = {chat_request.reasoning_effort, template_arguments.reasoning_effort} - {None}
    if len(efforts) > 1:
        values = " and ".join(sorted(map(repr, efforts)))
        message = f"reasoning_effort: {values}; expected one value"
        raise ApiError(400, message, "reasoning_effort")
    if chat_request.top_logprobs and not chat_request.logprobs:
        raise ApiError(
            400, f"top_logprobs {chat_request.top_logprobs} without logprobs", "top_logprobs"
        )
