"""Gradients of a step: where autograd has made them while there is one micro-batch, and summed in
fp32 once there are more.

Shapes: E numbers of a group of parameters end to end, N of a stretch of them.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finesight.model.frozen import KERNELS
from finesight.train.muon import Matrix

if KERNELS:
    from finesight.train import step_kernels

LARGE = 1 << 20
"""From so many numbers on, a gradient is added to its sum as soon as autograd has made it."""


@dataclass(frozen=True)
class Piece:
    """Where one parameter lies in its group."""

    name: str
    parameter: nn.Parameter
    place: slice

    def of(self, flat_E: Tensor) -> Tensor:
        """This parameter's part of a tensor of its group, in its own shape."""
        return flat_E[self.place].view(self.parameter.shape)

    @property
    def rows(self) -> Sequence[int]:
        """Of each matrix, where nothing else is said: a stack of experts has one for each."""
        *number, rows, _ = self.parameter.shape
        return (rows,) * math.prod(number)

    def matrices(self, rows: Sequence[int]) -> Iterator[Matrix]:
        """The parameter's matrices, stacked with so many rows each."""
        columns, start = self.parameter.shape[-1], self.place.start
        found = f"{rows} rows of {columns} in {self.parameter.shape}"
        assert sum(rows) * columns == self.parameter.numel(), found
        for number in rows:
            yield Matrix(slice(start, start + number * columns), number, columns)
            start += number * columns


class Gradients:
    """Of the parameters of one group, which hold `length` numbers with the gaps between them.

    Those of the first micro-batch stay with their parameters, in the parameters' type: they are
    their own sum. `add_up` before every further one moves them into `sum_E`, in fp32, which is made
    when it is first needed and then stays: so large a block would not be found again. Large
    gradients of later micro-batches are added as they come, small ones all at once.
    """

    def __init__(self, pieces: Sequence[Piece], length: int) -> None:
        self.pieces = pieces
        self.sum_E: Tensor | None = None
        self._length = length
        self._starts = [piece.place.start for piece in pieces]
        self._summed = False
        self._sums: list[Tensor] = []
        self._always = False
        self.device = pieces[0].parameter.device
        kernels = KERNELS and self.device.type == "cuda"
        places = [piece.place for piece in pieces]
        self.tiles = step_kernels.Tiles(places, self.device) if kernels else None
        for number, piece in enumerate(pieces):
            if piece.parameter.numel() >= LARGE:
                self._collect(number, piece)

    def _collect(self, number: int, piece: Piece) -> None:
        register: Callable[..., object] = piece.parameter.register_post_accumulate_grad_hook

        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None, f"{piece.name} was visited without a gradient"
            if self._summed:
                self._sums[number].add_(parameter.grad)
                parameter.grad = None

        register(collect)

    def sum_always(self) -> Tensor:
        """The tensor of the sums, which from now on never is another; one micro-batch is summed,
        too."""
        self._always = True
        return self._room()

    def _room(self) -> Tensor:
        if self.sum_E is None:
            self.sum_E = torch.zeros(self._length, dtype=torch.float32, device=self.device)
            self._sums = [piece.of(self.sum_E) for piece in self.pieces]
        return self.sum_E

    @torch.no_grad()
    def add_up(self) -> None:
        """Move what has come into the sums. Has to be called between any two micro-batches: left
        where it is, autograd would add the next to it in 16 bits."""
        came = [piece.parameter.grad for piece in self.pieces]
        sum_E, fresh = self._room(), not self._summed
        if self.tiles is not None:
            like = self.pieces[0].parameter.data
            step_kernels.add_up(self.tiles, came, like, sum_E, fresh)
        else:
            if fresh:
                sum_E.zero_()
            found = [n for n, gradient in enumerate(came) if gradient is not None]
            if found:
                ours, theirs = [self._sums[n] for n in found], [came[n] for n in found]
                torch._foreach_add_(ours, theirs)  # type: ignore[arg-type]
        self._summed = True
        self._clear()

    def of_each(self) -> Sequence[Tensor | None]:
        """The sum for every parameter, or None where no gradient came to it."""
        left = any(piece.parameter.grad is not None for piece in self.pieces)
        if left if self._summed else self._always:
            self.add_up()
        return self._sums if self._summed else [piece.parameter.grad for piece in self.pieces]

    def stretch(self, place: slice) -> Tensor:
        """The sums of a stretch in fp32 [N], zeros where no gradient came; to be used up."""
        if self._summed:
            return self._room()[place]
        flat_N = torch.zeros(place.stop - place.start, dtype=torch.float32, device=self.device)
        ours, theirs = [], []
        first = bisect_right(self._starts, place.start) - 1
        for piece in self.pieces[first : bisect_left(self._starts, place.stop)]:
            start = max(piece.place.start, place.start)
            stop = min(piece.place.stop, place.stop)
            if start < stop and piece.parameter.grad is not None:
                ours.append(flat_N[start - place.start : stop - place.start])
                own = piece.parameter.grad.view(-1)
                theirs.append(own[start - piece.place.start : stop - piece.place.start])
        if ours:
            torch._foreach_copy_(ours, theirs)
        return flat_N

    def used_up(self) -> None:
        """The step is taken: what comes next belongs to another."""
        self._summed = False
        self._clear()

    def forget(self) -> None:
        """The step is not taken. Its sums' memory is given back, so that another try has as much as
        this one."""
        self.used_up()
        if not self._always:
            self.sum_E, self._sums = None, []

    def _clear(self) -> None:
        for piece in self.pieces:
            piece.parameter.grad = None
