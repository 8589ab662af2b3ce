"""Rows of a WebDataset: a tar in which the files of a sample share their name and stand together.

0001.jpg, 0001.txt, 0001.json, 0002.jpg, ... A row has the picture as `image`, the content of texts
under their endings (`txt`, `cls`, `caption`), and what an object in JSON holds under its own keys.
Nothing is unpacked. Joined rows of several such tars are one data set.
"""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from finesight.data.formats.inventory import PICTURE_SUFFIXES
from finesight.data.rows import Record, Row, Rows
from finesight.errors import UserError

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
    try:
        with tarfile.open(path, "r:") as tar:
            first = None
            for sample in _samples(tar):
                endings = {_parts(member)[1] for member in sample}
                if not any(map(_is_picture, endings)) or not endings & {*TEXTS, "json"}:
                    return False
                first = first or _record(tar, sample, path)
            return first is not None and "imagePath" not in first
    except (tarfile.TarError, EOFError) as error:
        raise _damaged(path, error) from error


def open_tar(source: Path) -> Rows:
    """A row for each sample of a WebDataset. Raises UserError for a file that is none."""
    try:
        with tarfile.open(source, "r:") as tar:
            total = sum(1 for _ in _samples(tar))
    except (tarfile.TarError, EOFError) as error:
        raise _damaged(source, error) from error
    if total == 0:
        raise UserError(
            "holds no samples",
            where=str(source),
            expected="a WebDataset: 0001.jpg, 0001.txt, 0002.jpg, ...",
            remedy="check the file",
        )

    def select(start: int, stop: int) -> Iterator[Row]:
        with tarfile.open(source, "r:") as tar:
            chosen = itertools.islice(enumerate(_samples(tar), start=1), start, stop)
            for number, sample in chosen:
                key = _parts(sample[0])[0]
                yield Row(number, f"sample {key}", _record(tar, sample, source), source.stem)

    return Rows(total, select)


def _samples(tar: tarfile.TarFile) -> Iterator[Sample]:
    files = (member for member in tar if member.isreg() and not _is_hidden(member))
    for _, sample in itertools.groupby(files, key=lambda member: _parts(member)[0]):
        yield list(sample)


def _is_hidden(member: tarfile.TarInfo) -> bool:
    return PurePosixPath(member.name).name.startswith((".", "__"))


def _parts(member: tarfile.TarInfo) -> tuple[str, str]:
    """What the files of a sample share, and what comes after the first point of the name."""
    path = PurePosixPath(member.name)
    stem, _, ending = path.name.partition(".")
    return str(path.parent / stem), ending.lower()


def _is_picture(ending: str) -> bool:
    return f".{ending.rpartition('.')[2]}" in PICTURE_SUFFIXES


def _record(tar: tarfile.TarFile, sample: Sample, source: Path) -> Record:
    """A sample's files under their endings; a lone picture is `image`."""
    record: Record = {"id": _parts(sample[0])[0]}
    pictures = {_parts(m)[1]: m for m in sample if _is_picture(_parts(m)[1])}
    for ending, member in pictures.items():
        record["image" if len(pictures) == 1 else ending] = _bytes(tar, member, source)
    for member in sample:
        ending = _parts(member)[1]
        if ending in TEXTS or ending == "json":
            text = _text(tar, member, source)
            found = _parsed(text, member, source) if ending == "json" else {ending: text}
            record = {**found, **record}
    return record


def _parsed(text: str, member: tarfile.TarInfo, source: Path) -> Record:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{member.name}: broken JSON: {error}",
            where=str(source),
            expected="JSON in each .json file",
            remedy="make the tar again",
        ) from error
    return content if isinstance(content, dict) else {"json": content}


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo, source: Path) -> str:
    try:
        return _bytes(tar, member, source).decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{member.name}: byte {error.start} is not UTF-8 text",
            where=str(source),
            expected="texts in UTF-8",
            remedy="make the tar again",
        ) from error


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo, source: Path) -> bytes:
    if member.size > LARGEST:
        raise UserError(
            f"{member.name} has {member.size} bytes",
            where=str(source),
            expected=f"files of at most {LARGEST} bytes",
            remedy="make the tar again without it",
        )
    content = tar.extractfile(member)
    assert content is not None, f"{member.name} is a regular file without content"
    data = content.read()
    if len(data) != member.size:
        raise _damaged(source, f"{member.name} ends early")
    return data


def _damaged(source: Path, problem: object) -> UserError:
    return UserError(
        f"cannot be read as a tar: {problem}",
        where=str(source),
        expected="a whole tar",
        remedy="fetch the file again",
    )
