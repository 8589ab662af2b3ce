"""Processes that are threads: what each gives comes to all, as torch.distributed brings it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from finesight.model import sequence_parallel

T = TypeVar("T")


class Meeting:
    """Stands for the default group of so many processes."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = count
        self._barrier = threading.Barrier(count, timeout=60)
        self._brought: list[Tensor] = [torch.empty(0)] * count
        self._own = threading.local()
        monkeypatch.setattr(sequence_parallel, "GATHER", self._gather)
        monkeypatch.setattr(sequence_parallel, "SCATTER", self._scatter)
        monkeypatch.setattr(dist, "broadcast", self._broadcast)

    def all(self, work: Callable[[int], T]) -> list[T]:
        """What each process's work gives, all at the same time."""

        def one(number: int) -> T:
            self._own.number = number
            try:
                return work(number)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))

    def _broadcast(self, tensor: Tensor, src: int) -> None:
        tensor.copy_(self._everybodys(tensor)[src])

    def _everybodys(self, tensor: Tensor) -> list[Tensor]:
        self._brought[self._own.number] = tensor.clone()
        self._barrier.wait()
        brought = list(self._brought)
        self._barrier.wait()
        assert len({(one.shape, one.dtype) for one in brought}) == 1, "they bring different things"
        return brought

    def _gather(self, out: Tensor, tensor: Tensor) -> None:
        out.copy_(torch.cat(self._everybodys(tensor)))

    def _scatter(self, out: Tensor, tensor: Tensor) -> None:
        whole = torch.stack(self._everybodys(tensor)).sum(0)
        out.copy_(whole.chunk(self.count)[self._own.number])
