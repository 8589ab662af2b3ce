"""Rows of ms-swift with `query`, `response` and `history`, without `objects`."""

from __future__ import annotations

from collections.abc import Sequence

from finesight.ingest.formats.conversation_placeholders import parse_with_objects
from finesight.ingest.formats.dataset_format import DatasetFormat
from finesight.ingest.row_reader import Record
from finesight.samples.boxes import BOX_KEY


def _detect_query_response(records: Sequence[Record]) -> str | None:
    if not all({"query", "response"} <= record.keys() for record in records):
        return None
    boxes = sum(BOX_KEY in str(record["response"]) for record in records)
    return f"keys query and response, {BOX_KEY} in {boxes} of the first {len(records)}"


COMPONENT = DatasetFormat(
    name="query-response",
    description='"image": ["path"], "query": "...", "response": "..."',
    detect=_detect_query_response,
    parse_row=parse_with_objects,
    position=170,
)
