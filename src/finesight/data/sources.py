"""The data files of a recipe as one sequence of samples."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from finesight.config import DataFile
from finesight.data.jsonl import Located, read_samples
from finesight.storage import digest


@dataclass(frozen=True, slots=True)
class Corpus:
    """The samples of all files end to end, limits applied.

    `sizes` and `weights` are those of each file, in order. `fingerprint` is a SHA-256 over the
    files' bytes, limits and weights: two corpora that share it give the same samples in the same
    order, wherever the files lie.
    """

    samples: tuple[Located, ...]
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Located:
        return self.samples[index]


def load_sources(files: tuple[DataFile, ...], *, answered: bool = True) -> Corpus:
    """Read every file of a recipe's `data.train` or `data.eval`; see `read_samples` for errors."""
    samples: list[Located] = []
    sizes: list[int] = []
    identity = hashlib.sha256()
    for file in files:
        taken = read_samples(file.path, answered=answered)[: file.limit]
        samples += [Located(sample, file.path.parent) for sample in taken]
        sizes.append(len(taken))
        identity.update(f"{digest(file.path)} {file.limit} {file.weight!r}\n".encode())
    weights = tuple(file.weight for file in files)
    return Corpus(tuple(samples), tuple(sizes), weights, identity.hexdigest())
