"""The canonical form itself, passed through with its pictures and boxes checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finesight.data.boxes import BoxForm
from finesight.data.case import Case
from finesight.data.formats.format import Format, Reading
from finesight.data.jsonl import sample_from
from finesight.data.rows import Record, Row
from finesight.data.rules import check_sample
from finesight.data.sample import BoxPart, ImagePart, Part


def detect(records: Sequence[Record]) -> str | None:
    """Every record has messages with role and content."""
    for record in records:
        messages = record.get("messages")
        if not isinstance(messages, list) or not messages:
            return None
        if not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
            return None
    return f"messages with role and content in all of the first {len(records)}"


def read(row: Row, reading: Reading) -> Case:
    """The sample, its paths made absolute and its boxes fitted to their pictures."""
    sample = sample_from({**row.record, "id": row.id}, "")
    check_sample(sample, "")
    sample = sample.with_files(lambda name: str(reading.pictures.take(name)))
    pictures = [Path(part.image) for part in sample.parts() if isinstance(part, ImagePart)]

    def fitted(part: Part) -> Part:
        if not isinstance(part, BoxPart):
            return part
        xyxy = reading.fit(part.xyxy, pictures[part.image], BoxForm())
        return part.model_copy(update={"xyxy": xyxy})

    *turns, last = (
        message.model_copy(update={"content": tuple(map(fitted, message.content))})
        for message in sample.messages
    )
    return Case(sample.id, tuple(turns), (last.content,), sample.references, sample.meta)


FORMAT = Format(
    name="samples",
    looks='"messages": [{"role": "user", "content": [{"type": "image", "image": "path"}, ...]}]',
    keys=frozenset({"messages"}),
    detect=detect,
    read=read,
)
