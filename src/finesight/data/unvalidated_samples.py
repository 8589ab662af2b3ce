"""Open tar, Parquet and sharded training samples without validation, for data checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from finesight.bounded_files import parse_json
from finesight.data.corpus import open_sample_source
from finesight.data.formats import native_samples as samples_format
from finesight.data.formats.dataset_format import ImportContext
from finesight.data.import_example import ImportExample
from finesight.data.import_source import (
    ImportOptions,
    ImportSource,
    UnvalidatedSource,
    check_format_options,
)
from finesight.data.parquet_samples import read_first_record
from finesight.data.row_reader import RowReader, SourceRow
from finesight.data.sample_validation import validate_roles
from finesight.data.sharded_samples import PACKED_SUFFIXES, is_glob
from finesight.data.tar_samples import read_first_json


def is_sample_source(path: Path) -> bool:
    """Return whether a path refers to tar or Parquet files of training samples.

    This is the case for a glob pattern of such files, and for a file whose first row is a sample.

    Raises:
        UserError: The file is corrupt.
    """
    if path.suffix.lower() not in PACKED_SUFFIXES:
        return False
    if is_glob(path):
        return True
    if not path.is_file():
        return False
    record = (
        _read_first_tar_record(path) if path.suffix.lower() == ".tar" else read_first_record(path)
    )
    return record is not None and "id" in record and samples_format.detect([record]) is not None


def _read_first_tar_record(path: Path) -> dict[str, object] | None:
    content = read_first_json(path)
    try:
        record = None if content is None else parse_json(content)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def open_unvalidated_samples(
    path_or_url: Path | str, options: ImportOptions, output_folder: Path
) -> UnvalidatedSource:
    """Open training samples from a path, glob pattern or object storage URL without validation.

    Raises:
        UserError: The samples cannot be opened, as in `open_sample_source`, or an import option
            does not apply to samples.
    """
    samples = open_sample_source(path_or_url).take(options.limit)
    stem = Path(path_or_url).stem

    def select(start: int, stop: int) -> Iterator[SourceRow]:
        for index in range(start, min(stop, len(samples))):
            yield SourceRow(
                index + 1, _strip_source(samples.location(index), path_or_url), {}, stem
            )

    def parse_row(row: SourceRow, context: ImportContext) -> ImportExample:
        located_sample = samples.read_sample(row.number - 1)
        validate_roles(located_sample.sample.messages, "")  # ImportExample requires valid roles
        sample = located_sample.sample.map_paths(
            lambda name: str(located_sample.resolve_path(name).absolute())
        )
        return samples_format.example_from_sample(sample, context)

    data_format = replace(samples_format.FORMAT, parse_row=parse_row)
    check_format_options(data_format, "as in training", options)
    rows = RowReader(len(samples), select)
    source = ImportSource(
        Path(path_or_url), rows, data_format, "as in training", (), (0, len(samples))
    )
    return UnvalidatedSource(source, options, output_folder)


def _strip_source(location: str, path_or_url: Path | str) -> str:
    """Remove the path of the source from the location of a sample."""
    suffix = location.removeprefix(f"{path_or_url}, ")
    return suffix if suffix != location else location.rpartition("/")[2]
