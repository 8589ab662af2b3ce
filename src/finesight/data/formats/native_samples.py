"""The native sample format, imported with validation of its images and boxes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from finesight.data.boxes import BoxConvention
from finesight.data.formats.conversation_rows import JSONL_FILE, Files
from finesight.data.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    ImportContext,
    ImportExample,
    as_list,
)
from finesight.data.formats.row_keys import iter_nested
from finesight.data.row_reader import Record, SourceRow
from finesight.data.sample import (
    SAMPLE_KEYS,
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    Sample,
    check_limits,
    remove_nulls,
    sample_from_dict,
    sample_to_dict,
    validate_roles,
    validate_sample,
)
from finesight.errors import UserError


def detect(records: Sequence[Record]) -> str | None:
    """Detect native samples, and return the reason for the match or None.

    Chat messages of other formats look alike. Therefore any key that samples do not have excludes a
    match, unless a record has a box, a list of frames or references.
    """
    cleaned = list(map(remove_nulls, records))
    messages: list[list[Any]] = [as_list(record.get("messages")) for record in cleaned]
    if not all(isinstance(one, dict) and "role" in one for turns in messages for one in turns):
        return None
    parts = [part for turns in messages for one in turns for part in as_list(one.get("content"))]
    is_marked = all(messages) and any("references" in record for record in cleaned)
    is_marked |= any(p.get("type") == "box" or "frames" in p for p in parts if isinstance(p, dict))
    reason = f"messages with role and content in all of the first {len(records)}"
    return reason if is_marked or all(map(_is_sample, cleaned)) else None


def _is_sample(record: Record) -> bool:
    try:
        sample_from_dict({**record, "id": ""}, "")
    except UserError:
        return False
    return True


def parse_row(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a native sample, with absolute paths and validated boxes.

    A lenient import keeps invalid content. Boxes whose image index is invalid are not recorded in
    `raw_boxes`.
    """
    meta = row.record.get("meta")
    record = {key: value for key, value in row.record.items() if key != "meta"}
    context.other_keys.update(
        f"{path} of samples, not imported"
        for path, key, value in iter_nested(record)
        if value is None and key not in SAMPLE_KEYS
    )
    if row.has_own_id or record.get("id") is None:
        record["id"] = row.id
    record = remove_nulls(record)
    sample = sample_from_dict(record if meta is None else {**record, "meta": meta}, "")
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
