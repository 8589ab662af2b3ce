r"""The format of Qwen-VL: images in `<img>`, boxes in `<box>` on a grid of 1000.

{"conversations": [{"from": "user", "value": "Picture 1: <img>a.jpg</img>\nWhere is the dog?"},
                   {"from": "assistant", "value": "<ref>a dog</ref><box>(88,99),(500,700)</box>"}]}

A conversation may have any number of turns and images. `Picture 1:` and the line break after an
image are removed, because each model family adds its own. A box belongs to the last image before
it, in any turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from finesight.data.boxes import BoxConvention
from finesight.data.formats.conversation_rows import (
    Files,
    PartRenderer,
    build_turns_example,
    list_turn_texts,
    parse_token_box,
    parse_turns,
    write_rows,
)
from finesight.data.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    ImportContext,
    ImportExample,
    RowImages,
    make_text_part,
    split_at_pattern,
)
from finesight.data.row_reader import Record, SourceRow
from finesight.data.sample import BoxPart, ContentPart, ImagePart, LocatedSample, Message, Role
from finesight.errors import UserError

_REF_TEXT = r"(?s:(?:(?!</?ref>).)*)"
_BOX = r"<box>((?:(?!</?box>)(?s:.))*)</box>"
PLACEHOLDER = re.compile(
    r"(?:Picture \d+:\s*)?<img>(?P<path>[^<]*)</img>\n?"
    rf"|(?:<ref>(?P<label>{_REF_TEXT})</ref>)?(?P<boxes>(?:{_BOX})+)"
    rf"|<ref>(?P<words>{_REF_TEXT})</ref>"
)
QWEN_VL_BOX_CONVENTION = BoxConvention(format="xyxy", units="1000")


def detect(records: Sequence[Record]) -> str | None:
    """Detect Qwen-VL tags of images, boxes or references, and return the reason or None."""
    texts = (text for record in records for _, text in list_turn_texts(record))
    first = next((match[0] for text in texts for match in PLACEHOLDER.finditer(text)), None)
    return f"a turn contains {first.strip()[:60]!r}" if first else None


def parse_row(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a Qwen-VL conversation."""
    images = RowImages(context)

    def parse_text(role: Role, text: str) -> Iterator[ContentPart]:
        for piece in split_at_pattern(text, PLACEHOLDER):
            if isinstance(piece, str):
                yield make_text_part(piece)
            elif piece["path"] is not None:
                yield images.add_image(piece["path"])
            elif piece["boxes"] is None:
                yield make_text_part(piece["words"])
            else:
                for text_between in re.findall(_BOX, piece["boxes"]):
                    for box in parse_token_box(text_between):
                        yield images.create_box(box, piece["label"], QWEN_VL_BOX_CONVENTION)

    turns = parse_turns(row.record, context)
    return build_turns_example(row, context, turns, parse_text, None, "conversations", "system")


def write_files(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write conversations in the syntax of Qwen-VL.

    Box coordinates are rounded to its grid of 1000, with 999 as the maximum.
    """

    def make_fields(located_sample: LocatedSample) -> Record:
        renderer = PartRenderer(located_sample, context, "{}")
        turns = [
            {"from": message.role, "value": "".join(_iter_texts(message, renderer, context))}
            for message in located_sample.sample.messages
        ]
        return {"conversations": turns}

    yield from write_rows(samples, context, make_fields)


def _iter_texts(message: Message, renderer: PartRenderer, context: ExportContext) -> Iterator[str]:
    label = None
    for part in message.content:
        if not isinstance(part, BoxPart):
            label = None
            text = _check_no_markup(renderer.render(part))
            is_image = isinstance(part, ImagePart)
            number = len(renderer.image_paths)
            yield f"Picture {number}: <img>{text}</img>\n" if is_image else text
            continue
        if part.image != len(renderer.image_paths) - 1 or (
            label is not None and part.label is None
        ):
            raise UserError(
                f"a box in image {part.image} after {len(renderer.image_paths)} images, or one"
                " without a label after one with",
                expected="boxes in the preceding image, and labels for all consecutive boxes",
                remedy="export to ms-swift or samples, or remove the sample",
            )
        label = part.label
        if label is not None:
            yield f"<ref>{_check_no_markup(make_text_part(label).text)}</ref>"
        yield _format_box(part, renderer.image_paths[-1], context)


def _format_box(part: BoxPart, image_path: Path, context: ExportContext) -> str:
    height, width = context.image_size(image_path)
    sides = (width, height, width, height)
    grid_box = [value * 1000 / side for value, side in zip(part.xyxy, sides, strict=True)]
    x1, y1, x2, y2 = (min(round(value), 999) for value in grid_box)
    if x1 >= x2 or y1 >= y2:
        raise UserError(
            f"the box {list(part.xyxy)} is smaller than a grid cell",
            expected="boxes larger than a thousandth of the image",
            remedy="export to ms-swift or samples, or remove the sample",
        )
    is_rounded = any(abs(a - b) > 1e-3 for a, b in zip(grid_box, (x1, y1, x2, y2), strict=True))
    context.lost_counts["exact box corners (rounded to a grid of 1000)"] += is_rounded
    return f"<box>({x1},{y1}),({x2},{y2})</box>"


def _check_no_markup(text: str) -> str:
    """Return a text unchanged if it contains no Qwen-VL tags, else raise UserError."""
    if re.search(r"</?(?:img|ref|box)>", text):
        raise UserError(
            f"markup in {text[:60]!r}",
            expected="texts, labels and names without <img>, <ref> and <box>",
            remedy="export to ms-swift or samples, or remove the sample",
        )
    return text


FORMAT = DatasetFormat(
    name="qwen-vl",
    description='"conversations": [{"from": "user", "value": "Picture 1: <img>path</img>\\n..."}]',
    typical_keys=frozenset({"conversations", "from", "value"}),
    detect=detect,
    parse_row=parse_row,
    supported_options=frozenset({"prompt", "boxes"}),
    write_files=write_files,
)
