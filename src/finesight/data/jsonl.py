"""Samples in files: JSON Lines, one sample a line, UTF-8."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finesight import storage
from finesight.data.limits import check_json
from finesight.data.lines import MARK, Lines, find_lines, opened, read_lines
from finesight.data.rules import check_sample
from finesight.data.sample import (
    BoxPart,
    ImagePart,
    Message,
    Part,
    Sample,
    TextPart,
    VideoPart,
    shortest,
)
from finesight.errors import UserError

KEYS = tuple(
    dict.fromkeys(
        name
        for kind in (Sample, Message, TextPart, ImagePart, VideoPart, BoxPart)
        for name in kind.model_fields
    )
)
"""Every key that a sample or one of its pieces may have."""

FOREIGN_KEYS = frozenset(
    ("image", "images", "conversations", "conversation", "query", "response", "objects")
)
"""Keys by which a row of another program's format is known."""


@dataclass(frozen=True, slots=True)
class Located:
    """A sample and the folder that its paths are relative to."""

    sample: Sample
    folder: Path

    def path(self, name: str) -> Path:
        """Where a picture or frame of the sample lies."""
        return self.folder / name


def read_samples(path: Path, *, answered: bool = True) -> list[Sample]:
    """The samples of a JSONL file, their paths as written; blank lines are passed over.

    Without `answered`, the last turn may be the user's, as prediction needs no answer. Raises
    UserError naming file and line for anything that `check_sample` or the types refuse.
    """
    samples = []
    for line, where in read_lines(path):
        samples.append(parse(line, where))
        check_sample(samples[-1], where, answered=answered)
    if not samples:
        raise no_samples(path)
    return samples


@dataclass(frozen=True, slots=True)
class LineSamples:
    """The samples of a JSONL file, one a line."""

    lines: Lines

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.lines.path

    @property
    def digest(self) -> str:
        """Of the file's bytes."""
        return self.lines.index.digest

    def __len__(self) -> int:
        return len(self.lines)

    def located(self, index: int) -> Located:
        """A sample by its types alone. Raises UserError."""
        return Located(parse(self.lines[index], self.where(index)), self.path.parent)

    def where(self, index: int) -> str:
        """File and line as messages name them."""
        return self.lines.where(index)

    def first(self, limit: int | None) -> LineSamples:
        """So many samples at most, from the start."""
        return LineSamples(self.lines.first(limit))


def line_samples(path: Path) -> LineSamples:
    """The samples of a JSONL file, none of them looked at. Raises UserError."""
    return LineSamples(find_lines(path))


def no_samples(path: Path | str) -> UserError:
    """The error for a file of data that has none."""
    return UserError(
        "holds no samples",
        where=str(path),
        expected="one sample a line",
        remedy="make the file with `finesight data import`",
    )


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write samples so that `read_samples` gives them back; the file appears in one piece."""
    lines = (f"{as_line(as_record(sample))}\n".encode() for sample in samples)
    storage.write_pieces(path, lines)


as_line = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode
"""Write JSON data as one line of text, which may hold what UTF-8 cannot."""


def as_record(sample: Sample, renamed: Callable[[str], str] | None = None) -> dict[str, Any]:
    """The sample as JSON data, without the keys that say nothing (no label, no references); its
    images and frames as `renamed`, where that is given."""
    fields = sample_fields(sample.messages, sample.references, sample.meta, renamed or str)
    return {"id": sample.id, **fields}


def sample_fields(
    messages: Sequence[Message],
    references: Sequence[str],
    meta: dict[str, Any],
    renamed: Callable[[str], str],
) -> dict[str, Any]:
    """Build the JSON fields of a sample except its id, as `as_record` does."""
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
        record["meta"] = json_data(meta)
    return record


def _part_record(part: Part, renamed: Callable[[str], str]) -> dict[str, Any]:
    # Comparing the tag is faster than isinstance: the metaclass of pydantic models is ABCMeta.
    if part.type == "text":
        return {"type": "text", "text": part.text}
    if part.type == "image":
        return {"type": "image", "image": renamed(part.image)}
    if part.type == "video":
        return {"type": "video", "frames": [renamed(f) for f in part.frames], "fps": part.fps}
    label = {} if part.label is None else {"label": part.label}
    xyxy = [shortest(number) for number in part.xyxy]
    return {"type": "box", "image": part.image, **label, "xyxy": xyxy}


def json_data(value: Any) -> Any:
    """Return a value as JSON has it: NaN and infinity are null, other types become their text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): json_data(inner) for key, inner in value.items()}
    return [json_data(one) for one in value] if isinstance(value, list | tuple) else str(value)


def sample_from(record: dict[str, Any], where: str) -> Sample:
    """A sample from JSON data that is already parsed. Raises UserError at `where`."""
    try:
        return Sample.model_validate(record)
    except ValidationError as error:
        raise _explained(error, where) from error


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """The content of a data file without a byte order mark. Raises UserError when unreadable, and
    for one of over `most` bytes."""
    with opened(path) as file:
        content = file.read() if most is None else file.read(most + 1)
    if most is not None and len(content) > most:
        raise UserError(
            f"a file of more than {most:,} bytes",
            where=str(path),
            expected="the labels of one image, or the description of a data set",
            remedy="split the file, or take it out of the folder",
        )
    return content.removeprefix(MARK)


def parse(line: bytes, where: str) -> Sample:
    """The sample of a line by its types alone. Raises UserError at `where`."""
    check_json(line, where)
    try:
        return Sample.model_validate_json(line)
    except ValidationError as error:
        raise _explained(error, where) from error


def _explained(error: ValidationError, where: str) -> UserError:
    """What pydantic refuses, said in the terms of a sample.

    Of several errors an unknown key is told first: it is often the misspelt name of a missing one.
    """
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda details: details["type"] != "extra_forbidden")
    kind, value, place = first["type"], first["input"], first["loc"]
    # messages.0.content.1 is followed by the type of part that was tried, which no one wrote.
    key = ".".join(map(str, (*place[:4], *place[5:])))
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    remedy = "correct the line, or make the file anew with `finesight data import`"
    if kind == "json_invalid":
        return UserError(
            f"broken JSON: {str(first['ctx']['error']).replace('line 1 ', '')}",
            where=where,
            expected="one whole JSON object on each line",
            remedy=remedy,
        )
    if kind == "extra_forbidden" and len(place) == 1 and place[0] in FOREIGN_KEYS:
        return UserError(
            f"the key {key}: a row of another program's format, no sample",
            where=where,
            expected=f"the keys {', '.join(Sample.model_fields)}",
            remedy="bring it in with `finesight data import` first",
        )
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(place[-1]), KEYS, n=1)
        return UserError(
            f"unknown key {key} with the value {shown}",
            where=where,
            expected=f"the keys {', '.join(KEYS)}",
            remedy=f"did you mean {near[0]}?" if near else "remove it; `meta` holds free notes",
        )
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if kind == "union_tag_invalid":
        expected = f"a part with a type of {first['ctx']['expected_tags']}"
    if kind == "missing":
        expected = f"the keys {', '.join(KEYS)}, each where it belongs"
    what = f"the key {key} is missing" if kind == "missing" else f"{key or 'the line'} is {shown}"
    return UserError(what, where=where, expected=expected, remedy=remedy)
