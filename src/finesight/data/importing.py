"""Rows of a foreign file become samples in a new folder, whole or not at all."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from finesight.data.boxes import BadBox
from finesight.data.case import Case
from finesight.data.formats import recognised
from finesight.data.formats import table as table_format
from finesight.data.formats.format import BadOption, Format, Reading, StrayMark, UnreadKey
from finesight.data.headers import DamagedPicture
from finesight.data.jsonl import write_samples
from finesight.data.opening import Request, Source, open_source
from finesight.data.pictures import FOLDER, named, same_pictures
from finesight.data.rows import Row
from finesight.data.rules import BadTurns, check_sample
from finesight.data.sample import Sample, files_of
from finesight.data.split import hold_out_last, split_by_picture
from finesight.errors import UserError
from finesight.storage import write_file, write_folder

DESCRIBED = 5
"""Bad rows that are described; the others are counted."""

SINGLE_FAULTS = 0.1
"""The share of the rows with bad boxes up to which these are faults of single rows. Above, boxes
were probably read in another form than they are in, and those that pass are wrong as well."""

LEFT_OUT = "left_out.jsonl"
"""Where rows that cannot be used are listed, with --unusable drop."""

UNSELECTED = "not selected by --rows and --limit"
SHOWN_IN_EVAL = "shows a picture of the evaluation rows"
REASONS: dict[type[UserError], str] = {
    DamagedPicture: "a picture is missing or damaged",
    BadBox: "a box is none, or lies outside of its picture",
    BadTurns: "turns are out of order or empty",
    StrayMark: "marks in the text that its format does not read",
    UnreadKey: "a key whose value would be lost",
}
OTHER_REASON = "not as its format says"


@dataclass(frozen=True, slots=True)
class Written:
    """One file of samples and how many rows of the source went into it."""

    file: Path
    rows: int
    samples: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What an import did: every row of the source is in `written` or, by reason, in `left_out`.

    Those that cannot be used are in the file `listed` one by one.
    """

    format: str
    known_by: str
    rows: int
    written: tuple[Written, ...]
    left_out: dict[str, int]
    pictures: int
    clipped_boxes: int
    noted: dict[str, int]
    unused_columns: tuple[str, ...]
    listed: Path | None = None


Cases = list[Case]
"""What one row says."""

Dropped = list[tuple[Row, UserError]]


@dataclass(frozen=True, slots=True)
class _Part:
    """One file to write: rows to train on (a sample an answer) or to measure on."""

    name: str
    rows: list[Cases]
    measured: bool = False

    def __len__(self) -> int:
        """How many samples the rows make."""
        cases = (case for cases in self.rows for case in cases)
        return sum(1 if self.measured else len(case.answers) for case in cases)

    def samples(self) -> Iterator[Sample]:
        for case in (case for cases in self.rows for case in cases):
            yield from [case.for_evaluation()] if self.measured else case.for_training()


def import_file(source: Path, out: Path, request: Request) -> Summary:
    """Read `source`, write `out`/data.jsonl, or train.jsonl and eval.jsonl when rows are held out.

    Paths in these files are relative to `out`. Pictures stay where they are, unless they are to be
    copied or come out of a table: then they lie in `out`/pictures. Raises UserError, and leaves no
    `out`, when it exists already, an option does not fit, or any row cannot be used; rows to be
    dropped are listed in `out`/left_out.jsonl instead.
    """
    opened = open_source(source, request)
    with write_folder(out) as staging:
        reading = opened.reading(request, staging)
        rows, dropped = _read(opened, reading, request)
        parts = _parts(_with_own_ids(rows), request)
        pictures = _pictures(case for part in parts for cases in part.rows for case in cases)
        names = named(pictures, staging, out, copy=request.copy_pictures)
        written = [_write(part, names, staging, out) for part in parts]
        _write_left_out(dropped, staging)
        _remove_unused(staging, names)
    used = sum(part.rows for part in written)
    unselected = opened.rows.total - len(rows) - len(dropped)
    left_out = Counter({UNSELECTED: unselected, SHOWN_IN_EVAL: sum(map(bool, rows)) - used})
    left_out.update(reading.left_out)
    left_out.update(reason_of(problem) for _, problem in dropped)
    return Summary(
        format=opened.form.name,
        known_by=opened.known_by,
        rows=opened.rows.total,
        written=tuple(written),
        left_out={reason: count for reason, count in left_out.items() if count},
        pictures=len(names),
        clipped_boxes=reading.clipped,
        noted=dict(+reading.noted),
        unused_columns=_unused(opened, request),
        listed=out / LEFT_OUT if dropped else None,
    )


def reason_of(problem: UserError) -> str:
    """The kind of fault that a row was refused for, in a few words."""
    fits = (reason for kind, reason in REASONS.items() if isinstance(problem, kind))
    return next(fits, OTHER_REASON)


