"""Read rows of a WebDataset, a tar in which a sample is several adjacent files.

The files of a sample share their stem: 0001.jpg, 0001.txt, 0001.json, 0002.jpg, and so on. A row
contains the image as `image`, the content of text files under their suffixes (`txt`, `cls`,
`caption`), and the keys of the JSON object. Files are read without unpacking.
"""

from __future__ import annotations

import itertools
import posixpath
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

from finesight.bounded_files import parse_json
from finesight.data.formats.folder_listing import IMAGE_SUFFIXES
from finesight.data.limits import check_json
from finesight.data.line_index import open_data_file
from finesight.data.row_reader import Record, RowReader, SourceRow
from finesight.errors import UserError
from finesight.file_name_encoding import to_readable_name
from finesight.hub.archive import TarArchive, open_tar

TEXT_SUFFIXES = frozenset({"txt", "text", "caption", "transcript", "cls", "id", "index"})

MAX_MEMBER_BYTES = 256 * 2**20
"""Maximum number of bytes of a file in a tar, read into memory at once."""

MemberGroup = list[tarfile.TarInfo]


def is_tar_file(path: Path) -> bool:
    """Return whether a file has the suffix of an uncompressed tar."""
    return path.suffix.lower() == ".tar"


def is_webdataset(path: Path) -> bool:
    """Return whether each sample in a tar has an image and text or JSON.

    Other tar files, including those with LabelMe JSON, are archives to unpack.

    Raises:
        UserError: The tar is corrupt.
    """
    with open_tar(path) as tar:
        first_record = None
        for members in iter_member_groups(tar):
            suffixes = {split_member_name(member)[1] for member in members}
            if not any(map(_is_image_suffix, suffixes)) or not suffixes & {*TEXT_SUFFIXES, "json"}:
                return False
            first_record = first_record or _build_record(tar, members)
        return first_record is not None and "imagePath" not in first_record


def open_webdataset(source: Path) -> RowReader:
    """Open a WebDataset tar as rows, one per sample.

    Raises:
        UserError: The tar is corrupt or contains no samples.
    """
    with open_data_file(source), open_tar(source) as tar:
        num_samples = sum(1 for _ in iter_member_groups(tar))
    if num_samples == 0:
        raise UserError(
            "contains no samples",
            where=str(source),
            expected="a WebDataset: 0001.jpg, 0001.txt, 0002.jpg, ...",
            remedy="check the file",
        )

    def iter_range(start: int, stop: int) -> Iterator[SourceRow]:
        with open_tar(source) as tar:
            selected = itertools.islice(enumerate(iter_member_groups(tar), start=1), start, stop)
            for row_number, members in selected:
                key = split_member_name(members[0])[0]
                yield SourceRow(
                    row_number, f"sample {key}", _build_record(tar, members), source.stem
                )

    return RowReader(num_samples, iter_range)


def iter_member_groups(tar: TarArchive) -> Iterator[MemberGroup]:
    """Yield the tar members of each sample: adjacent files with the same stem.

    Hidden files are skipped.
    """
    files = (member for member in tar.iter_headers() if member.isreg() and not _is_hidden(member))
    for _, members in itertools.groupby(files, key=lambda member: split_member_name(member)[0]):
        yield list(members)


def _is_hidden(member: tarfile.TarInfo) -> bool:
    return posixpath.basename(member.name.rstrip("/")).startswith((".", "__"))


def split_member_name(member: tarfile.TarInfo) -> tuple[str, str]:
    """Split a tar member path into stem and suffix at the first dot."""
    folder, slash, name = member.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    return _normalize_folder(folder or slash) + stem, to_readable_name(suffix.lower())


@lru_cache(1024)
def _normalize_folder(folder: str) -> str:
    """Return a folder as a path prefix with trailing slash, without leading `./`."""
    path = str(PurePosixPath(folder))
    return "" if path == "." else f"{path.rstrip('/')}/"


def _is_image_suffix(suffix: str) -> bool:
    return f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES


def _build_record(tar: TarArchive, members: MemberGroup) -> Record:
    """Build a row from the files of a sample, with their suffixes as keys.

    A single image has the key `image`.
    """
    record: Record = {"id": split_member_name(members[0])[0]}
    image_members = {
        split_member_name(m)[1]: m for m in members if _is_image_suffix(split_member_name(m)[1])
    }
    for suffix, member in image_members.items():
        record["image" if len(image_members) == 1 else suffix] = _read_member(tar, member)
    for member in members:
        suffix = split_member_name(member)[1]
        if suffix in TEXT_SUFFIXES or suffix == "json":
            text = _read_text(tar, member)
            values = _parse_json(text, member, tar.archive) if suffix == "json" else {suffix: text}
            record = {**values, **record}
    return record


def _parse_json(text: str, member: tarfile.TarInfo, source: Path) -> Record:
    check_json(text.encode(), f"{source}, {member.name}")
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UserError(
            f"{member.name}: broken JSON: {error}",
            where=str(source),
            expected="JSON in each .json file",
            remedy="create the tar again",
        ) from error
    return content if isinstance(content, dict) else {"json": content}


def _read_text(tar: TarArchive, member: tarfile.TarInfo) -> str:
    try:
        return _read_member(tar, member).decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{member.name}: byte {error.start} is not UTF-8 text",
            where=str(tar.archive),
            expected="texts in UTF-8",
            remedy="create the tar again",
        ) from error


def _read_member(tar: TarArchive, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_MEMBER_BYTES:
        raise UserError(
            f"{member.name} has {member.size} bytes",
            where=str(tar.archive),
            expected=f"files of at most {MAX_MEMBER_BYTES} bytes",
            remedy="create the tar again without it",
        )
    return tar.read_member(member)
