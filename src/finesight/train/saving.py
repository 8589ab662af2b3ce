"""Checkpoints that are written while a GPU goes on: numbers are copied at once, files are written
by a thread."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import copy_context
from threading import Thread

from torch import Tensor

from finesight.train.checkpoint import Checkpoints, State

MOST_NUMBERS = 400_000_000
"""That learn, of which a copy is made in memory, twelve bytes each. More of them are written before
the run goes on."""


class Saving:
    """Writes one checkpoint at a time. What goes wrong is raised by the next call."""

    def __init__(self, checkpoints: Checkpoints, *, meanwhile: bool) -> None:
        self._checkpoints, self._meanwhile = checkpoints, meanwhile
        self._thread: Thread | None = None
        self._failed: BaseException | None = None

    def save(
        self, state: State, values: Mapping[str, Tensor], moments: Mapping[str, Tensor]
    ) -> None:
        """As `Checkpoints.save`: it is there when `wait` returns."""
        self.wait()
        if not self._meanwhile or state.step in self._checkpoints.steps():
            self._checkpoints.save(state, values, moments)
            return
        copies = [
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for tensors in (values, moments)
        ]
        # What is in force for this thread is for that one.
        context = copy_context()
        self._thread = Thread(target=context.run, args=(self._write, state, *copies))
        self._thread.start()

    def _write(
        self, state: State, values: Mapping[str, Tensor], moments: Mapping[str, Tensor]
    ) -> None:
        try:
            self._checkpoints.save(state, values, moments)
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
