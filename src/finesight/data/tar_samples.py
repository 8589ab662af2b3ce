"""Samples in tars, as WebDatasets lie in shards: `0001.json` is a sample, and the pictures that it
names lie beside it under the same stem, `0001.jpg`, or `0001.left.jpg` and `0001.right.jpg`.

A shard is read once, header by header, to know where its samples start. From then on a sample is
read from its place, and so are its pictures: nothing is unpacked.
"""

from __future__ import annotations

import hashlib
import itertools
import posixpath
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from finesight.data.index_files import Index, indexed
from finesight.data.inside import in_tar
from finesight.data.jsonl import Located, parse
from finesight.data.lines import State, opened, state_of, unchanged
from finesight.data.tar_rows import Sample as Members
from finesight.data.tar_rows import parts_of, samples_in
from finesight.errors import UserError
from finesight.file_names import readable_name
from finesight.remote.members import Tar, open_tar_file


@dataclass(frozen=True, slots=True)
class TarSamples:
    """The samples of a tar in the `state` in which they were found. By the `index`, the headers and
    files of sample k lie from byte `bounds_N1[k]` up to `bounds_N1[k + 1]`."""

    path: Path
    index: Index
    state: State

    @property
    def digest(self) -> str:
        """Of all names, sizes and samples; not of the pictures, as for any other file of data."""
        return self.index.digest

    def __len__(self) -> int:
        return len(self.index.bounds_N1) - 1

    def located(self, index: int) -> Located:
        """A sample by its types alone. Raises UserError."""
        start, stop = self.index.bounds_N1[index : index + 2].tolist()
        with unchanged(self.path, self.state), open_tar_file(self.path, start) as tar:
            members = list(itertools.takewhile(lambda one: one.offset < stop, tar.headers()))
            content, folder = _json(tar, members)
        folder = readable_name(folder)
        sample = parse(content, self.where(index))
        # By their names and, where these are not UTF-8, by what they say.
        beside = {
            name: in_tar(member.offset_data, member.size, posixpath.basename(member.name))
            for member in members
            for name in (member.name, readable_name(member.name))
        }

        def placed(name: str) -> str:
            found = beside.get(posixpath.normpath(posixpath.join(folder, name)))
            # Below the tar, where nothing is: no picture that did not come with it.
            return found or posixpath.normpath(f"/{name}").lstrip("/")

        return Located(sample.with_files(placed), self.path)

    def where(self, index: int) -> str:
        """File and place as messages name them."""
        return f"{self.path}, sample {index + 1}"

    def first(self, limit: int | None) -> TarSamples:
        """So many samples at most, from the start."""
        return replace(self, index=self.index.first(limit))


def tar_samples(path: Path) -> TarSamples:
    """Where the samples of a tar lie. Raises UserError for one that is damaged or holds others."""
    with opened(path) as file:
        return TarSamples(path, indexed(file, path, "tar", lambda: _found(path)), state_of(file))


def first_json(path: Path) -> bytes | None:
    """The JSON beside the first picture of a tar; None where there is none. Raises UserError for a
    damaged tar."""
    with open_tar_file(path) as tar:
        members = next(samples_in(tar), [])
        return next((tar.read(one) for one in members if parts_of(one)[1] == "json"), None)


def _found(path: Path) -> Index:
    whole = hashlib.sha256()
    starts, stop = [], 0
    with open_tar_file(path) as tar:
        for members in samples_in(tar):
            starts.append(members[0].offset)
            stop = members[-1].offset_data + members[-1].size
            for member in members:
                whole.update(f"{member.name!r} {member.size}\n".encode(errors="surrogatepass"))
            whole.update(_json(tar, members)[0])
    return Index(np.array([*starts, stop]), np.empty(0, np.int64), whole.hexdigest())


def _json(tar: Tar, members: Members) -> tuple[bytes, str]:
    """The sample among the files of one stem, and the folder that it lies in."""
    for member in members:
        if parts_of(member)[1] == "json":
            return tar.read(member), posixpath.dirname(member.name)
    raise UserError(
        f"no sample beside {members[0].name}",
        where=str(tar.archive),
        expected="a .json file with a sample for each picture: 0001.json, 0001.jpg, 0002.json, ...",
        remedy="bring other tars in with `finesight data import`",
    )
