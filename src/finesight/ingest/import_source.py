"""Open dataset sources: select their rows, detect their format, and parse rows for checks."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finesight.errors import UserError
from finesight.files.bounded_files import find_existing
from finesight.files.path_patterns import is_glob
from finesight.ingest.folder_listing import ROW_SUFFIXES, FolderListing, list_folder
from finesight.ingest.formats import (
    FORMATS,
    detect_format,
    get_format,
    get_native_format,
    iter_formats,
)
from finesight.ingest.formats import table as table_format
from finesight.ingest.formats.dataset_format import (
    CLASS_PLACEHOLDER,
    BoxTask,
    DatasetFormat,
    ImportContext,
    ImportExample,
    InvalidBoxPolicy,
    InvalidOptionError,
    RawBox,
    as_list,
    example_from_sample,
    make_text_part,
    read_prompt,
)
from finesight.ingest.formats.image_annotations import MAX_CLASSES
from finesight.ingest.image_resolver import ImageResolver
from finesight.ingest.record_files import open_record_files
from finesight.ingest.role_proposal import RoleProposal
from finesight.ingest.row_reader import (
    TEXT_TABLE_SUFFIXES,
    Record,
    RowReader,
    SourceRow,
    concat_rows,
    get_row_suffix,
    is_json_lines,
    open_row_file,
)
from finesight.samples.corpus import PACKED_SUFFIXES, open_sample_source, read_first_record
from finesight.samples.default_prompts import escape_placeholders
from finesight.samples.frames import Order, Unit
from finesight.samples.image_file import PageRanges, read_image_size
from finesight.samples.sample import Sample, validate_roles

if TYPE_CHECKING:
    from finesight.hub.url_files import RemoteImages


TABLE_SUFFIXES = (*TEXT_TABLE_SUFFIXES, ".xlsx")

NUM_DETECTION_ROWS = 100

MAX_PATH_CHARS = 4096
"""Maximum length of an image path; longer texts are embedded images."""

NUM_PREVIEW_ROWS = 300
"""Number of rows from which columns, image folder and task are detected."""


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """Options of an import: parsing of the source, selection of rows, and split.

    Attributes:
        format: Name of the dataset format, None to detect it.
        mapping: Format of a mapping file, which reads the records; None without one.
        replace_prompts: Text that replaces the question of each row; None keeps the questions.
        row_range: Slice bounds of the rows, 0-based. None means the first or last row.
        train_fraction: Fraction of the rows for training; the rest is for validation.
        box_task: Kind of the questions of box datasets.
        on_invalid_box: Treatment of invalid boxes. None fails, or clips with `on_invalid_row` skip.
        row_files: Files of a folder that contain its rows; empty to detect them.
        web_images: Downloader of image URLs, None to reject URLs.
        pages: Pages to use of documents (PDF, multi-page TIFF); empty for all of them.
        encoding: Encoding of .csv, .tsv and .txt files, None to detect it.
        no_header: The first row of a table contains values; its columns are 1, 2 and so on.
        ignorable_columns: Columns that guessed roles leave out; a value in another one is an error.
            None for roles of the user.
        allowed_root: Folder of an untrusted source: images outside of it are rejected.
        requires_most_rows: Fail if more rows are invalid than valid, or lack their image than have
            one, instead of skipping them.
    """

    format: str | None = None
    mapping: DatasetFormat | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    replace_prompts: str | None = None
    box_format: Order | None = None
    box_units: Unit | None = None
    row_range: tuple[int | None, int | None] = (None, None)
    limit: int | None = None
    eval_last: int | None = None
    train_fraction: float | None = None
    seed: int = 0
    copy_images: bool = False
    box_task: BoxTask = "detection"
    on_invalid_row: Literal["fail", "skip"] = "fail"
    on_invalid_box: InvalidBoxPolicy | None = None
    row_files: tuple[Path, ...] = ()
    web_images: RemoteImages | None = None
    allowed_root: Path | None = None
    pages: PageRanges = ()
    encoding: str | None = None
    no_header: bool = False
    ignorable_columns: frozenset[str] | None = None
    requires_most_rows: bool = False

    @property
    def is_detected(self) -> bool:
        """True if the import detects the format and the column roles."""
        return not (self.columns or self.format or self.mapping)

    def open_file(self, file: Path) -> RowReader:
        """Open a file of rows.

        The columns that the user names decide whether a table has a header.
        """
        named = set(self.mapping.named_keys if self.mapping else ())
        for column in self.columns.values():
            named.update([column, *map(str.strip, column.split(","))])
        return open_row_file(file, self.encoding, no_header=self.no_header, named=named)

    @property
    def has_split(self) -> bool:
        """True if the options split the rows into training and validation."""
        return self.eval_last is not None or self.train_fraction is not None


@dataclass(frozen=True, slots=True)
class ImportSource:
    """An opened dataset with its detected format and selected rows.

    Attributes:
        column_map: Column of each role, of `--map` or of the format.
        row_bounds: First and last (exclusive) selected row, 0-based.
        image_folder: Folder of the images that the rows name; None for that of the data file.
    """

    path: Path
    rows: RowReader
    data_format: DatasetFormat
    detected_by: str
    columns: tuple[str, ...]
    column_map: Mapping[str, str]
    row_bounds: tuple[int, int]
    image_folder: Path | None = None

    def iter_rows(self) -> Iterator[SourceRow]:
        """Yield the rows that `--rows` and `--limit` select."""
        return self.rows.iter_range(*self.row_bounds)

    def create_context(
        self, options: ImportOptions, output_folder: Path, *, lenient: bool = False
    ) -> ImportContext:
        """Create the import context that parses the rows of this source.

        Args:
            output_folder: Folder below which embedded images are saved.
            lenient: Accept invalid images and boxes unchanged, for data checks.
        """
        folder = self.path if self.path.is_dir() else self.image_folder or self.path.parent
        prompt = options.prompt
        replacement = options.replace_prompts
        if options.replace_prompts is not None:
            # The replacement needs a question, also in rows without one.
            prompt = ""
            replacement = read_prompt(options.replace_prompts)
        elif prompt is not None and {"box", "label"} <= self.column_map.keys():
            prompt = self._insert_labels(prompt)
        return ImportContext(
            ImageResolver(
                folder,
                output_folder,
                validate=not lenient,
                exact_paths=lenient and self.data_format is get_native_format(),
                web_images=options.web_images,
                allowed_root=options.allowed_root,
                pages=options.pages,
            ),
            columns=self.column_map,
            ignorable_columns=options.ignorable_columns,
            prompt=prompt,
            replacement=replacement,
            box_format=options.box_format,
            box_units=options.box_units,
            box_task=options.box_task,
            lenient=lenient,
            has_box_options="boxes" in self.data_format.supported_options,
            on_invalid_box=options.on_invalid_box
            or ("clip" if options.on_invalid_row == "skip" else "fail"),
        )

    def _insert_labels(self, prompt: str) -> str:
        """Return a prompt about the boxes of a table with the labels of all rows for `{labels}`."""
        if "{labels}" not in CLASS_PLACEHOLDER.findall(prompt):
            return prompt
        labels = table_format.list_labels(self.iter_rows(), self.column_map["label"])
        if not 0 < len(labels) <= MAX_CLASSES:
            raise UserError(
                f"{len(labels):,} labels in the column {self.column_map['label']}",
                where="--prompt",
                expected=f"1 to {MAX_CLASSES:,} labels for {{labels}}",
                remedy="write a question without {labels}",
            )
        values = {"{labels}": escape_placeholders(", ".join(labels))}
        return CLASS_PLACEHOLDER.sub(lambda match: values.get(match[0], match[0]), prompt)


@dataclass(frozen=True, slots=True)
class UnvalidatedRow:
    """A dataset row parsed without validation, for data checks.

    Attributes:
        samples: Samples of the row with absolute image paths. Their boxes are two corners in
            pixels, neither clipped nor rejected.
        boxes: Boxes of the row with their coordinates as stored in the source.
        error: Error of a row that cannot be parsed; it has no samples.
    """

    location: str
    samples: tuple[Sample, ...] = ()
    boxes: tuple[RawBox, ...] = ()
    error: UserError | None = None


@dataclass(frozen=True, slots=True)
class UnvalidatedSource:
    """An iterable over the rows of a source, parsed without validation.

    Rows are read one at a time, and again in each iteration. Embedded images are saved below
    `output_folder`, which must exist.
    """

    source: ImportSource
    options: ImportOptions
    output_folder: Path

    def __len__(self) -> int:
        start, stop = self.source.row_bounds
        return stop - start

    def __iter__(self) -> Iterator[UnvalidatedRow]:
        context = self.source.create_context(self.options, self.output_folder, lenient=True)
        for row in self.source.iter_rows():
            context.raw_boxes.clear()
            examples, error = list[ImportExample](), None
            try:
                examples = self.source.data_format.parse_examples(row, context)
            except InvalidOptionError:
                raise
            except UserError as found:
                error = found
            samples = tuple(sample for example in examples for sample in example.to_train_samples())
            boxes = tuple(context.raw_boxes)
            yield UnvalidatedRow(row.location, samples, boxes, error)


def open_unvalidated(
    source: Path, options: ImportOptions, output_folder: Path
) -> UnvalidatedSource:
    """Open a dataset for a data check, keeping invalid images and boxes."""
    return UnvalidatedSource(open_source(source, options), options, output_folder)


def open_source(source: Path, options: ImportOptions) -> ImportSource:
    """Open a dataset, detect its format, and select its rows."""
    _check_options(options)
    rows, data_format, detected_by = _open_rows(source, options)
    if options.mapping is not None and options.mapping.group_rows is not None:
        file = (*options.row_files, source)[0]
        rows = options.mapping.group_rows(rows, file)
    start, stop, _ = slice(*options.row_range).indices(rows.num_rows)
    stop = stop if options.limit is None else min(stop, start + options.limit)
    if start >= stop:
        expected = "a dataset with rows"
        remedy = "check the file"
        if rows.num_rows:
            expected = f"--rows A:B with A below B and below {rows.num_rows}"
            remedy = "select other rows"
        raise UserError(
            f"no rows are selected of {rows.num_rows}",
            where=str(source),
            expected=expected,
            remedy=remedy,
        )
    first_records = tuple(
        row.record for row in rows.iter_range(start, min(stop, start + NUM_DETECTION_ROWS))
    )
    if data_format is None:
        data_format, detected_by = _detect_format(first_records, source, rows, options)
        is_table = get_row_suffix((*options.row_files, source)[0]) in TABLE_SUFFIXES
        repeated = _find_repeated_name(first_records) if is_table else ""
        if repeated:
            note = f"{repeated!r} names a column and is one of its values: if the first row"
            note = f"{rows.text_format}; {note} contains values, give --no-header"
            rows = replace(rows, text_format=note)
    check_format_options(data_format, detected_by, options)
    column_map: Mapping[str, str] = options.columns
    if data_format.map_columns is not None:
        column_map = data_format.map_columns(first_records, column_map)
    known = dict.fromkeys(key for record in first_records for key in record)
    for role, column in column_map.items():
        table_format.find_columns(known, role, column, str(source))
    columns = tuple(table_format.list_columns(first_records[0], column_map))
    opened = ImportSource(
        source, rows, data_format, detected_by, columns, column_map, (start, stop)
    )
    if {"image", "box"} <= column_map.keys():
        opened = _merge_objects(opened)
    if data_format is table_format.COMPONENT and (folder := _find_image_folder(opened)) is not None:
        detected_by = f"{opened.detected_by}; images found in {folder.name}/"
        opened = replace(opened, image_folder=folder, detected_by=detected_by)
    return opened


def _merge_objects(source: ImportSource) -> ImportSource:
    """Merge rows with an object each to rows with all objects of an image.

    Rows are merged if their cells are equal in all roles except box and label. Rows with embedded
    images or with a list of boxes are unchanged.
    """
    start, stop = source.row_bounds
    rows, image = source.rows, source.column_map["image"]
    names = [
        name
        for role, column in source.column_map.items()
        if role not in ("box", "label")
        for name in table_format.find_some_columns(source.columns, role, column)
    ]
    groups: dict[tuple[bool, str], list[SourceRow]] = {}
    for index, row in enumerate(source.iter_rows(), start=start):
        if not isinstance(row.record.get(image), str) or len(row.record[image]) > MAX_PATH_CHARS:
            return source
        boxes = table_format.get_cell(row.record, source.column_map["box"])
        if isinstance(boxes, list) and boxes and isinstance(boxes[0], list):
            return source
        is_eval = rows.eval_start is not None and index >= rows.eval_start
        cells = repr([table_format.get_cell(row.record, name) for name in names])
        groups.setdefault((is_eval, cells), []).append(row)
    if len(groups) == stop - start:
        return source
    merged = []
    for first, *others in groups.values():
        location = f"{first.location} with {len(others)} more of its image"
        records = tuple(row.record for row in others)
        row = replace(first, location=location, more_records=records) if others else first
        merged.append(row)
    rows = RowReader(
        len(merged) + rows.num_rows - (stop - start),
        lambda start, stop: iter(merged[start:stop]),
        None if rows.eval_start is None else sum(not is_eval for is_eval, _ in groups),
        rows.text_format,
        rows.other_keys,
    )
    note = f"{source.detected_by}; {stop - start} rows with boxes of {len(merged)} images"
    return replace(source, rows=rows, row_bounds=(0, len(merged)), detected_by=note)


def _find_image_folder(source: ImportSource) -> Path | None:
    """Return the only subfolder next to a table with most images, given by bare names.

    The first `NUM_PREVIEW_ROWS` rows decide. Images that no subfolder contains are ignored.
    """
    records = [row.record for row in islice(source.iter_rows(), NUM_PREVIEW_ROWS)]
    return _find_folder_of_names(source.path.parent, records, source.column_map)


def _name_folder(path: Path, records: Sequence[Record], columns: Mapping[str, str]) -> str | None:
    """Return the name of the subfolder with the images of records; None without one."""
    folder = _find_folder_of_names(path.parent, records, columns)
    return None if folder is None else folder.name


def _find_folder_of_names(
    home: Path, records: Sequence[Record], columns: Mapping[str, str]
) -> Path | None:
    """Return the only subfolder that contains most images of the records."""
    column = columns.get("image") or columns.get("video", "")
    column = column if column in records[0] else column.partition(",")[0]
    values = [record.get(column) for record in records]
    names = [name for name in values if name is not None and name != ""]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        return None
    if not names or any(find_existing(home, name) or os.path.exists(name) for name in names):
        return None
    subfolders = [folder for folder in home.iterdir() if folder.is_dir()]
    found = ({one for one in subfolders if find_existing(one, name)} for name in names)
    matches = list(filter(None, found))
    folders = set.intersection(*matches) if 2 * len(matches) > len(values) else set()
    return folders.pop() if len(folders) == 1 else None


def _check_options(options: ImportOptions) -> None:
    """Reject import options that are invalid for every source."""
    unknown = sorted(options.columns.keys() - set(table_format.MAPPABLE_COLUMNS))
    if unknown:
        raise UserError(
            f"unknown role {unknown[0]!r}",
            where="--map",
            expected=f"one of {', '.join(table_format.MAPPABLE_COLUMNS)}",
            remedy=table_format.suggest_role(unknown[0], options.columns[unknown[0]]),
        )
    if options.mapping is not None and (options.columns or options.format):
        raise UserError(
            "--mapping is given, too",
            where="--map" if options.columns else "--format",
            expected="one description of the data",
            remedy="remove one of the two",
        )
    if options.replace_prompts is not None:
        _check_replacement(options.replace_prompts, options)
    if options.train_fraction is not None and options.eval_last is not None:
        raise UserError(
            f"both are set: {options.train_fraction:g} and {options.eval_last}",
            where="train_fraction, eval_last",
            expected="one of the two options",
            remedy="remove one of the two",
        )
    if options.train_fraction is not None and not 0 < options.train_fraction < 1:
        raise UserError(
            f"{options.train_fraction:g} is out of range",
            where="train_fraction",
            expected="the fraction of training rows, between 0 and 1 (exclusive)",
            remedy="for example 0.9",
        )
    try:
        bytes(4).decode(options.encoding or "utf-8")  # decode ignores the encoding of b""
    except (LookupError, ValueError) as error:
        raise UserError(
            f"unknown encoding {options.encoding!r}",
            where="--encoding",
            expected="the name of a text encoding in Python",
            remedy="for example cp1250, or remove --encoding to detect it",
        ) from error


def _check_replacement(text: str, options: ImportOptions) -> None:
    """Reject a text that cannot replace the question of every row."""
    what = ""
    if options.prompt is not None:
        what = "--prompt is given, too"
        remedy = "give one of the two options"
    elif options.box_task == "grounding":
        what = "the question of --box-task grounding names the object"
        remedy = 'give --prompt with {label}, such as --prompt "Find {label}."'
    elif placeholder := CLASS_PLACEHOLDER.search(text):
        what = f"{text!r} has a placeholder of class names"
        remedy = f"give it as --prompt, or write {{{placeholder[0]}}} for this word itself"
    if what:
        raise UserError(
            what,
            where="--replace-prompts",
            expected="one question for all rows",
            remedy=remedy,
        )
    # Rejects placeholders of images, which keep their place.
    make_text_part(text)


def _open_rows(source: Path, options: ImportOptions) -> tuple[RowReader, DatasetFormat | None, str]:
    """Open the rows of a source, and return them with format and reason.

    Formats with their own files (folders, COCO JSON) are tried first. For other row files, the
    format is None and is detected from the rows later.
    """
    requested = _find_requested(options)
    files = options.row_files or (source,)
    is_folder = os.path.isdir(source) and not options.row_files
    if options.encoding and is_folder:
        opened = _open_encoded(source, options.encoding, requested)
        if opened is not None:
            return opened
    _check_table_options(files, options)
    as_table = options.columns and (source.is_file() or options.row_files)
    # Plug-ins are not imported for row files, whose format is detected later.
    candidates: Iterable[DatasetFormat] = iter_formats(is_folder)
    if requested:
        candidates = [requested]
    elif as_table:
        candidates = []
    for data_format in candidates:
        opener = (data_format.open_requested if requested else None) or data_format.open_dataset
        result = None if opener is None else opener(source)
        if result is not None:
            rows, detected_by = result
            if requested is not None:
                detected_by = "mapping" if options.mapping else "--format"
            return rows, data_format, detected_by
    if requested is not None and requested.open_dataset is not None:
        raise UserError(
            f"no {requested.name} dataset is found there",
            where=str(source),
            expected=requested.description,
            remedy="check the path, or remove --format to detect the format",
        )
    if is_folder:
        return _open_folder_rows(source, options.mapping), None, ""
    readers = [options.open_file(file) for file in files]
    return readers[0] if len(readers) == 1 else concat_rows(files, readers), None, ""


def _open_folder_rows(source: Path, mapping: DatasetFormat | None) -> RowReader:
    """Open the JSON files of a folder as rows, or with a mapping those of a table in it."""
    # A preset matches the objects of images: others describe the project, such as its classes.
    needs_images = mapping is None or mapping.is_preset
    records = open_record_files(source, needs_images=needs_images)
    if records is not None:
        return records
    rows = None if mapping is None else open_table_folder(source)
    if rows is None:
        raise _build_folder_error(source)
    return rows


def open_table_folder(source: Path) -> RowReader | None:
    """Open the rows of a folder whose format has a table, such as an ImageFolder; else None."""
    for data_format in FORMATS.list_built_in():
        if data_format.map_columns is not None and data_format.open_dataset is not None:
            opened = data_format.open_dataset(source)
            if opened is not None:
                rows, _ = opened
                return rows
    return None


def _build_folder_error(source: Path) -> UserError:
    """Return the error of a folder that no format reads."""
    folder_formats = [one for one in iter_formats() if one.open_dataset is not None]
    names = ", ".join(one.name for one in folder_formats)
    expected = f'a dataset in one of the formats {names} (page "Importing data")'
    listing = list_folder(source)
    if len(listing.image_files()) == len(listing.files) > 0:
        expected = "images with labels"
    return UserError(
        f"a folder without a known dataset format; it contains {listing}"
        + "".join(_explain_mismatch(listing, one) for one in folder_formats if listing.files),
        where=str(source),
        expected=expected,
        remedy=listing.suggest_source(),
    )


def _check_table_options(files: Sequence[Path], options: ImportOptions) -> None:
    """Reject options of tables for other files."""
    for file in files:
        suffix = get_row_suffix(file)
        if suffix == ".txt" and is_json_lines(file):
            suffix = ".jsonl"
        if options.encoding and suffix not in TEXT_TABLE_SUFFIXES:
            raise UserError(
                f"the source is not a .csv, .tsv or .txt file: {file.name}",
                where="--encoding",
                expected="a table as text, or an ImageFolder with metadata.csv; others are UTF-8",
                remedy="remove --encoding",
            )
        if options.no_header and suffix not in TABLE_SUFFIXES:
            raise UserError(
                f"the source is not a .csv, .tsv, .txt or .xlsx file: {file.name}",
                where="--no-header",
                expected="a table whose first row contains values",
                remedy="remove --no-header",
            )


def _find_requested(options: ImportOptions) -> DatasetFormat | None:
    """Return the format that the user names, or that of the mapping file; None to detect it."""
    if options.format is not None:
        return get_format(options.format)
    return options.mapping


def _open_encoded(
    source: Path, encoding: str, requested: DatasetFormat | None
) -> tuple[RowReader, DatasetFormat, str] | None:
    """Open a folder with a table of a given encoding, or return None.

    Args:
        requested: Format that the user names; None to detect it.
    """
    candidates: Iterable[DatasetFormat] = FORMATS.list_built_in()
    if requested is not None:
        candidates = [requested]
    for data_format in candidates:
        if data_format.open_encoded is None:
            continue
        found = data_format.open_encoded(source, encoding)
        if found is not None:
            rows, detected_by = found
            if requested is not None:
                detected_by = "--format"
            return rows, data_format, detected_by
    return None


def _explain_mismatch(listing: FolderListing, data_format: DatasetFormat) -> str:
    """Return why a folder is not of a format without a distinctive file, "" for other formats."""
    try:
        result = data_format.open_requested(listing.root) if data_format.open_requested else None
    except UserError as error:
        return f"; not {data_format.name}: {error.what}" if listing.image_files() else ""
    return f"; {result[0].text_format} only with --format {data_format.name}" if result else ""


def _detect_format(
    first_records: Sequence[Record], source: Path, rows: RowReader, options: ImportOptions
) -> tuple[DatasetFormat, str]:
    """Detect the format of a row file from its first records."""
    if options.mapping is not None:
        data_format, detected_by = options.mapping, "mapping"
    elif options.format is not None:
        data_format, detected_by = get_format(options.format), "--format"
    elif options.columns:
        data_format, detected_by = table_format.COMPONENT, "--map"
    else:
        note = f" ({rows.text_format})" if "no header" in rows.text_format else ""
        try:
            data_format, detected_by = detect_format(first_records, f"{source}{note}")
        except UserError as error:
            if _has_numbered_columns(first_records, source, options):
                error.remedy = _suggest_numbered_columns(first_records, source, rows)
            raise
    if data_format is table_format.COMPONENT and not options.columns:
        raise table_format.UnknownRolesError(
            f"a table of {', '.join(map(str, first_records[0]))} without column mapping",
            where="--format table",
            expected="--map image=COLUMN, --map answer=COLUMN or --map box=COLUMN and so on",
            remedy=f"perhaps {table_format.suggest_mapping(first_records)}",
        )
    return data_format, detected_by


def _has_numbered_columns(
    first_records: Sequence[Record], source: Path, options: ImportOptions
) -> bool:
    """Return whether a table has no header, or one that may be a row of values."""
    file = (*options.row_files, source)[0]
    is_table = get_row_suffix(file) in TABLE_SUFFIXES
    has_number = any(re.fullmatch(r"[+-]?\d+(?:\.\d+)?", str(name)) for name in first_records[0])
    return is_table and (has_number or _find_repeated_name(first_records) != "")


def _find_repeated_name(records: Sequence[Record]) -> str:
    """Return the first name of a column that is also one of its values.

    It is empty without such a column.
    """
    for record in records:
        for name, value in record.items():
            if str(value).strip() == name and not name.isdecimal():
                return name
    return ""


def _suggest_numbered_columns(
    first_records: Sequence[Record], source: Path, rows: RowReader
) -> str:
    """Return a remedy for a table without header, or with one that may be a row of values."""
    records = list(first_records)
    if "no header" not in rows.text_format:
        lines = [list(records[0]), *(list(record.values()) for record in records)]
        records = []
        for cells in lines:
            records.append({str(number): cell for number, cell in enumerate(cells, start=1)})
    image = table_format.guess_columns(records).get("image", "")
    sizes = [_find_size(record, image, source.parent) for record in records]
    options = table_format.suggest_numbered_mapping(records, sizes)
    examples = [f"{name} is {str(cell)[:30]!r}" for name, cell in records[0].items()]
    shown = f"in the first row, {', '.join(examples[:8])}"
    if "no header" in rows.text_format:
        return f"name the columns by their numbers, perhaps with {options} ({shown})"
    named = table_format.suggest_mapping(first_records)
    return (
        f"name its columns, perhaps with {named}; if the first line contains values, import with"
        f" --no-header {options} ({shown})"
    )


def check_format_options(
    data_format: DatasetFormat, detected_by: str, options: ImportOptions
) -> None:
    """Reject import options that the dataset format does not support."""
    used_options = {
        "map": ("--map", bool(options.columns)),
        "prompt": ("--prompt", options.prompt is not None),
        "boxes": ("--box-format or --box-units", bool(options.box_format or options.box_units)),
        "box_task": ("--box-task", options.box_task != "detection"),
    }
    supported = {*data_format.supported_options}
    supported |= {"box_task"} if options.box_task in supported else set()
    for name, (option, is_given) in used_options.items():
        if is_given and name not in supported:
            raise UserError(
                f"the format {data_format.name} (detected by {detected_by}) does not support it",
                where=option,
                expected=f"rows such as {data_format.description}",
                remedy=f"remove {option}, or choose another --format",
            )


def is_sample_source(path: Path) -> bool:
    """Return whether a path refers to tar or Parquet files of training samples.

    This is the case for a glob pattern of such files, and for a file whose first row is a sample.
    """
    if path.suffix.lower() not in PACKED_SUFFIXES:
        return False
    if is_glob(path):
        return True
    if not path.is_file():
        return False
    record = read_first_record(path)
    if record is None or "id" not in record:
        return False
    # A text-only conversation next to images belongs to another format.
    with_images = record.pop("images", None) is not None
    messages = as_list(record.get("messages"))
    is_text = all(isinstance(one, dict) and isinstance(one.get("content"), str) for one in messages)
    detect = get_native_format().detect
    assert detect is not None
    return detect([record]) is not None and not (with_images and is_text)


def open_unvalidated_samples(
    path_or_url: Path | str, options: ImportOptions, output_folder: Path
) -> UnvalidatedSource:
    """Open training samples from a path, glob pattern or object storage URL without validation."""
    samples = open_sample_source(path_or_url).take(options.limit)
    stem = Path(path_or_url).stem

    def select(start: int, stop: int) -> Iterator[SourceRow]:
        for index in range(start, min(stop, len(samples))):
            full_location = samples.location(index)
            location = full_location.removeprefix(f"{path_or_url}, ")
            if location == full_location:
                location = location.rpartition("/")[2]
            yield SourceRow(index + 1, location, {}, stem)

    def parse_row(row: SourceRow, context: ImportContext) -> ImportExample:
        located_sample = samples.read_sample(row.number - 1)
        validate_roles(located_sample.sample.messages, "")  # ImportExample requires valid roles
        sample = located_sample.sample.map_paths(
            lambda name: str(located_sample.resolve_path(name).absolute())
        )
        return example_from_sample(sample, context)

    data_format = replace(get_native_format(), parse_row=parse_row)
    check_format_options(data_format, "as in training", options)
    rows = RowReader(len(samples), select)
    source = ImportSource(
        Path(path_or_url), rows, data_format, "as in training", (), {}, (0, len(samples))
    )
    return UnvalidatedSource(source, options, output_folder)


@dataclass(frozen=True, slots=True)
class DetectedColumns:
    """File or folder to import, and options with the column roles of a table.

    Attributes:
        proposal: Roles that were guessed from names and values, which the user has not confirmed;
            None for other formats.
    """

    path: Path
    options: ImportOptions
    proposal: RoleProposal | None = None


def detect_columns(
    path: Path, options: ImportOptions, ask_question: Callable[[list[str]], str] | None = None
) -> DetectedColumns:
    """Detect the format of a source, or the column roles of a table.

    The roles are empty if the format of the data is detected without them. Roles in `options` are
    not changed. Box format and units are set if the values contradict the names of the columns.

    Args:
        ask_question: Function that asks which of two unknown text columns is the question; any
            other text makes both a JSON answer. None raises UserError for such columns.

    Raises:
        UnassignedKeysError: Values inside of lists or objects have no role.
    """
    opened = None
    rows = None
    try:
        opened = open_source(path, options)
    except UserError:
        rows = _open_possible_table(path, options)
        if rows is None:
            table = find_only_table(path)
            if table is None:
                raise
            return detect_columns(table, options, ask_question)
    proposal = None
    if not options.columns and (opened is None or _is_question_table(opened, options)):
        records = _read_preview(rows or open_table_rows(path, options))
        columns = table_format.guess_columns(records)
        media = columns.keys() & set(table_format.MEDIA_ROLES)
        if not media or len(columns) == len(media):
            open_source(path, options)  # raises the error of a table, if it is one
            return DetectedColumns(path, options)
        columns = _resolve_ambiguous_columns(path, records, columns, ask_question)
        table_format.check_guessed_columns(records, columns, str(path))
        proposal = RoleProposal(records, columns, image_folder=_name_folder(path, records, columns))
        proposal.check_inner_values(str(path))
        options = replace(options, columns=columns)
        opened = None
    opened = opened or open_source(path, options)
    if options.format is None:
        _check_left_out(opened, path)
    if opened.data_format.map_columns is not None and not options.columns:
        # The rows of an ImageFolder are those of a table.
        proposal = RoleProposal(_read_preview(opened.rows), opened.column_map)
        proposal.check_inner_values(str(path))
        options = replace(options, columns=opened.column_map)
    box = opened.column_map.get("box")
    if box is not None and not (options.box_format or options.box_units):
        records = _read_preview(opened.rows)
        image, folder = opened.column_map.get("image", ""), opened.image_folder or path.parent
        sizes = [_find_size(record, image, folder) for record in records]
        box_format, box_units = table_format.guess_box_options(records, box, sizes)
        options = replace(options, box_format=box_format, box_units=box_units)
    if proposal is not None:
        proposal = replace(proposal, box_options=_list_box_options(options))
        options = replace(options, ignorable_columns=proposal.list_ignorable())
    return DetectedColumns(path, options, proposal)


def _check_left_out(source: ImportSource, path: Path) -> None:
    """Raise UserError if the first rows have content that a detected format leaves out."""
    check_row = source.data_format.check_left_out
    if check_row is None:
        return
    for row in source.rows.iter_range(0, NUM_DETECTION_ROWS):
        try:
            check_row(row)
        except UserError as error:
            error.where = error.where or str(path)
            raise


def open_table_rows(path: Path, options: ImportOptions) -> RowReader:
    """Open the rows of a file, or those of a folder with a JSON file for each image."""
    if path.is_dir():
        rows = open_record_files(path)
        if rows is not None:
            return rows
    return options.open_file(path)


def _open_possible_table(path: Path, options: ImportOptions) -> RowReader | None:
    """Open rows that may be those of a table; None for other sources."""
    if path.is_dir():
        return open_record_files(path)
    # A .txt file is a table only if the user names it: folders contain other ones.
    is_table = path.name.lower().endswith((*ROW_SUFFIXES, ".txt"))
    if path.is_file() and (is_table or is_json_lines(path)):
        return open_table_rows(path, options)
    return None


def find_table(path: Path, options: ImportOptions) -> Path:
    """Return the only table of a folder that is no dataset itself; other sources unchanged."""
    if options.format is not None or options.row_files or not path.is_dir():
        return path
    table = find_only_table(path)
    if table is None:
        return path
    try:
        open_source(path, options)
    except UserError:
        return table
    return path


def find_only_table(path: Path) -> Path | None:
    """Return the only table of a folder. Returns None for other sources."""
    if not path.is_dir():
        return None
    files = [file for file in list_folder(path).files if file.name.lower().endswith(ROW_SUFFIXES)]
    if len(files) == 1 and files[0].is_file():
        return files[0]
    return None


def _list_box_options(options: ImportOptions) -> tuple[str, ...]:
    """Return the box format and units as options of the command."""
    words: list[str] = []
    if options.box_format is not None:
        words += ["--box-format", options.box_format]
    if options.box_units is not None:
        words += ["--box-units", options.box_units]
    return tuple(words)


def _is_question_table(source: ImportSource, options: ImportOptions) -> bool:
    """Return whether rows of instructions have their images in a column, without placeholders."""
    may_be_table = source.data_format.may_be_table
    if may_be_table is None or options.format is not None:
        return False
    records = _read_preview(source.rows)
    columns = table_format.guess_columns(records)
    return may_be_table(records) and not columns.keys().isdisjoint(table_format.MEDIA_ROLES)


def _resolve_ambiguous_columns(
    path: Path,
    records: Sequence[Record],
    columns: dict[str, str],
    ask_question: Callable[[list[str]], str] | None,
) -> dict[str, str]:
    """Raise UserError for boxes or texts in columns whose names do not state their role.

    With `ask_question`, return the columns with the roles of two texts that the user gives.
    """
    if "box" in columns:
        return columns
    image = columns.get("image", "")
    media = table_format.format_media_options(columns)
    sizes = [_find_size(record, image, path.parent) for record in records]
    names = list(map(str, records[0]))
    for start in range(len(names) - 3):
        box = ",".join(names[start : start + 4])
        if (box_format := table_format.find_box_format(records, box, sizes)) is not None:
            option = "" if box_format == "xyxy" else f" --box-format {box_format} (of import)"
            raise table_format.UnknownRolesError(
                f"the columns {box} contain coordinates in the image",
                where=str(path),
                expected="columns with names of box coordinates, such as xmin,ymin,xmax,ymax",
                remedy=f"give {media} --map {shlex.quote(f'box={box}')}{option}, or without"
                f" boxes: {media} --map answer=COLUMN",
            )
    if not table_format.has_unknown_texts(records, columns):
        return columns
    first, second = columns["fields"].split(",")
    if ask_question is None:
        raise table_format.UnknownRolesError(
            f"the columns {first} and {second} may be a question and its answer, or two answers",
            where=str(path),
            expected="columns with known names, such as question and answer",
            remedy=f"give {media} --map {shlex.quote(f'question={first}')}"
            f" --map {shlex.quote(f'answer={second}')}, or for answers in JSON: {media}"
            f" --map {shlex.quote(f'fields={first},{second}')}",
        )
    question = ask_question([first, second])
    if question not in (first, second):
        return columns
    answer = second if question == first else first
    roles = {role: columns[role] for role in table_format.MEDIA_ROLES if role in columns}
    return {**roles, "question": question, "answer": answer}


def _find_size(record: Record, image: str, folder: Path) -> tuple[float, float] | None:
    """Return width and height of a local image, or those that its record states."""
    with suppress(KeyError, TypeError, UserError, OSError):
        height, width = read_image_size(folder / record[image])
        return width, height
    with suppress(KeyError, ValueError):
        return float(str(record["width"])), float(str(record["height"]))
    return None


def _read_preview(rows: RowReader) -> list[Record]:
    preview = rows.iter_range(0, min(rows.num_rows, NUM_PREVIEW_ROWS))
    return [record for row in preview for record in (row.record, *row.more_records)]
