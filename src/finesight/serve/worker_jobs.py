"""Jobs of the server's worker processes: parsing, tokenization, image decoding, grammars.

The first argument of each job is the `WorkerState` of its process. `serve.preparation` and
`serve.constraints` run the jobs through a `finesight.worker_pool.WorkerPool`.
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

from finesight.data.headers import picture_size
from finesight.data.jsonl import Located
from finesight.data.sample import Sample
from finesight.encode.encoded import Outline
from finesight.encode.render import Renderer
from finesight.errors import UserError
from finesight.infer.constrain import Grammars, Matched
from finesight.serve.conversation import conversation, image_name, images_of
from finesight.serve.errors import Refused
from finesight.serve.limits import Limits
from finesight.serve.schema import LONGEST_URL, FilePart, Question, check_limits, parsed
from finesight.worker_process import Output

Given = ParamSpec("Given")

Spec = tuple[str, tuple[Any, ...]]
"""Name of a method of `Grammars`, and its arguments."""


@dataclass(slots=True)
class WorkerState:
    """State of a worker process.

    Attributes:
        renderer: Renderer of the model.
        grammars: Grammar compiler of the model.
        outline: Tokens of the current request.
        matched: Grammar of the current answer.
    """

    renderer: Renderer
    grammars: Grammars
    outline: Outline | None = None
    matched: Matched | None = None


def load_state(renderer: Renderer, vocabulary: int) -> WorkerState:
    """Load the state of the template process."""
    grammars = Grammars(renderer, vocabulary)
    grammars.load_tokenizer()
    return WorkerState(renderer, grammars)


def _refusing(
    job: Callable[Given, Output],
) -> Callable[Given, Output]:
    """Return a Refused exception of a job as its result."""

    @functools.wraps(job)
    def wrapped(*args: Given.args, **kwargs: Given.kwargs) -> Output:
        try:
            return job(*args, **kwargs)
        except Refused as error:
            refusal = [error.status, error.message, error.param, error.code]
            return Output({"refused": refusal})

    return wrapped


@_refusing
def read_body(
    state: WorkerState, body: NDArray[np.uint8], folder: Path, limits: Limits, characters: int
) -> Output:
    """Parse the body of a chat completion, and write the images of its data URLs.

    Returns:
        The value has the `question` without its messages, and `images` as arguments of
        `preparation.ImageRequest`. The array is the conversation as JSON.
    """
    question = parsed(Question, body.tobytes())
    check_limits(question, limits, characters)
    images: list[tuple[int, str, str | None, str | None]] = []
    for number, (param, part) in enumerate(images_of(question), 1):
        if isinstance(part, FilePart):
            images.append((number, param, None, part.file.file_id))
            continue
        url = part.image_url.url
        inline = url[:5].lower() == "data:"
        if not inline and len(url) > LONGEST_URL:
            raise Refused(400, f"a URL of {len(url)} characters: at most {LONGEST_URL}", param)
        images.append((number, param, None if inline else url, None))
        if inline:
            try:
                _write_image(url, folder / image_name(number), limits.picture_bytes)
            except Refused as error:
                error.param = param
                raise
    sample = conversation(question, state.renderer.system).model_dump_json().encode()
    return Output(
        {"question": question.parameters, "images": images}, [np.frombuffer(sample, np.uint8)]
    )


def _write_image(url: str, path: Path, most: int) -> None:
    """Write the bytes of a data URL in base64 (RFC 2397). Raises Refused for what is none."""
    comma = url.find(",", 0, 200)
    if comma < 0 or not url[:comma].lower().endswith(";base64"):
        raise Refused(400, f"a data URL that begins {url[:20]!r}: expected data:image/...;base64,")
    if (len(url) - comma) * 3 // 4 > most + 3:
        raise Refused(413, f"a picture of {(len(url) - comma) * 3 // 4} bytes: at most {most}")
    try:
        data = binascii.a2b_base64(url[comma + 1 :].encode("ascii"))
    except (binascii.Error, UnicodeEncodeError) as error:
        raise Refused(400, f"a data URL that is no base64: {type(error).__name__}") from error
    with open(path, "xb") as file:
        file.write(data)


def inspect_image(
    state: WorkerState, path: Path, max_pixels: int, formats: Sequence[str]
) -> Output:
    """Read the header of an image. Returns height and width."""
    return Output(picture_size(path, max_pixels, formats))


def encode_outline(
    state: WorkerState, sample: NDArray[np.uint8], folder: Path, max_tokens: int
) -> Output:
    """Tokenize a conversation of `read_body`, whose images are in `folder`.

    Returns:
        The value has the `spans` of the images and the `width` of a patch. The arrays are the ids
        and the position ids.

    Raises:
        UserError: The prompt has `max_tokens` tokens or more. No image was decoded.
    """
    located = Located(Sample.model_validate_json(sample.tobytes()), folder)
    try:
        outline = state.renderer.prompt_outline(located)
    finally:
        # Keep no texts of clients.
        state.renderer.tokenizer.clear_cache()
    if outline.tokens >= max_tokens:
        raise UserError(
            f"the prompt has {outline.tokens} tokens",
            where="messages",
            expected=f"fewer than {max_tokens}",
            remedy="ask with less text, or with fewer or smaller images",
        )
    state.outline = outline
    spans = [
        [span.start, span.stop, span.grid, span.files[0].name, span.original, span.resized]
        for span in outline.spans
    ]
    width = state.renderer.geometry.numbers
    return Output({"spans": spans, "width": width}, [outline.ids_T, outline.positions_3T])


def image_patches(state: WorkerState, number: int) -> Output:
    """Decode an image of the current request, counted from 0, into patches."""
    assert state.outline is not None, f"image {number} of no outline"
    return Output(None, [state.renderer.span_patches(state.outline.spans[number])])


def compile_grammar(state: WorkerState, spec: Spec, with_mask: bool) -> Output:
    """Compile the grammar of an answer. Returns the mask of the first token."""
    name, args = spec
    kinds: Mapping[str, Callable[..., Matched]] = {
        "json_object": state.grammars.json_object,
        "json_schema": state.grammars.json_schema,
        "boxes": state.grammars.boxes,
        "calls": state.grammars.calls,
    }
    state.matched = kinds[name](*args)
    return _mask(state.matched) if with_mask else Output()


def next_mask(state: WorkerState, token: int) -> Output:
    """Accept a token of the answer. Returns the mask of the next token."""
    assert state.matched is not None, f"token {token} of no answer"
    state.matched.take(token)
    return _mask(state.matched)


def _mask(matched: Matched) -> Output:
    mask = matched.allow()
    return Output({"failed": matched.failed}, [mask])
