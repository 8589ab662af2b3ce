"""Per-token table of a tokenized sample, as text and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from finesight.encode.tokenized_sample import TokenizedSample, VisualSpan
from finesight.encode.tokenizer import TextTokenizer

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
    return f"({span.files[0]}{frame_note}, {size}, grid {' x '.join(map(str, span.grid_thw))})"
