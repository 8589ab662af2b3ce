"""Read and write sample files in JSON Lines format: one sample per line, UTF-8."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finesight import storage
from finesight.data.line_index import (
    UTF8_BOM,
    IndexedLines,
    index_lines,
    open_data_file,
    read_lines,
)
from finesight.data.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    Message,
    Sample,
    TextPart,
    VideoPart,
    check_json,
    format_number,
    validate_sample,
)
from finesight.errors import UserError, suggest_name

SAMPLE_KEYS = tuple(
    dict.fromkeys(
        name
        for kind in (Sample, Message, TextPart, ImagePart, VideoPart, BoxPart)
        for name in kind.model_fields
    )
)

FOREIGN_KEYS = frozenset(
    ("image", "images", "conversations", "conversation", "query", "response", "objects")
)
"""Keys that identify a row of another dataset format rather than a sample."""


@dataclass(frozen=True, slots=True)
class LocatedSample:
    """A sample with the folder to which its image paths are relative."""

    sample: Sample
    folder: Path

    def resolve_path(self, name: str) -> Path:
        """Return the file path of an image or video frame of the sample."""
        return self.folder / name


def read_samples(path: Path, *, require_answer: bool = True) -> list[Sample]:
    """Read and validate all samples of a JSONL file. Blank lines are skipped.

    Image paths are returned as stored in the file.
    """
    samples = []
    for line, where in read_lines(path):
        samples.append(parse_sample(line, where))
        validate_sample(samples[-1], where, require_answer=require_answer)
    if not samples:
        raise build_no_samples_error(path)
    return samples


class JsonlSamples(IndexedLines):
    """Random access to the samples of an indexed JSONL file."""

    def read_sample(self, index: int) -> LocatedSample:
        """Read a sample by index and check its types."""
        return LocatedSample(parse_sample(self[index], self.location(index)), self.path.parent)


def open_jsonl_samples(path: Path) -> JsonlSamples:
    """Open and index a JSONL file without parsing its samples."""
    lines = index_lines(path)
    return JsonlSamples(path, lines.index, lines.file_state)


def build_no_samples_error(path: Path | str) -> UserError:
    """Return the error for a data file that contains no samples."""
    return UserError(
        "contains no samples",
        where=str(path),
        expected="one sample per line",
        remedy="create the file with `finesight data import`",
    )


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write samples to a JSONL file atomically, in the format of `read_samples`."""
    lines = (f"{encode_json_line(sample_to_dict(sample))}\n".encode() for sample in samples)
    storage.write_chunks(path, lines)


encode_json_line = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode
"""Encode JSON data as one line of text.

The text may contain lone surrogates, which cannot be encoded as UTF-8.
"""


def sample_to_dict(sample: Sample, renamed: Callable[[str], str] | None = None) -> dict[str, Any]:
    """Convert a sample to JSON data without empty keys.

    Args:
        renamed: Function that maps each image and frame path to the path to write. None keeps them.
    """
    fields = sample_fields(sample.messages, sample.references, sample.meta, renamed or str)
    return {"id": sample.id, **fields}


def sample_fields(
    messages: Sequence[Message],
    references: Sequence[str],
    meta: dict[str, Any],
    renamed: Callable[[str], str],
) -> dict[str, Any]:
    """Build the JSON data of a sample without its ID; see `sample_to_dict`."""
    record: dict[str, Any] = {
        "messages": [
            {
                "role": message.role,
                "content": [_part_record(part, renamed) for part in message.content],
            }
            for message in messages
        ],
    }
    if references:
        record["references"] = list(references)
    if meta:
        record["meta"] = meta
    return record


def _part_record(part: ContentPart, renamed: Callable[[str], str]) -> dict[str, Any]:
    # Comparing the tag is faster than isinstance: the metaclass of pydantic models is ABCMeta.
    if part.type == "text":
        return {"type": "text", "text": part.text}
    if part.type == "image":
        return {"type": "image", "image": renamed(part.image)}
    if part.type == "video":
        return {"type": "video", "frames": [renamed(f) for f in part.frames], "fps": part.fps}
    label = {} if part.label is None else {"label": part.label}
    xyxy = [format_number(number) for number in part.xyxy]
    return {"type": "box", "image": part.image, **label, "xyxy": xyxy}


