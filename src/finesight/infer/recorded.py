"""What runs on a card again and again, as CUDA graphs: a row of a few tokens takes longer to launch
its kernels than to run them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


class Recorded:
    """Recordings by a whole number, each of a function that reads and writes tensors of its own.

    The first call of each is launched as it is: what it needs has to be set up before it can be
    recorded. The function is handed over with each call and not kept: its owner would keep itself
    alive, and its cache with it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._launched: set[int] = set()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, number: int, function: Callable[[], Tensor]) -> Tensor:
        """What the function gives, which its next run overwrites."""
        if number not in self._launched:
            self._launched.add(number)
            return function()
        if number not in self._graphs:
            self._graphs[number] = self._record(function)
        graph, result = self._graphs[number]
        graph.replay()
        return result

    def has(self, number: int) -> bool:
        """Whether the next run of this number is a replay."""
        return number in self._graphs

    def _record(self, function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Not by torch.cuda.graph: it gives all cached memory back first, which costs more than the
        # recording.
        graph, stream = torch.cuda.CUDAGraph(), _recording_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = function()
            except BaseException:
                # While a recording is open, the device refuses everything else. One that the error
                # has spoiled is closed with an error of its own, which says nothing more.
                with contextlib.suppress(RuntimeError):
                    self._close(graph)
                raise
            self._close(graph)
        torch.cuda.current_stream().wait_stream(stream)
        return graph, result

    def _close(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            _clear_away(self._device, self._pool)
            raise


def _clear_away(device: torch.device, pool: tuple[int, int]) -> None:
    """What torch leaves of a recording that is spoiled: a generator for which every draw is still
    a part of it, and an allocator that keeps what several streams have used until it has ended."""
    with torch.cuda.device(device):
        number = torch.cuda.current_device()
    generator, same = torch.cuda.default_generators[number], torch.Generator(device)
    same.set_state(generator.get_state())
    generator.graphsafe_set_state(same.graphsafe_get_state())
    # An error says that it knows already.
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(number, pool)


@lru_cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
