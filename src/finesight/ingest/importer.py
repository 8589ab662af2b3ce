"""Import dataset rows as training and evaluation samples into a new folder.

The folder is created only if the import succeeds. Samples are assigned to output files only after
all rows are parsed; until then, a temporary file contains them.
"""

from __future__ import annotations

import itertools
import operator
import os
import shlex
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

from finesight.errors import UserError, escape_surrogates, format_count
from finesight.files.storage import translate_os_errors, write_chunks, write_folder
from finesight.host_memory import available_memory, num_allowed_cpus
from finesight.ingest.folder_listing import list_folder
from finesight.ingest.formats import detect_format
from finesight.ingest.formats.dataset_format import (
    ImportContext,
    ImportExample,
    InvalidOptionError,
    UnexpectedPlaceholderError,
    decode_base64_text,
)
from finesight.ingest.formats.row_keys import UnfoundMediaError, UnsupportedKeyError
from finesight.ingest.image_resolver import IMAGES_FOLDER, ImageNames
from finesight.ingest.import_source import ImportOptions, ImportSource, open_source
from finesight.ingest.row_reader import SourceRow
from finesight.samples.boxes import COORDINATE_REMEDIES, InvalidBoxError, TextCoordinates
from finesight.samples.image_file import (
    CorruptImageError,
    PixelKey,
    decode_image,
    is_image_value,
    sha256_content,
    split_page,
)
from finesight.samples.image_split import split_by_image, split_last_rows
from finesight.samples.line_index import MAX_LINE_BYTES
from finesight.samples.sample import (
    ContentPart,
    ImagePart,
    InvalidRowError,
    InvalidTurnsError,
    LimitExceededError,
    Sample,
    check_limit,
    encode_json_line,
    is_video_path,
    join_text,
    sample_fields,
    validate_sample,
)

FREE_BYTES = 2**30
MAX_EXPANSION_RATIO = 1000
"""Maximum ratio of spooled bytes to source bytes, applied beyond `FREE_BYTES`.

Valid datasets, such as boxes with a thousand classes, reach a ratio of 100.
"""


SpoolSpan = tuple[int, int]
"""Start and size in bytes of one encoded sample in the spool."""


class Spool:
    """Temporary file of encoded samples. Callers keep only their byte ranges in memory."""

    def __init__(self, folder: Path, source_bytes: int) -> None:
        self._folder = folder
        self._source_bytes = source_bytes
        self.end = 0

    def __enter__(self) -> Self:
        with translate_os_errors(self._folder):
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=2**20)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, content: bytes) -> SpoolSpan:
        """Append an encoded sample and return its byte range."""
        span = self.end, len(content)
        self.end += len(content)
        if self.end > max(FREE_BYTES, MAX_EXPANSION_RATIO * self._source_bytes):
            raise UserError(
                f"over {self.end - 1:,} bytes of samples out of {self._source_bytes:,} bytes",
                where="the source",
                expected=f"no more than {MAX_EXPANSION_RATIO} times its size",
                remedy="check the source; shorten what repeats in each row,"
                " or import parts of it with --rows",
            )
        with translate_os_errors(self._folder):
            self._file.write(content)
        return span

    def read(self, span: SpoolSpan) -> bytes:
        """Return the bytes of a span. After the first read, `add` must not be called."""
        start, size = span
        self._file.seek(start)
        content: bytes = self._file.read(size)
        assert len(content) == size, f"{len(content)} bytes of {span}"
        return content


MAX_DESCRIBED_ROWS = 5
"""Maximum number of invalid rows that an error message describes; further rows are only counted."""

MAX_INVALID_BOX_FRACTION = 0.1
"""Maximum fraction of rows with invalid boxes that is attributed to individual annotation errors.

Above it, the box convention is probably wrong, and boxes that pass validation are wrong as well.
"""

MAX_LISTED_KEYS = 100
"""Maximum number of unused keys that the summary lists; further keys are only counted."""

MAX_ROW_BYTES = 2**28

