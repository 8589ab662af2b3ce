"""The canonical form itself, passed through with its pictures and boxes checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from finesight.data.boxes import BoxForm
from finesight.data.case import Case
from finesight.data.formats import texts
from finesight.data.formats.format import Format, Reading, Writing
from finesight.data.jsonl import Located, as_record, sample_from
from finesight.data.rows import Record, Row
from finesight.data.rules import check_limits, check_order, check_sample
from finesight.data.sample import BoxPart, ImagePart, Part, Sample


def detect(records: Sequence[Record]) -> str | None:
    """Every record has messages with role and content, and none has a part of another format.

    Messages that are all text could be anyone's: a key that samples do not have decides.
    """
    for record in records:
        messages = record.get("messages")
        if not isinstance(messages, list) or not messages:
            return None
        if not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
            return None
        contents = [message["content"] for message in messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        if any(isinstance(part, dict) and _is_foreign(part) for part in parts):
            return None
        if not parts and not record.keys() <= Sample.model_fields.keys():
            return None
    return f"messages with role and content in all of the first {len(records)}"


def _is_foreign(part: Record) -> bool:
    return part.get("type") == "image_url" or (part.get("type") == "image" and "image" not in part)


def read(row: Row, reading: Reading) -> Case:
    """The sample, its paths made absolute and its boxes fitted to their pictures.

    A lenient reading keeps faults in the sample; a box without its picture has no raw numbers.
    """
    sample = sample_from({**row.record, "id": row.id}, "")
    if reading.lenient:
        check_limits(sample.messages, sample.references, "")
        check_order(sample.messages, "")  # a case has no place for other orders
    else:
        check_sample(sample, "")
    return case_of(sample.with_files(lambda name: str(reading.pictures.take(name))), reading)


def case_of(sample: Sample, reading: Reading) -> Case:
    """The sample, whose paths are absolute, with its boxes read as those of any row."""
    if any(part.type == "box" for part in sample.parts()):
        sample = _with_fitted_boxes(sample, reading)
    *turns, last = sample.messages
    return Case(sample.id, tuple(turns), (last.content,), sample.references, sample.meta)


def _with_fitted_boxes(sample: Sample, reading: Reading) -> Sample:
    images = [Path(part.image) for part in sample.parts() if isinstance(part, ImagePart)]

    def fitted(part: Part) -> Part:
        if not isinstance(part, BoxPart) or part.image >= len(images):
            return part
        xyxy = reading.box(part.xyxy, images[part.image], BoxForm(), part.label)
        return part.model_copy(update={"xyxy": xyxy})

    return sample.with_parts(fitted)


def write(samples: Sequence[Located], writing: Writing) -> texts.Files:
    """The samples as they are, their pictures under the names that the output has for them."""
    for located in samples:
        sample = located.sample.with_files(_renaming(located, writing))
        yield texts.FILE, f"{json.dumps(as_record(sample), ensure_ascii=False)}\n".encode()


def _renaming(located: Located, writing: Writing) -> Callable[[str], str]:
    return lambda name: writing.name(located.path(name))


FORMAT = Format(
    name="samples",
    looks='"messages": [{"role": "user", "content": [{"type": "image", "image": "path"}, ...]}]',
    keys=frozenset({"messages"}),
    detect=detect,
    read=read,
    write=write,
)
