"""Checkpoints that are written while a GPU goes on: numbers are copied at once, files are written
by a thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import copy_context
from threading import Thread

import torch
from torch import Tensor

from finesight.train.checkpoint import Checkpoints, State
from finesight.train.prepare import Session
from finesight.train.ranks import ALONE, Ranks

MOST_NUMBERS = 400_000_000
"""That learn in a process, of which a copy is made in memory, twelve bytes each. More of them are
written before the run goes on."""

_ALIGNED = 64
"""Bytes between possible starts of a tensor."""


class _Room:
    """Memory for copies, taken once: to take it is slow. Where it can be page-locked, a GPU copies
    into it several times as fast."""

    def __init__(self) -> None:
        self._bytes_N: Tensor | None = None

    def copies(self, sets: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The tensors of each set, in the place of those of the call before, which had the same
        shapes."""
        if self._bytes_N is None:
            # Only once: some tensors are made when they are asked for.
            self._bytes_N = _taken(sum(_up(t.nbytes) for tensors in sets for t in tensors.values()))
        at, copies = 0, [dict[str, Tensor]() for _ in sets]
        for tensors, own in zip(sets, copies, strict=True):
            for name, tensor in tensors.items():
                room = self._bytes_N[at : at + tensor.nbytes].view(tensor.dtype)
                own[name] = room.view(tensor.shape).copy_(tensor, non_blocking=True)
                at += _up(tensor.nbytes)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


def _taken(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    except RuntimeError:
        # A machine allows only so much of it.
        return torch.empty(size, dtype=torch.uint8)


def _up(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def saving_of(session: Session, checkpoints: Checkpoints) -> Saving:
    """That of a run: while a GPU goes on, where a copy has room. A CPU has no time beside its
    steps."""
    on_gpu = session.machine.device.type == "cuda"
    meanwhile = on_gpu and session.masters.numbers <= MOST_NUMBERS
    return Saving(checkpoints, meanwhile=meanwhile, ranks=session.together.aside())


class Saving:
    """Writes one checkpoint at a time. What goes wrong is raised by the next call."""

    def __init__(self, checkpoints: Checkpoints, *, meanwhile: bool, ranks: Ranks = ALONE) -> None:
        """`ranks` that are several write together."""
        self._checkpoints, self._meanwhile, self._ranks = checkpoints, meanwhile, ranks
        self._room = _Room()
        self._thread: Thread | None = None
        self._failed: BaseException | None = None

    def save(
        self, state: State, values: Mapping[str, Tensor], moments: Mapping[str, Tensor]
    ) -> None:
        """As `Checkpoints.save`: it is there when `wait` returns."""
        self.wait()
        written = self._ranks.alone and state.step in self._checkpoints.steps()
        if written or not self._meanwhile:
            self._checkpoints.save(state, values, moments, self._ranks)
            return
        copies = self._room.copies((values, moments))
        # What is in force for this thread is for that one.
        context = copy_context()
        self._thread = Thread(target=context.run, args=(self._write, state, *copies))
        self._thread.start()

    def _write(
        self, state: State, values: Mapping[str, Tensor], moments: Mapping[str, Tensor]
    ) -> None:
        try:
            self._checkpoints.save(state, values, moments, self._ranks)
        except BaseException as error:
            self._failed = error

    def wait(self) -> None:
        """Until the last one is written. Raises what went wrong there."""
        failed = self.end()
        if failed is not None:
            raise failed

    def end(self) -> BaseException | None:
        """Until nothing is being written any more; what went wrong, if nobody was told yet."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failed, self._failed = self._failed, None
        return failed