LINE_OVERHEAD_BYTES, MAX_ESCAPED_BYTES = 100, 6
"""Bytes of a JSON line besides ID and content, and maximum bytes per ID character.

They ensure that each sample fits into a line of at most `MAX_LINE_BYTES`.
"""

SKIPPED_ROWS_FILE = "skipped_rows.jsonl"
"""Name of the output file that lists the rows skipped by `--on-invalid-row skip`."""

NOTE_FIRST_FRAME = "images are animated; only the first frame is used"
NOTE_PREFERENCE_PAIRS = "preference pairs: an answer, and a rejected one"
NOTE_UNFINISHED_REASONING = "answers of a <think> without </think>: complete or remove them"
MAX_KEY_SIDE = 256
"""Maximum side of the grid of pixels by which images are compared before all their pixels are."""

DECODE_BATCH_SIZE = 1024
"""Number of images whose decoding is submitted at once."""

MAX_DECODE_THREADS, DECODE_BYTES = 16, 2**29
"""Maximum number of decoding threads, and the available memory in bytes that each requires.

A large image takes about 256 MB; half of the memory remains for other programs.
"""

ProgressStage = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Function that shows the progress of a stage, from its title and total; see `progress_stage`."""

REASON_NOT_SELECTED = "not selected by --rows and --limit"
REASON_IMAGE_IN_EVAL = "shares an image with the validation rows"
REASON_BY_ERROR: dict[type[UserError], str] = {
    CorruptImageError: "an image is missing or corrupt",
    InvalidBoxError: "a box is invalid or outside its image",
    LimitExceededError: "too many boxes, messages or answers",
    InvalidTurnsError: "turns have an invalid order or are empty",
    UnexpectedPlaceholderError: "unsupported placeholders in the text",
    UnsupportedKeyError: "a key with unsupported content",
}
REASON_OTHER = "does not match its format"


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A sample file written by an import, with its numbers of rows and samples."""

    file: Path
    num_rows: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class ImportSummary:
    """Result of an import. Each source row is counted in `output_files` or in `skipped_rows`.

    Attributes:
        num_images: Number of different images, including frames of videos.
        num_videos: Number of different video files.
        num_clipped_boxes: Number of boxes that exceeded their image by a rounding error.
        text_format: Delimiter and encoding of a table, its sheet, classes, or "".
        source_notes: Counts of source content that samples do not represent, by description.
        other_keys: Number of keys of the rows that the format does not use, by description.
        first_errors: Location and error of the first invalid row, by reason.
        skipped_rows_file: File that lists the invalid rows, None if there are none.
    """

    format: str
    detected_by: str
    num_rows: int
    output_files: tuple[OutputFile, ...]
    skipped_rows: dict[str, int]
    num_images: int
    num_clipped_boxes: int
    source_notes: dict[str, int]
    unused_columns: tuple[str, ...]
    skipped_rows_file: Path | None = None
    text_format: str = ""
    first_errors: dict[str, str] = field(default_factory=dict)
    other_keys: dict[str, int] = field(default_factory=dict)
    num_videos: int = 0

    @property
    def has_media(self) -> bool:
        """Whether some samples have an image or a video."""
        return bool(self.num_images or self.num_videos)

    def list_media(self) -> list[str]:
        """Return a line with the number of images, and one with that of videos."""
        lines: list[str] = []
        if self.num_images or not self.num_videos:
            lines.append(format_count(self.num_images, "image"))
        if self.num_videos:
            lines.append(format_count(self.num_videos, "video"))
        return lines

    def list_other_keys(self) -> list[str]:
        """Return a line with the keys that the format does not use, and their numbers."""
        if self.unused_columns or not self.other_keys:
            return []
        keys = [f"{key} ({count})" for key, count in self.other_keys.items()]
        line = f"other keys: {'; '.join(keys[:MAX_LISTED_KEYS])}"
        if len(keys) > MAX_LISTED_KEYS:
            line += f" and {len(keys) - MAX_LISTED_KEYS} more"
        return [line]

    def list_unused_columns(self) -> list[str]:
        """Return the unused columns of a table, with their numbers of rows if not all have it."""
        counts = {name: self.other_keys[name] for name in self.unused_columns}
        most = max(counts.values(), default=0)
        return [one if n == most else f"{one} ({n} of {most} rows)" for one, n in counts.items()]

    def list_skipped(self) -> list[str]:
        """Return a line per reason, with the number of skipped rows and the first error."""
        return [
            f"skipped: {format_count(count, 'row')}, {reason}"
            + (f"; first: {self.first_errors[reason]}" if reason in self.first_errors else "")
            for reason, count in self.skipped_rows.items()
        ]


