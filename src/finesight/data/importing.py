"""Rows of a foreign file become samples in a new folder, whole or not at all."""

from __future__ import annotations

import gc
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from finesight.data.boxes import BadBox
from finesight.data.case import Case, answer_id
from finesight.data.formats import recognised
from finesight.data.formats import table as table_format
from finesight.data.formats.format import BadOption, Format, Reading, StrayMark, UnreadKey
from finesight.data.formats.inventory import inventory
from finesight.data.headers import DamagedPicture
from finesight.data.jsonl import as_line, sample_fields
from finesight.data.limits import TooMany, check_count
from finesight.data.lines import LARGEST_LINE
from finesight.data.opening import Request, Source, open_source
from finesight.data.pictures import FOLDER, ImageNames, same_pictures
from finesight.data.rows import Row
from finesight.data.rules import BadTurns, check_messages
from finesight.data.sample import Message
from finesight.data.split import hold_out_last, split_by_picture
from finesight.data.spool import Piece, Spool
from finesight.errors import UserError, escaped_json
from finesight.storage import write_folder, write_pieces

DESCRIBED = 5
"""Bad rows that are described; the others are counted."""

SINGLE_FAULTS = 0.1
"""The share of the rows with bad boxes up to which these are faults of single rows. Above, boxes
were probably read in another form than they are in, and those that pass are wrong as well."""

LARGEST_ROW = 2**28
"""Bytes of all samples out of one row."""

SPARE, MOST_ESCAPED = 100, 6
"""Bytes of a line beside id and content, and bytes that a character of an id may take: a sample
must be short enough to be read again."""

LEFT_OUT = "left_out.jsonl"
"""Where rows that cannot be used are listed, with --unusable drop."""

