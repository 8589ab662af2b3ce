"""Jobs of the worker processes: parsing, tokenization, image decoding and grammars.

The first argument of each job is the `WorkerState` of its process. `serve.request_preprocessor`
runs the jobs in a `finesight.worker_pool.WorkerPool`.

Messages become turns of a sample, which the renderer of the model formats as in training.
"""

from __future__ import annotations

import binascii
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finesight.bounded_files import parse_json
from finesight.data.boxes import POINT_KEY
from finesight.data.formats.label_studio import parse_label_config
from finesight.data.image_header import list_pages, read_image_size
from finesight.data.sample import (
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    ToolCallPart,
    expand_images,
    validate_sample,
)
from finesight.encode.family import DEFAULT_THINKING, THINK_END, THINK_START, ThinkingOptions
from finesight.encode.renderer import NativeRenderer, Renderer
from finesight.encode.tokenization import (
    EncodedSample,
    TokenizedSample,
    pack_tokenized,
    unpack_tokenized,
)
from finesight.errors import UserError
from finesight.infer.structured_output import GrammarCompiler, GrammarConstraint
from finesight.serve.api_schema import (
    MAX_URL_CHARS,
    ApiError,
    AssistantMessage,
    ChatCompletionRequest,
    ChatMessage,
    FileContent,
    FileData,
    FileReference,
    ImageContent,
    ServerLimits,
    TextContent,
    ToolMessage,
    UserMessage,
    check_limits,
    parse_chat_request,
)
from finesight.worker_pool import JobOutput, WorkerLostError, WorkerPool

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


def parse_request(
    state: WorkerState, body: bytearray, folder: Path, limits: ServerLimits, max_chars: int
) -> JobOutput:
    """Parse the body of a chat completion request, and write images of data URLs to the folder.

    The body is cleared, so that its memory is available for the images.

    The value has `parameters`, the fields of the request except for its messages, and `images`, a
    list of arguments for `ImageRequest`. The array is the conversation as JSON text. For an invalid
    request, the value has the fields of an `api_error` only.
    """
    try:
        chat_request = parse_chat_request(body)
        body.clear()
        check_limits(chat_request, limits, max_chars)
        parts = enumerate(iter_images(chat_request), 1)
        images = [_read_image_part(number, *part, folder, limits) for number, part in parts]
        with_reasoning = state.renderer.renders_reasoning
        sample = build_sample(chat_request, with_reasoning=with_reasoning).model_dump_json()
    except ApiError as error:
        return JobOutput({"api_error": [error.status, error.message, error.param, error.code]})
    return JobOutput(
        {"parameters": chat_request.parameters, "images": images},
        [np.frombuffer(sample.encode(), np.uint8)],
    )


def _read_image_part(
    image_number: int,
    param: str,
    part: ImageContent | FileContent,
    folder: Path,
    limits: ServerLimits,
) -> tuple[int, str, str | None, str | None]:
    """Return the arguments of an `ImageRequest`, and write the image of a data URL."""
    file = part.file if isinstance(part, FileContent) else FileData(file_data=part.image_url.url)
    if isinstance(file, FileReference):
        return image_number, param, None, file.file_id
    url = file.file_data
    if url[:5].lower() == "data:":
        data = _decode_data_url(url, limits.max_image_bytes, param)
        (folder / get_image_name(image_number)).write_bytes(data)
        return image_number, param, None, None
    if isinstance(part, FileContent) and ":" not in url:
        raise ApiError(400, "expected a data URL, such as data:application/pdf;base64,...", param)
    if len(url) > MAX_URL_CHARS:
        message = f"the URL has {len(url)} characters; expected at most {MAX_URL_CHARS}"
        raise ApiError(400, message, param)
    return image_number, param, url, None


def _decode_data_url(url: str, max_bytes: int, param: str) -> bytes:
    """Decode a base64 data URL (RFC 2397). Raise ApiError if it is invalid or too large."""
    comma = url.find(",", 0, 200)
    if comma < 0 or not url[:comma].lower().endswith(";base64"):
        message = f"invalid data URL {url[:20]!r}; expected data:image/...;base64,"
        raise ApiError(400, message, param)
    num_bytes = (len(url) - comma) * 3 // 4
    if num_bytes > max_bytes + 3:
        raise ApiError(413, f"the image has {num_bytes} bytes; expected at most {max_bytes}", param)
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
    controls = parse_label_config(config) if isinstance(config, str) and config else []
    tasks = fields["tasks"] if isinstance(fields.get("tasks"), list) else []
    if len(tasks) * len(controls) > max_answers:
        raise UserError(
            f"{len(tasks)} tasks with {len(controls)} controls each",
            expected=f"at most {max_answers} answers per request",
            remedy="Request predictions for fewer tasks.",
        )
    data = [task.get("data") if isinstance(task, dict) else None for task in tasks]
    references = [
        [one.get(control.data_key) if isinstance(one, dict) else None for control in controls]
        for one in data
    ]
    return JobOutput(
        {
            "action": str(fields.get("action", ""))[:40],
            "controls": [asdict(control) for control in controls],
            "tasks": [[one if isinstance(one, str) else None for one in row] for row in references],
        }
    )


def inspect_image(
    state: WorkerState, path: Path, max_pixels: int, formats: Sequence[str]
) -> JobOutput:
    """Read the header of an image, or of all pages of a document."""
    for page in list_pages(path, formats=formats):
        read_image_size(page, max_pixels, formats)
    return JobOutput()


