"""Pictures that a frozen tower has looked at: its features, kept for all steps of a run.

Shapes: P different pictures, M places of the pictures of a pack, A places of all pictures, K
features of each, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finesight.data.headers import DamagedPicture
from finesight.train.feature_files import Stored, read_rows
from finesight.train.loader import Form, Known
from finesight.train.shown import Shown


@dataclass(frozen=True)
class Places(Known):
    """Where the features of a pack stand among those of all pictures: that alone travels. It is
    made where packs are made, ahead of the step; samples go by their index in the corpus.

    `bounds_P1` are the places at which the pictures start, and the end of the last.
    """

    shown: Shown
    bounds_P1: NDArray[np.int64]

    def check(self, sample: int, places: int) -> None:
        """Raises DamagedPicture for a sample of which a picture could not be looked at, or whose
        pictures no longer take as many places as they did."""
        if sample in self.shown.damaged:
            raise self.shown.damaged[sample]
        if places != self.count([sample]):
            raise DamagedPicture(
                f"a picture takes {places} places among the tokens now, and took"
                f" {self.count([sample])} when it was looked at",
                where=str(self.shown.sights[self.numbers([sample])[0]].span.files[0]),
                expected="pictures that stay as they are while a run learns from them",
                remedy="start again with --resume: the pictures are looked at again",
            )

    def numbers(self, members: Sequence[int]) -> list[int]:
        """The pictures of these samples, one after the other."""
        return [number for sample in members for number in self.shown.of_sample[sample]]

    def count(self, members: Sequence[int]) -> int:
        """M of these samples."""
        sights = self.shown.sights
        return sum(sights[number].places for number in self.numbers(members))

    def form(self, members: Sequence[int]) -> Form:
        """int64 [M]."""
        return torch.int64, (self.count(members),)

    def lay(self, members: Sequence[int], room: Tensor) -> None:
        """The places, one picture after the other."""
        bounds = self.bounds_P1
        ranges = [np.arange(bounds[n], bounds[n + 1]) for n in self.numbers(members)]
        if ranges:
            np.concatenate(ranges, out=room.numpy())


@dataclass(frozen=True)
class InMemory(Places):
    """Features [A, K, D] that the processes share which make packs; those of a pack travel."""

    features_AKD: Tensor

    def form(self, members: Sequence[int]) -> Form:
        """[M, K, D]."""
        return self.features_AKD.dtype, (self.count(members), *self.features_AKD.shape[1:])

    def lay(self, members: Sequence[int], room: Tensor) -> None:
        """The features, gathered."""
        at_M = torch.empty(len(room), dtype=torch.int64)
        super().lay(members, at_M)
        torch.index_select(self.features_AKD, 0, at_M, out=room)


@dataclass(frozen=True)
class OnDisk(Places):
    """Features in `files`, one for each chunk of pictures, of which `firsts` are the first ones;
    those of a pack travel. `tail` is (K, D)."""

    files: Sequence[Stored]
    firsts: NDArray[np.int64]
    tail: tuple[int, int]
    dtype: torch.dtype

    def form(self, members: Sequence[int]) -> Form:
        """[M, K, D]."""
        return self.dtype, (self.count(members), *self.tail)

    def lay(self, members: Sequence[int], room: Tensor) -> None:
        """The features, read. Raises Unreadable where a file is gone or cut off."""
        start = 0
        for number in self.numbers(members):
            stop = start + self.shown.sights[number].places
            chunk = int(np.searchsorted(self.firsts, number, "right")) - 1
            at = self.bounds_P1[number] - self.bounds_P1[self.firsts[chunk]]
            read_rows(self.files[chunk], int(at), room[start:stop])
            start = stop


@dataclass(frozen=True, slots=True)
class Seen:
    """Features of all pictures: `known` travels with the packs, and where that is places alone,
    `features_AKD` are on the device."""

    known: Places
    device: torch.device
    features_AKD: Tensor | None = None

    def of(self, known: Tensor) -> Tensor:
        """Features [M, K, D] of a pack on the device, by what has travelled with it: one copy that
        nobody waits for, or one gather."""
        there = known.to(self.device, non_blocking=True)
        return there if self.features_AKD is None else self.features_AKD.index_select(0, there)
