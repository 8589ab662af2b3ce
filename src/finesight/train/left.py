"""Where the recordings of packs leave their gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from finesight.model.wide import gradients_laid
from finesight.train.gradients import LARGE


class Left:
    """Gradients where recordings leave them, all in the same places: they are summed up before the
    next one runs. Those of large parameters are made there, or go there as soon as they are made,
    so that there never is memory for all of them twice."""

    def __init__(self, learning: Sequence[nn.Parameter]) -> None:
        self._learning = learning
        self._large = {id(one): n for n, one in enumerate(learning) if one.numel() >= LARGE}
        self._places: dict[int, Tensor] = {}

    def go_back(self, loss: Tensor, beside: Sequence[tuple[Tensor, Tensor]]) -> None:
        """From a loss to the parameters and to what learns beside them, each with the place that
        its gradient goes to."""
        hooks = [self._hook(number) for number in self._large.values()]
        ends = [*self._learning, *(tensor for tensor, _ in beside)]
        try:
            with gradients_laid(self._place_of):
                made = torch.autograd.grad(loss, ends, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        own, others = made[: len(self._learning)], made[len(self._learning) :]
        for (_, place), gradient in zip(beside, others, strict=True):
            place.copy_(gradient)
        large = self._large.values()
        small = {n: one for n, one in enumerate(own) if one is not None and n not in large}
        if small:
            torch._foreach_copy_([self._place(n) for n in small], [*small.values()])

    def hand_over(self, but: Collection[int] = ()) -> None:
        """Give them to the parameters, but for those of these numbers, which the recording that has
        run does not reach: what lies in their places is another's."""
        for number, parameter in enumerate(self._learning):
            parameter.grad = None if number in but else self._places.get(number)

    def clear(self) -> None:
        """Give their memory back."""
        self._places.clear()

    def _hook(self, number: int) -> RemovableHandle:
        register: Callable[..., RemovableHandle] = self._learning[number].register_hook
        return register(partial(self._leave, number))

    def _leave(self, number: int, gradient: Tensor) -> Tensor:
        place = self._place(number)
        return place if place.data_ptr() == gradient.data_ptr() else place.copy_(gradient)

    def _place_of(self, weight: Tensor) -> Tensor | None:
        number = self._large.get(id(weight))
        return None if number is None else self._place(number)

    def _place(self, number: int) -> Tensor:
        if number not in self._places:
            # As the parameter lies: a gradient may come transposed.
            self._places[number] = torch.empty_like(self._learning[number], requires_grad=False)
        return self._places[number]
