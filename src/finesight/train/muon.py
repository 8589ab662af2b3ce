"""Muon: momentum with all directions of a matrix made equally long (Jordan et al. 2024).

A matrix that learns from nothing has gradients of few strong directions; what is rare, such as how
one letter differs from another, drowns in them. Made orthogonal, a step takes every direction at
the same pace.

Shapes: E numbers of a group of parameters end to end, N matrices of R rows and C columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from finesight.model.frozen import has_tensor_cores
from finesight.train.wide import Wide

MOMENTUM = 0.95
ROUNDS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Coefficients of the odd polynomial whose iteration draws singular values to about one."""

LIKE_ADAMW = 0.2
"""Root mean square of AdamW's usual steps, so that both learn well at like rates (Liu et al. 2025,
Muon is Scalable for LLM Training, section 2.2)."""


MOST = 1 << 26
"""Numbers of matrices that are made orthogonal at once: a bound on memory."""

WIDE = 1 << 24
"""Numbers whose masters are moved at once."""

RECORDED = 1 << 24
"""A group of no more numbers is stepped by a recorded CUDA graph: it takes longer to launch its
kernels than to run them. The graph keeps the memory of one passage."""


class Matrix(NamedTuple):
    """Where a matrix lies in its group, and its shape."""

    place: slice
    rows: int
    columns: int


class Muon:
    """Steps for the matrices of one group; `momentum_E` is all that has to be remembered.

    A step is as long where the gradient is small or zero for a while: the momentum's direction
    counts, not its length.
    """

    def __init__(self, masters: Wide, grad_E: Tensor, matrices: Iterable[Matrix]) -> None:
        self.momentum_E = torch.zeros_like(grad_E)
        self._masters, self._grad_E = masters, grad_E
        by_shape: dict[tuple[int, int], list[slice]] = {}
        for place, rows, columns in matrices:
            by_shape.setdefault((rows, columns), []).append(place)
        # Views made once: there are a hundred matrices, and steps of a small model are short.
        self._alike = [
            [grad_E[place].view(shape) for place in some]
            for shape, places in by_shape.items()
            for some in _together(places, shape)
        ]
        # Where a recorded graph finds it.
        self._new = torch.zeros((), device=grad_E.device)
        self._warm = False
        self._recorded: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def step(self, rate: float, decay: float, shrink: Tensor) -> None:
        """Move the masters by Nesterov's momentum of the gradients times `shrink`, a scalar on the
        device, made orthogonal, and shrink them by `rate` times `decay`. Where `shrink` is NaN, the
        step is void and changes nothing. The gradients are used up. Waits for nothing, except once,
        to record a small group."""
        void = shrink.isnan()
        self._grad_E.mul_(shrink).masked_fill_(void, 0.0)
        self._new.fill_(1 - MOMENTUM).masked_fill_(void, 0.0)
        self._turn()
        kept = torch.where(void, 1.0, 1 - rate * decay)
        length = torch.where(void, 0.0, -rate)
        for start in range(0, len(self._masters), WIDE):
            place = slice(start, start + WIDE)
            master_N = self._masters.of(place).mul_(kept)
            self._masters.keep(master_N.addcmul_(self._grad_E[place], length), place)

    def _turn(self) -> None:
        """`_directions`, recorded the second time, when all that it needs has been set up."""
        if not self._grad_E.is_cuda or self._grad_E.numel() > RECORDED or not self._warm:
            self._warm = True
            self._directions()
            return
        if self._recorded is None:
            graph = torch.cuda.CUDAGraph()
            # Another thread pins memory meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._directions()
            self._recorded = graph
        self._recorded.replay()

    def _directions(self) -> None:
        """Gradients to the steps of a rate of one, in their place."""
        self.momentum_E.lerp_(self._grad_E, self._new)
        self._grad_E.lerp_(self.momentum_E, MOMENTUM)
        for ahead in self._alike:
            moved_NRC = orthogonal(torch.stack(ahead))
            moved_NRC.mul_(LIKE_ADAMW * max(moved_NRC.shape[1:]) ** 0.5)
            torch._foreach_copy_(ahead, moved_NRC.unbind())


def _together(places: list[slice], shape: tuple[int, int]) -> list[list[slice]]:
    """Matrices of one shape in stacks of at most `MOST` numbers."""
    number = max(1, MOST // (shape[0] * shape[1]))
    return [places[start : start + number] for start in range(0, len(places), number)]


def orthogonal(x_NRC: Tensor) -> Tensor:
    """About U V^T of each U S V^T by Newton and Schulz's iteration: singular values above a
    hundredth of the matrix's norm come to between 0.6 and 1.3. Fp32, computed in bf16 on cards that
    have it; zeros stay zeros."""
    wide = x_NRC.shape[1] <= x_NRC.shape[2]
    y = x_NRC if wide else x_NRC.mT
    y = y / (torch.linalg.matrix_norm(y, keepdim=True) + 1e-12)
    y = y.bfloat16() if has_tensor_cores(torch.bfloat16, y.device) else y
    for _ in range(ROUNDS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), y, beta=_A)
    return (y if wide else y.mT).float()
