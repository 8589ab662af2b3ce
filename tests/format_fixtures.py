"""One record read by one format, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finesight.data.formats.dataset_format import DatasetFormat, ImportContext, ImportExample
from finesight.data.image_resolver import ImageResolver
from finesight.data.row_reader import SourceRow
from finesight.data.sample import BoxPart, ContentPart, ImagePart, Message, TextPart


def parse_record(
    data_format: DatasetFormat, record: dict[str, Any], folder: Path, **context_fields: Any
) -> ImportExample:
    """Make the case of a record whose images are in `folder`; `said` are fields of Reading."""
    row = SourceRow(number=3, location="line 3", record=record, stem="rows")
    (case,) = data_format.parse_examples(
        row, ImportContext(ImageResolver(folder, folder / "out"), **context_fields)
    )
    return case


def summarize_content(content: tuple[ContentPart, ...]) -> list[object]:
    """Return text unchanged, an image as its file name, a box as (image, label, corners)."""
    return [_summarize_part(part) for part in content]


def list_turns(case: ImportExample) -> list[tuple[str, list[object]]]:
    """Role and content of every turn, the first answer last."""
    last = Message(role="assistant", content=case.answers[0])
    return [
        (message.role, summarize_content(message.content))
        for message in (*case.prompt_messages, last)
    ]


def _summarize_part(part: ContentPart) -> object:
    if isinstance(part, TextPart):
        return part.text
    if isinstance(part, ImagePart):
        return Path(part.image)
    assert isinstance(part, BoxPart), f"a {part.type} part"
    return part.image, part.label, part.xyxy
