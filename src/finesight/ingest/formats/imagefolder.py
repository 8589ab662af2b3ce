"""ImageFolder (Hugging Face): metadata.csv, .jsonl or .parquet with a column `file_name`.

Its rows are parsed as a table. It may be in split folders such as train and validation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from finesight.ingest.folder_listing import list_folder
from finesight.ingest.formats import table
from finesight.ingest.formats.dataset_format import DatasetFormat
from finesight.ingest.formats.split_folders import order_by_split
from finesight.ingest.row_reader import Record, RowReader, SourceRow, concat_rows, open_row_file

_METADATA_NAME = re.compile(r"metadata\.(?:csv|jsonl|parquet)", re.IGNORECASE)


def open_imagefolder(source: Path, encoding: str | None = None) -> tuple[RowReader, str] | None:
    """Open a Hugging Face ImageFolder as table rows; paths in `file_name` become absolute.

    Args:
        encoding: Encoding of metadata.csv, None to detect it; other files then do not match.
    """
    found = [path for path in list_folder(source).files if _METADATA_NAME.fullmatch(path.name)]
    files, num_train, note = order_by_split(source, found)
    if encoding is not None and any(file.suffix.lower() != ".csv" for file in files):
        return None
    readers = [_resolve_file_names(open_row_file(file, encoding), file.parent) for file in files]
    first_rows = [next(iter(reader.iter_range(0, 1)), None) for reader in readers]
    if not files or any(row is None or "file_name" not in row.record for row in first_rows):
        return None
    rows = concat_rows(files, readers) if len(files) > 1 else readers[0]
    eval_start = sum(reader.num_rows for reader in readers[:num_train])
    return replace(rows, eval_start=eval_start), f"{files[0].name} with file_name{note}"


def _resolve_file_names(reader: RowReader, folder: Path) -> RowReader:
    def iter_range(start: int, stop: int) -> Iterator[SourceRow]:
        for row in reader.iter_range(start, stop):
            name = row.record.get("file_name")
            path = str(folder.absolute() / name) if isinstance(name, str) and name else name
            yield replace(row, record={**row.record, "file_name": path})

    return replace(reader, iter_range=iter_range)


def map_imagefolder_columns(
    records: Sequence[Record], columns: Mapping[str, str]
) -> dict[str, str]:
    """Return the column of each role: of `--map`, else `file_name` and those of known names."""
    if columns.keys() & {"answer", "fields", "box"}:
        return {"image": "file_name", **columns}
    guessed = table.guess_columns(records) | {"image": "file_name"}
    guessed.pop("fields", None)
    table.check_guessed_columns(records, guessed | dict(columns), "--map")
    return guessed | dict(columns)


COMPONENT = DatasetFormat(
    name="imagefolder",
    description="a folder of images with metadata.csv, .jsonl or .parquet (column file_name)",
    parse_row=table.parse_row,
    supported_options=frozenset({"map", "prompt", "boxes"}),
    open_dataset=open_imagefolder,
    map_columns=map_imagefolder_columns,
    open_encoded=open_imagefolder,
    # Before `classes`: the images may be in folders, too.
    position=90,
)
