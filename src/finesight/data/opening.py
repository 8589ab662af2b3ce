"""A foreign source opened: its rows, the format that reads them, and a first draft of samples."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finesight.data.boxes import BoxFormat, BoxUnits
from finesight.data.formats import FORMATS, format_named, recognised
from finesight.data.formats import samples as samples_format
from finesight.data.formats import table as table_format
from finesight.data.formats.format import Ask, BadOption, Format, RawBox, Reading
from finesight.data.formats.inventory import inventory
from finesight.data.pictures import Pictures
from finesight.data.rows import Record, Row, Rows, joined, open_rows
from finesight.data.sample import Sample
from finesight.data.tar_rows import is_tar, open_tar
from finesight.errors import UserError

if TYPE_CHECKING:
    # Not needed but for imports from the web, and slow to import.
    from finesight.remote.https import Pictures as WebPictures

LOOKED_AT = 100
"""Records that a format is recognised by."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the user wants of a source: how to read it, which rows, and how to part them.

    `rows` are the bounds of a slice of the source's rows, the first being 0, and `limit` keeps only
    the first of those. `eval_last` holds out that many rows at the end; `split` trains on that
    share of the rows. `ask` is for box data sets. `unusable` rows stop an import, or are left out.
    `files` are those of a folder that hold its rows, end to end; without them it tells by itself.
    `web` fetches pictures that are addresses. `within` is the folder of a source that is not the
    user's own: its rows get no picture from elsewhere on this machine.
    """

    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    box_format: BoxFormat | None = None
    box_units: BoxUnits | None = None
    rows: tuple[int | None, int | None] = (None, None)
    limit: int | None = None
    eval_last: int | None = None
    split: float | None = None
    seed: int = 0
    copy_pictures: bool = False
    ask: Ask = "detection"
    unusable: Literal["refuse", "drop"] = "refuse"
    files: tuple[Path, ...] = ()
    web: WebPictures | None = None
    within: Path | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """A source as rows: the format that reads them, what it was known by, and which are wanted.

    `columns` are the keys of the first of the `chosen` rows, whose bounds are those of a slice.
    """

    path: Path
    rows: Rows
    form: Format
    known_by: str
    columns: tuple[str, ...]
    chosen: tuple[int, int]

    def selected(self) -> Iterator[Row]:
        """The rows that --rows and --limit leave."""
        return self.rows.select(*self.chosen)

    def reading(self, request: Request, saved: Path, *, lenient: bool = False) -> Reading:
        """What its rows are read with; pictures out of a table are saved in `saved`/pictures."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return Reading(
            Pictures(
                folder,
                saved,
                checked=not lenient,
                literally=lenient and self.form is samples_format.FORMAT,
                web=request.web,
                within=request.within,
            ),
            columns=request.columns,
            prompt=request.prompt,
            box_format=request.box_format,
            box_units=request.box_units,
            ask=request.ask,
            lenient=lenient,
        )


@dataclass(frozen=True, slots=True)
class Drafted:
    """One row, read with its faults: its samples or, in their place, the `problem` with it.

    Paths in the samples are absolute. Their boxes are corners in pixels, neither clipped nor
    refused; `boxes` are the row's boxes as the source holds them.
    """

    place: str
    number: int
    samples: tuple[Sample, ...] = ()
    boxes: tuple[RawBox, ...] = ()
    problem: UserError | None = None


@dataclass(frozen=True, slots=True)
class Drafts:
    """A source read leniently, one row at a time; every iteration reads it anew."""

    source: Source
    request: Request
    saved: Path

    def __len__(self) -> int:
        start, stop = self.source.chosen
        return stop - start

    def __iter__(self) -> Iterator[Drafted]:
        common = self.source.reading(self.request, self.saved, lenient=True)
        for row in self.source.selected():
            reading = replace(common, raw=[])
            try:
                cases = self.source.form.cases(row, reading)
            except BadOption:
                raise
            except UserError as problem:
                yield Drafted(row.place, row.number, (), tuple(reading.raw), problem)
                continue
            samples = tuple(sample for case in cases for sample in case.for_training())
            yield Drafted(row.place, row.number, samples, tuple(reading.raw))


def draft(source: Path, request: Request, saved: Path) -> Drafts:
    """`source` read as an import reads it, but with its faults: what is checked may be bad.

    Missing and damaged pictures stay under the paths that they should have; see `Drafted` for
    boxes and for rows that cannot be read at all. Pictures out of a table are saved in
    `saved`/pictures; `saved` exists. Raises UserError as `open_source` does.
    """
    return Drafts(open_source(source, request), request, saved)


