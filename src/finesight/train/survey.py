"""Every sample looked at before training: tokens counted, pictures' headers read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import Dataset

from finesight.config import Data
from finesight.data.headers import DamagedPicture
from finesight.data.sources import Corpus
from finesight.encode.encoded import Outline
from finesight.encode.lengths import usable
from finesight.encode.render import Renderer
from finesight.errors import UserError
from finesight.train.loader import Dropped
from finesight.train.progress import Advance
from finesight.train.workers import guarded, read_ahead

CHUNK = 64
"""Samples that a worker looks at before it reports."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Which samples of a corpus will be used: `kept` holds their indices, `dropped` the others.
    `tokens` and `patches` are sums over the kept ones, `longest` counts tokens."""

    kept: tuple[int, ...]
    dropped: tuple[Dropped, ...]
    tokens: int
    patches: int
    longest: int


class _Outlines(Dataset[list[Outline | UserError] | UserError]):
    def __init__(self, corpus: Corpus, renderer: Renderer) -> None:
        self._corpus, self._renderer = corpus, renderer

    def __getitem__(self, number: int) -> list[Outline | UserError] | UserError:
        chunk = range(number * CHUNK, min((number + 1) * CHUNK, len(self._corpus)))
        return [self._outline(index) for index in chunk]

    def _outline(self, index: int) -> Outline | UserError:
        return guarded(lambda: self._renderer.outline(self._corpus[index]))


def survey(
    corpus: Corpus, renderer: Renderer, data: Data, workers: int, advance: Advance | None = None
) -> Survey:
    """Outline every sample of `corpus` and choose the usable ones.

    Over-long samples, samples with nothing to learn and unusable pictures are dropped with their
    reason or, by `data.unusable`, refused with a UserError; other mistakes in a sample always are.
    """
    chunks = range(-(-len(corpus) // CHUNK))
    source = _Outlines(corpus, renderer)
    lists: Iterator[list[Outline | UserError]] = read_ahead(
        source, chunks, min(workers, len(chunks) // 4), pin=False
    )
    damaged: dict[int, str] = {}
    patches: list[int] = []

    def whole() -> Iterator[Outline]:
        index = 0
        for outlines in lists:
            for outline in outlines:
                if isinstance(outline, Outline):
                    patches.append(outline.patches)
                    yield outline
                elif isinstance(outline, DamagedPicture) and data.unusable == "drop":
                    damaged[index] = str(outline).splitlines()[0]
                else:
                    raise outline
                index += 1
            if advance is not None:
                advance(len(outlines))
        if not patches:
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
    return Survey(
        kept=tuple(readable[i] for i in chosen.kept),
        dropped=tuple(dropped),
        tokens=sum(chosen.tokens),
        patches=sum(patches[i] for i in chosen.kept),
        longest=max(chosen.tokens),
    )
