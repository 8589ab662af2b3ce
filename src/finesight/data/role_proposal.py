"""Proposal of column roles for a table, and the columns that it leaves out.

Names and values of columns suggest their roles. The user consents to columns without a role: by
naming the others (`--map`), by a mapping file, or by an answer to a question of `finesight init`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from finesight.data.formats.row_keys import has_value
from finesight.data.formats.table import (
    MEDIA_ROLES,
    counts_rows,
    format_columns,
    get_cell,
    is_row_name,
    join_words,
    list_unused_columns,
)
from finesight.data.image_file import is_image_value
from finesight.data.row_reader import Record
from finesight.errors import UserError, format_count, shorten

MAX_SHOWN_CHARS = 40
"""Maximum length of a value in a proposal."""

NUM_SHOWN_RECORDS = 3
"""Number of records with which a proposal is shown."""

SIZE_NAMES = ("width", "height", "image_width", "image_height", "area")
"""Columns next to boxes that are compared with the image or decide the box format."""


@dataclass(frozen=True, slots=True)
class RoleProposal:
    """Roles of the columns of a table, guessed from the first records.

    Attributes:
        columns: Column, or several separated by commas, by role.
        box_options: Guessed options of the boxes, such as "--box-format xywh".
        image_folder: Name of the folder next to the table with its images; None if it names them.
    """

    records: Sequence[Record]
    columns: Mapping[str, str]
    box_options: tuple[str, ...] = ()
    image_folder: str | None = None

    def list_unused(self) -> dict[str, object]:
        """Return the columns without a role, with the first value of each.

        Empty columns, names and numbers of rows, and sizes next to boxes need no role.
        """
        media = format_columns(self.columns, MEDIA_ROLES)
        unused: dict[str, object] = {}
        for name in list_unused_columns(self.records[0], self.columns):
            if is_row_name(name) or counts_rows(self.records, name, media):
                continue
            if "box" in self.columns and join_words(name) in SIZE_NAMES:
                continue
            values = [get_cell(record, name) for record in self.records]
            filled = [value for value in values if has_value(value) and value == value]
            if filled:
                unused[name] = filled[0]
        return unused

    def format_options(self) -> str:
        """Return the options of `finesight import` that accept the proposal."""
        words: list[str] = []
        for role, column in self.columns.items():
            words += ["--map", f"{role}={column}"]
        return shlex.join([*words, *self.box_options])

    def format_records(self) -> list[str]:
        """Return a line for each of the first records, with the values of the roles."""
        lines: list[str] = []
        for record in self.records[:NUM_SHOWN_RECORDS]:
            texts: list[str] = []
            for role, column in self.columns.items():
                names = [column] if column in record else column.split(",")
                values = [_format_value(get_cell(record, name)) for name in names]
                texts.append(f"{role} {', '.join(values)}")
            lines.append("; ".join(texts))
        return lines

    def check_columns(self, where: str) -> None:
        """Raise UnassignedKeysError if a column has no role."""
        unused = self.list_unused()
        if not unused:
            return
        error = UnassignedKeysError(
            f"{format_count(len(unused), 'column')} without a known role: {format_values(unused)}",
            where=where,
            expected="a role for each column, because others are left out",
            remedy="if they belong neither to the question nor to the answer, give"
            f" {self.format_options()}",
        )
        error.proposal = self
        raise error

    def check_inner_texts(self, where: str) -> None:
        """Raise UnassignedKeysError for texts inside of lists or objects without a role.

        Such a text may be the real question or answer.
        """
        inner = [name for name in self.list_unused() if self._has_inner_texts(name)]
        if not inner:
            return
        guess = ", ".join(f"{role}={column}" for role, column in self.columns.items())
        error = UnassignedKeysError(
            f"{', '.join(inner)[:200]}: texts inside of lists or objects, which may be the question"
            f" or the answer and would be left out (guessed roles: {guess})",
            where=where,
            expected="a role for each key, which the names do not state",
            remedy="name the columns by --map image=COLUMN, --map answer=COLUMN and so on, which"
            " leaves out all others",
        )
        media = {role: name for role, name in self.columns.items() if role in MEDIA_ROLES}
        error.proposal = replace(self, columns=media)  # the other roles are probably wrong
        raise error

    def _has_inner_texts(self, name: str) -> bool:
        values = [get_cell(record, name) for record in self.records]
        return any(isinstance(value, dict | list) and _has_inner_text(value) for value in values)


class UnassignedKeysError(UserError):
    """Raised if a proposal leaves out columns, or texts inside of lists or objects.

    Attributes:
        proposal: The roles and the first records of the source.
    """

    proposal: RoleProposal


def format_values(values: Mapping[str, object]) -> str:
    """Return names with a value each, such as "license ('CC0'), width (640)"."""
    return ", ".join(f"{name} ({_format_value(value)})" for name, value in values.items())


def _format_value(value: object) -> str:
    if isinstance(value, bytes) or (isinstance(value, dict) and value.get("bytes")):
        return "an image"
    return shorten(repr(value), MAX_SHOWN_CHARS)


def _has_inner_text(value: object) -> bool:
    """Return whether a list or an object contains a text with letters, outside of file names."""
    if isinstance(value, dict):
        return any(map(_has_inner_text, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_inner_text, value))
    is_text = isinstance(value, str) and not is_image_value(value)
    return is_text and re.search(r"[^\W\d_]", str(value)) is not None
