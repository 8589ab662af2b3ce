"""Samples where training reads them, in tars, Parquet files and shards, as a check reads them: one
by one, each with its faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from finesight.bounded_files import parse_json
from finesight.data.case import Case
from finesight.data.formats import samples as samples_format
from finesight.data.formats.format import Reading
from finesight.data.opening import Drafts, Request, Source, check_use
from finesight.data.parquet_samples import first_record
from finesight.data.rows import Row, Rows
from finesight.data.rules import check_order
from finesight.data.shards import PACKED, is_pattern
from finesight.data.sources import samples_at
from finesight.data.tar_samples import first_json


def holds_samples(path: Path) -> bool:
    """Whether a path means samples to train on as they are: one with a pattern, and tars and
    Parquet files whose first row is a sample. Raises UserError for damaged ones."""
    if path.suffix.lower() not in PACKED:
        return False
    if is_pattern(path):
        return True
    if not path.is_file():
        return False
    record = _tar_record(path) if path.suffix.lower() == ".tar" else first_record(path)
    return record is not None and "id" in record and samples_format.detect([record]) is not None


def _tar_record(path: Path) -> dict[str, object] | None:
    content = first_json(path)
    try:
        record = None if content is None else parse_json(content)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def draft_packed(place: Path | str, request: Request, saved: Path) -> Drafts:
    """The samples that a path, a pattern or an address in object storage means to training, with
    their faults; nothing is `saved`. Raises UserError as `samples_at` does, and for options of
    `request` that mean nothing to samples."""
    samples = samples_at(place).first(request.limit)
    stem = Path(place).stem

    def select(start: int, stop: int) -> Iterator[Row]:
        for index in range(start, min(stop, len(samples))):
            yield Row(index + 1, _within(samples.where(index), place), {}, stem)

    def read(row: Row, reading: Reading) -> Case:
        located = samples.located(row.number - 1)
        check_order(located.sample.messages, "")  # a case has no place for other orders
        sample = located.sample.with_files(lambda name: str(located.path(name).absolute()))
        return samples_format.case_of(sample, reading)

    form = replace(samples_format.FORMAT, read=read)
    check_use(form, "as they are trained on", request)
    rows = Rows(len(samples), select)
    source = Source(Path(place), rows, form, "as they are trained on", (), (0, len(samples)))
    return Drafts(source, request, saved)


def _within(where: str, place: Path | str) -> str:
    """Where a sample is, without the name of its only file, or without the folder of its shards."""
    own = where.removeprefix(f"{place}, ")
    return own if own != where else where.rpartition("/")[2]
