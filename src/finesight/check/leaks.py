"""Pictures that are held out and trained on: the same file, the same content, or saved anew."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from finesight.check.alike import shows_something
from finesight.check.findings import Finding, Place, Shown
from finesight.check.pictures import Album
from finesight.check.samples import paths_of
from finesight.data.sample import Sample

_REMEDY = "leave one of the two out: what was trained on says nothing about new pictures"


class Leaks:
    """Which pictures are held out; held-out samples are entered first, the others after them."""

    def __init__(self, album: Album) -> None:
        self._album = album
        self._held_out: dict[int, Place] = {}
        self._trained: defaultdict[int, list[Place]] = defaultdict(list)

    def hold_out(self, sample: Sample, place: Place) -> None:
        """Take down a held-out sample."""
        for number in self._numbers(sample):
            self._held_out.setdefault(number, place)

    def train(self, sample: Sample, place: Place) -> Iterator[Finding]:
        """Take down a sample to train on. The finding, if any, is that its picture is held out."""
        if not self._held_out:
            return
        for number in self._numbers(sample):
            if number in self._held_out:
                what = f"{self._album.examples[number]} is held out, at"
                yield self._finding("same-picture", place, number, number, what)
            else:
                self._trained[number].append(place)

    def close(self) -> Iterator[tuple[Place, Finding]]:
        """Pictures that were saved anew for one of the sides."""
        for held_out, trained in self._album.alike(self._held_out, self._trained):
            what = f"{self._album.examples[trained]} shows the same as a held-out picture, at"
            for place in self._trained[trained]:
                yield (
                    place,
                    self._finding("same-picture-resaved", place, trained, held_out, what),
                )

    def _numbers(self, sample: Sample) -> list[int]:
        """The contents that a sample shows, without those that are blank or cannot be used."""
        numbers = dict.fromkeys(self._album.number(path) for path in paths_of(sample))
        contents = self._album.contents
        return [
            n for n in numbers if not contents[n].fault and shows_something(contents[n].thumbnail)
        ]

    def _finding(self, code: str, place: Place, trained: int, held_out: int, what: str) -> Finding:
        other = self._held_out[held_out]
        shown = [Shown(Path(self._album.examples[number])) for number in (trained, held_out)]
        return place.finding(code, f"{what} {other.where}", _REMEDY, tuple(shown), "dropped")
