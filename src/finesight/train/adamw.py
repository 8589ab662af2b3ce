"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) for a group of parameters: one kernel where
Triton is, stretch by stretch else.

Bytes for each number that learns in bf16: 2 that the model computes with, 2 beside them for the
fp32 master, 2 of gradient from the backward pass to the step, and moments of 8, or of 2.03 in eight
bits: 14 or 8.03. Where several micro-batches make a step, the sum of their gradients takes 4
instead of 2. A step reads and writes 26 bytes a number, or 14, and 2 for the gradient's norm.

Shapes: E numbers of a group of parameters end to end, M of a stretch of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finesight.model.frozen import KERNELS
from finesight.train.gradients import Gradients
from finesight.train.moments import EPSILON, EightBits, Moment, Pace
from finesight.train.wide import Wide

if KERNELS:
    from finesight.train import step_kernels

MOST = 1 << 20
"""Numbers that are stepped at once without a kernel: meanwhile each takes some 20 bytes."""


class AdamW:
    """Steps for one group. Its two moments are all that it remembers, and how many steps were
    `taken`: a number on the device, which alone knows whether one is void."""

    def __init__(
        self,
        numbers: Wide,
        gradients: Gradients,
        betas: tuple[float, float],
        eight_bits: bool = False,
    ) -> None:
        self._numbers, self._gradients, self._betas = numbers, gradients, betas
        length, device = len(numbers), numbers.narrow_E.device
        self.first: Moment
        self.second: Moment
        if eight_bits:
            self.first = EightBits(length, device, signed=True)
            self.second = EightBits(length, device, signed=False)
        else:
            self.first, self.second = Moment(length, device), Moment(length, device)
        self._taken = torch.zeros((), dtype=torch.float64, device=device)
        self._next = self._taken.clone()

    @property
    def taken(self) -> int:
        """Steps that were not void. Waits for the device."""
        return int(self._taken)

    @taken.setter
    def taken(self, number: int) -> None:
        self._taken.fill_(number)

    @torch.no_grad()
    def step(self, shrink: Tensor, rate: float, decay: float) -> None:
        """Move the numbers by a step at this rate, of gradients times `shrink`, a scalar on the
        device, and shrink them by `rate` times `decay`. Where `shrink` is NaN, the step is void: it
        changes nothing and does not count. Waits for nothing where there is a kernel."""
        pace = Pace(rate, decay, self._betas)
        tiles, moments = self._gradients.tiles, (self.first, self.second)
        of_each = self._gradients.of_each()
        if tiles is not None:
            count = self._taken, self._next
            step_kernels.adamw(tiles, of_each, self._numbers, moments, shrink, count, pace)
            self._next, self._taken = count
            return
        if not shrink.isfinite():
            return
        self.taken += 1
        taken = self.taken
        for start in range(0, len(self._numbers), MOST):
            self._step(slice(start, min(start + MOST, len(self._numbers))), shrink, pace, taken)

    def _step(self, place: slice, shrink: Tensor, pace: Pace, taken: int) -> None:
        beta_1, beta_2 = pace.betas
        grad_M = self._gradients.stretch(place).mul_(shrink)
        first_M = self.first.of(place).lerp_(grad_M, 1 - beta_1)
        second_M = self.second.of(place).mul_(beta_2)
        second_M.addcmul_(grad_M, grad_M, value=1 - beta_2)
        self.first.keep(first_M, place)
        self.second.keep(second_M, place)
        # Moved by the moments as they were before they were rounded.
        root_M = second_M.sqrt().div_(pace.root(taken)).add_(EPSILON)
        master_M = self._numbers.of(place).mul_(pace.kept)
        self._numbers.keep(master_M.addcdiv_(first_M, root_M, value=-pace.length(taken)), place)

    def stored(self, place: slice, shape: torch.Size) -> dict[str, Tensor]:
        """What a checkpoint keeps of a parameter; views. The last is zero as long as every gradient
        was: squares never cancel each other."""
        return {
            f"{name}{kind}": tensor
            for name, moment in (("first", self.first), ("second", self.second))
            for kind, tensor in moment.stored(place, shape).items()
        }
