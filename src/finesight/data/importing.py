"""Rows of a foreign file become samples in a new folder, whole or not at all."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finesight.data.boxes import BoxFormat, BoxUnits
from finesight.data.case import Case
from finesight.data.formats import format_named, recognised
from finesight.data.formats import table as table_format
from finesight.data.formats.format import Format, Reading
from finesight.data.jsonl import write_samples
from finesight.data.pictures import Pictures, copy_all, same_pictures
from finesight.data.rows import Record, Row, open_rows
from finesight.data.rules import check_sample
from finesight.data.sample import Sample, files_of
from finesight.data.split import hold_out_last, split_by_picture
from finesight.errors import UserError
from finesight.storage import write_folder

LOOKED_AT = 100
"""Records that a format is recognised by."""

DESCRIBED = 5
"""Bad rows that are described; the others are counted."""

UNSELECTED = "not selected by --rows and --limit"
SHOWN_IN_EVAL = "shows a picture of the evaluation rows"


@dataclass(frozen=True, slots=True)
class Request:
    """What the user wants of a file: how to read it, which rows, and how to part them.

    `rows` are the bounds of a slice of the file's rows, the first being 0, and `limit` keeps only
    the first of those. `eval_last` holds out that many rows at the end; `split` trains on that
    share of the rows.
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


