"""Jobs of the worker processes: parsing, tokenization, image decoding and grammars.

The first argument of each job is the `WorkerState` of its process. `serve.request_preprocessor`
runs the jobs in a `finesight.files.worker_pool.WorkerPool`.

Messages become turns of a sample, which the renderer of the model formats as in training.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finesight.encode.family import DEFAULT_THINKING, THINK_END, THINK_START, ThinkingOptions
from finesight.encode.renderer import NativeRenderer, Renderer
from finesight.encode.tokenization import (
    EncodedSample,
    TokenizedSample,
    pack_tokenized,
    unpack_tokenized,
)
from finesight.errors import UserError
from finesight.files.bounded_files import parse_json
from finesight.files.worker_pool import JobOutput, WorkerLostError, WorkerPool
from finesight.infer.structured_output import GrammarCompiler, GrammarConstraint
from finesight.ingest.formats.label_studio import LabelControl, parse_label_config
from finesight.samples.boxes import POINT_KEY
from finesight.samples.image_file import list_pages, read_image_size
from finesight.samples.prompt_format import DEFAULT_PROMPT_FORMAT, PromptFormat
from finesight.samples.sample import (
    VIDEO_SUFFIXES,
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    ToolCallPart,
    VideoPart,
    expand_images,
    is_video_path,
    validate_sample,
)
from finesight.samples.video_file import read_video_header
from finesight.serve.api_schema import (
    MAX_URL_CHARS,
    ApiError,
    AssistantMessage,
    ChatCompletionParameters,
    ChatCompletionRequest,
    ChatMessage,
    FileContent,
    FileReference,
    ImageContent,
    MediaContent,
    ServerLimits,
    TextContent,
    ToolMessage,
    UserMessage,
    check_limits,
    parse_chat_request,
)

GrammarSpec = tuple[str, tuple[Any, ...]]
"""Grammar for structured output: its kind in `compile_grammar`, and its arguments."""


@dataclass(slots=True)
class WorkerState:
    """State of a worker process between the jobs of a request."""

    renderer: NativeRenderer
    grammar_compiler: GrammarCompiler
    tokenized: TokenizedSample | None = None
    constraint: GrammarConstraint | None = None


def load_worker_state(renderer: NativeRenderer, vocab_size: int) -> WorkerState:
    """Load the state of the template process, from which worker processes are forked."""
    grammar_compiler = GrammarCompiler(renderer, vocab_size)
    grammar_compiler.load_tokenizer()
    return WorkerState(renderer, grammar_compiler)


@dataclass(frozen=True, slots=True)
class MediaFile:
    """Image, document, video or frame of a request, by its name in a folder.

    `url` is None for a data URL or an uploaded file. `file_id` is None for other files.
    """

    name: str
    param: str
    url: str | None = None
    file_id: str | None = None


@dataclass(frozen=True, slots=True)
class MediaFolder:
    """Folder with the images and videos of a request.

    The files of data URLs are written. Other files are only listed, and are added later.

    Attributes:
        max_frames: Maximum number of frames to sample of a video, by file name.
    """

    path: Path
    limits: ServerLimits
    files: list[MediaFile] = field(default_factory=list)
    max_frames: dict[str, int] = field(default_factory=dict)

    def add_part(
        self, part: MediaContent, param: str, chat_request: ChatCompletionParameters
    ) -> ImagePart | VideoPart:
        """Add the files of a message part, and return the part of a sample."""
        if isinstance(part, ImageContent):
            return ImagePart(image=self._add_url(part.image_url.url, param))
        if isinstance(part, FileContent):
            if isinstance(part.file, FileReference):
                return ImagePart(image=self._add_file(param, file_id=part.file.file_id).name)
            if ":" not in part.file.file_data:
                message = "expected a data URL, such as data:application/pdf;base64,..."
                raise ApiError(400, message, param)
            return ImagePart(image=self._add_url(part.file.file_data, param))
        video = part.video
        fps, max_frames = chat_request.get_sampling(part)
        if isinstance(video, str):
            name = self._add_url(video, param, VIDEO_SUFFIXES[0])
            if max_frames is not None:
                self.max_frames[name] = max_frames
            return VideoPart(video=name, fps=fps)
        params = (f"{param}.{part.type}.{index}" for index in range(len(video)))
        return VideoPart(frames=tuple(map(self._add_url, video, params)), fps=fps)

    def _add_url(self, url: str, param: str, suffix: str = "") -> str:
        """Add the file of a URL, and return its name."""
        if url[:5].lower() == "data:":
            data = _decode_data_url(url, self.limits.max_image_bytes, param)
            file = self._add_file(param, suffix)
            (self.path / file.name).write_bytes(data)
            return file.name
        if len(url) > MAX_URL_CHARS:
            message = f"the URL has {len(url)} characters; expected at most {MAX_URL_CHARS}"
            raise ApiError(400, message, param)
        return self._add_file(param, suffix, url=url).name

    def _add_file(self, param: str, suffix: str = "", **source: str) -> MediaFile:
        file = MediaFile(f"media-{len(self.files) + 1}{suffix}", param, **source)
        self.files.append(file)
        return file


def parse_request(
    state: WorkerState, body: bytearray, folder: Path, limits: ServerLimits, max_chars: int
) -> JobOutput:
    """Parse the body of a chat completion request, and write its data URLs to files.

    The body is cleared, so that its memory is available for the files.

    The value has `parameters`, the fields of the request except for its messages, and `files`, a
    list of arguments for `MediaFile`. The array is the conversation as JSON text. For an invalid
    request, the value has the fields of an `api_error` only.
    """
    try:
        chat_request = parse_chat_request(body)
        body.clear()
        check_limits(chat_request, limits, max_chars)
        media = MediaFolder(folder, limits)
        with_reasoning = state.renderer.renders_reasoning
        sample = build_sample(chat_request, media, with_reasoning=with_reasoning)
    except ApiError as error:
        return JobOutput({"api_error": [error.status, error.message, error.param, error.code]})
    return JobOutput(
        {"parameters": chat_request.parameters, "files": [*map(astuple, media.files)]},
        [np.frombuffer(sample.model_dump_json().encode(), np.uint8)],
    )


def _decode_data_url(url: str, max_bytes: int, param: str) -> bytes:
    """Decode a base64 data URL (RFC 2397). Raise ApiError if it is invalid or too large."""
    comma = url.find(",", 0, 200)
    if comma < 0 or not url[:comma].lower().endswith(";base64"):
        message = f"invalid data URL {url[:20]!r}; expected data:TYPE;base64, and the file"
        raise ApiError(400, message, param)
    num_bytes = (len(url) - comma) * 3 // 4
    if num_bytes > max_bytes + 3:
        raise ApiError(413, f"the file has {num_bytes} bytes; expected at most {max_bytes}", param)
    try:
        return binascii.a2b_base64(url[comma + 1 :])
    except ValueError as error:
        raise ApiError(400, f"data URL is not base64: {type(error).__name__}", param) from error


def parse_label_studio_request(state: WorkerState, body: bytearray, max_answers: int) -> JobOutput:
    """Parse the body of a request of Label Studio.

    The value has the `action` of a webhook, the `controls` of the labeling configuration, and for
    each of the `tasks` its image reference for each control. None is a missing one. Raises
    UserError for more than `max_answers` answers.
    """
    try:
        request = parse_json(bytes(body))
    except ValueError as error:
        raise UserError(f"the body is not JSON: {error}", expected="JSON") from error
    fields = request if isinstance(request, dict) else {}
    config = fields.get("label_config")
    controls: Sequence[LabelControl] = ()
    if isinstance(config, str) and config:
        controls = parse_label_config(config)
    tasks = fields.get("tasks")
    if not isinstance(tasks, list):
        tasks = []
    if len(tasks) * len(controls) > max_answers:
        raise UserError(
            f"{len(tasks)} tasks with {len(controls)} controls each",
            expected=f"at most {max_answers} answers per request",
            remedy="Request predictions for fewer tasks.",
        )
    return JobOutput(
        {
            "action": str(fields.get("action", ""))[:40],
            "controls": list(map(asdict, controls)),
            "tasks": [_list_references(task, controls) for task in tasks],
        }
    )


def _list_references(task: object, controls: Sequence[LabelControl]) -> list[str | None]:
    """Return the image reference of a task for each control, None for a missing one."""
    data = task.get("data") if isinstance(task, dict) else None
    if not isinstance(data, dict):
        return [None] * len(controls)
    references: list[str | None] = []
    for control in controls:
        reference = data.get(control.data_key)
        references.append(reference if isinstance(reference, str) else None)
    return references


def inspect_file(
    state: WorkerState, path: Path, limits: ServerLimits, formats: Sequence[str]
) -> JobOutput:
    """Read the header of a video, image, or all pages of a document."""
    if not is_video_path(path):
        for page in list_pages(path, formats=formats):
            read_image_size(page, limits.max_image_pixels, formats)
        return JobOutput()
    header = read_video_header(path)
    for value, limit, unit in (
        (math.prod(header.size), limits.max_image_pixels, "pixels"),
        (header.num_frames / header.fps, limits.max_video_s, "seconds"),
    ):
        if value > limit:
            raise UserError(
                f"a video of {value:g} {unit}",
                expected=f"at most {limit:g}",
                remedy="Send a shorter or smaller video.",
            )
    return JobOutput()


def tokenize_sample(
    state: WorkerState,
    sample: NDArray[np.uint8],
    folder: Path,
    max_model_len: int,
    thinking: ThinkingOptions = DEFAULT_THINKING,
    prompt_format: PromptFormat = DEFAULT_PROMPT_FORMAT,
) -> JobOutput:
    """Tokenize a conversation from `parse_request`, without decoding its images and videos.

    A conversation without a system message gets that of the training. The output is that of
    `pack_tokenized`, with `patch_dim`, and with `has_training_form` of the questions. Raises
    UserError if the prompt has `max_model_len` tokens or more.
    """
    conversation = Sample.model_validate_json(sample.tobytes())

    def list_page_names(name: str) -> list[str]:
        return [page.name for page in list_pages(folder / name)]

    messages: list[Message] = []
    has_training_form = True
    for turn in conversation.messages:
        parts: list[ContentPart] = []
        for part in expand_images(turn.content, list_page_names):
            parts.append(_limit_frames(part, folder, conversation.meta))
        message = turn.model_copy(update={"content": tuple(parts)})
        has_training_form &= message == prompt_format.arrange_question(message)
        messages.append(message)
    # The order of the parts is that of the request. Only a missing system prompt is added.
    messages_with_system = prompt_format.add_system_message(messages)
    changed = conversation.model_copy(update={"messages": messages_with_system})
    located_sample = LocatedSample(changed, folder)
    try:
        tokenized = state.renderer.with_thinking(thinking).tokenize_prompt(located_sample)
    finally:
        # The cache must not retain texts of clients after their request.
        state.renderer.tokenizer.token_cache.clear()
    if tokenized.num_tokens >= max_model_len:
        raise UserError(
            f"the prompt has {tokenized.num_tokens} tokens",
            where="messages",
            expected=f"fewer than {max_model_len}",
            remedy="Send less text, fewer or smaller images, or fewer frames of a video.",
        )
    state.tokenized = tokenized
    output = pack_tokenized(tokenized)
    patch_dim = state.renderer.patch_config.patch_dim
    value = {"patch_dim": patch_dim, "has_training_form": has_training_form}
    return JobOutput(output.value | value, output.arrays)


def _limit_frames(part: ContentPart, folder: Path, max_frames: Mapping[str, int]) -> ContentPart:
    """Reduce the frame rate of a video file with a maximum number of frames."""
    if not isinstance(part, VideoPart) or part.video is None or part.video not in max_frames:
        return part
    header = read_video_header(folder / part.video)
    # Slightly more, so that a rounding error does not remove a frame.
    fps = max_frames[part.video] * header.fps / header.num_frames * (1 + 1e-9)
    return part.model_copy(update={"fps": min(part.fps, fps)})


def load_patches(state: WorkerState, start: int, stop: int) -> JobOutput:
    """Decode a range of images or video segments of the current request into patches."""
    assert state.tokenized is not None, f"image {start} has no tokenized sample"
    tokenized = replace(state.tokenized, spans=state.tokenized.spans[start:stop])
    return JobOutput(None, [state.renderer.load_patches(tokenized).patches_ND])


def compile_grammar(
    state: WorkerState,
    spec: GrammarSpec,
    with_bitmask: bool,
    thinking: ThinkingOptions = DEFAULT_THINKING,
) -> JobOutput:
    """Compile the grammar of a completion, and optionally return its first bitmask.

    In thinking mode, the grammar applies to the answer after the reasoning.
    """
    name, args = spec
    compiler = state.grammar_compiler.with_thinking(thinking)
    compilers: Mapping[str, Callable[..., GrammarConstraint]] = {
        "json_object": compiler.compile_json_object,
        "json_schema": compiler.compile_json_schema,
        "boxes": compiler.compile_boxes,
        "points": partial(compiler.compile_boxes, POINT_KEY),
        "calls": compiler.compile_tool_calls,
    }
    state.constraint = compilers[name](*args)
    if not with_bitmask:
        return JobOutput()
    return _compute_bitmask(state.constraint)


def compute_next_bitmask(state: WorkerState, token_id: int) -> JobOutput:
    """Accept a generated token and return the bitmask of the next one."""
    assert state.constraint is not None, f"token {token_id} has no constraint"
    state.constraint.accept_token(token_id)
    return _compute_bitmask(state.constraint)


def _compute_bitmask(constraint: GrammarConstraint) -> JobOutput:
    bitmask = constraint.compute_bitmask()
    return JobOutput({"failed": constraint.has_failed}, [bitmask])


def build_sample(
    chat_request: ChatCompletionRequest, media: MediaFolder, *, with_reasoning: bool = False
) -> Sample:
    """Convert the messages of a request to a sample, and add its files.

    Consecutive messages of one role become one turn, except for tool results. `meta` is
    `max_frames` of the folder. `with_reasoning` includes the `reasoning_content` of assistant
    messages. Raises UserError or ApiError for an invalid order of turns or file.
    """
    turns: list[Message] = []
    for index, message in enumerate(chat_request.messages):
        content = message.content or ""
        parts: list[ContentPart] = []
        for number, part in enumerate([content] if isinstance(content, str) else content):
            if isinstance(part, str):
                parts.append(TextPart(text=part))
            elif isinstance(part, TextContent):
                parts.append(TextPart(text=part.text))
            else:
                param = f"messages.{index}.content.{number}"
                parts.append(media.add_part(part, param, chat_request))
        turn = _build_turn(message, parts, with_reasoning)
        if turn.content == (TextPart(text=""),) and turn.role == "assistant":
            # An empty answer that a client sends back.
            continue
        if turns and turns[-1].role == turn.role != "tool":
            joined = *turns.pop().content, TextPart(text="\n"), *turn.content
            turn = turn.model_copy(update={"content": joined})
        turns.append(turn)
    if not turns:
        raise ApiError(400, f"{len(chat_request.messages)} messages are empty", "messages")
    tools = chat_request.tools if chat_request.tool_choice != "none" else None
    definitions = tuple(tool.model_dump(exclude_unset=True) for tool in tools or [])
    sample = Sample(id="request", tools=definitions, messages=tuple(turns), meta=media.max_frames)
    validate_sample(sample, "messages", require_answer=False)
    if (role := turns[-1].role) not in ("user", "tool"):
        # The models are not trained to continue an answer.
        raise ApiError(400, f"the last turn is a {role} turn; expected a user turn", "messages")
    return sample


def _build_turn(message: ChatMessage, parts: list[ContentPart], with_reasoning: bool) -> Message:
    if isinstance(message, UserMessage | ToolMessage):
        return Message(role=message.role, content=tuple(parts))
    parts = [TextPart(text="".join(part.text for part in parts if isinstance(part, TextPart)))]
    if not isinstance(message, AssistantMessage):
        return Message(role="system", content=tuple(parts))
    if with_reasoning and message.reasoning_content:
        parts.insert(0, TextPart(text=f"{THINK_START}{message.reasoning_content}{THINK_END}"))
    for call in message.tool_calls or []:
        part = ToolCallPart.from_json(call.model_dump())
        if part is None:
            what = f"the tool call {call.function.name!r:.80} with {call.function.arguments!r:.80}"
            raise ApiError(400, f"{what}; expected a JSON object as arguments", "messages")
        parts.append(part)
    return Message(role="assistant", content=tuple(parts))


MAX_PROMPT_CPU_S = 20.0
"""CPU seconds to tokenize a prompt and to decode all of its images."""


def encode_in_worker(
    pool: WorkerPool, located_sample: LocatedSample, thinking: ThinkingOptions
) -> EncodedSample:
    """Tokenize a prompt and decode its images in a worker process, within limits.

    Args:
        pool: Worker processes of `create_image_pool(renderer, __name__)`.

    Raises:
        UserError: The sample is invalid, or exceeds a limit on time or memory.
    """
    # Lazy import: workers import this module, and need torch for some models only.
    import torch

    try:
        with pool.borrow_worker() as worker:
            reply = worker.call(encode_prompt, located_sample, thinking, max_cpu_s=MAX_PROMPT_CPU_S)
    except WorkerLostError as error:
        raise UserError("not encoded, because the server stops", where="prompt") from error
    tokenized = unpack_tokenized(reply, located_sample.sample.id)
    patches_ND, *inputs = reply.arrays[2:]
    hf_inputs = {
        name: torch.from_numpy(array.copy())
        for name, array in zip(reply.value["hf_inputs"], inputs, strict=True)
    }
    return EncodedSample(tokenized, patches_ND.view(np.uint8), hf_inputs)


def encode_prompt(
    renderer: Renderer, located_sample: LocatedSample, thinking: ThinkingOptions
) -> JobOutput:
    """Tokenize a prompt in a worker process, and decode its images."""
    encoded = renderer.with_thinking(thinking).encode_prompt(located_sample)
    tokenized = pack_tokenized(encoded.tokenized)
    inputs = [tensor.numpy() for tensor in encoded.hf_inputs.values()]
    return JobOutput(
        tokenized.value | {"hf_inputs": list(encoded.hf_inputs)},
        [*tokenized.arrays, encoded.patches_ND, *inputs],
    )
