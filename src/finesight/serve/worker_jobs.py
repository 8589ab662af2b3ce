"""Jobs of the worker processes: parsing, tokenization, image decoding and grammars.

The first argument of each job is the `WorkerState` of its process. `serve.request_preprocessor` and
`serve.worker_constraint` run the jobs in a `finesight.worker_pool.WorkerPool`.
"""

from __future__ import annotations

import binascii
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
from numpy.typing import NDArray

from finesight.data.image_header import read_image_size
from finesight.data.jsonl import LocatedSample
from finesight.data.sample import Sample
from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenized_sample import TokenizedSample
from finesight.errors import UserError
from finesight.infer.structured_output import GrammarCompiler, GrammarConstraint
from finesight.serve.api_errors import ApiError
from finesight.serve.chat_schema import (
    MAX_URL_CHARS,
    ChatCompletionRequest,
    FileContent,
    check_limits,
    validate_body,
)
from finesight.serve.message_conversion import build_sample, get_image_name, iter_images
from finesight.serve.server_limits import ServerLimits
from finesight.worker_pool import JobOutput

ArgsP = ParamSpec("ArgsP")

GrammarSpec = tuple[str, tuple[Any, ...]]
"""Grammar for structured output: its kind in `compile_grammar`, and its arguments."""


@dataclass(slots=True)
class WorkerState:
    """State of a worker process between jobs.

    Attributes:
        renderer: Renderer of the model.
        grammar_compiler: Grammar compiler of the model.
        tokenized: Tokenized sample of the current request.
        constraint: Grammar constraint of the current completion.
    """

    renderer: NativeRenderer
    grammar_compiler: GrammarCompiler
    tokenized: TokenizedSample | None = None
    constraint: GrammarConstraint | None = None


def load_worker_state(renderer: NativeRenderer, vocab_size: int) -> WorkerState:
    """Load the state of the template process, from which worker processes are forked."""
    grammar_compiler = GrammarCompiler(renderer, vocab_size)
    grammar_compiler.load_tokenizer()
    return WorkerState(renderer, grammar_compiler)


def _return_api_errors(
    job: Callable[ArgsP, JobOutput],
) -> Callable[ArgsP, JobOutput]:
    """Decorate a job to return an ApiError as its result instead of raising it."""

    @functools.wraps(job)
    def wrapped(*args: ArgsP.args, **kwargs: ArgsP.kwargs) -> JobOutput:
        try:
            return job(*args, **kwargs)
        except ApiError as error:
            fields = [error.status, error.message, error.param, error.code]
            return JobOutput({"api_error": fields})

    return wrapped


@_return_api_errors
def parse_request(
    state: WorkerState, body: NDArray[np.uint8], folder: Path, limits: ServerLimits, max_chars: int
) -> JobOutput:
    """Parse the body of a chat completion request, and write images of data URLs.

    Args:
        state: State of the worker process.
        body: JSON text of the request.
        folder: Private folder of the request, to which images are written.
        limits: Limits of the server.
        max_chars: Maximum number of characters of all texts.

    Returns:
        The value has `parameters`, the fields of the request except for its messages, and `images`,
        a list of arguments for `request_preprocessor.ImageRequest`. The array is the conversation
        as JSON text.
    """
    chat_request = validate_body(ChatCompletionRequest, body.tobytes())
    check_limits(chat_request, limits, max_chars)
    images: list[tuple[int, str, str | None, str | None]] = []
    for image_number, (param, part) in enumerate(iter_images(chat_request), 1):
        if isinstance(part, FileContent):
            images.append((image_number, param, None, part.file.file_id))
            continue
        url = part.image_url.url
        is_inline = url[:5].lower() == "data:"
        if not is_inline and len(url) > MAX_URL_CHARS:
            raise ApiError(
                400, f"the URL has {len(url)} characters; expected at most {MAX_URL_CHARS}", param
            )
        images.append((image_number, param, None if is_inline else url, None))
        if is_inline:
            try:
                _write_data_url(url, folder / get_image_name(image_number), limits.max_image_bytes)
            except ApiError as error:
                error.param = param
                raise
    sample = build_sample(chat_request, state.renderer.system_prompt).model_dump_json().encode()
    return JobOutput(
        {"parameters": chat_request.parameters, "images": images}, [np.frombuffer(sample, np.uint8)]
    )


def _write_data_url(url: str, path: Path, max_bytes: int) -> None:
    """Decode a base64 data URL (RFC 2397) and write its content to a file.

    Raises:
        ApiError: The URL is invalid, or its content is too large.
    """
    comma = url.find(",", 0, 200)
    if comma < 0 or not url[:comma].lower().endswith(";base64"):
        raise ApiError(400, f"invalid data URL {url[:20]!r}; expected data:image/...;base64,")
    if (len(url) - comma) * 3 // 4 > max_bytes + 3:
        raise ApiError(
            413, f"the image has {(len(url) - comma) * 3 // 4} bytes; expected at most {max_bytes}"
        )
    try:
        data = binascii.a2b_base64(url[comma + 1 :].encode("ascii"))
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ApiError(400, f"data URL is not base64: {type(error).__name__}") from error
    with open(path, "xb") as file:
        file.write(data)


def inspect_image(
    state: WorkerState, path: Path, max_pixels: int, formats: Sequence[str]
) -> JobOutput:
    """Read the header of an image and return its height and width.

    Raises:
        UserError: The image is corrupt, too large or of another format.
    """
    return JobOutput(read_image_size(path, max_pixels, formats))


def tokenize_sample(
    state: WorkerState, sample: NDArray[np.uint8], folder: Path, max_model_len: int
) -> JobOutput:
    """Tokenize a conversation from `parse_request`.

    Args:
        state: State of the worker process.
        sample: Conversation as JSON text.
        folder: Private folder of the request, which contains the images.
        max_model_len: Context length of the model in tokens.

    Returns:
        The value has the `spans` of image tokens and the `patch_dim`. The arrays are the token IDs
        and the position IDs.

    Raises:
        UserError: The prompt has `max_model_len` tokens or more. No image was decoded.
    """
    located_sample = LocatedSample(Sample.model_validate_json(sample.tobytes()), folder)
    try:
        tokenized = state.renderer.tokenize_prompt(located_sample)
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
    spans = [
        [
            span.start,
            span.stop,
            span.grid_thw,
            span.files[0].name,
            span.original_size,
            span.resized_size,
        ]
        for span in tokenized.spans
    ]
    patch_dim = state.renderer.patch_config.patch_dim
    return JobOutput(
        {"spans": spans, "patch_dim": patch_dim}, [tokenized.ids_T, tokenized.position_ids_3T]
    )


def load_image_patches(state: WorkerState, image_index: int) -> JobOutput:
    """Decode an image of the current request, given by its index, into patches."""
    assert state.tokenized is not None, f"image {image_index} has no tokenized sample"
    return JobOutput(None, [state.renderer.span_patches(state.tokenized.spans[image_index])])


def compile_grammar(state: WorkerState, spec: GrammarSpec, with_bitmask: bool) -> JobOutput:
    """Compile the grammar of a completion.

    Returns the bitmask of the first token if `with_bitmask` is true.
    """
    name, args = spec
    compilers: Mapping[str, Callable[..., GrammarConstraint]] = {
        "json_object": state.grammar_compiler.compile_json_object,
        "json_schema": state.grammar_compiler.compile_json_schema,
        "boxes": state.grammar_compiler.compile_boxes,
        "calls": state.grammar_compiler.compile_tool_calls,
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
