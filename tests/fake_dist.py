"""Ranks as threads, with the collectives of torch.distributed."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from finesight.model import attention

T = TypeVar("T")


class FakeProcessGroup:
    """Replacement of the default process group."""

    def __init__(self, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=60)
        self._contributions: list[Tensor] = [torch.empty(0)] * world_size
        self._local = threading.local()
        monkeypatch.setattr(attention, "ALLGATHER", self._concat_all)
        monkeypatch.setattr(attention, "REDUCE_SCATTER", self._reduce_and_split)
        monkeypatch.setattr(dist, "broadcast", self._broadcast)

    def run_all(self, work: Callable[[int], T]) -> list[T]:
        """Run a function on all ranks concurrently, and return its results."""

        def run_rank(rank: int) -> T:
            self._local.number = rank
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(run_rank, range(self.world_size)))

    def _broadcast(self, tensor: Tensor, src: int) -> None:
        tensor.copy_(self._exchange(tensor)[src])

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self._contributions[self._local.number] = tensor.clone()
        self._barrier.wait()
        contributions = list(self._contributions)
        self._barrier.wait()
        assert len({(one.shape, one.dtype) for one in contributions}) == 1, (
            "the tensors of the ranks differ in shape or dtype"
        )
        return contributions

    def _concat_all(self, out: Tensor, tensor: Tensor) -> None:
        out.copy_(torch.cat(self._exchange(tensor)))

    def _reduce_and_split(self, out: Tensor, tensor: Tensor) -> None:
        total = torch.stack(self._exchange(tensor)).sum(0)
        out.copy_(total.chunk(self.world_size)[self._local.number])
