"""The pictures that samples show, each once: known by what is fed of them, in chunks that are a
function of their content alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from finesight.data.headers import DamagedPicture
from finesight.data.inside import content_digest
from finesight.data.sources import Corpus
from finesight.encode.encoded import Span
from finesight.encode.rendering import Rendering
from finesight.errors import UserError
from finesight.train.progress import Advance
from finesight.train.workers import guarded, read_ahead

CHUNK_PATCHES = 16384
"""A chunk ends with the picture that brings it to this: bounds the memory of looking at it."""

_SAMPLES = 64
"""Samples that a worker reads before it reports."""


class Sight(NamedTuple):
    """A picture or video as a sample shows it. `key` is a SHA-256 over its files' bytes, the size
    that it is brought to and its patches along each side: what shares it is fed the same."""

    key: str
    span: Span

    @property
    def places(self) -> int:
        """Places among the tokens that its features take."""
        return self.span.stop - self.span.start

    @property
    def patches(self) -> int:
        """Patches that the tower reads."""
        frames, height, width = self.span.grid
        return frames * height * width


@dataclass(frozen=True, slots=True)
class Chunk:
    """Pictures [start, stop) of all, looked at together; `name` is a SHA-256 of their keys."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Shown:
    """`sights` are the different pictures that samples show, in the order of their keys, and
    `of_sample` says for each sample, by its index in the corpus, which of them it shows. `damaged`
    are the samples of which a picture could no longer be read."""

    sights: tuple[Sight, ...]
    of_sample: Mapping[int, tuple[int, ...]]
    damaged: Mapping[int, DamagedPicture]

    @property
    def bounds_P1(self) -> NDArray[np.int64]:
        """Where the features of each picture start when those of all lie end to end, and the end
        of the last."""
        return np.cumsum([0, *(sight.places for sight in self.sights)])

    def pictures(self, chunks: Sequence[Chunk]) -> int:
        """How many these chunks hold."""
        return sum(chunk.stop - chunk.start for chunk in chunks)

    def patches(self, chunks: Sequence[Chunk]) -> int:
        """Of the pictures of these chunks."""
        sights = self.sights
        return sum(sights[n].patches for chunk in chunks for n in range(chunk.start, chunk.stop))

    def chunks(self) -> list[Chunk]:
        """All pictures, shared out to be looked at together.

        A chunk ends behind a picture whose key says so, one of sixteen, or where it is large
        enough: pictures that come to a corpus or leave it change the chunks they are in, no others.
        What is computed of a picture may depend, in its last bits, on those beside it; so it is
        the same in every run that finds the chunk or makes it.
        """
        ends, patches = [0], 0
        for number, sight in enumerate(self.sights, 1):
            patches += sight.patches
            last = number == len(self.sights)
            if last or sight.key[-1] == "0" or patches >= CHUNK_PATCHES:
                ends.append(number)
                patches = 0
        return [Chunk(self._name(start, stop), start, stop) for start, stop in pairwise(ends)]

    def _name(self, start: int, stop: int) -> str:
        keys = "".join(sight.key for sight in self.sights[start:stop])
        return hashlib.sha256(keys.encode()).hexdigest()


class _Sights(Dataset[list[list[Sight] | UserError] | UserError]):
    """Item k is what the k-th samples of those asked for show."""

    def __init__(self, corpus: Corpus, renderer: Rendering, samples: Sequence[int]) -> None:
        self._corpus, self._renderer, self._samples = corpus, renderer, samples
        self._digests: dict[Path, str] = {}

    def __getitem__(self, number: int) -> list[list[Sight] | UserError] | UserError:
        start = number * _SAMPLES
        return [self._guarded(index) for index in self._samples[start : start + _SAMPLES]]

    def _guarded(self, index: int) -> list[Sight] | UserError:
        return guarded(lambda: self._sights(index))

    def _sights(self, index: int) -> list[Sight]:
        spans = self._renderer.outline(self._corpus[index]).spans
        return [Sight(self._key(span), span) for span in spans]

    def _key(self, span: Span) -> str:
        fed = [[self._digest(file) for file in span.files], span.kind, span.resized, span.grid]
        return hashlib.sha256(json.dumps(fed).encode()).hexdigest()

    def _digest(self, file: Path) -> str:
        # Samples with the same picture often stand together.
        if file not in self._digests:
            try:
                self._digests[file] = content_digest(file)
            except OSError as error:
                raise DamagedPicture(
                    f"cannot be read: {error.strerror or error}",
                    where=str(file),
                    expected="a picture that stays where it is",
                    remedy="put the picture back, or correct its permissions",
                ) from error
        return self._digests[file]


def shown_by(
    corpus: Corpus, renderer: Rendering, samples: Sequence[int], workers: int, advance: Advance
) -> Shown:
    """What these samples of the corpus show, every file read to its end.

    Raises UserError for what is wrong with a sample other than a picture that cannot be used.
    """
    parts = range(-(-len(samples) // _SAMPLES))
    source = _Sights(corpus, renderer, samples)
    found: dict[int, list[Sight]] = {}
    damaged: dict[int, DamagedPicture] = {}
    indices = iter(samples)
    lists: Iterator[list[list[Sight] | UserError]] = read_ahead(
        source, parts, min(workers, len(parts) // 4), pin=False
    )
    with closing(part for part in lists) as reading:
        # The last reference: the workers end with the block.
        del lists
        for part in reading:
            for sights in part:
                index = next(indices)
                if isinstance(sights, DamagedPicture):
                    damaged[index] = sights
                elif isinstance(sights, UserError):
                    raise sights
                else:
                    found[index] = sights
            advance(len(part))
    different = {sight.key: sight for sights in found.values() for sight in sights}
    number = {key: place for place, key in enumerate(sorted(different))}
    return Shown(
        sights=tuple(different[key] for key in number),
        of_sample={index: tuple(number[s.key] for s in found[index]) for index in found},
        damaged=damaged,
    )