def tokenize_sample(
    state: WorkerState,
    sample: NDArray[np.uint8],
    folder: Path,
    max_model_len: int,
    thinking: ThinkingOptions = DEFAULT_THINKING,
) -> JobOutput:
    """Tokenize a conversation from `parse_request`, without decoding its images.

    The output is that of `pack_tokenized`, with `patch_dim`. Raises UserError if the prompt has
    `max_model_len` tokens or more.
    """
    conversation = Sample.model_validate_json(sample.tobytes())

    def list_names(image: str) -> list[str]:
        return [page.name for page in list_pages(folder / image)]

    messages = tuple(
        turn.model_copy(update={"content": expand_images(turn.content, list_names)})
        for turn in conversation.messages
    )
    located_sample = LocatedSample(conversation.model_copy(update={"messages": messages}), folder)
    try:
        tokenized = state.renderer.with_thinking(thinking).tokenize_prompt(located_sample)
    finally:
        # Remove texts of clients from the tokenizer cache.
        state.renderer.tokenizer.token_cache.clear()
    if tokenized.num_tokens >= max_model_len:
        raise UserError(
            f"the prompt has {tokenized.num_tokens} tokens",
            where="messages",
            expected=f"fewer than {max_model_len}",
            remedy="Send less text, or fewer or smaller images.",
        )
    state.tokenized = tokenized
    output = pack_tokenized(tokenized)
    patch_dim = state.renderer.patch_config.patch_dim
    return JobOutput(output.value | {"patch_dim": patch_dim}, output.arrays)


def load_image_patches(state: WorkerState, image_index: int) -> JobOutput:
    """Decode an image of the current request, given by its index, into patches."""
    assert state.tokenized is not None, f"image {image_index} has no tokenized sample"
    return JobOutput(None, [state.renderer.span_patches(state.tokenized.spans[image_index])])


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
    return _compute_bitmask(state.constraint) if with_bitmask else JobOutput()


def compute_next_bitmask(state: WorkerState, token_id: int) -> JobOutput:
    """Accept a generated token and return the bitmask of the next one."""
    assert state.constraint is not None, f"token {token_id} has no constraint"
    state.constraint.accept_token(token_id)
    return _compute_bitmask(state.constraint)


def _compute_bitmask(constraint: GrammarConstraint) -> JobOutput:
    bitmask = constraint.compute_bitmask()
    return JobOutput({"failed": constraint.has_failed}, [bitmask])


def get_image_name(image_number: int) -> str:
    """Return the file name of an image in the folder of its request."""
    return f"image-{image_number}"


def iter_images(
    chat_request: ChatCompletionRequest,
) -> Iterator[tuple[str, ImageContent | FileContent]]:
    """Yield (field path, image) pairs for all images of a request."""
    for message_index, message in enumerate(chat_request.messages):
        content = message.content or ""
        for part_index, part in enumerate(() if isinstance(content, str) else content):
            if not isinstance(part, TextContent):
                yield f"messages.{message_index}.content.{part_index}", part


def build_sample(chat_request: ChatCompletionRequest, *, with_reasoning: bool = False) -> Sample:
    """Convert the messages of a request to a sample.

    Its images are named by `get_image_name`, numbered from 1. Consecutive messages of one role
    become one turn, except for tool results. `with_reasoning` includes the `reasoning_content` of
    assistant messages. Raises UserError or ApiError for an invalid order of turns.
    """
    image_counter = itertools.count(1)
    turns: list[Message] = []
    for message in chat_request.messages:
        turn = _convert_message(message, image_counter, with_reasoning)
        if turn.content == (TextPart(text=""),) and turn.role == "assistant":
            # An empty answer that a client sends back.
            continue
        if turns and turns[-1].role == turn.role != "tool":
            content = *turns.pop().content, TextPart(text="\n"), *turn.content
            turn = turn.model_copy(update={"content": content})
        turns.append(turn)
    if not turns:
        raise ApiError(400, f"{len(chat_request.messages)} messages are empty", "messages")
    tools = chat_request.tools if chat_request.tool_choice != "none" else None
    definitions = tuple(tool.model_dump(exclude_unset=True) for tool in tools or [])
    sample = Sample(id="request", tools=definitions, messages=tuple(turns))
    validate_sample(sample, "messages", require_answer=False)
    if (role := turns[-1].role) not in ("user", "tool"):
        # The models are not trained to continue an answer.
        raise ApiError(400, f"the last turn is a {role} turn; expected a user turn", "messages")
    return sample


def _convert_message(
    message: ChatMessage, image_counter: Iterator[int], with_reasoning: bool
) -> Message:
    content = message.content or ""
    parts: list[ContentPart] = [
        TextPart(text=part if isinstance(part, str) else part.text)
        if isinstance(part, str | TextContent)
        else ImagePart(image=get_image_name(next(image_counter)))
        for part in ([content] if isinstance(content, str) else content)
    ]
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


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Encodes prompts in worker processes, with limits on time and memory.

    Attributes:
        pool: Worker processes of `create_image_pool(renderer, __name__)`.
    """

    pool: WorkerPool

    def encode(self, located_sample: LocatedSample, thinking: ThinkingOptions) -> EncodedSample:
        """Tokenize the prompt of a sample and decode its images into patches.

        Raises:
            UserError: The sample is invalid, or exceeds a limit.
        """
        # Lazy import: workers import this module, and need torch for some models only.
        import torch

        try:
            with self.pool.borrow_worker() as worker:
                reply = worker.call(
                    encode_prompt, located_sample, thinking, max_cpu_s=MAX_PROMPT_CPU_S
                )
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
