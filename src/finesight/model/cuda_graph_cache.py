"""CUDA graph capture and replay for launch-bound decoding steps and training passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


class CudaGraphCache:
    """Cache of captured CUDA graphs, one per key (static batch shape).

    The first call with a key runs eagerly as warm-up, the second call captures, later calls replay.
    The function is passed with each call instead of being stored: a stored bound method would keep
    its owner and the KV cache alive.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._warmed_up: set[int] = set()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: int, function: Callable[[], Tensor]) -> Tensor:
        """Run `function` eagerly on the first call with a key, later as a CUDA graph.

        The returned tensor is a static buffer, which the next replay overwrites.
        """
        if key not in self._warmed_up:
            self._warmed_up.add(key)
            return function()
        if key not in self._graphs:
            self._graphs[key] = self._capture(function)
        graph, result = self._graphs[key]
        graph.replay()
        return result

    def __len__(self) -> int:
        return len(self._graphs)

    def contains(self, key: int) -> bool:
        """Return whether the next `run` with this key replays a captured graph."""
        return key in self._graphs

    def _capture(self, function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # torch.cuda.graph would empty the allocator cache first, which is slower than the capture.
        graph = torch.cuda.CUDAGraph()
        stream = _capture_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = function()
            except BaseException:
                # An open capture blocks the device. Ending an invalidated capture raises another
                # error, which is suppressed in favor of the first one.
                with contextlib.suppress(RuntimeError):
                    self._end_capture(graph)
                raise
            self._end_capture(graph)
        torch.cuda.current_stream().wait_stream(stream)
        return graph, result

    def _end_capture(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            _reset_failed_capture(self._device, self._pool)
            raise


def _reset_failed_capture(device: torch.device, pool: tuple[int, int]) -> None:
    """Restore the CUDA state of torch after a failed graph capture.

    The default random generator remains registered with the graph, and the allocator still
    allocates from its memory pool. Both are reset.
    """
    with torch.cuda.device(device):
        device_index = torch.cuda.current_device()
    generator = torch.cuda.default_generators[device_index]
    replacement = torch.Generator(device)
    replacement.set_state(generator.get_state())
    generator.graphsafe_set_state(replacement.graphsafe_get_state())
    # The pool may have been released already.
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device_index, pool)


@lru_cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the capture stream of a device; cuBLAS allocates one workspace per stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