def open_source(source: Path, request: Request) -> Source:
    """The rows of `source` and the format to read them with.

    Raises UserError when it cannot be opened, its format is unsure, an option does not fit or no
    rows are selected.
    """
    _check(request)
    rows, form, known_by = _opened(source, request)
    start, stop, _ = slice(*request.rows).indices(rows.total)
    stop = stop if request.limit is None else min(stop, start + request.limit)
    if start >= stop:
        raise UserError(
            f"no rows are selected of {rows.total}",
            where=str(source),
            expected=f"--rows A:B with A below B and below {rows.total}",
            remedy="select other rows",
        )
    head = tuple(row.record for row in rows.select(start, min(stop, start + LOOKED_AT)))
    if form is None:
        form, known_by = _format(head, source, request)
    check_use(form, known_by, request)
    columns = tuple(map(str, head[0])) if head else ()
    return Source(source, rows, form, known_by, columns, (start, stop))


def _check(request: Request) -> None:
    """Refuse wishes that are wrong whatever the source holds."""
    unknown = sorted(request.columns.keys() - set(table_format.COLUMNS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], table_format.COLUMNS, n=1)
        raise UserError(
            f"unknown role {unknown[0]!r}",
            where="columns",
            expected=f"one of {', '.join(table_format.COLUMNS)}",
            remedy=f"did you mean {near[0]}?" if near else "leave the column out",
        )
    if request.split is not None and request.eval_last is not None:
        raise UserError(
            f"a split of {request.split:g} and the last {request.eval_last} rows held out",
            where="split",
            expected="one way to hold rows out",
            remedy="leave one of the two out",
        )
    if request.split is not None and not 0 < request.split < 1:
        raise UserError(
            f"a split of {request.split:g}",
            where="split",
            expected="the share of the rows to train on, above 0 and below 1",
            remedy="for example 0.9",
        )


def _opened(source: Path, request: Request) -> tuple[Rows, Format | None, str]:
    """Rows by a format that opens its sources itself, else those of a file with rows."""
    named = format_named(request.format) if request.format is not None else None
    as_table = request.columns and (source.is_file() or request.files)
    asked = [named] if named else [] if as_table else FORMATS
    for form in asked:
        opened = form.open(source) if form.open is not None else None
        if opened is not None:
            rows, known_by = opened
            return rows, form, "--format" if named else known_by
    if named is not None and named.open is not None:
        raise UserError(
            f"no {named.name} is found there",
            where=str(source),
            expected=named.looks,
            remedy="check the path, or leave --format out to have the format detected",
        )
    if os.path.isdir(source) and not request.files:
        folders = [form for form in FORMATS if form.open is not None]
        found = inventory(source)
        raise UserError(
            f"a folder in which no known data set is found; it holds {found}",
            where=str(source),
            expected="; ".join(f"{form.name}: {form.looks}" for form in folders),
            remedy=found.nearest(),
        )
    return _rows(request.files or (source,)), None, ""


def _rows(files: Sequence[Path]) -> Rows:
    """The rows of one file, or of several end to end."""
    rows = [open_tar(file) if is_tar(file) else open_rows(file) for file in files]
    return rows[0] if len(rows) == 1 else joined(files, rows)


def _format(head: Sequence[Record], source: Path, request: Request) -> tuple[Format, str]:
    """The format of a file with rows and why; a table whose columns are not mapped is refused."""
    if request.format is not None:
        form, known_by = format_named(request.format), "--format"
    elif request.columns:
        form, known_by = table_format.FORMAT, "--map"
    else:
        form, known_by = recognised(head, str(source))
    if form is table_format.FORMAT and not request.columns:
        raise UserError(
            f"a table of {', '.join(map(str, head[0]))} whose columns are not mapped",
            where="--format table",
            expected="--map image=COLUMN, --map answer=COLUMN or --map box=COLUMN and so on",
            remedy=f"perhaps {table_format.suggestion(head[0])}",
        )
    return form, known_by


def check_use(form: Format, known_by: str, request: Request) -> None:
    """Refuse options that mean nothing to the format."""
    given = {
        "map": ("--map", bool(request.columns)),
        "prompt": ("--prompt", request.prompt is not None),
        "boxes": ("--box-format or --box-units", bool(request.box_format or request.box_units)),
        "ask": ("--ask", request.ask != "detection"),
    }
    for kind, (option, is_given) in given.items():
        if is_given and kind not in form.takes:
            raise UserError(
                f"the format {form.name} (known by {known_by}) has no use for it",
                where=option,
                expected=f"rows such as {form.looks}",
                remedy=f"leave {option} out, or choose another --format",
            )