UNSELECTED = "not selected by --rows and --limit"
SHOWN_IN_EVAL = "shows a picture of the evaluation rows"
REASONS: dict[type[UserError], str] = {
    DamagedPicture: "a picture is missing or damaged",
    BadBox: "a box is none, or lies outside of its picture",
    TooMany: "more boxes, messages or answers than a sample may have",
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


class _Encoded(NamedTuple):
    """A case as the JSON of its samples, but for their ids; see `_Imported`."""

    id: str
    training: tuple[bytes, ...]
    evaluation: bytes
    images: tuple[str, ...]


class _Imported(NamedTuple):
    """A case whose samples are written already, but for their ids: where in the `Spool`.

    There is one piece for each training sample, and one for the evaluation sample.
    """

    id: str
    training: tuple[Piece, ...]
    evaluation: Piece
    images: tuple[str, ...]

    def lines(self, spool: Spool, *, measured: bool) -> Iterator[bytes]:
        """Yield the lines of its samples."""
        if measured or len(self.training) == 1:
            yield _line(self.id, spool.read(self.evaluation))
            return
        for number, piece in enumerate(self.training, start=1):
            yield _line(answer_id(self.id, number), spool.read(piece))


Cases = list[_Imported]
"""What one row says."""


@dataclass(slots=True)
class _Refused:
    """The rows that cannot be used: the first of them, and of all how many and why.

    `lines` are those of left_out.jsonl, in the spool.
    """

    first: Row | None = None
    described: list[tuple[str, UserError]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    boxes: int = 0
    lines: list[Piece] = field(default_factory=list)

    def __len__(self) -> int:
        return self.reasons.total()

    def add(self, row: Row, problem: UserError) -> None:
        """Take note of a row. The problem loses its traceback, which holds all of the row."""
        problem.__traceback__ = problem.__cause__ = problem.__context__ = None
        self.first = self.first or row
        if len(self.described) < DESCRIBED:
            self.described.append((row.place, problem))
        self.reasons[reason_of(problem)] += 1
        self.boxes += isinstance(problem, BadBox)


@dataclass(frozen=True, slots=True)
class _Part:
    """One file to write: rows to train on (a sample an answer) or to measure on."""

    name: str
    rows: list[Cases]
    measured: bool = False

    def __len__(self) -> int:
        """How many samples the rows make."""
        cases = (case for cases in self.rows for case in cases)
        return sum(1 if self.measured else len(case.training) for case in cases)

    def images(self) -> dict[str, None]:
        """Every image and frame once, in order."""
        return dict.fromkeys(image for cases in self.rows for image in _images(cases))


def import_file(source: Path, out: Path, request: Request) -> Summary:
    """Read `source`, write `out`/data.jsonl, or train.jsonl and eval.jsonl when rows are held out.

    Paths in these files are relative to `out`. Pictures stay where they are, unless they are to be
    copied or come out of a table: then they lie in `out`/pictures. Raises UserError, and leaves no
    `out`, when it exists already, an option does not fit, or any row cannot be used; rows to be
    dropped are listed in `out`/left_out.jsonl instead.
    """
    opened = open_source(source, request)
    with write_folder(out) as staging, Spool(staging, _size(opened, request)) as spool:
        reading = opened.reading(request, staging)
        names = ImageNames(staging, out, reading.pictures.saved_names, copy=request.copy_pictures)
        with _gc_paused():
            rows, refused = _read(opened, reading, request, spool, names)
        parts = _parts(_with_own_ids(rows), request)
        used = dict.fromkeys(image for part in parts for image in part.images())
        names.copy(used)
        written = [_write(part, spool, staging, out) for part in parts]
        if refused.lines:
            write_pieces(staging / LEFT_OUT, map(spool.read, refused.lines))
        _remove_unused(staging, {names.name(image) for image in used})
    in_files = sum(part.rows for part in written)
    unselected = opened.rows.total - len(rows) - len(refused)
    left_out = Counter({UNSELECTED: unselected, SHOWN_IN_EVAL: sum(map(bool, rows)) - in_files})
    left_out.update(reading.left_out)
    left_out.update(refused.reasons)
    return Summary(
        format=opened.form.name,
        known_by=opened.known_by,
        rows=opened.rows.total,
        written=tuple(written),
        left_out={reason: count for reason, count in left_out.items() if count},
        pictures=len(used),
        clipped_boxes=reading.clipped,
        noted=dict(+reading.noted),
        unused_columns=_unused(opened, request),
        listed=out / LEFT_OUT if refused else None,
    )


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector.

    Rows hold no reference cycles, but their number makes each collection slow: 10 % of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _size(opened: Source, request: Request) -> int:
    """Return the bytes of the source's own files."""
    files = request.files
    if not files:
        files = inventory(opened.path).files if opened.path.is_dir() else (opened.path,)
    return sum(os.path.getsize(file) for file in files if os.path.exists(file))


def reason_of(problem: UserError) -> str:
    """The kind of fault that a row was refused for, in a few words."""
    fits = (reason for kind, reason in REASONS.items() if isinstance(problem, kind))
    return next(fits, OTHER_REASON)


def _read(
    opened: Source, reading: Reading, request: Request, spool: Spool, names: ImageNames
) -> tuple[list[Cases], _Refused]:
    """All rows that can be used, written into the spool, and the others with what is wrong.

    Raises one UserError for all of the others where they are not to be dropped, none is left, or
    so many boxes are bad that the others are likely to be wrong as well.
    """
    rows: list[Cases] = []
    bad = _Refused()
    for row in opened.selected():
        clipped = reading.clipped
        reading.raw.clear()
        try:
            encoded = _encoded_cases(opened.form.cases(row, reading), names)
        except BadOption:
            raise
        except UserError as problem:
            reading.clipped = clipped
            bad.add(row, problem)
            if request.unusable == "drop":
                bad.lines.append(spool.add(_left_out(row, problem)))
        else:
            rows.append([_spooled(case, spool) for case in encoded])
    suspicious = bad.boxes > max(1, SINGLE_FAULTS * (len(rows) + len(bad)))
    if bad.first and (request.unusable == "refuse" or suspicious or not any(rows)):
        other = _other_format(bad.first, reading, opened.form)
        raise _refusal(bad, rows, opened.path, other, suspicious=suspicious)
    if not any(rows):
        reasons = [f"{count} {reason}" for reason, count in reading.left_out.items()]
        raise UserError(
            f"none of {len(rows)} rows says anything to learn: {'; '.join(reasons)}",
            where=str(opened.path),
            expected=opened.form.looks,
            remedy="check the source, or choose another --format",
        )
    return rows, bad


def _encoded_cases(cases: list[Case], names: ImageNames) -> list[_Encoded]:
    """Check the samples of a row and make JSON of them. Raises UserError."""
    encoded = []
    size = 0
    for case in cases:
        images: dict[str, None] = {}

        def name(image: str, images: dict[str, None] = images) -> str:
            images[image] = None
            return names.name(image)

        training = []
        for answer in case.answers:
            messages = (*case.turns, Message(role="assistant", content=answer))
            check_messages(messages, case.references, "")
            training.append(_encoded(case.id, messages, case.references, case.meta, name))
            size += len(training[-1])
            if size > LARGEST_ROW:
                raise TooMany(
                    f"over {LARGEST_ROW:,} bytes of samples: {len(cases):,} questions, and"
                    f" {len(case.answers):,} answers to a question of {len(training[0]):,} bytes",
                    expected=f"at most {LARGEST_ROW:,} bytes out of one row",
                    remedy="split the row, or leave it out",
                )
        evaluation = training[0]
        if len(case.answers) > 1:
            one = case.for_evaluation()
            evaluation = _encoded(one.id, one.messages, one.references, one.meta, name)
        encoded.append(_Encoded(case.id, tuple(training), evaluation, tuple(images)))
    return encoded


def _spooled(case: _Encoded, spool: Spool) -> _Imported:
    training = tuple(map(spool.add, case.training))
    evaluation = training[0] if len(training) == 1 else spool.add(case.evaluation)
    return _Imported(case.id, training, evaluation, case.images)


def _encoded(
    id_: str,
    messages: Sequence[Message],
    references: Sequence[str],
    meta: dict[str, Any],
    name: Callable[[str], str],
) -> bytes:
    """The JSON of a sample from the key after the id on. Raises UserError for text that no file
    can hold, and for a sample of more bytes than a line may have."""
    try:
        encoded = as_line(sample_fields(messages, references, meta, name))[1:].encode()
        id_.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text with half of a character, {error.object[error.start]!r}",
            expected="text that UTF-8 can hold",
            remedy="correct the row: it was probably cut in the middle of a character",
        ) from error
    check_count(len(encoded) + MOST_ESCAPED * len(id_), LARGEST_LINE - SPARE, "bytes")
    return encoded


def _line(name: str, encoded: bytes) -> bytes:
    return b'{"id": %s, %s\n' % (as_line(name).encode(), encoded)


def _other_format(row: Row, reading: Reading, form: Format) -> str | None:
    """The option for a format that a row can be read in which `form` refuses; None without one."""
    try:
        other, known_by = recognised([row.record], "")
        other.cases(row, reading)
    except UserError:
        return None
    return None if other is form else f"--format {other.name}: {row.place} has {known_by}"


def _left_out(row: Row, problem: UserError) -> bytes:
    """The line of left_out.jsonl for a row."""
    line = {"place": row.place, "reason": reason_of(problem), "problem": str(problem)}
    return f"{escaped_json(as_line(line))}\n".encode()


def _refusal(
    bad: _Refused, good: list[Cases], source: Path, other: str | None, *, suspicious: bool
) -> UserError:
    lines = [f"{len(bad)} of {len(bad) + len(good)} rows cannot be used; nothing was written"]
    for place, problem in bad.described:
        where = problem.where.lstrip(", ")
        lines.append(f"  {place}: {where}{': ' if where else ''}{problem.what}")
    if len(bad) > DESCRIBED:
        lines.append(f"  and {len(bad) - DESCRIBED} more")
    if suspicious:
        lines.append(f"  so many bad boxes (over {SINGLE_FAULTS:.0%} of the rows) are no accident")
    first = bad.described[0][1]
    remedy = first.remedy
    if other is not None:
        remedy = f"give {other}"
    elif any(good) and not suspicious:
        remedy += "; --unusable drop leaves such rows out, and lists them"
    return UserError("\n".join(lines), where=str(source), expected=first.expected, remedy=remedy)


def _with_own_ids(rows: list[Cases]) -> list[Cases]:
    """The rows' cases, those whose id is not theirs alone with their number added to it."""
    uses = Counter(case.id for cases in rows for case in cases)
    if len(uses) == sum(map(len, rows)):
        return rows
    numbers = itertools.count(1)
    return [
        [
            case if uses[case.id] == 1 else case._replace(id=f"{case.id}-row{number}")
            for case, number in zip(cases, numbers, strict=False)
        ]
        for cases in rows
    ]


def _parts(rows: list[Cases], request: Request) -> list[_Part]:
    """The files to write. Nothing held out: one; everything held out: eval.jsonl alone."""
    if request.eval_last is None and request.split is None:
        return [_Part("data.jsonl", rows)]
    per_row = [[Path(i) for i in dict.fromkeys(_images(cases))] for cases in rows]
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
    parts = parts if train else parts[1:]
    for part in parts:
        if not len(part):
            raise UserError(
                f"{part.name} would hold no samples: its {len(part.rows)} rows say nothing",
                where="the rows held out",
                expected="rows with answers on both sides",
                remedy="hold out other rows, or another share of them",
            )
    return parts


def _images(cases: Cases) -> Iterator[str]:
    return (image for case in cases for image in case.images)


def _write(part: _Part, spool: Spool, staging: Path, out: Path) -> Written:
    cases = (case for cases in part.rows for case in cases)
    lines = (line for case in cases for line in case.lines(spool, measured=part.measured))
    write_pieces(staging / part.name, lines)
    return Written(out / part.name, sum(map(bool, part.rows)), len(part))


def _remove_unused(staging: Path, used: set[str]) -> None:
    """Take away pictures out of a table whose rows were left out."""
    for saved in (staging / FOLDER).glob("*"):
        if saved.relative_to(staging).as_posix() not in used:
            saved.unlink()


def _unused(opened: Source, request: Request) -> tuple[str, ...]:
    """Columns of a table that no role was given to."""
    if opened.form is not table_format.FORMAT:
        return ()
    known, mapped = opened.columns, request.columns.values()
    used = {name for column in mapped for name in (column, *table_format.several(column, known))}
    return tuple(name for name in known if name not in used and name != "id")
