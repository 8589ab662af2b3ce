"""The page of `data show --html`: samples as the model sees them, every token in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from finesight.data.jsonl import Located
from finesight.data.sample import BoxPart
from finesight.encode.dialect import Box, scaled
from finesight.encode.encoded import Encoded, Outline, Span
from finesight.encode.render import TURN_START, Renderer
from finesight.encode.show import Row, rows
from finesight.report.language import say
from finesight.report.page import render
from finesight.report.picture import picture
from finesight.vision.patches import from_patches

SIDE = 1024
"""The longest side of a picture on the page; larger ones are shrunk after they were resized."""


def sample_page(
    renderer: Renderer,
    samples: Sequence[Located],
    source: str,
    advance: Callable[[int], None] = lambda done: None,
) -> str:
    """Samples as a page of its own; `source` says where they come from.

    Everything on it is read back from what the model is given: pictures from their patches, boxes
    from the tokens' text by the family's dialect. `advance` is told each sample that was drawn.
    """
    records = []
    for located in samples:
        records.append(_record(renderer, located))
        advance(1)
    counts = ("tokens", "learned", "patches")
    return render(
        "sample",
        records,
        title=say("What the model sees"),
        source=source,
        family=renderer.family.name,
        rule=", ".join(f"{key} {value}" for key, value in renderer.rule.model_dump().items()),
        samples=len(records),
        totals={key: sum(record[key] for record in records) for key in counts},
    )


def _record(renderer: Renderer, located: Located) -> dict[str, Any]:
    encoded = renderer.encode(located)
    outline = encoded.outline
    turns = list(_turns(renderer, outline))
    written = [part for part in located.sample.parts() if isinstance(part, BoxPart)]
    images = [span for span in outline.spans if span.kind == "image"]
    read = _read_boxes(renderer, [turn["raw"] for turn in turns], images, written)
    return {
        "id": outline.id,
        "tokens": outline.tokens,
        "learned": outline.supervised,
        "patches": outline.patches,
        "pictures": list(_pictures(renderer, encoded)),
        "written": len(written),
        "boxes": [
            {"xyxy": box.xyxy, "label": box.label, "picture": outline.spans.index(span)}
            | {"original": scaled(box.xyxy, span.resized, span.original)}
            for span, box in read
        ],
        "turns": [{"role": turn["role"], "rows": turn["rows"]} for turn in turns],
    }


def _turns(renderer: Renderer, outline: Outline) -> Iterator[dict[str, Any]]:
    """The rows of each turn, its role, and its text with special tokens, without placeholders."""
    start = renderer.tokenizer.id_of(TURN_START)
    turn: list[Row] = []
    for row in (*rows(outline, renderer.tokenizer), None):
        if turn and (row is None or row.id == start):
            ids = [token.id for token in turn if token.span is None]
            raw = renderer.tokenizer.decode(ids, skip_special=False)
            role = raw.removeprefix(TURN_START).partition("\n")[0]
            packed = [_packed(renderer, outline, token) for token in turn]
            yield {"role": role, "raw": raw, "rows": packed}
            turn = []
        if row is not None:
            turn.append(row)


def _packed(renderer: Renderer, outline: Outline, row: Row) -> dict[str, Any]:
    decode = renderer.tokenizer.decode
    kind = "text" if decode([row.id], skip_special=True) else "special"
    if kind == "text" and "\ufffd" in decode([row.id], skip_special=False):
        kind = "bytes"
    packed = {"at": row.start, "id": row.id, "text": row.text, "kind": kind, "place": row.first}
    if row.learned:
        packed["learned"] = True
    if row.span is not None:
        number = outline.spans.index(row.span)
        packed |= {"kind": "picture", "picture": number, "to": row.stop - 1, "last": row.last}
    return packed


def _pictures(renderer: Renderer, encoded: Encoded) -> Iterator[dict[str, Any]]:
    """Every picture of a sample, put together again from the patches that the model gets."""
    at = 0
    for span in encoded.outline.spans:
        t, h, w = span.grid
        stop = at + t * h * w
        frames = from_patches(encoded.patches_ND[at:stop], span.grid, renderer.geometry)
        at = stop
        yield {
            "kind": span.kind,
            "name": span.files[0].name,
            "frames": [picture(frame, SIDE) for frame in frames[: len(span.files)]],
            "original": span.original,
            "resized": span.resized,
            "grid": span.grid,
            "tokens": span.stop - span.start,
        }


def _read_boxes(
    renderer: Renderer, texts: Sequence[str], images: Sequence[Span], written: Sequence[BoxPart]
) -> list[tuple[Span, Box]]:
    """The boxes that the turns' text says, in pixels of the resized picture that each is about.

    The text does not say which picture it means: that is the sample's word, where the text says
    as many boxes as the sample, and the first picture otherwise.
    """
    if not images:
        return []
    by_image = [
        [
            box
            for text in texts
            for box in renderer.family.read_boxes(text, image.resized, image.resized)
        ]
        for image in images
    ]
    found = len(by_image[0])
    numbers = [part.image for part in written] if len(written) == found else [0] * found
    return [(images[number], by_image[number][at]) for at, number in enumerate(numbers)]
