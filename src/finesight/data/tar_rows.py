"""Rows of a WebDataset: a tar in which the files of a sample share their name and stand together.

0001.jpg, 0001.txt, 0001.json, 0002.jpg, ... A row has the picture as `image`, the content of texts
under their endings (`txt`, `cls`, `caption`), and what an object in JSON holds under its own keys.
Nothing is unpacked. Joined rows of several such tars are one data set.
"""

from __future__ import annotations

import itertools
import posixpath
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

from finesight.bounded_files import parse_json
from finesight.data.formats.inventory import PICTURE_SUFFIXES
from finesight.data.limits import check_json
from finesight.data.lines import opened
from finesight.data.rows import Record, Row, Rows
from finesight.errors import UserError
from finesight.file_names import readable_name
from finesight.remote.members import Tar, open_tar_file

TEXTS = frozenset({"txt", "text", "caption", "transcript", "cls", "id", "index"})

LARGEST = 256 * 2**20
"""Bytes of one file in the tar: it is read at once."""

Sample = list[tarfile.TarInfo]


def is_tar(path: Path) -> bool:
    """Whether a file is an uncompressed tar by its name."""
    return path.suffix.lower() == ".tar"


def is_webdataset(path: Path) -> bool:
    """Whether each sample of a tar has a picture and a text or JSON, and none is LabelMe's.

    Any other tar is an archive. Raises UserError for a damaged one.
    """
    with open_tar_file(path) as tar:
        first = None
        for sample in samples_in(tar):
            endings = {parts_of(member)[1] for member in sample}
            if not any(map(_is_picture, endings)) or not endings & {*TEXTS, "json"}:
                return False
            first = first or _record(tar, sample)
        return first is not None and "imagePath" not in first


def open_tar(source: Path) -> Rows:
    """A row for each sample of a WebDataset. Raises UserError for a file that is none."""
    with opened(source), open_tar_file(source) as tar:
        total = sum(1 for _ in samples_in(tar))
    if total == 0:
        raise UserError(
            "holds no samples",
            where=str(source),
            expected="a WebDataset: 0001.jpg, 0001.txt, 0002.jpg, ...",
            remedy="check the file",
        )

    def select(start: int, stop: int) -> Iterator[Row]:
        with open_tar_file(source) as tar:
            chosen = itertools.islice(enumerate(samples_in(tar), start=1), start, stop)
            for number, sample in chosen:
                key = parts_of(sample[0])[0]
                yield Row(number, f"sample {key}", _record(tar, sample), source.stem)

    return Rows(total, select)


def samples_in(tar: Tar) -> Iterator[Sample]:
    """The files of each sample, in order."""
    files = (member for member in tar.headers() if member.isreg() and not _is_hidden(member))
    for _, sample in itertools.groupby(files, key=lambda member: parts_of(member)[0]):
        yield list(sample)


def _is_hidden(member: tarfile.TarInfo) -> bool:
    return posixpath.basename(member.name.rstrip("/")).startswith((".", "__"))


def parts_of(member: tarfile.TarInfo) -> tuple[str, str]:
    """What the files of a sample share, and what comes after the first point of the name."""
    folder, slash, name = member.name.rpartition("/")
    stem, _, ending = name.partition(".")
    return _below(folder or slash) + stem, readable_name(ending.lower())


@lru_cache(1024)
def _below(folder: str) -> str:
    """How paths in a folder begin: `./` and the like, which say nothing, are left out."""
    path = str(PurePosixPath(folder))
    return "" if path == "." else f"{path.rstrip('/')}/"


def _is_picture(ending: str) -> bool:
    return f".{ending.rpartition('.')[2]}" in PICTURE_SUFFIXES


def _record(tar: Tar, sample: Sample) -> Record:
    """A sample's files under their endings; a lone picture is `image`."""
    record: Record = {"id": parts_of(sample[0])[0]}
    pictures = {parts_of(m)[1]: m for m in sample if _is_picture(parts_of(m)[1])}
    for ending, member in pictures.items():
        record["image" if len(pictures) == 1 else ending] = _bytes(tar, member)
    for member in sample:
        ending = parts_of(member)[1]
        if ending in TEXTS or ending == "json":
            text = _text(tar, member)
            found = _parsed(text, member, tar.archive) if ending == "json" else {ending: text}
            record = {**found, **record}
    return record


def _parsed(text: str, member: tarfile.TarInfo, source: Path) -> Record:
    check_json(text.encode(), f"{source}, {member.name}")
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UserError(
            f"{member.name}: broken JSON: {error}",
            where=str(source),
            expected="JSON in each .json file",
            remedy="make the tar again",
        ) from error
    return content if isinstance(content, dict) else {"json": content}


def _text(tar: Tar, member: tarfile.TarInfo) -> str:
    try:
        return _bytes(tar, member).decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{member.name}: byte {error.start} is not UTF-8 text",
            where=str(tar.archive),
            expected="texts in UTF-8",
            remedy="make the tar again",
        ) from error


def _bytes(tar: Tar, member: tarfile.TarInfo) -> bytes:
    if member.size > LARGEST:
        raise UserError(
            f"{member.name} has {member.size} bytes",
            where=str(tar.archive),
            expected=f"files of at most {LARGEST} bytes",
            remedy="make the tar again without it",
        )
    return tar.read(member)
