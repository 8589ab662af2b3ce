"""Gradients of a step: where autograd has made them while there is one micro-batch, and summed in
fp32 once there are more.

Shapes: E numbers of a group of parameters end to end, N of a stretch of them.
"""

from __future__ import annotations

import math
import weakref
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
"""From so many numbers on, a gradient is added to its sum as soon as autograd has made it, and of a
recording laid where it stays (`train.recorded`)."""


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

    Those of a step's first micro-batch stay with their parameters, in the parameters' type: they
    are their own sum. `add_up` before every further one moves them into sums of fp32. A sum is made
    when it is first needed and then stays; from then on, that of a large parameter takes a gradient
    as soon as it comes, and there never is room for both. Small ones are added all at once.
    """

    def __init__(self, pieces: Sequence[Piece], length: int) -> None:
        self.pieces, self.device = pieces, pieces[0].parameter.device
        self._length, self._starts = length, [piece.place.start for piece in pieces]
        self._flat_E: Tensor | None = None
        self._sums: list[Tensor | None] = [None] * len(pieces)
        # Whether its sum holds something of this step.
        self._came = [False] * len(pieces)
        self._large = [n for n, p in enumerate(pieces) if p.parameter.numel() >= LARGE]
        self._small = [n for n, p in enumerate(pieces) if p.parameter.numel() < LARGE]
        kernels = KERNELS and self.device.type == "cuda"
        places = [piece.place for piece in pieces]
        self.tiles = step_kernels.Tiles(places, self.device) if kernels else None
        few = [places[n] for n in self._small]
        self._few = step_kernels.Tiles(few, self.device) if kernels and few else None
        for number in self._large:
            self._collect(number)

    def _collect(self, number: int) -> None:
        own = self.pieces[number].parameter
        register: Callable[..., object] = own.register_post_accumulate_grad_hook
        # The parameter holds its hook where no garbage collector looks: it must not hold itself.
        gradients = weakref.ref(self)

        def collect(parameter: Tensor) -> None:
            found = gradients()
            if found is not None and found._sums[number] is not None:
                found._take(number)

        register(collect)

    def _take(self, number: int) -> None:
        """Add one gradient to its sum."""
        parameter, sum_ = self.pieces[number].parameter, self._sum_of(number)
        assert parameter.grad is not None, f"nothing came to {self.pieces[number].name}"
        if self._came[number]:
            sum_.add_(parameter.grad)
        else:
            sum_.copy_(parameter.grad)
        self._came[number], parameter.grad = True, None

    def _sum_of(self, number: int) -> Tensor:
        found = self._sums[number]
        if found is None:
            parameter = self.pieces[number].parameter
            found = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
            self._sums[number] = found
        return found

    def sum_always(self) -> None:
        """Keep all sums in one tensor, and sum one micro-batch, too; see `whole`."""
        if self._flat_E is not None:
            return
        self._flat_E = torch.zeros(self._length, dtype=torch.float32, device=self.device)
        self._sums = [piece.of(self._flat_E) for piece in self.pieces]

    @torch.no_grad()
    def whole(self) -> Tensor:
        """All sums, zeros where no gradient came [E]: the same tensor each time, to be used up."""
        assert self._flat_E is not None, f"{len(self.pieces)} sums lie apart"
        self.add_up()
        for sum_, came in zip(self._sums, self._came, strict=True):
            if sum_ is not None and not came:
                sum_.zero_()
        return self._flat_E

    @torch.no_grad()
    def join(self, add: Callable[[Tensor], object]) -> None:
        """Let `add` put the sum of all processes in the place of this one's; see `sum_always`."""
        add(self.whole())
        self._came = [True] * len(self.pieces)

    @torch.no_grad()
    def add_up(self) -> None:
        """Move what has come into the sums. Has to be called between any two micro-batches: left
        where it is, autograd would add the next to it in 16 bits."""
        for number in self._large:
            if self.pieces[number].parameter.grad is not None:
                self._take(number)
        small = [n for n in self._small if self.pieces[n].parameter.grad is not None]
        if self._few is not None and small:
            step_kernels.add_up(
                self._few,
                [self.pieces[n].parameter.grad for n in self._small],
                [self._sum_of(n) for n in self._small],
                [self._came[n] for n in self._small],
            )
            for number in small:
                self._came[number], self.pieces[number].parameter.grad = True, None
        else:
            for number in small:
                self._take(number)

    def of_each(self) -> Sequence[Tensor | None]:
        """The sum for every parameter, or None where no gradient came to it."""
        if self._flat_E is not None or any(self._came):
            self.add_up()
            return [s if came else None for s, came in zip(self._sums, self._came, strict=True)]
        return [piece.parameter.grad for piece in self.pieces]

    def squares(self) -> Tensor:
        """The sum of the squares of all of them, a scalar on the device in fp32 or wider."""
        of_each = self.of_each()
        came = [gradient for gradient in of_each if gradient is not None]
        if not came:
            return torch.zeros((), device=self.device)
        if self.tiles is not None:
            return step_kernels.squares(self.tiles, of_each)
        norms = torch._foreach_norm(came, 2, torch.promote_types(came[0].dtype, torch.float32))
        return torch.stack(norms).square_().sum()

    def stretch(self, place: slice) -> Tensor:
        """What `of_each` gave, of a stretch of the group in fp32 [N], zeros where no gradient came;
        to be used up."""
        flat_N = torch.zeros(place.stop - place.start, dtype=torch.float32, device=self.device)
        ours, theirs = [], []
        first = max(0, bisect_right(self._starts, place.start) - 1)
        for number in range(first, bisect_left(self._starts, place.stop)):
            own = self.pieces[number].place
            start, stop = max(own.start, place.start), min(own.stop, place.stop)
            of_one = self.pieces[number].parameter.grad
            gradient = self._sums[number] if self._came[number] else of_one
            if start < stop and gradient is not None:
                ours.append(flat_N[start - place.start : stop - place.start])
                theirs.append(gradient.view(-1)[start - own.start : stop - own.start])
        if ours:
            torch._foreach_copy_(ours, theirs)
        return flat_N

    def used_up(self) -> None:
        """The step is taken: what comes next belongs to another."""
        self._came = [False] * len(self.pieces)
        for piece in self.pieces:
            piece.parameter.grad = None

    def forget(self) -> None:
        """The step is not taken. Its sums' memory is given back, so that another try has as much as
        this one."""
        self.used_up()
        if self._flat_E is None:
            self._sums = [None] * len(self.pieces)
