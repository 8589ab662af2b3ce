"""Tokenized samples, encoded samples with image patches, and their filter and token table.

Shapes: T tokens of a sequence, N patches, D values per patch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from finesight.data.image_header import ImageSize
from finesight.encode.tokenizer import TextTokenizer
from finesight.errors import UserError
from finesight.vision.image_processing import GridTHW

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class VisualSpan:
    """An image or video of a tokenized sample, and the range of its placeholder tokens.

    Attributes:
        files: The image, the frames of the video, or the video file.
        frame_indices: Indices of the frames in a video file; empty for images.
    """

    kind: Literal["image", "video"]
    start: int
    stop: int
    grid_thw: GridTHW
    files: tuple[Path, ...]
    original_size: ImageSize
    resized_size: ImageSize
    frame_indices: tuple[int, ...] = ()

    @property
    def num_frames(self) -> int:
        """Number of frames before the last one is repeated; 1 for an image."""
        return len(self.frame_indices or self.files)


def iter_video_runs(spans: Iterable[VisualSpan]) -> Iterator[list[VisualSpan]]:
    """Group consecutive spans of one video file whose frames can be decoded in one pass.

    Every other span is its own group.
    """
    run: list[VisualSpan] = []
    for span in spans:
        is_next = (
            run
            and span.frame_indices
            and span.files == run[-1].files
            and span.frame_indices[0] > run[-1].frame_indices[-1]
        )
        if run and not is_next:
            yield run
            run = []
        run.append(span)
    if run:
        yield run


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """Token ids, loss mask and position ids of a sample.

    Built from the text and the image headers; pixels are not decoded.

    Attributes:
        position_ids_3T: M-RoPE positions: time, height and width (Wang et al. 2024, Qwen2-VL,
            section 2.1).
        is_thinking: Whether the sample is rendered in thinking mode. A prompt then ends within the
            reasoning section.
    """

    id: str
    ids_T: NDArray[np.int32]
    loss_mask_T: NDArray[np.bool_]
    position_ids_3T: NDArray[np.int32]
    spans: tuple[VisualSpan, ...]
    is_thinking: bool = field(default=False, kw_only=True)

    @property
    def num_tokens(self) -> int:
        return len(self.ids_T)

    @property
    def num_supervised_tokens(self) -> int:
        """Number of tokens that contribute to the loss.

        The first token is not counted, because no earlier token predicts it.
        """
        return int(self.loss_mask_T[1:].sum())

    @property
    def num_packed_tokens(self) -> int:
        """Number of tokens of this sample that a packed batch contains.

        Tokens after the last image and after the token that predicts the last supervised token do
        not affect the loss and are not packed. Without supervised tokens, all tokens are packed.
        """
        predicting = np.flatnonzero(self.loss_mask_T[1:])
        if not len(predicting):
            return self.num_tokens
        return max(int(predicting[-1]) + 1, self.spans[-1].stop if self.spans else 0)

    @property
    def num_patches(self) -> int:
        return sum(t * h * w for t, h, w in (span.grid_thw for span in self.spans))


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A tokenized sample with the pixel patches of its images and videos.

    Attributes:
        patches_ND: uint8 patches of all images and videos in the order of the transformers image
            processor: grouped by merge block, D = channels x frames x patch_size x patch_size.
            Samples with images only store one frame, which the processor repeats
            (`vision.image_processing.repeat_still_frames`).
        hf_inputs: Processor outputs by name for families without native code, which have no
            patches.
    """

    tokenized: TokenizedSample
    patches_ND: NDArray[np.uint8]
    hf_inputs: Mapping[str, Tensor] = field(default_factory=dict)


class CountedSample(Protocol):
    """Interface of samples with known token counts."""

    @property
    def id(self) -> str: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_supervised_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class FilteredSamples:
    """Indices and token counts of valid samples, and the ids of skipped samples."""

    sample_indices: tuple[int, ...]
    token_counts: tuple[int, ...]
    too_long_ids: tuple[str, ...]
    unsupervised_ids: tuple[str, ...]

    @property
    def num_skipped(self) -> int:
        return len(self.too_long_ids) + len(self.unsupervised_ids)


def filter_samples(
    samples: Iterable[CountedSample], max_length: int, on_invalid_sample: Literal["skip", "fail"]
) -> FilteredSamples:
    """Select the samples that have supervised tokens and at most `max_length` tokens.

    Samples are never truncated, because a truncated sample loses its answer or part of an image.
    `samples` is iterated once and not stored.
    """
    sample_indices, token_counts = [], []
    too_long, unsupervised = [], []
    max_tokens = 0
    for index, sample in enumerate(samples):
        max_tokens = max(max_tokens, sample.num_tokens)
        error = find_sample_error(sample, max_length)
        if error is None:
            sample_indices.append(index)
            token_counts.append(sample.num_tokens)
        elif on_invalid_sample == "fail":
            raise error
        elif sample.num_tokens > max_length:
            too_long.append(sample.id)
        else:
            unsupervised.append(sample.id)
    if not sample_indices:
        raise UserError(
            f"none of {len(too_long) + len(unsupervised)} samples is valid: {len(too_long)}"
            f" exceed {max_length} tokens (the longest has {max_tokens}), {len(unsupervised)}"
            " have no answer",
            where="data",
            expected="samples with an assistant turn and at most data.max_length tokens",
            remedy="raise data.max_length, or set a smaller image size",
        )
    return FilteredSamples(
        tuple(sample_indices), tuple(token_counts), tuple(too_long), tuple(unsupervised)
    )


