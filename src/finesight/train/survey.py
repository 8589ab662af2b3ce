"""Every sample looked at before training: checked, tokens counted, pictures' headers read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from torch.utils.data import Dataset

from finesight.config import Data
from finesight.data.headers import DamagedPicture
from finesight.data.jsonl import Located
from finesight.data.sample import files_of
from finesight.data.sources import Corpus
from finesight.encode.encoded import Grid
from finesight.encode.lengths import usable
from finesight.encode.rendering import Rendering
from finesight.errors import UserError
from finesight.train.loader import Dropped
from finesight.train.progress import Advance
from finesight.train.workers import guarded, read_ahead

CHUNK = 64
"""Samples that a worker looks at before it reports."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Which samples of a corpus will be used: `kept` holds their indices, `glances` what was seen
    of each, `dropped` the others. `tokens` and `patches` are sums over the kept ones, `longest`
    counts tokens. `pictures` counts the files of pictures and frames that the kept ones show,
    `distinct` those that differ in their path. `met` are the watched pictures that samples have."""

    kept: tuple[int, ...]
    dropped: tuple[Dropped, ...]
    tokens: int
    patches: int
    longest: int
    pictures: int = 0
    distinct: int = 0
    met: frozenset[str] = frozenset()
    glances: tuple[Glance, ...] = ()


class Glance(NamedTuple):
    """What a worker reports of a sample; an outline would be a hundred times as much. `pictures`
    has a short digest of each path."""

    id: str
    tokens: int
    supervised: int
    grids: tuple[Grid, ...]
    pictures: tuple[bytes, ...]
    met: frozenset[str]

    @property
    def patches(self) -> int:
        """Of all its pictures."""
        return sum(t * h * w for t, h, w in self.grids)


class _Glances(Dataset[list[Glance | UserError] | UserError]):
    def __init__(self, corpus: Corpus, renderer: Rendering, watched: Set[str]) -> None:
        self._corpus, self._renderer, self._watched = corpus, renderer, watched

    def __getitem__(self, number: int) -> list[Glance | UserError] | UserError:
        chunk = range(number * CHUNK, min((number + 1) * CHUNK, len(self._corpus)))
        return [self._guarded(index) for index in chunk]

    def _guarded(self, index: int) -> Glance | UserError:
        return guarded(lambda: self._glance(index))

    def _glance(self, index: int) -> Glance:
        located = self._corpus.checked(index)
        outline = self._renderer.outline(located)
        shown = pictures_of(located)
        return Glance(
            id=outline.id,
            tokens=outline.tokens,
            supervised=outline.supervised,
            grids=tuple(span.grid for span in outline.spans),
            pictures=tuple(blake2b(os.fsencode(path), digest_size=8).digest() for path in shown),
            met=frozenset(shown & self._watched),
        )


def pictures_of(located: Located) -> set[str]:
    """Absolute paths of all pictures and frames of a sample."""
    return {
        os.path.abspath(located.folder / name)
        for part in located.sample.parts()
        for name in files_of(part)
    }


def survey(
    corpus: Corpus,
    renderer: Rendering,
    data: Data,
    workers: int,
    advance: Advance | None = None,
    watched: Set[str] = frozenset(),
) -> Survey:
    """Check and outline every sample of `corpus` and choose the usable ones; `watched` are absolute
    paths of pictures to be told of when samples have them.

    Over-long samples, samples with nothing to learn and unusable pictures are dropped with their
    reason or, by `data.unusable`, refused with a UserError; other mistakes in a sample always are.
    """
    chunks = range(-(-len(corpus) // CHUNK))
    source = _Glances(corpus, renderer, watched)
    lists: Iterator[list[Glance | UserError]] = read_ahead(
        source, chunks, min(workers, len(chunks) // 4), pin=False
    )
    damaged: dict[int, str] = {}
    seen: list[Glance] = []
    met: set[str] = set()

    def whole() -> Iterator[Glance]:
        index = 0
        for glances in lists:
            for glance in glances:
                if isinstance(glance, Glance):
                    seen.append(glance)
                    met.update(glance.met)
                    yield glance
                elif isinstance(glance, DamagedPicture) and data.unusable == "drop":
                    damaged[index] = str(glance).splitlines()[0]
                else:
                    raise glance
                index += 1
            if advance is not None:
                advance(len(glances))
        if not seen:
            raise UserError(
                f"not one of {len(corpus)} samples has pictures that can be read",
                where="data",
                expected="whole pictures, at the paths that the samples name",
                remedy=f"the first one says: {next(iter(damaged.values()))}",
            )

    chosen = usable(whole(), data.max_length, data.unusable)
    readable = [index for index in range(len(corpus)) if index not in damaged]
    dropped = [Dropped(corpus[index].sample.id, reason) for index, reason in damaged.items()]
    dropped += [Dropped(name, f"over {data.max_length} tokens") for name in chosen.too_long]
    dropped += [Dropped(name, "nothing to learn") for name in chosen.without_answer]
    glances = tuple(seen[i] for i in chosen.kept)
    return Survey(
        kept=tuple(readable[i] for i in chosen.kept),
        dropped=tuple(dropped),
        tokens=sum(chosen.tokens),
        patches=sum(glance.patches for glance in glances),
        longest=max(chosen.tokens),
        pictures=sum(len(glance.pictures) for glance in glances),
        distinct=len({shown for glance in glances for shown in glance.pictures}),
        met=frozenset(met),
        glances=glances,
    )
