"""What a sample looks like to the model, token by token, for people and for machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from finesight.encode.encoded import Outline, Span
from finesight.encode.tokenizer import TextTokenizer

Position = tuple[int, int, int]
"""Time, height and width."""


@dataclass(frozen=True, slots=True)
class Row:
    """One token, or all the placeholders of one picture: tokens [start, stop) with one id.

    `first` and `last` are the positions of the first and the last of them.
    """

    start: int
    stop: int
    id: int
    text: str
    learned: bool
    first: Position
    last: Position
    span: Span | None = None


def rows(outline: Outline, tokenizer: TextTokenizer) -> Iterator[Row]:
    """Every token of a sample in order; the placeholders of a picture count as one row."""
    spans = {span.start: span for span in outline.spans}
    at = 0
    while at < outline.tokens:
        span = spans.get(at)
        stop = at + 1 if span is None else span.stop
        token_id = int(outline.ids_T[at])
        yield Row(
            start=at,
            stop=stop,
            id=token_id,
            text=_text(token_id, tokenizer),
            learned=bool(outline.learned_T[at]),
            first=_position(outline, at),
            last=_position(outline, stop - 1),
            span=span,
        )
        at = stop


def as_lines(outline: Outline, tokenizer: TextTokenizer) -> Iterator[str]:
    """A table as plain text: token, id, learned (a star), positions, text."""
    shown = Counter(span.kind for span in outline.spans)
    films = f", stretches of videos: {shown['video']}" if shown["video"] else ""
    pictures = f"pictures: {shown['image']}{films} (patches: {outline.patches})"
    yield f"sample {outline.id}"
    yield f"tokens: {outline.tokens}, learned: {outline.supervised}, {pictures}"
    yield f"{'token':>11} {'id':>7} {'learned':<7} {'time, height, width':<27} text"
    for row in rows(outline, tokenizer):
        mark = "*" if row.learned else ""
        if row.span is None:
            place, text = str(row.start), repr(row.text)
            where = _shown(row.first)
        else:
            place = f"{row.start}-{row.stop - 1}"
            where = f"{_shown(row.first)} to {_shown(row.last)}"
            text = f"{row.stop - row.start} x {row.text} {_described(row.span)}"
        yield f"{place:>11} {row.id:>7} {mark:<7} {where:<27} {text}"


def as_record(outline: Outline, tokenizer: TextTokenizer) -> dict[str, Any]:
    """The same as JSON data: counts, pictures, and one object for each row."""
    return {
        "id": outline.id,
        "tokens": outline.tokens,
        "learned": outline.supervised,
        "pictures": [
            {**asdict(span), "files": [str(file) for file in span.files]} for span in outline.spans
        ],
        "rows": [
            {key: value for key, value in asdict(row).items() if key != "span"}
            for row in rows(outline, tokenizer)
        ],
    }


def _text(token_id: int, tokenizer: TextTokenizer) -> str:
    """A token's characters, or the vocabulary's spelling of one that is a part of a character."""
    text = tokenizer.decode([token_id], skip_special=False)
    return tokenizer.name_of(token_id) if "\ufffd" in text else text


def _position(outline: Outline, at: int) -> Position:
    time, height, width = (int(row[at]) for row in outline.positions_3T)
    return time, height, width


def _shown(position: Position) -> str:
    return "{}, {}, {}".format(*position)


def _described(span: Span) -> str:
    size = f"{span.original[1]}x{span.original[0]} as {span.resized[1]}x{span.resized[0]}"
    more = f" and {len(span.files) - 1} more frames" if len(span.files) > 1 else ""
    return f"({span.files[0]}{more}, {size}, grid {' x '.join(map(str, span.grid))})"