def find_sample_error(sample: CountedSample, max_length: int) -> UserError | None:
    """Return an error if a sample cannot be used for training, else None."""
    if sample.num_tokens > max_length:
        return _build_length_error(sample.id, sample.num_tokens, max_length)
    return None if sample.num_supervised_tokens else _build_no_answer_error(sample.id)


def _build_length_error(sample_id: str, num_tokens: int, max_length: int) -> UserError:
    return UserError(
        f"{num_tokens} tokens",
        where=f"sample {sample_id}",
        expected=f"at most {max_length} tokens (data.max_length)",
        remedy="raise data.max_length, set a smaller image size, or set"
        " data.on_invalid_sample: skip",
    )


def _build_no_answer_error(sample_id: str) -> UserError:
    return UserError(
        "no assistant turn, so no supervised tokens",
        where=f"sample {sample_id}",
        expected="an assistant turn in every sample",
        remedy="remove the sample, or set data.on_invalid_sample: skip",
    )


PositionTHW = tuple[int, int, int]
"""Position ids of a token: time, height and width."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Row of a token table: tokens [start, stop), which all have the same id.

    A row is a single token, or all placeholder tokens of one image or video (`span`).
    """

    start: int
    stop: int
    id: int
    text: str
    is_supervised: bool
    first_position: PositionTHW
    last_position: PositionTHW
    span: VisualSpan | None = None


def iter_token_rows(tokenized: TokenizedSample, tokenizer: TextTokenizer) -> Iterator[TokenRow]:
    """Yield the token table rows of a sample, with one row per image or video."""
    spans = {span.start: span for span in tokenized.spans}
    index = 0
    while index < tokenized.num_tokens:
        span = spans.get(index)
        stop = index + 1 if span is None else span.stop
        token_id = int(tokenized.ids_T[index])
        yield TokenRow(
            start=index,
            stop=stop,
            id=token_id,
            text=_token_text(token_id, tokenizer),
            is_supervised=bool(tokenized.loss_mask_T[index]),
            first_position=_get_position(tokenized, index),
            last_position=_get_position(tokenized, stop - 1),
            span=span,
        )
        index = stop


def format_token_table(tokenized: TokenizedSample, tokenizer: TextTokenizer) -> Iterator[str]:
    """Yield the lines of a text table with the tokens of a sample.

    The columns are token index, token id, loss (a star marks supervised tokens), position ids and
    text.
    """
    span_counts = Counter(span.kind for span in tokenized.spans)
    video_summary = f", video segments: {span_counts['video']}" if span_counts["video"] else ""
    image_summary = (
        f"images: {span_counts['image']}{video_summary} (patches: {tokenized.num_patches})"
    )
    yield f"sample {tokenized.id}"
    yield (
        f"tokens: {tokenized.num_tokens}, supervised: {tokenized.num_supervised_tokens},"
        f" {image_summary}"
    )
    yield f"{'token':>11} {'id':>7} {'loss':<7} {'time, height, width':<27} text"
    for row in iter_token_rows(tokenized, tokenizer):
        loss_mark = "*" if row.is_supervised else ""
        if row.span is None:
            token_range, text = str(row.start), repr(row.text)
            position_text = _format_position(row.first_position)
        else:
            token_range = f"{row.start}-{row.stop - 1}"
            position_text = (
                f"{_format_position(row.first_position)} to {_format_position(row.last_position)}"
            )
            text = f"{row.stop - row.start} x {row.text} {_format_span(row.span)}"
        yield f"{token_range:>11} {row.id:>7} {loss_mark:<7} {position_text:<27} {text}"


def token_table_to_dict(tokenized: TokenizedSample, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Convert the token table of a sample to JSON data: token counts, images and rows."""
    return {
        "id": tokenized.id,
        "num_tokens": tokenized.num_tokens,
        "num_supervised_tokens": tokenized.num_supervised_tokens,
        "images": [
            {**asdict(span), "files": [str(file) for file in span.files]}
            for span in tokenized.spans
        ],
        "rows": [
            {key: value for key, value in asdict(row).items() if key != "span"}
            for row in iter_token_rows(tokenized, tokenizer)
        ],
    }


def _token_text(token_id: int, tokenizer: TextTokenizer) -> str:
    """Return the text of a token, or the vocabulary entry of a partial character."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    return tokenizer.id_to_token(token_id) if "\ufffd" in text else text


def _get_position(tokenized: TokenizedSample, index: int) -> PositionTHW:
    time, height, width = (int(row[index]) for row in tokenized.position_ids_3T)
    return time, height, width


def _format_position(position: PositionTHW) -> str:
    return "{}, {}, {}".format(*position)


def _format_span(span: VisualSpan) -> str:
    (height, width), (resized_height, resized_width) = span.original_size, span.resized_size
    size = f"{width}x{height} as {resized_width}x{resized_height}"
    frame_note = f" and {len(span.files) - 1} more frames" if len(span.files) > 1 else ""
    if span.frame_indices:
        frame_note = f", frames {', '.join(map(str, span.frame_indices))}"
    return f"({span.files[0]}{frame_note}, {size}, grid {' x '.join(map(str, span.grid_thw))})"
