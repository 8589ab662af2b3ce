"""Samples looked at before training: checked, tokens counted, pictures' headers read. All of them,
or of very many some, by which the others are judged until they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from finesight.config import Data
from finesight.data.headers import DamagedPicture
from finesight.data.jsonl import Located
from finesight.data.sample import files_of
from finesight.data.sources import Corpus
from finesight.encode.encoded import Grid
from finesight.encode.lengths import unfit, usable
from finesight.encode.pack import Common
from finesight.encode.rendering import Rendering
from finesight.errors import UserError
from finesight.train.image_record import ImageState, ImageStates, image_state
from finesight.train.loader import Dropped
from finesight.train.progress import Advance
from finesight.train.workers import guarded, read_ahead

MOST = 500_000
"""Samples that are all looked at: of more, it would take minutes, and gigabytes to remember."""

SOME = 10_000
"""How many are looked at where there are more."""

CHUNK = 64
"""Samples that a worker looks at before it reports."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Which samples of a corpus will be used: `kept` holds their indices, `dropped` the others.
    `tokens` and `patches` are sums over the kept ones, `longest` counts tokens. `pictures` counts
    the files of pictures and frames that the kept ones show, `distinct` those that differ in their
    path. `met` are the watched pictures that samples have. `glances` are what was seen of the
    samples `seen`, `beginning` counts the tokens that all of them begin with (`encode.pack`).
    `images` are the fingerprints of their images.

    Where all were looked at, `seen` are those that are kept. Otherwise all are kept, `looked_at` of
    them were looked at, `seen` can be used, sums are estimates, and `pictures` is not known."""

    kept: Sequence[int]
    dropped: tuple[Dropped, ...]
    tokens: int
    patches: int
    longest: int
    pictures: int = 0
    distinct: int = 0
    met: frozenset[str] = frozenset()
    glances: tuple[Glance, ...] = ()
    seen: Sequence[int] = ()
    looked_at: int = 0
    beginning: int = 0
    images: ImageStates = field(default_factory=ImageStates.none, compare=False)

    @property
    def whole(self) -> bool:
        """Whether all samples were looked at."""
        return self.looked_at == len(self.kept) + len(self.dropped)


class Glance(NamedTuple):
    """What a worker reports of a sample; an outline would be a hundred times as much. Packs have
    the `needed` of its tokens; `pictures` has a short digest of each path."""

    id: str
    tokens: int
    needed: int
    supervised: int
    grids: tuple[Grid, ...]
    pictures: tuple[bytes, ...]
    met: frozenset[str]

    @property
    def patches(self) -> int:
        """Of all its pictures."""
        return sum(t * h * w for t, h, w in self.grids)


class _Look(NamedTuple):
    """What is seen of a sample, what it begins with, and the fingerprints of its images."""

    glance: Glance
    begins: Common
    images: ImageState


class _Looks(Dataset[list[_Look | UserError] | UserError]):
    """Item k is what is seen of the k-th samples of these."""

    def __init__(
        self, corpus: Corpus, indices: Sequence[int], renderer: Rendering, watched: Set[str]
    ) -> None:
        self._corpus, self._indices = corpus, indices
        self._renderer, self._watched = renderer, watched

    def __getitem__(self, number: int) -> list[_Look | UserError] | UserError:
        chunk = self._indices[number * CHUNK : (number + 1) * CHUNK]
        return [self._guarded(index) for index in chunk]

    def _guarded(self, index: int) -> _Look | UserError:
        return guarded(lambda: _look(self._corpus, index, self._renderer, self._watched))


def _look(corpus: Corpus, index: int, renderer: Rendering, watched: Set[str]) -> _Look:
    located = corpus.checked(index)
    outline = renderer.outline(located)
    shown = pictures_of(located)
    glance = Glance(
        id=outline.id,
        tokens=outline.tokens,
        needed=outline.needed,
        supervised=outline.supervised,
        grids=tuple(span.grid for span in outline.spans),
        pictures=tuple(blake2b(os.fsencode(path), digest_size=8).digest() for path in shown),
        met=frozenset(shown & watched),
    )
    return _Look(glance, Common.of(outline), image_state(located))


class Glances(dict[int, Glance]):
    """What was seen of samples, by their index in the corpus. One that was not looked at is looked
    at when it is asked for; one that cannot be used shows nothing. All that were looked at begin
    with `beginning` tokens that are the same."""

    def __init__(self, corpus: Corpus, found: Survey, renderer: Rendering, max_length: int) -> None:
        super().__init__(zip(found.seen, found.glances, strict=True))
        self.beginning = found.beginning
        self._corpus, self._renderer, self._max_length = corpus, renderer, max_length

    def __missing__(self, index: int) -> Glance:
        seen = guarded(lambda: _look(self._corpus, index, self._renderer, frozenset()))
        if isinstance(seen, UserError) or unfit(seen.glance, self._max_length) is not None:
            return Glance("", 0, 0, 0, (), (), frozenset())
        return seen.glance


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
    some: Sequence[int] | None = None,
) -> Survey:
    """Check and outline samples of `corpus` and choose the usable ones; `watched` are absolute
    paths of pictures to be told of when samples have them. Every sample, unless there are `some`.

    Over-long samples, samples with nothing to learn and unusable pictures are dropped with their
    reason or, by `data.unusable`, refused with a UserError; other mistakes in a sample always are.
    """
    indices = range(len(corpus)) if some is None else some
    chunks = range(-(-len(indices) // CHUNK))
    source = _Looks(corpus, indices, renderer, watched)
    lists: Iterator[list[_Look | UserError]] = read_ahead(
        source, chunks, min(workers, len(chunks) // 4), pin=False
    )
    damaged: dict[int, str] = {}
    seen: list[Glance] = []
    states: list[ImageState] = []
    met: set[str] = set()
    begin: Common | None = None

    def whole() -> Iterator[Glance]:
        nonlocal begin
        index = 0
        for looks in lists:
            for look in looks:
                if isinstance(look, _Look):
                    if unfit(look.glance, data.max_length) is None:
                        begin = look.begins if begin is None else begin.meet(look.begins)
                    seen.append(look.glance)
                    states.append(look.images)
                    met.update(look.glance.met)
                    yield look.glance
                elif isinstance(look, DamagedPicture) and data.unusable == "drop":
                    damaged[index] = str(look).splitlines()[0]
                else:
                    raise look
                index += 1
            if advance is not None:
                advance(len(looks))
        if not seen:
            raise _all_damaged(len(indices), next(iter(damaged.values())))

    chosen = usable(whole(), data.max_length, data.unusable)
    readable = [index for place, index in enumerate(indices) if place not in damaged]
    glances = tuple(seen[i] for i in chosen.kept)
    kept = tuple(readable[i] for i in chosen.kept)
    images = ImageStates.of(kept, [states[i] for i in chosen.kept])
    beginning = 0 if begin is None else begin.tokens
    if some is not None:
        estimate = _estimated(len(corpus), indices, kept, glances, met, beginning)
        return replace(estimate, images=images)
    dropped = [Dropped(corpus[index].sample.id, reason) for index, reason in damaged.items()]
    dropped += [Dropped(name, f"over {data.max_length} tokens") for name in chosen.too_long]
    dropped += [Dropped(name, "nothing to learn") for name in chosen.without_answer]
    return Survey(
        kept=kept,
        dropped=tuple(dropped),
        tokens=sum(chosen.tokens),
        patches=sum(glance.patches for glance in glances),
        longest=max(chosen.tokens),
        pictures=sum(len(glance.pictures) for glance in glances),
        distinct=len({shown for glance in glances for shown in glance.pictures}),
        met=frozenset(met),
        glances=glances,
        seen=kept,
        looked_at=len(corpus),
        beginning=beginning,
        images=images,
    )


def _all_damaged(samples: int, first: str) -> UserError:
    return UserError(
        f"not one of {samples} samples has pictures that can be read",
        where="data",
        expected="whole pictures, at the paths that the samples name",
        remedy=f"the first one says: {first}",
    )


def spread(samples: int) -> Sequence[int]:
    """About `SOME` of so many samples, in order: drawn by chance, always the same ones."""
    draws = np.random.Philox(np.random.SeedSequence(samples)).random_raw(SOME)
    return [int(index) for index in np.unique(draws % samples)]


def _estimated(
    samples: int,
    indices: Sequence[int],
    fit: Sequence[int],
    glances: tuple[Glance, ...],
    met: set[str],
    beginning: int,
) -> Survey:
    """Of so many samples, when those of these indices were looked at, and those `fit` can be used;
    all of them are kept, as which others cannot be used is not known."""
    share = samples / len(indices)
    return Survey(
        kept=range(samples),
        dropped=(),
        tokens=round(share * sum(glance.tokens for glance in glances)),
        patches=round(share * sum(glance.patches for glance in glances)),
        longest=max(glance.tokens for glance in glances),
        met=frozenset(met),
        glances=glances,
        seen=fit,
        looked_at=len(indices),
        beginning=beginning,
    )
