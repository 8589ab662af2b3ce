"""Explanation of a row: which value has which role in a mapping, and the samples it becomes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finesight.errors import UserError, shorten
from finesight.ingest.import_source import ImportOptions, open_source
from finesight.ingest.mapped_rows import read_mapped_row
from finesight.ingest.mapping_format import MappingFormat
from finesight.ingest.record_values import RoleAssignment
from finesight.samples.sample import ContentPart, ImagePart, Sample, list_coordinates

MAX_VALUE_CHARS = 60
"""Maximum length of a value in an explanation."""

NO_ROLE = "no role"


@dataclass(frozen=True, slots=True)
class RowExplanation:
    """Values of a row with their roles, and its samples.

    Attributes:
        mapping: RecordMapping file, or name of the preset.
        num_rows: Number of rows of the source.
        unused: Values without a role; an import fails with them.
    """

    mapping: str
    location: str
    num_rows: int
    readings: list[RoleAssignment]
    unused: list[RoleAssignment]
    samples: list[Sample]

    def format_lines(self) -> list[str]:
        """Return a table of path, role and value, then the samples."""
        rows = [_describe(one) for one in (*self.readings, *self.unused)]
        path_width = max((len(path) for path, _, _ in rows), default=0)
        role_width = max((len(role) for _, role, _ in rows), default=0)
        lines: list[str] = []
        for path, role, value in rows:
            lines.append(f"  {path.ljust(path_width)}  {role.ljust(role_width)}  {value}")
        for sample in self.samples:
            lines += _format_sample(sample)
        if not self.samples:
            lines.append("no sample")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return the explanation as JSON data."""
        return {
            "row": self.location,
            "roles": list(map(_describe, self.readings)),
            "unused": list(map(_describe, self.unused)),
            "samples": [sample.model_dump(mode="json") for sample in self.samples],
        }


def _format_sample(sample: Sample) -> list[str]:
    """Return the messages of a sample as lines."""
    lines = [f"sample {sample.id}"]
    for message in sample.messages:
        lines.append(f"  {message.role}: {_format_content(message.content)}")
    if sample.rejected:
        lines.append(f"  rejected: {_format_content(sample.rejected)}")
    if sample.label is not None:
        lines.append(f"  desirable: {sample.label}")
    for reference in sample.references:
        lines.append(f"  reference: {shorten(reference, MAX_VALUE_CHARS)}")
    return lines


def explain_row(path: Path, options: ImportOptions, number: int, folder: Path) -> RowExplanation:
    """Explain a row of a source.

    Args:
        number: Number of the row, counted from 1.
        folder: Folder for embedded images.

    Raises:
        UserError: The source has no such row, the options have no mapping, or it does not fit.
    """
    mapping_format = options.mapping
    if not isinstance(mapping_format, MappingFormat):
        raise UserError(
            "no mapping is given, and no preset matches the data",
            where="--explain",
            expected="--mapping FILE",
            remedy="give the mapping whose roles are explained",
        )
    source = open_source(path, options)
    if number > source.rows.num_rows:
        raise UserError(
            f"row {number} of {source.rows.num_rows}",
            where="--explain",
            expected="a row of the source, counted from 1",
            remedy=f"give 1 to {source.rows.num_rows}",
        )
    context = source.create_context(options, folder)
    (row,) = source.rows.iter_range(number - 1, number)
    try:
        found = read_mapped_row(row, context, mapping_format.mapping)
    except UserError as error:
        error.where = error.where or f"{path}, {row.location}"
        raise
    samples = [sample for example in found.examples for sample in example.to_train_samples()]
    return RowExplanation(
        mapping=mapping_format.name,
        location=row.location,
        num_rows=source.rows.num_rows,
        readings=found.readings,
        unused=found.unused,
        samples=samples,
    )


def _describe(reading: RoleAssignment) -> list[str]:
    """Return path, role and value as texts."""
    return [reading.location, reading.role or NO_ROLE, format_value(reading.value)]


def format_value(value: object) -> str:
    """Return a value as JSON of one line, shortened."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = json.dumps(value, ensure_ascii=False, default=_describe_other)
    return shorten(text, MAX_VALUE_CHARS)


def _describe_other(value: object) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return str(value)


def _format_content(content: tuple[ContentPart, ...]) -> str:
    """Return the parts of a message as one line."""
    pieces: list[str] = []
    for part in content:
        if isinstance(part, ImagePart):
            pieces.append(f"[image {Path(part.image).name}]")
        elif part.type == "text":
            pieces.append(part.text.replace("\n", "\\n"))
        elif part.type in ("box", "point"):
            pieces.append(f"[{part.type} {part.label or ''} {list_coordinates(part)}]")
        elif part.type == "tool_call":
            pieces.append(f"[call {part.name} {format_value(part.arguments)}]")
        else:
            pieces.append(f"[{part.type}]")
    return " ".join(pieces)
