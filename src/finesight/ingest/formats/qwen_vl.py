"""Qwen-VL: images in `<img>`, and boxes in `<box>` after their label in `<ref>`.

Boxes are on a grid of 1000. `Picture 1:` and the line break after an image are removed, because
each model family adds its own. A box belongs to the last image before it, in any turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from finesight.ingest.formats.conversation_rows import (
    build_turns_example,
    list_turn_texts,
    parse_turns,
)
from finesight.ingest.formats.dataset_format import (
    DatasetFormat,
    ImportContext,
    ImportExample,
    RowImages,
    make_text_part,
    split_at_pattern,
)
from finesight.ingest.row_reader import Record, SourceRow
from finesight.samples.boxes import split_at_text_boxes
from finesight.samples.sample import ContentPart, Role

_QWEN_VL_TAGS = re.compile(
    r"(?:Picture \d+:\s*)?<img>(?P<path>[^<]*)</img>\n?"
    r"|<ref>(?P<words>(?s:(?:(?!</?ref>).)*))</ref>(?!\s*<box>)"
)


def _detect_qwen_vl(records: Sequence[Record]) -> str | None:
    """Detect Qwen-VL tags of images, boxes or references, and return the reason or None.

    Boxes next to `<image>` belong to formats with that placeholder.
    """
    texts = [text for record in records for _, text in list_turn_texts(record)]
    if any("<image>" in text for text in texts) and not any("<img>" in text for text in texts):
        return None
    marks = re.compile(rf"{_QWEN_VL_TAGS.pattern}|<box>[^<]*</box>")
    first = next((match[0] for text in texts for match in marks.finditer(text)), None)
    return f"a turn contains {first.strip()[:60]!r}" if first else None


def _parse_qwen_vl(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a Qwen-VL conversation."""
    images = RowImages(context)

    def parse_turn(role: Role, text: str) -> Iterator[ContentPart]:
        for piece in split_at_pattern(text, _QWEN_VL_TAGS):
            if not isinstance(piece, str):
                is_text = piece["path"] is None
                yield make_text_part(piece["words"]) if is_text else images.add_image(piece["path"])
                continue
            for text_or_box in split_at_text_boxes(piece, None, is_tagged=True):
                if isinstance(text_or_box, str):
                    yield make_text_part(text_or_box)
                else:
                    yield images.create_text_box(text_or_box)

    turns = parse_turns(row.record, context)
    return build_turns_example(row, context, turns, parse_turn, None)


COMPONENT = DatasetFormat(
    name="qwen-vl",
    description='"conversations": [{"from": "user", "value": "Picture 1: <img>path</img>\\n..."}]',
    detect=_detect_qwen_vl,
    parse_row=_parse_qwen_vl,
    # Its tags distinguish it from other turns.
    position=150,
)