class _SpooledExample(NamedTuple):
    """An imported example in the spool, as JSON without its ID, which may still change.

    Attributes:
        spans: A training sample per answer, and for several answers a sample for evaluation.
    """

    id: str
    spans: tuple[SpoolSpan, ...]
    images: tuple[str, ...]

    def lines(self, spool: Spool, *, is_eval: bool) -> Iterator[bytes]:
        """Yield one JSON line per sample of the example, with its final ID."""
        if is_eval or len(self.spans) == 1:
            yield _format_line(self.id, spool.read(self.spans[-1]))
            return
        for number, span in enumerate(self.spans[:-1], start=1):
            yield _format_line(f"{self.id}-{number}", spool.read(span))


RowExamples = list[_SpooledExample]
"""Examples of one dataset row; box datasets may yield several."""


@dataclass(slots=True)
class _InvalidRows:
    """Invalid rows of an import.

    Attributes:
        described: Locations and errors of the first rows with the same remedy, by remedy.
        remedies: Number of rows by remedy.
        lines: Lines of the file of skipped rows, in the spool.
    """

    first: SourceRow | None = None
    described: defaultdict[str, list[tuple[str, UserError]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    remedies: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    first_errors: dict[str, str] = field(default_factory=dict)
    lines: list[SpoolSpan] = field(default_factory=list)

    def __len__(self) -> int:
        return self.reasons.total()

    def add(self, location: str, error: UserError, spool: Spool | None) -> None:
        """Record an invalid row, with a line in the spool if it is skipped.

        The traceback of the error is removed, because it references the full row and its images.
        """
        error.__traceback__ = error.__cause__ = error.__context__ = None
        remedy = str(error.remedy)
        if len(self.described[remedy]) < MAX_DESCRIBED_ROWS:
            self.described[remedy].append((location, error))
        self.remedies[remedy] += 1
        reasons = (reason for kind, reason in REASON_BY_ERROR.items() if isinstance(error, kind))
        reason = next(reasons, REASON_OTHER)
        text = ": ".join(filter(None, (error.where, error.what)))
        self.reasons[reason] += 1
        self.first_errors.setdefault(reason, f"{location}, {text}")
        if spool is not None:
            line = {"location": location, "reason": reason, "error": str(error)}
            self.lines.append(spool.add(f"{escape_surrogates(encode_json_line(line))}\n".encode()))

    def describe(self) -> Iterator[str]:
        """Yield lines with the number and the first examples of each kind of error."""
        for remedy, num_rows in self.remedies.most_common(MAX_DESCRIBED_ROWS):
            texts: dict[str, str] = {}
            for location, error in self.described[remedy]:
                where = error.where.lstrip(", ")
                texts.setdefault(f"{where}{': ' if where else ''}{error.what}", location)
            yield from (f"  {location}: {text}" for text, location in texts.items())
            if num_rows > len(texts):
                yield f"  and {num_rows - len(texts)} more such rows"
            if len(self.remedies) > 1 and remedy:
                yield f"    remedy: {remedy}"
        if len(self.remedies) > MAX_DESCRIBED_ROWS:
            others = self.remedies.most_common()[MAX_DESCRIBED_ROWS:]
            yield f"  and {sum(count for _, count in others)} rows with other errors"

    def build_error(self, num_rows: int, path: Path, *, is_systematic: bool) -> UserError:
        """Return the error of an import, with the remedy of most rows."""
        lines = [f"{len(self)} of {num_rows} rows are invalid; no files were written"]
        lines += self.describe()
        if is_systematic:
            lines.append(
                f"  over {MAX_INVALID_BOX_FRACTION:.0%} of the rows have invalid boxes: the box"
                " convention is probably wrong"
            )
        remedy, _ = self.remedies.most_common(1)[0]
        _, first = self.described[remedy][0]
        what = "\n".join(lines)
        if isinstance(first, UnfoundMediaError):
            unfound = UnfoundMediaError(
                what, where=str(path), expected=first.expected, remedy=remedy
            )
            unfound.key = first.key
            return unfound
        return UserError(what, where=str(path), expected=first.expected, remedy=remedy)


@dataclass(frozen=True, slots=True)
class _OutputSplit:
    """Rows of one output file: training rows (one sample per answer) or validation rows."""

    name: str
    rows: list[RowExamples]
    is_eval: bool = False

    def __len__(self) -> int:
        """Return the number of samples in the output file."""
        examples = (example for examples in self.rows for example in examples)
        return sum(1 if self.is_eval else len(one.spans[:-1]) or 1 for one in examples)

    def write(self, spool: Spool, staging: Path, out: Path) -> OutputFile:
        """Write the samples, and return the later file with its numbers of rows and samples."""
        examples = (example for examples in self.rows for example in examples)
        lines = (line for one in examples for line in one.lines(spool, is_eval=self.is_eval))
        write_chunks(staging / self.name, lines)
        return OutputFile(out / self.name, sum(map(bool, self.rows)), len(self))

    def images(self) -> dict[str, None]:
        """Return the path of each image and video frame of the split once, in order."""
        return dict.fromkeys(image for examples in self.rows for image in _images(examples))


def import_dataset(
    path: Path,
    out: Path,
    options: ImportOptions,
    progress_stage: ProgressStage = lambda title, total: nullcontext(lambda count: None),
) -> ImportSummary:
    """Import a dataset to `out`/data.jsonl, or to train.jsonl and eval.jsonl with a split.

    Image paths in these files are relative to `out`. Images stay where they are, except that copied
    images and images embedded in a table are saved in `out`/images.

    Args:
        options: How to parse, select and split the rows.
        progress_stage: Function that shows the progress of decoding the images.
    """
    source = open_source(path, options)
    if source.data_format.states_split and options.has_split:
        raise UserError(
            "the mapping states the split of each row",
            where="eval_last" if options.train_fraction is None else "train_fraction",
            expected="one split",
            remedy="remove this option, or remove split from the mapping",
        )
    with write_folder(out) as staging, Spool(staging, _source_bytes(source, options)) as spool:
        context = source.create_context(options, staging)
        image_names = ImageNames(staging, out, context.images.saved_names, copy=options.copy_images)
        parsed = _parse_rows(source, context, options, spool, image_names, progress_stage)
        rows, invalid = parsed.rows, parsed.invalid
        if source.data_format.states_split and parsed.num_eval == sum(map(bool, rows)):
            raise UserError(
                f"no row is for training, {format_count(parsed.num_eval, 'row')} for validation",
                where=str(path),
                expected="rows for training",
                remedy="import them together with those for training; or correct split in the"
                " mapping, or remove it",
            )
        if not options.has_split and 0 < parsed.num_eval < len(rows):
            options = replace(options, eval_last=parsed.num_eval)
        try:
            splits = _split_rows(_make_ids_unique(rows), options, parsed.pixel_keys)
        except UserError as error:
            if source.data_format.states_split:
                error.where = str(path)
                error.remedy = "remove split from the mapping, and give train_fraction"
            raise
        num_used = dict.fromkeys(image for part in splits for image in part.images())
        image_names.copy(num_used)
        output_files = [split.write(spool, staging, out) for split in splits]
        if invalid.lines:
            write_chunks(staging / SKIPPED_ROWS_FILE, map(spool.read, invalid.lines))
        used_names = {split_page(image_names.name(image))[0] for image in num_used}
        for saved in (staging / IMAGES_FOLDER).glob("*"):  # such as those of skipped rows
            if saved.relative_to(staging).as_posix() not in used_names:
                saved.unlink()
    in_files = sum(part.num_rows for part in output_files)
    num_not_selected = source.rows.num_rows - len(rows) - len(invalid)
    reason_counts = Counter({REASON_NOT_SELECTED: num_not_selected})
    reason_counts[REASON_IMAGE_IN_EVAL] = sum(map(bool, rows)) - in_files
    reason_counts.update(context.skipped_rows + invalid.reasons)
    is_table = "map" in source.data_format.supported_options
    num_videos = sum(map(is_video_path, num_used))
    return ImportSummary(
        format=source.data_format.name,
        detected_by=source.detected_by,
        num_rows=source.rows.num_rows,
        output_files=tuple(output_files),
        skipped_rows={reason: count for reason, count in reason_counts.items() if count},
        num_images=len(num_used) - num_videos,
        num_videos=num_videos,
        num_clipped_boxes=context.num_clipped,
        source_notes=dict(+context.source_notes),
        unused_columns=tuple(parsed.other_keys) if is_table else (),
        other_keys=dict(parsed.other_keys),
        skipped_rows_file=out / SKIPPED_ROWS_FILE if invalid else None,
        text_format=source.rows.text_format,
        first_errors=invalid.first_errors,
    )


def _source_bytes(opened: ImportSource, request: ImportOptions) -> int:
    files = request.row_files
    if not files:
        files = list_folder(opened.path).files if opened.path.is_dir() else (opened.path,)
    return sum(os.path.getsize(file) for file in files if os.path.exists(file))


class _ParsedRows(NamedTuple):
    """Result of reading a source.

    Attributes:
        rows: Valid rows; those of the validation split of the source are the last.
        num_eval: Number of rows of the validation split of the source.
        invalid: Invalid rows.
        other_keys: Number of unused keys of the valid rows by description.
        pixel_keys: Keys of the images by path, which are empty without a split.
    """

    rows: list[RowExamples]
    num_eval: int
    invalid: _InvalidRows
    other_keys: Counter[str]
    pixel_keys: dict[str, PixelKey]


def _parse_rows(
    source: ImportSource,
    context: ImportContext,
    options: ImportOptions,
    spool: Spool,
    names: ImageNames,
    progress_stage: ProgressStage,
) -> _ParsedRows:
    """Parse the selected rows, write the encoded samples to the spool, and collect invalid rows."""

    rows: list[RowExamples] = []
    locations: list[str] = []
    skipped = _InvalidRows()
    other_keys = Counter(source.rows.other_keys)
    repaired: list[tuple[str, UserError]] = []
    coordinates = TextCoordinates()
    skipped_spool = spool if options.on_invalid_row == "skip" else None
    eval_start = source.rows.num_rows if source.rows.eval_start is None else source.rows.eval_start
    is_eval: list[bool] = []
    for row_index, row in enumerate(source.iter_rows(), start=source.row_bounds[0]):
        num_clipped = context.num_clipped
        context.raw_boxes.clear()
        try:
            examples = source.data_format.parse_examples(row, context)
            encoded = _encode_examples(examples, names)
            for example in examples:
                _note_texts(example, context, coordinates, checks_base64=options.mapping is None)
        except InvalidOptionError:
            raise
        except UserError as error:
            context.num_clipped = num_clipped
            skipped.first = skipped.first or row
            skipped.add(row.location, error, skipped_spool)
        else:
            other_keys.update(context.other_keys)
            ids = [example.id for example in examples]
            spans = [tuple(map(spool.add, lines)) for lines, _ in encoded]
            images = [paths for _, paths in encoded]
            rows.append(list(map(_SpooledExample, ids, spans, images)))
            locations.append(row.location)
            if source.data_format.states_split:
                is_eval.append(any(example.is_eval for example in examples))
            else:
                is_eval.append(row_index >= eval_start)
            context.source_notes.update(context.row_notes)
            context.source_notes.update(note for note, _ in context.invalid_boxes)
            if context.invalid_boxes and options.on_invalid_box is None:
                repaired.append((row.location, context.invalid_boxes[0][1].with_traceback(None)))
    if len(context.num_json) > 1 and not context.keeps_json:
        context.restart_with_json()
        return _parse_rows(source, context, options, spool, names, progress_stage)
    for kind, count, _, text in coordinates.describe():
        note = f"samples with {kind} in their text, such as {text!r}: they stay as they are for"
        context.source_notes[f"{note} every model; {COORDINATE_REMEDIES[kind]}"] += count
    with_keys = any(is_eval) or options.has_split
    corrupt, pixel_keys = _decode_images(rows, context, progress_stage, with_keys=with_keys)
    if corrupt:
        row_errors = [next((corrupt[i] for i in _images(r) if i in corrupt), None) for r in rows]
        for location, image_error in zip(locations, row_errors, strict=True):
            if image_error is not None:
                skipped.add(location, image_error, skipped_spool)
        is_valid = [error is None for error in row_errors]
        rows = list(itertools.compress(rows, is_valid))
        is_eval = list(itertools.compress(is_eval, is_valid))
    is_train = map(operator.not_, is_eval)
    rows = [*itertools.compress(rows, is_train), *itertools.compress(rows, is_eval)]
    num_rows = len(rows) + len(skipped)
    num_invalid = skipped.reasons[REASON_BY_ERROR[InvalidBoxError]] + len(repaired)
    is_systematic = num_invalid > max(1, MAX_INVALID_BOX_FRACTION * num_rows)
    if is_systematic:
        for location, box_error in repaired:
            skipped.add(location, box_error, None)
    num_missing = skipped.reasons[REASON_BY_ERROR[CorruptImageError]]
    num_found = sum(any(_images(examples)) for examples in rows)
    is_minority = len(skipped) > sum(map(bool, rows)) or num_missing > num_found
    lacks_rows = options.requires_most_rows and is_minority
    must_fail = options.on_invalid_row == "fail" or is_systematic or lacks_rows
    if len(skipped) and (must_fail or not any(rows)):
        failure = skipped.build_error(num_rows, source.path, is_systematic=is_systematic)
        alternative = None
        if options.mapping is None and (first := skipped.first):
            alternative = None if any(rows) else _suggest_image_column(first, context)
            alternative = alternative or _suggest_format(first, context, source, options)
        if alternative is not None:
            failure.remedy = f"give {alternative}"
        elif any(rows) and options.on_invalid_row == "fail" and not is_systematic:
            failure.remedy = f"{failure.remedy}; --on-invalid-row skip skips and lists invalid rows"
        elif any(rows) and lacks_rows:
            failure.remedy = (
                f"{failure.remedy}; or import the source with --on-invalid-row skip, and"
            )
            failure.remedy += " give init the file that it writes"
        raise failure
    if not any(rows):
        reasons = [f"{count} {reason}" for reason, count in context.skipped_rows.items()]
        raise UserError(
            f"none of {len(rows)} rows has training content: {'; '.join(reasons)}",
            where=str(source.path),
            expected=source.data_format.description,
            remedy="check the source, or choose another --format",
        )
    return _ParsedRows(rows, sum(is_eval), skipped, other_keys, pixel_keys)


def _note_texts(
    example: ImportExample,
    context: ImportContext,
    coordinates: TextCoordinates,
    *,
    checks_base64: bool,
) -> None:
    """Note coordinates in the texts of an example, a rejected answer, and unfinished reasoning.

    Args:
        checks_base64: No mapping file states the answer, which may be encoded by mistake.

    Raises:
        InvalidRowError: An answer is a text in base64.
    """
    if example.rejected:
        context.row_notes[NOTE_PREFERENCE_PAIRS] += 1
    parts: list[ContentPart] = []
    answers = list(example.answers)
    for message in example.prompt_messages:
        parts += message.content
        if message.role == "assistant":
            answers.append(message.content)
    parts += itertools.chain(*example.answers)
    paths = [part.image for part in parts if isinstance(part, ImagePart)]
    text = join_text(parts, "\n")
    coordinates.add(text, paths, lambda path: context.images.image_size(Path(path)))
    for answer in answers:
        answer_text = join_text(answer).lstrip()
        decoded = decode_base64_text(answer_text)
        if checks_base64 and decoded is not None:
            raise InvalidRowError(
                f"the answer is in base64, the text {decoded[:60]!r}",
                "a text as a model shall write it",
                "give a mapping file (--mapping) with parse: {COLUMN: base64}, or with parse:"
                " {COLUMN: [base64, json]} for JSON, of which the answer is a key; a mapping"
                " without parse keeps the answer in base64",
            )
        if answer_text.startswith("<think>") and "</think>" not in answer_text:
            context.row_notes[NOTE_UNFINISHED_REASONING] += 1


def _decode_images(
    rows: Sequence[RowExamples],
    context: ImportContext,
    progress_stage: ProgressStage,
    *,
    with_keys: bool,
) -> tuple[dict[str, CorruptImageError], dict[str, PixelKey]]:
    """Decode all images in threads; return the errors of corrupt ones and the keys by path.

    Images with further frames are counted in the notes of the import.
    """
    errors: dict[str, CorruptImageError] = {}

    def decode(
        path: str, max_key_side: int | None = MAX_KEY_SIDE
    ) -> tuple[bool, PixelKey | None] | CorruptImageError:
        try:
            return decode_image(Path(path), with_key=with_keys, max_key_side=max_key_side)
        except CorruptImageError as error:
            if context.images.is_saved(Path(path)):  # this file is deleted after the error
                error.what, error.where = f"the embedded image: {error.what}", ""
            return error

    paths = dict.fromkeys(image for examples in rows for image in _images(examples))
    images = [path for path in paths if not is_video_path(path)]
    num_threads = min(num_allowed_cpus(), MAX_DECODE_THREADS, available_memory() // DECODE_BYTES)
    keys: dict[str, PixelKey] = {}
    with (
        progress_stage("images", len(images)) as on_progress,
        ThreadPoolExecutor(max(1, num_threads)) as pool,
    ):
        for start in range(0, len(images), DECODE_BATCH_SIZE):
            batch = images[start : start + DECODE_BATCH_SIZE]
            for path, result in zip(batch, pool.map(decode, batch), strict=True):
                if isinstance(result, CorruptImageError):
                    errors[path] = result
                else:
                    context.source_notes[NOTE_FIRST_FRAME] += result[0]
                    keys |= {path: result[1]} if result[1] else {}
                on_progress(1)
        # Only images that are equal in the grid of pixels may be equal.
        counts = Counter(keys.values())
        repeated = [path for path, key in keys.items() if counts[key] > 1]
        exact = pool.map(partial(decode, max_key_side=None), repeated)
        for path, result in zip(repeated, exact, strict=True):
            if isinstance(result, CorruptImageError):
                errors[path] = result
            elif result[1] is not None:
                keys[path] = result[1]
    return errors, keys


def _encode_examples(
    examples: list[ImportExample], names: ImageNames
) -> list[tuple[list[bytes], tuple[str, ...]]]:
    """Validate the samples of a row; return their JSON and the images of each example."""
    encoded = []
    size = 0
    for example in examples:
        images: dict[str, None] = {}

        def name(image: str, images: dict[str, None] = images) -> str:
            images[image] = None
            return names.name(image)

        lines: list[bytes] = []
        for sample in example.to_train_samples():
            validate_sample(sample, "")
            lines.append(_encode_sample(sample, name))
            size += len(lines[-1])
            if size > MAX_ROW_BYTES:
                raise LimitExceededError(
                    f"over {MAX_ROW_BYTES:,} bytes of samples: {len(examples):,} questions, and"
                    f" {len(example.answers):,} answers to a question of {len(lines[0]):,}"
                    " bytes",
                    expected=f"at most {MAX_ROW_BYTES:,} bytes out of one row",
                    remedy="split the row, or remove it",
                )
        if len(example.answers) > 1:
            lines.append(_encode_sample(example.to_eval_sample(), name))
        encoded.append((lines, tuple(images)))
    return encoded


def _encode_sample(sample: Sample, name: Callable[[str], str]) -> bytes:
    """Encode a sample as JSON without its opening brace and ID, which `_format_line` adds."""
    try:
        encoded = encode_json_line(sample_fields(sample, name))[1:].encode()
        sample.id.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text with a lone surrogate, {error.object[error.start]!r}",
            expected="text that can be encoded as UTF-8",
            remedy="correct the row: it was probably truncated within a character",
        ) from error
    size = len(encoded) + MAX_ESCAPED_BYTES * len(sample.id)
    check_limit(size, MAX_LINE_BYTES - LINE_OVERHEAD_BYTES, "bytes")
    return encoded


def _format_line(name: str, encoded: bytes) -> bytes:
    return b'{"id": %s, %s\n' % (encode_json_line(name).encode(), encoded)


def _suggest_image_column(row: SourceRow, context: ImportContext) -> str | None:
    """Return the option for a column with images, if the column of `--map` has none."""
    value = row.record.get(context.columns.get("image", ""))
    if value is None or isinstance(value, bytes | list) or is_image_value(value):
        return None
    column = next((name for name, value in row.record.items() if is_image_value(value)), None)
    return column and f"--map {shlex.quote(f'image={column}')}, the column with images"


def _suggest_format(
    row: SourceRow, context: ImportContext, source: ImportSource, options: ImportOptions
) -> str | None:
    try:
        candidate, detected_by = detect_format([row.record], "")
        candidate.parse_examples(row, context)
    except UserError:
        return None
    choice = f"--format {candidate.name}"
    if options.columns:
        choice += " without --map"
    hint = f"{choice}: {row.location} has {detected_by}"
    return None if candidate is source.data_format else hint


def _make_ids_unique(rows: list[RowExamples]) -> list[RowExamples]:
    """Append the number of the example to example IDs that occur more than once."""
    id_counts = Counter(example.id for examples in rows for example in examples)
    if len(id_counts) == sum(map(len, rows)):
        return rows
    used_ids, numbers = set(id_counts), itertools.count(1)

    def rename(example: _SpooledExample) -> _SpooledExample:
        number = next(numbers)
        if id_counts[example.id] == 1:
            return example
        name = f"{example.id}-row{number}"
        while name in used_ids:
            name += "-copy"
        used_ids.add(name)
        return example._replace(id=name)

    return [[rename(example) for example in examples] for examples in rows]


def _split_rows(
    rows: list[RowExamples], options: ImportOptions, pixel_keys: Mapping[str, PixelKey]
) -> list[_OutputSplit]:
    """Assign the rows to output files, so that no two files have images with equal pixels.

    Without a split there is one file, data.jsonl, otherwise train.jsonl and eval.jsonl.
    """
    if not options.has_split:
        return [_OutputSplit("data.jsonl", rows)]
    paths = dict.fromkeys(path for examples in rows for path in _images(examples))
    sizes = {path: os.path.getsize(path) for path in paths if path not in pixel_keys}
    counts = Counter(sizes.values())
    # Videos of different sizes differ, so that most of these large files need not be read.
    keys: dict[str, Hashable] = {
        path: sha256_content(Path(path)) if counts[size] > 1 else path
        for path, size in sizes.items()
    }
    keys.update(pixel_keys)
    image_keys = [frozenset(map(keys.__getitem__, _images(examples))) for examples in rows]
    if options.train_fraction is not None:
        train, validation = split_by_image(image_keys, options.train_fraction, options.seed)
    else:
        assert options.eval_last is not None, "neither train_fraction nor eval_last"
        train, validation = split_last_rows(image_keys, options.eval_last)
    splits = [
        _OutputSplit("train.jsonl", [rows[row_index] for row_index in train]),
        _OutputSplit("eval.jsonl", [rows[row_index] for row_index in validation], is_eval=True),
    ]
    splits = splits if train else splits[1:]
    for part in splits:
        if not len(part):
            raise UserError(
                f"{part.name} would contain no samples: its {len(part.rows)} rows have no"
                " training content",
                where="train_fraction" if options.eval_last is None else "eval_last",
                expected="rows with answers in both files",
                remedy="choose another fraction or number of rows",
            )
    return splits


def _images(examples: RowExamples) -> Iterator[str]:
    return (image for example in examples for image in example.images)