def to_json_data(value: Any) -> Any:
    """Convert a value to JSON data: NaN and infinity become null, unsupported types become text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): to_json_data(inner) for key, inner in value.items()}
    return [to_json_data(one) for one in value] if isinstance(value, list | tuple) else str(value)


def sample_from_dict(record: dict[str, Any], where: str) -> Sample:
    """Build a sample from parsed JSON data and check its types."""
    try:
        return Sample.model_validate(record)
    except ValidationError as error:
        raise _to_user_error(error, where) from error


def read_data_file(path: Path, max_bytes: int | None = None) -> bytes:
    """Read the content of a data file without its byte order mark."""
    with open_data_file(path) as file:
        content = file.read() if max_bytes is None else file.read(max_bytes + 1)
    if max_bytes is not None and len(content) > max_bytes:
        raise UserError(
            f"a file of more than {max_bytes:,} bytes",
            where=str(path),
            expected="the labels of one image, or the description of a dataset",
            remedy="split the file, or remove it from the folder",
        )
    return content.removeprefix(UTF8_BOM)


def read_text_file(path: Path, max_bytes: int | None = None) -> str:
    """Read the text of a data file in UTF-8; see `read_data_file`."""
    try:
        return read_data_file(path, max_bytes).decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {error.start} is not UTF-8 text",
            where=str(path),
            expected="a file in UTF-8",
            remedy="save the file as UTF-8",
        ) from error


def parse_sample(line: bytes, where: str) -> Sample:
    """Parse a JSON line as a sample and check its types."""
    check_json(line, where)
    try:
        return Sample.model_validate_json(line)
    except ValidationError as error:
        raise _to_user_error(error, where) from error


def _to_user_error(error: ValidationError, where: str) -> UserError:
    """Convert a pydantic validation error of a sample to a UserError.

    If there are several errors, an unknown key is reported first: it is often the misspelled name
    of a missing key.
    """
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda details: details["type"] != "extra_forbidden")
    error_type, value, error_location = first["type"], first["input"], first["loc"]
    # The location in pydantic includes the union member after messages.0.content.1; omit it.
    key = ".".join(map(str, (*error_location[:4], *error_location[5:])))
    value_repr = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    remedy = "correct the line, or create the file again with `finesight data import`"
    if error_type == "json_invalid":
        return UserError(
            f"broken JSON: {str(first['ctx']['error']).replace('line 1 ', '')}",
            where=where,
            expected="one complete JSON object per line",
            remedy=remedy,
        )
    if (
        error_type == "extra_forbidden"
        and len(error_location) == 1
        and error_location[0] in FOREIGN_KEYS
    ):
        return UserError(
            f"the key {key}: a row of another dataset format, not a sample",
            where=where,
            expected=f"the keys {', '.join(Sample.model_fields)}",
            remedy="import it with `finesight data import` first",
        )
    if error_type == "extra_forbidden":
        return UserError(
            f"unknown key {key} with the value {value_repr}",
            where=where,
            expected=f"the keys {', '.join(SAMPLE_KEYS)}",
            remedy=suggest_name(
                str(error_location[-1]), SAMPLE_KEYS, "remove it; `meta` accepts arbitrary metadata"
            ),
        )
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if error_type == "union_tag_invalid":
        expected = f"a part with a type of {first['ctx']['expected_tags']}"
    if error_type == "missing":
        expected = f"the keys {', '.join(SAMPLE_KEYS)}, each at its level"
    what = (
        f"the key {key} is missing"
        if error_type == "missing"
        else f"{key or 'the line'} is {value_repr}"
    )
    return UserError(what, where=where, expected=expected, remedy=remedy)
