"""Jobs of the worker processes: parsing, tokenization, image decoding and grammars.

The first argument of each job is the `WorkerState` of its process. `serve.request_preprocessor` and
`serve.worker_constraint` run the jobs in a `finesight.worker_pool.WorkerPool`.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    FileContent,
    ImageContent,
    check_limits,
    parse_chat_request,
)
from finesight.serve.message_conversion import build_sample, get_image_name, iter_images
from finesight.serve.server_limits import ServerLimits
from finesight.worker_pool import JobOutput

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
    state: WorkerState, body: NDArray[np.uint8], folder: Path, limits: ServerLimits, max_chars: int
) -> JobOutput:
    """Parse the body of a chat completion request, and write images of data URLs to the folder.

    Returns:
        The value has `parameters`, the fields of the request except for its messages, and `images`,
        a list of arguments for `ImageRequest`. The array is the conversation as JSON text. For an
        invalid request, the value has the fields of an `api_error` only.
    """
    try:
        chat_request = parse_chat_request(body.tobytes())
        check_limits(chat_request, limits, max_chars)
        images = [
            _read_image_part(image_number, param, part, folder, limits)
            for image_number, (param, part) in enumerate(iter_images(chat_request), 1)
        ]
        sample = build_sample(chat_request, state.renderer.system_prompt).model_dump_json()
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
    if isinstance(part, FileContent):
        return image_number, param, None, part.file.file_id
    url = part.image_url.url
    if url[:5].lower() == "data:":
        path = folder / get_image_name(image_number)
        try:
            path.write_bytes(_decode_data_url(url, limits.max_image_bytes))
        except ApiError as error:
            error.param = param
            raise
        return image_number, param, None, None
    if len(url) > MAX_URL_CHARS:
        raise ApiError(
            400, f"the URL has {len(url)} characters; expected at most {MAX_URL_CHARS}", param
        )
    return image_number, param, url, None


def _decode_data_url(url: str, max_bytes: int) -> bytes:
    """Decode a base64 data URL (RFC 2397). Raise ApiError if it is invalid or too large."""
    comma = url.find(",", 0, 200)
    if comma < 0 or not url[:comma].lower().endswith(";base64"):
        raise ApiError(400, f"invalid data URL {url[:20]!r}; expected data:image/...;base64,")
    if (len(url) - comma) * 3 // 4 > max_bytes + 3:
        raise ApiError(
            413, f"the image has {(len(url) - comma) * 3 // 4} bytes; expected at most {max_bytes}"
        )
    try:
        return binascii.a2b_base64(url[comma + 1 :].encode("ascii"))
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ApiError(400, f"data URL is not base64: {type(error).__name__}") from error


def inspect_image(
    state: WorkerState, path: Path, max_pixels: int, formats: Sequence[str]
) -> JobOutput:
    """Read the header of an image and return its height and width."""
    return JobOutput(read_image_size(path, max_pixels, formats))


def tokenize_sample(
    state: WorkerState, sample: NDArray[np.uint8], folder: Path, max_model_len: int
) -> JobOutput:
    """Tokenize a conversation from `parse_request`, without decoding its images.

    Returns:
        The value has the `spans` of image tokens and the `patch_dim`. The arrays are the token IDs
        and the position IDs.

    Raises:
        UserError: The prompt has `max_model_len` tokens or more.
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
        [s.start, s.stop, s.grid_thw, s.files[0].name, s.original_size, s.resized_size]
        for s in tokenized.spans
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
