"""Samples of a WebDataset: the adjacent files of a tar whose names have the same stem."""

from __future__ import annotations

import itertools
import posixpath
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import PurePosixPath

from finesight.files.archive import TarArchive
from finesight.files.bounded_files import to_readable_name

MemberGroup = list[tarfile.TarInfo]
"""Headers of the files of a sample."""


def iter_member_groups(tar: TarArchive) -> Iterator[MemberGroup]:
    """Yield the tar members of each sample: adjacent files with the same stem.

    Hidden files are skipped.
    """
    files = (
        member
        for member in tar.iter_headers()
        if member.isreg()
        and not posixpath.basename(member.name.rstrip("/")).startswith((".", "__"))
    )
    for _, members in itertools.groupby(files, key=lambda member: split_member_name(member)[0]):
        yield list(members)


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
