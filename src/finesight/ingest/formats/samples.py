"""The native format, imported with validation of its images and boxes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from finesight.errors import UserError
from finesight.ingest.formats.conversation_rows import JSONL_FILE
from finesight.ingest.formats.dataset_format import (
    NUMBERED_IMAGE,
    DatasetFormat,
    ExportContext,
    Files,
    ImportContext,
    ImportExample,
    as_list,
    example_from_sample,
)
from finesight.ingest.formats.row_keys import iter_nested
from finesight.ingest.row_reader import Record, SourceRow
from finesight.samples.sample import (
    JSON_DATA_KEYS,
    SAMPLE_KEYS,
    LocatedSample,
    check_limits,
    remove_nulls,
    sample_from_dict,
    sample_to_dict,
    validate_roles,
    validate_sample,
)

_FOREIGN_TAGS = re.compile(f"<(?:image|video|tool_call|tool_response)>|{NUMBERED_IMAGE.pattern}")


def detect_samples(records: Sequence[Record]) -> str | None:
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
    is_marked |= any(isinstance(p, dict) and p.keys() & {"xyxy", "xy", "frames"} for p in parts)
    reason = f"messages with role and content in all of the first {len(records)}"
    return reason if is_marked or all(map(_is_sample, cleaned)) else None


def _is_sample(record: Record) -> bool:
    """Return whether a record is a sample whose texts have no tags of other formats."""
    turns: list[Any] = as_list(record.get("messages"))
    texts = [one.get("content") for one in turns]
    if any(isinstance(text, str) and _FOREIGN_TAGS.search(text) for text in texts):
        return False
    try:
        sample_from_dict({**record, "id": ""}, "")
    except UserError:
        return False
    return True


def _parse_sample(row: SourceRow, context: ImportContext) -> ImportExample:
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
    record = remove_nulls(record, JSON_DATA_KEYS)
    sample = sample_from_dict(record if meta is None else {**record, "meta": meta}, "")
    if context.lenient:
        check_limits(sample.messages, sample.references, "")
        validate_roles(sample.messages, "")  # an example requires this order
    else:
        validate_sample(sample, "")
    return example_from_sample(
        sample.map_paths(lambda name: str(context.images.resolve(name))), context
    )


def _write_samples(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write samples with image paths relative to the output folder."""
    for located_sample in samples:
        names = partial(context.name_image, located_sample)
        record = sample_to_dict(located_sample.sample, names)
        yield JSONL_FILE, f"{json.dumps(record, ensure_ascii=False)}\n".encode()


COMPONENT = DatasetFormat(
    name="samples",
    description=(
        '"messages": [{"role": "user", "content": [{"type": "image", "image": "path"}, ...]}]'
    ),
    detect=detect_samples,
    parse_row=_parse_sample,
    supported_options=frozenset(),
    write_files=_write_samples,
    is_native=True,
    keeps_pages=True,
    # Before other messages, which look alike.
    position=120,
)
