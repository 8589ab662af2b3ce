"""The data files of a recipe as one sequence of samples."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from finesight.config import DataFile
from finesight.data.jsonl import Located, parse, sample_lines
from finesight.data.lines import Lines
from finesight.data.rules import check_sample


@dataclass(frozen=True)
class Corpus:
    """The samples of all files end to end, limits applied. They stay in their files, and each is
    read when it is asked for: a corpus of millions needs little memory.

    `fingerprint` is a SHA-256 over the files' bytes, limits and weights: two corpora that share it
    give the same samples in the same order, wherever the files lie.
    """

    files: tuple[Lines, ...]
    weights: tuple[float, ...]
    fingerprint: str
    answered: bool = True

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each file, in order."""
        return tuple(len(lines) for lines in self.files)

    def read(self, limit: int | None = None) -> list[Located]:
        """All samples, or the first ones, each read and checked now."""
        return [self.checked(index) for index in range(len(self))[:limit]]

    def __len__(self) -> int:
        return self._ends[-1] if self.files else 0

    def __getitem__(self, index: int) -> Located:
        """A sample that has been checked before, so that its types alone are looked at."""
        return self._parsed(*self._place(index))

    def checked(self, index: int) -> Located:
        """A sample. Raises UserError naming file and line for what `check_sample` refuses."""
        lines, place = self._place(index)
        found = self._parsed(lines, place)
        check_sample(found.sample, lines.where(place), answered=self.answered)
        return found

    def where(self, index: int) -> str:
        """A sample's file and line."""
        lines, place = self._place(index)
        return lines.where(place)

    def _parsed(self, lines: Lines, place: int) -> Located:
        return Located(parse(lines[place], lines.where(place)), lines.path.parent)

    def _place(self, index: int) -> tuple[Lines, int]:
        assert 0 <= index < len(self), f"sample {index} of {len(self)}"
        number = bisect_right(self._ends, index)
        return self.files[number], index - (self._ends[number] - len(self.files[number]))

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.sizes))


def load_sources(files: tuple[DataFile, ...], *, answered: bool = True) -> Corpus:
    """The files of a recipe's `data.train` or `data.eval`, their samples not yet looked at. Raises
    UserError for a file that is missing, unreadable or empty."""
    identity = hashlib.sha256()
    lines: list[Lines] = []
    for file in files:
        lines.append(sample_lines(file.path).first(file.limit))
        identity.update(f"{lines[-1].index.digest} {file.limit} {file.weight!r}\n".encode())
    weights = tuple(file.weight for file in files)
    return Corpus(tuple(lines), weights, identity.hexdigest(), answered)
