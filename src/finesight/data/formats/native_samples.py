"""The native sample format, imported with validation of its images and boxes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from finesight.data.boxes import BoxConvention
from finesight.data.formats.conversation_rows import JSONL_FILE, Files
from finesight.data.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    ImportContext,
    ImportExample,
)
from finesight.data.row_reader import Record, SourceRow
from finesight.data.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    Sample,
    check_limits,
    sample_from_dict,
    sample_to_dict,
    validate_roles,
    validate_sample,
)


def detect(records: Sequence[Record]) -> str | None:
    """Detect native samples, and return the reason for the match or None.

    Every record has messages with role and content, and no content part of another format. Because
    messages of plain text are ambiguous, any key that samples do not have then excludes a match.
    """
    for record in records:
        messages = record.get("messages")
        if not isinstance(messages, list) or not messages:
            return None
        if not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
            return None
        contents = [message["content"] for message in messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        typed = [(part.get("type"), part) for part in parts if isinstance(part, dict)]
        if any(x == "image_url" or (x == "image" and "image" not in part) for x, part in typed):
            return None
        if not parts and not record.keys() <= Sample.model_fields.keys():
            return None
    return f"messages with role and content in all of the first {len(records)}"


def parse_row(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a native sample, with absolute paths and validated boxes.

    A lenient import keeps invalid content. Boxes whose image index is invalid are not recorded in
    `raw_boxes`.
    """
    sample = sample_from_dict({**row.record, "id": row.id}, "")
    if context.lenient:
        check_limits(sample.messages, sample.references, "")
        validate_roles(sample.messages, "")  # an example requires this order
    else:
        validate_sample(sample, "")
    return example_from_sample(
        sample.map_paths(lambda name: str(context.images.resolve(name))), context
    )


def example_from_sample(sample: Sample, context: ImportContext) -> ImportExample:
    """Build a training example from a native sample with absolute image paths.

    Its boxes are validated and clipped to their images, unless the import is lenient.
    """
    if any(part.type == "box" for part in sample.iter_parts()):
        sample = _with_fitted_boxes(sample, context)
    *turns, answer = sample.messages
    return ImportExample(sample.id, tuple(turns), (answer.content,), sample.references, sample.meta)


def _with_fitted_boxes(sample: Sample, reading: ImportContext) -> Sample:
    images = [Path(part.image) for part in sample.iter_parts() if isinstance(part, ImagePart)]

    def fitted(part: ContentPart) -> ContentPart:
        if not isinstance(part, BoxPart) or part.image >= len(images):
            return part
        xyxy = reading.read_box(part.xyxy, images[part.image], BoxConvention(), part.label)
        return part.model_copy(update={"xyxy": xyxy})

    return sample.with_parts(fitted)


def write_files(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write samples with image paths relative to the output folder."""
    for located_sample in samples:
        rename = partial(_name_image, located_sample, context)
        record = sample_to_dict(located_sample.sample, rename)
        yield JSONL_FILE, f"{json.dumps(record, ensure_ascii=False)}\n".encode()


def _name_image(located_sample: LocatedSample, context: ExportContext, name: str) -> str:
    return context.image_name(located_sample.resolve_path(name))


FORMAT = DatasetFormat(
    name="samples",
    description=(
        '"messages": [{"role": "user", "content": [{"type": "image", "image": "path"}, ...]}]'
    ),
    typical_keys=frozenset({"messages"}),
    detect=detect,
    parse_row=parse_row,
    write_files=write_files,
)