def _read(opened: Source, reading: Reading, request: Request) -> tuple[list[Cases], Dropped]:
    """All rows that can be used, and the others with what is wrong with them.

    Raises one UserError for all of the others where they are not to be dropped, none is left, or
    so many boxes are bad that the others are likely to be wrong as well.
    """
    rows: list[Cases] = []
    bad: Dropped = []
    for row in opened.selected():
        clipped = reading.clipped
        reading.raw.clear()
        try:
            cases = opened.form.cases(row, reading)
            for sample in (sample for case in cases for sample in case.for_training()):
                check_sample(sample, "")
            rows.append(cases)
        except BadOption:
            raise
        except UserError as problem:
            reading.clipped = clipped
            bad.append((row, problem))
    boxes = [row for row, problem in bad if isinstance(problem, BadBox)]
    suspicious = len(boxes) > max(1, SINGLE_FAULTS * (len(rows) + len(bad)))
    if bad and (request.unusable == "refuse" or suspicious or not any(rows)):
        other = _other_format(bad[0][0], reading, opened.form)
        raise _refusal(bad, rows, opened.path, other, suspicious=suspicious) from bad[0][1]
    if not any(rows):
        reasons = [f"{count} {reason}" for reason, count in reading.left_out.items()]
        raise UserError(
            f"none of {len(rows)} rows says anything to learn: {'; '.join(reasons)}",
            where=str(opened.path),
            expected=opened.form.looks,
            remedy="check the source, or choose another --format",
        )
    return rows, bad


def _other_format(row: Row, reading: Reading, form: Format) -> str | None:
    """The option for a format that a row can be read in which `form` refuses; None without one."""
    try:
        other, known_by = recognised([row.record], "")
        other.cases(row, reading)
    except UserError:
        return None
    return None if other is form else f"--format {other.name}: {row.place} has {known_by}"


def _refusal(
    bad: Dropped, good: list[Cases], source: Path, other: str | None, *, suspicious: bool
) -> UserError:
    lines = [f"{len(bad)} of {len(bad) + len(good)} rows cannot be used; nothing was written"]
    for row, problem in bad[:DESCRIBED]:
        place = f"{problem.where.lstrip(', ')}: " if problem.where else ""
        lines.append(f"  {row.place}: {place}{problem.what}")
    if len(bad) > DESCRIBED:
        lines.append(f"  and {len(bad) - DESCRIBED} more")
    if suspicious:
        lines.append(f"  so many bad boxes (over {SINGLE_FAULTS:.0%} of the rows) are no accident")
    first = bad[0][1]
    remedy = first.remedy
    if other is not None:
        remedy = f"give {other}"
    elif any(good) and not suspicious:
        remedy += "; --unusable drop leaves such rows out, and lists them"
    return UserError("\n".join(lines), where=str(source), expected=first.expected, remedy=remedy)


def _with_own_ids(rows: list[Cases]) -> list[Cases]:
    """The rows' cases, those whose id is not theirs alone with their number added to it."""
    uses = Counter(case.id for cases in rows for case in cases)
    numbers = itertools.count(1)
    return [
        [
            case if uses[case.id] == 1 else case.renamed(f"{case.id}-row{number}")
            for case, number in zip(cases, numbers, strict=False)
        ]
        for cases in rows
    ]


def _parts(rows: list[Cases], request: Request) -> list[_Part]:
    """The files to write. Nothing held out: one; everything held out: eval.jsonl alone."""
    if request.eval_last is None and request.split is None:
        return [_Part("data.jsonl", rows)]
    per_row = [_pictures(cases) for cases in rows]
    keys = same_pictures(path for paths in per_row for path in paths)
    shown = [frozenset(keys[path] for path in paths) for paths in per_row]
    if request.split is not None:
        train, held_out = split_by_picture(shown, request.split, request.seed)
    else:
        assert request.eval_last is not None, "neither split nor eval_last"
        train, held_out = hold_out_last(shown, request.eval_last)
    parts = [
        _Part("train.jsonl", [rows[place] for place in train]),
        _Part("eval.jsonl", [rows[place] for place in held_out], measured=True),
    ]
    return parts if train else parts[1:]


def _pictures(cases: Iterable[Case]) -> list[Path]:
    """Every picture and frame once, in order."""
    parts = (piece for case in cases for piece in case.for_evaluation().parts())
    return [Path(file) for file in dict.fromkeys(file for part in parts for file in files_of(part))]


def _write(part: _Part, names: Mapping[Path, str], staging: Path, out: Path) -> Written:
    # Not a list: samples of all rows at once would double the memory that an import takes.
    samples = (sample.with_files(lambda file: names[Path(file)]) for sample in part.samples())
    write_samples(staging / part.name, samples)
    return Written(out / part.name, sum(map(bool, part.rows)), len(part))


def _write_left_out(dropped: Dropped, staging: Path) -> None:
    if dropped:
        lines = [
            {"place": row.place, "reason": reason_of(problem), "problem": str(problem)}
            for row, problem in dropped
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_file(staging / LEFT_OUT, text.encode())


def _remove_unused(staging: Path, names: Mapping[Path, str]) -> None:
    """Take away pictures out of a table whose rows were left out."""
    for saved in (staging / FOLDER).glob("*"):
        if saved not in names and saved.relative_to(staging).as_posix() not in names.values():
            saved.unlink()


def _unused(opened: Source, request: Request) -> tuple[str, ...]:
    """Columns of a table that no role was given to."""
    if opened.form is not table_format.FORMAT:
        return ()
    head, mapped = opened.head[0], request.columns.values()
    used = {name for column in mapped for name in (column, *table_format.several(column, head))}
    return tuple(name for name in head if name not in used and name != "id")
