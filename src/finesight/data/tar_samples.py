"""Read samples from tar files in the layout of WebDataset shards.

`0001.json` is a sample. Its images are next to it with the same stem: `0001.jpg`, or
`0001.left.jpg` and `0001.right.jpg`. The headers of a shard are scanned once to index its samples.
Samples and images are then read by byte offset, without unpacking.
"""

from __future__ import annotations

import hashlib
import itertools
import posixpath
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from finesight.data.container_paths import tar_member_path
from finesight.data.index_cache import SampleIndex, load_or_build_index
from finesight.data.jsonl import LocatedSample, parse_sample
from finesight.data.line_index import FileState, open_data_file, open_unchanged, read_file_state
from finesight.data.webdataset import MemberGroup as Members
from finesight.data.webdataset import iter_member_groups, split_member_name
from finesight.errors import UserError
from finesight.file_name_encoding import to_readable_name
from finesight.hub.archive import TarArchive, open_tar


@dataclass(frozen=True, slots=True)
class TarSamples:
    """Random access to the samples of an indexed tar file.

    The tar headers and files of sample k are in the bytes from `offsets_N1[k]` to `offsets_N1[k +
    1]`.
    """

    path: Path
    index: SampleIndex
    file_state: FileState

    @property
    def digest(self) -> str:
        """SHA-256 of all member names, sizes and sample JSON in hexadecimal.

        The content of images is not included, as for other data files.
        """
        return self.index.digest

    def __len__(self) -> int:
        return len(self.index.offsets_N1) - 1

    def read_sample(self, index: int) -> LocatedSample:
        """Read a sample by index and check its types.

        Raises:
            UserError: The JSON is not a sample, or the file is corrupt or modified.
        """
        start, stop = self.index.offsets_N1[index : index + 2].tolist()
        with open_unchanged(self.path, self.file_state), open_tar(self.path, start) as tar:
            members = list(
                itertools.takewhile(lambda member: member.offset < stop, tar.iter_headers())
            )
            content, folder = _read_sample_json(tar, members)
        folder = to_readable_name(folder)
        sample = parse_sample(content, self.location(index))
        # Non-UTF-8 names are also found by their decoded form.
        paths_by_name = {
            name: tar_member_path(member.offset_data, member.size, posixpath.basename(member.name))
            for member in members
            for name in (member.name, to_readable_name(member.name))
        }

        def map_path(name: str) -> str:
            member_path = paths_by_name.get(posixpath.normpath(posixpath.join(folder, name)))
            # Other names become paths below the tar, where no files exist: only images inside the
            # tar are valid.
            return member_path or posixpath.normpath(f"/{name}").lstrip("/")

        return LocatedSample(sample.map_paths(map_path), self.path)

    def location(self, index: int) -> str:
        """Return file and 1-based sample number for messages."""
        return f"{self.path}, sample {index + 1}"

    def take(self, limit: int | None) -> TarSamples:
        """Return a view of the first `limit` samples; None means all."""
        return replace(self, index=self.index.take(limit))


def open_tar_samples(path: Path) -> TarSamples:
    """Open and index a tar file of samples.

    Raises:
        UserError: The tar is corrupt, or contains files without a sample.
    """
    with open_data_file(path) as file:
        return TarSamples(
            path,
            load_or_build_index(file, path, "tar", lambda: _build_index(path)),
            read_file_state(file),
        )


def read_first_json(path: Path) -> bytes | None:
    """Return the JSON file of the first sample in a tar, None without one.

    Raises:
        UserError: The tar is corrupt.
    """
    with open_tar(path) as tar:
        members = next(iter_member_groups(tar), [])
        return next(
            (
                tar.read_member(member)
                for member in members
                if split_member_name(member)[1] == "json"
            ),
            None,
        )


def _build_index(path: Path) -> SampleIndex:
    sha256 = hashlib.sha256()
    starts, stop = [], 0
    with open_tar(path) as tar:
        for members in iter_member_groups(tar):
            starts.append(members[0].offset)
            stop = members[-1].offset_data + members[-1].size
            for member in members:
                sha256.update(f"{member.name!r} {member.size}\n".encode(errors="surrogatepass"))
            sha256.update(_read_sample_json(tar, members)[0])
    return SampleIndex(np.array([*starts, stop]), np.empty(0, np.int64), sha256.hexdigest())


def _read_sample_json(tar: TarArchive, members: Members) -> tuple[bytes, str]:
    """Return the JSON of a sample and its folder, given its tar members."""
    for member in members:
        if split_member_name(member)[1] == "json":
            return tar.read_member(member), posixpath.dirname(member.name)
    raise UserError(
        f"no sample next to {members[0].name}",
        where=str(tar.archive),
        expected="a .json file with a sample per image: 0001.json, 0001.jpg, 0002.json, ...",
        remedy="import other tar files with `finesight data import`",
    )