@dataclass(frozen=True, slots=True)
class Written:
    """One file of samples and how many rows of the source went into it."""

    file: Path
    rows: int
    samples: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What an import did: every row of the source is in `written` or, by reason, in `left_out`."""

    format: str
    known_by: str
    rows: int
    written: tuple[Written, ...]
    left_out: dict[str, int]
    pictures: int
    clipped_boxes: int
    unused_columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """One file to write: cases to train on (a sample an answer) or to measure on."""

    name: str
    cases: list[Case]
    measured: bool = False

    def samples(self) -> Iterator[Sample]:
        for case in self.cases:
            yield from [case.for_evaluation()] if self.measured else case.for_training()


def import_file(source: Path, out: Path, request: Request) -> Summary:
    """Read `source`, write `out`/data.jsonl, or train.jsonl and eval.jsonl when rows are held out.

    Paths in these files are relative to `out`. Pictures stay where they are, unless they are to be
    copied or come out of a table: then they lie in `out`/pictures. Raises UserError, and leaves no
    `out`, when it exists already, an option does not fit, or any row cannot be used.
    """
    _check(request)
    rows = open_rows(source)
    start, stop, _ = slice(*request.rows).indices(rows.total)
    stop = stop if request.limit is None else min(stop, start + request.limit)
    if start >= stop:
        raise UserError(
            f"no rows are selected of {rows.total}",
            where=str(source),
            expected=f"--rows A:B with A below B and below {rows.total}",
            remedy="select other rows",
        )
    head = [row.record for row in rows.select(start, min(stop, start + LOOKED_AT))]
    form, known_by = _format(head, source, request)
    with write_folder(out) as staging:
        reading = Reading(
            Pictures(source.parent, staging),
            columns=request.columns,
            prompt=request.prompt,
            box_format=request.box_format,
            box_units=request.box_units,
        )
        cases = _with_own_ids(_read(rows.select(start, stop), form, reading, source))
        parts = _parts(cases, request)
        pictures = _pictures(sample for part in parts for sample in part.samples())
        names = _names(pictures, staging, out, copy=request.copy_pictures)
        written = [_write(part, names, staging, out) for part in parts]
    used = sum(part.rows for part in written)
    left_out = {UNSELECTED: rows.total - len(cases), SHOWN_IN_EVAL: len(cases) - used}
    return Summary(
        format=form.name,
        known_by=known_by,
        rows=rows.total,
        written=tuple(written),
        left_out={reason: count for reason, count in left_out.items() if count},
        pictures=len(names),
        clipped_boxes=reading.clipped,
        unused_columns=_unused(head[0], request) if form is table_format.FORMAT else (),
    )


def _check(request: Request) -> None:
    """Refuse wishes that are wrong whatever the source holds."""
    unknown = sorted(request.columns.keys() - set(table_format.COLUMNS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], table_format.COLUMNS, n=1)
        raise UserError(
            f"unknown role {unknown[0]!r}",
            where="--map",
            expected=f"one of {', '.join(table_format.COLUMNS)}",
            remedy=f"did you mean {near[0]}?" if near else "leave the column out",
        )
    if request.split is not None and request.eval_last is not None:
        raise UserError(
            f"{request.split:g} is given together with --eval-last {request.eval_last}",
            where="--split",
            expected="one way to hold rows out",
            remedy="leave one of the two out",
        )
    if request.split is not None and not 0 < request.split < 1:
        raise UserError(
            f"{request.split:g}",
            where="--split",
            expected="the share of the rows to train on, above 0 and below 1",
            remedy="for example --split 0.9",
        )


def _format(head: Sequence[Record], source: Path, request: Request) -> tuple[Format, str]:
    """The format to read with and why; options that mean nothing to it are refused."""
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
    given = {
        "map": ("--map", bool(request.columns)),
        "prompt": ("--prompt", request.prompt is not None),
        "boxes": ("--box-format or --box-units", bool(request.box_format or request.box_units)),
    }
    for kind, (option, is_given) in given.items():
        if is_given and kind not in form.takes:
            raise UserError(
                f"the format {form.name} (known by {known_by}) has no use for it",
                where=option,
                expected=f"rows such as {form.looks}",
                remedy=f"leave {option} out, or choose another --format",
            )
    return form, known_by


def _read(rows: Iterable[Row], form: Format, reading: Reading, source: Path) -> list[Case]:
    """All rows as cases. Raises one UserError for all rows that cannot be used."""
    cases: list[Case] = []
    bad: list[tuple[Row, UserError]] = []
    for row in rows:
        try:
            case = form.read(row, reading)
            for sample in case.for_training():
                check_sample(sample, "")
            cases.append(case)
        except UserError as error:
            bad.append((row, error))
    if bad:
        raise _refusal(bad, len(cases) + len(bad), source) from bad[0][1]
    return cases


def _refusal(bad: list[tuple[Row, UserError]], rows: int, source: Path) -> UserError:
    lines = [f"{len(bad)} of {rows} rows cannot be used; nothing was written"]
    for row, problem in bad[:DESCRIBED]:
        place = f"{problem.where.lstrip(', ')}: " if problem.where else ""
        lines.append(f"  {row.place}: {place}{problem.what}")
    if len(bad) > DESCRIBED:
        lines.append(f"  and {len(bad) - DESCRIBED} more")
    first = bad[0][1]
    return UserError(
        "\n".join(lines), where=str(source), expected=first.expected, remedy=first.remedy
    )


def _with_own_ids(cases: list[Case]) -> list[Case]:
    """The cases, those whose id is not theirs alone with their number added to it."""
    uses = Counter(case.id for case in cases)
    return [
        case if uses[case.id] == 1 else case.renamed(f"{case.id}-row{number}")
        for number, case in enumerate(cases, start=1)
    ]


def _parts(cases: list[Case], request: Request) -> list[_Part]:
    """The files to write. Nothing held out: one; everything held out: eval.jsonl alone."""
    if request.eval_last is None and request.split is None:
        return [_Part("data.jsonl", cases)]
    per_case = [_pictures([case.for_evaluation()]) for case in cases]
    keys = same_pictures(path for paths in per_case for path in paths)
    shown = [frozenset(keys[path] for path in paths) for paths in per_case]
    if request.split is not None:
        train, held_out = split_by_picture(shown, request.split, request.seed)
    else:
        assert request.eval_last is not None, "neither split nor eval_last"
        train, held_out = hold_out_last(shown, request.eval_last)
    parts = [
        _Part("train.jsonl", [cases[place] for place in train]),
        _Part("eval.jsonl", [cases[place] for place in held_out], measured=True),
    ]
    return parts if train else parts[1:]


def _pictures(samples: Iterable[Sample]) -> list[Path]:
    """Every picture and frame once, in order."""
    files = (file for sample in samples for piece in sample.parts() for file in files_of(piece))
    return [Path(file) for file in dict.fromkeys(files)]


def _names(pictures: list[Path], staging: Path, out: Path, *, copy: bool) -> dict[str, str]:
    """What to call each picture in the written files, by what the cases call it."""
    outside = [path for path in pictures if not path.is_relative_to(staging)]
    copies = copy_all(outside, staging) if copy else {}
    home = out.resolve()
    names = {}
    for path in pictures:
        inside = copies.get(path, path)
        if inside.is_relative_to(staging):
            names[str(path)] = inside.relative_to(staging).as_posix()
        else:
            names[str(path)] = Path(os.path.relpath(path, home)).as_posix()
    return names


def _write(part: _Part, names: Mapping[str, str], staging: Path, out: Path) -> Written:
    samples = [sample.with_files(names.__getitem__) for sample in part.samples()]
    write_samples(staging / part.name, samples)
    return Written(out / part.name, len(part.cases), len(samples))


def _unused(record: Record, request: Request) -> tuple[str, ...]:
    used = {name for column in request.columns.values() for name in (column, *column.split(","))}
    return tuple(name for name in record if name not in used and name != "id")
