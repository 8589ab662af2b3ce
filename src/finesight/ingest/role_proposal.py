"""Proposal of column roles for a table, and the columns that it leaves out.

Names and values of columns suggest their roles. The user consents to columns without a role: by
naming the others (`--map`), by a mapping file, or by the answer to a question.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from finesight.errors import Remedy, format_count, shorten
from finesight.ingest.formats.row_keys import has_value
from finesight.ingest.formats.table import (
    MEDIA_ROLES,
    UnknownRolesError,
    counts_rows,
    format_columns,
    format_media_options,
    get_cell,
    guess_columns,
    has_inner_text,
    is_answer_name,
    is_row_name,
    join_words,
    list_names,
    list_unused_columns,
    numbers_rows,
    split_column_names,
)
from finesight.ingest.row_reader import Record

MAX_SHOWN_CHARS = 40
"""Maximum length of a value in a proposal."""

NUM_SHOWN_RECORDS = 3
"""Number of records with which a proposal is shown."""

SIZE_NAMES = ("width", "height", "image_width", "image_height", "area")
"""Columns next to boxes that are compared with the image or decide the box format."""

FLAGS = frozenset({"0", "1", "0.0", "1.0", "true", "false"})
"""Values of columns that state whether an image shows a class."""


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
        unused: dict[str, object] = {}
        for name, values in self._list_values().items():
            filled = next(filter(_is_filled, values), None)
            if filled is not None and not self._needs_no_role(name):
                unused[name] = filled
        return unused

    def list_ignorable(self) -> frozenset[str]:
        """Return the columns that need no role, also if later rows have a value there."""
        return frozenset(filter(self._needs_no_role, self._list_values()))

    def _list_values(self) -> dict[str, list[object]]:
        """Return the values of the columns that no role uses."""
        names: dict[str, None] = {}
        for record in self.records:
            names.update(dict.fromkeys(list_unused_columns(record, self.columns)))
        values: dict[str, list[object]] = {}
        for name in names:
            values[name] = self._read(name)
        return values

    def _split(self, column: str) -> list[str]:
        """Return the columns of a role."""
        if column in self.records[0]:
            return [column]
        return split_column_names(column, self.records[0])

    def _read(self, name: str) -> list[object]:
        """Return the values of a column."""
        return [get_cell(record, name) for record in self.records]

    def _needs_no_role(self, name: str) -> bool:
        media = format_columns(self.columns, MEDIA_ROLES)
        if is_row_name(name) or numbers_rows(self.records, name):
            return True
        if counts_rows(self.records, name, media):
            return True
        return "box" in self.columns and join_words(name) in SIZE_NAMES

    def choose_fields(self) -> RoleProposal:
        """Return the proposal with all columns of text as fields of the answer.

        Known names of questions remain a question. A column of JSON objects remains the answer, and
        boxes remain boxes.
        """
        answer = self.columns.get("answer")
        if "box" in self.columns or (answer and all(map(_is_json_object, self._read(answer)))):
            return self
        columns = dict(self.columns)
        columns.pop("answer", None)
        question = columns.pop("question", "")
        guessed: dict[str, Mapping[str, str]] = {}
        for name, values in self._list_all_values().items():
            guessed[name] = guess_columns([{name: value} for value in values])
        if any("question" in guessed.get(name, {}) for name in question.split(",")):
            columns["question"] = question
        fields: list[str] = []
        for name, roles in guessed.items():
            is_text = "," not in name and name in (roles.get("answer"), roles.get("question"))
            if is_text and name not in columns.get("question", "").split(","):
                fields.append(name)
        if len(fields) < 2:
            return self
        columns["fields"] = ",".join(fields)
        return replace(self, columns=columns)

    def _list_all_values(self) -> dict[str, list[object]]:
        """Return the values of all columns."""
        values: dict[str, list[object]] = {}
        for name in list_names(self.records):
            values[name] = self._read(name)
        return values

    def format_options(self) -> str:
        """Return the options of an import that accept the proposal."""
        words: list[str] = []
        for role, column in self.columns.items():
            words += ["--map", f"{role}={column}"]
        if not self.box_options:
            return shlex.join(words)
        return f"{shlex.join([*words, *self.box_options])} (options of import)"

    def format_records(self) -> list[str]:
        """Return a line for each of the first records, with the values of the roles."""
        lines: list[str] = []
        for record in self.records[:NUM_SHOWN_RECORDS]:
            texts: list[str] = []
            for role, column in self.columns.items():
                values: list[str] = []
                for name in self._split(column):
                    values.append(_format_value(get_cell(record, name)))
                texts.append(f"{role} {', '.join(values)}")
            lines.append("; ".join(texts))
        return lines

    def check_columns(self, where: str) -> None:
        """Raise UnassignedKeysError if the role of a column is not certain."""
        answer = self.columns.get("answer", "")
        # Columns of a table without header are named 1, 2 and so on.
        if answer.isdecimal() and self._has_distinct_integers(answer):
            raise UnassignedKeysError(
                f"the column {answer} has another number in each row"
                f" ({_format_value(get_cell(self.records[0], answer))}): an answer, or an"
                " identifier of the image",
                self._keep_media(),
                where=where,
                expected="a table with a header, or the roles of its columns",
                remedy=f"if the numbers are the answers, give {self.format_options()}",
            )
        if "fields" in self.columns and not self._has_flags_only():
            raise UnassignedKeysError(
                f"no column is known as the answer, only {self._format_fields()}",
                self,
                where=where,
                expected="a column with a known name, such as answer or caption",
                remedy=f"if all of them are the answer, as JSON, give {self.format_options()}; or"
                f" for one of them, {self._format_one_answer()}",
            )
        self.check_unused(where)

    def check_unused(self, where: str) -> None:
        """Raise UnassignedKeysError if a column has no role, or several may be the answer."""
        unused = self.list_unused()
        other_answers = list(filter(is_answer_name, unused))
        if "answer" in self.columns and other_answers:
            names = [self.columns["answer"], *other_answers]
            raise UnassignedKeysError(
                f"each of the columns {_format_names(names)} may be the answer, or a part of the"
                f" question ({format_values(unused)})",
                self._keep_media(),
                where=where,
                expected="one column of answers by its name",
                remedy=f"name the columns: {self._format_one_answer()}",
            )
        if unused:
            raise UnassignedKeysError(
                f"{format_count(len(unused), 'column')} without a known role:"
                f" {format_values(unused)}",
                self,
                where=where,
                expected="a role for each column, because others are left out",
                remedy="if they belong neither to the question nor to the answer, give"
                f" {self.format_options()}",
            )

    def _has_distinct_integers(self, name: str) -> bool:
        cells = [str(value).strip() for value in self._read(name)]
        are_distinct = len(cells) > 1 and len(set(cells)) == len(cells)
        return are_distinct and all(map(str.isdecimal, cells))

    def _has_flags_only(self) -> bool:
        """Return whether all fields are flags: a table of several classes, one column each."""
        for name in self._split(self.columns["fields"]):
            texts = map(str, self._read(name))
            if not FLAGS.issuperset(text.strip().lower() for text in texts):
                return False
        return True

    def _format_fields(self) -> str:
        values: dict[str, object] = {}
        for name in self._split(self.columns["fields"]):
            values[name] = get_cell(self.records[0], name)
        return format_values(values)

    def _format_one_answer(self) -> str:
        """Return the options of an import with a single column as the answer."""
        options = f"{self._format_media()} --map answer=COLUMN"
        question = self.columns.get("question")
        if question is not None:
            return f"{options} --map {shlex.quote(f'question={question}')}"
        fields = self.columns.get("fields")
        if fields is None or len(self._split(fields)) > 1:
            return f"{options}, and --map question=COLUMN for a text of the question"
        return options

    def _format_media(self) -> str:
        return format_media_options(self.columns)

    def _keep_media(self) -> RoleProposal:
        """Return the proposal without the roles of texts, which may be wrong."""
        media = {role: name for role, name in self.columns.items() if role in MEDIA_ROLES}
        return replace(self, columns=media)

    def check_inner_values(self, where: str) -> None:
        """Raise UnassignedKeysError for values inside of lists or objects without a role.

        Such a value may be the real question or answer.
        """
        inner: dict[str, object] = {}
        for name in self.list_unused():
            value = next(filter(has_inner_text, self._read(name)), None)
            if value is not None:
                inner[name] = value
        if inner:
            raise UnassignedKeysError(
                f"texts inside of lists or objects may be the question or the answer:"
                f" {format_values(inner)}",
                self._keep_media(),
                where=where,
                expected="a role for each key, which the names do not state",
                remedy="name the columns by --map image=COLUMN, --map answer=COLUMN and so on,"
                " which leaves out all others",
            )


class UnassignedKeysError(UnknownRolesError):
    """Raised if a proposal leaves out columns, or values inside of lists or objects.

    Attributes:
        proposal: The first records of the source, and the roles that are certain.
    """

    def __init__(
        self,
        what: str,
        proposal: RoleProposal | None = None,
        *,
        where: str = "",
        expected: str = "",
        remedy: Remedy = "",
    ) -> None:
        super().__init__(what, where=where, expected=expected, remedy=remedy)
        self.proposal = proposal


def format_values(values: Mapping[str, object]) -> str:
    """Return names with a value each, such as "license ('CC0'), width (640)"."""
    texts: list[str] = []
    for name, value in values.items():
        texts.append(f"{_format_name(name)} ({_format_value(value)})")
    return ", ".join(texts)


def _is_json_object(value: object) -> bool:
    """Return whether a cell is the text of a JSON object, or empty."""
    if value is None or value == "":
        return True
    try:
        return isinstance(value, str) and isinstance(json.loads(value), dict)
    except (ValueError, RecursionError):
        return False


def _is_filled(value: object) -> bool:
    return has_value(value) and value == value


def _format_name(name: str) -> str:
    """Return a column name, escaped if it could begin a new line of a message."""
    return name if name.isprintable() else repr(name)


def _format_names(names: Sequence[str]) -> str:
    return ", ".join(map(_format_name, names))[:200]


def _format_value(value: object) -> str:
    if isinstance(value, bytes) or (isinstance(value, dict) and value.get("bytes")):
        return "an image"
    return shorten(repr(value), MAX_SHOWN_CHARS)
