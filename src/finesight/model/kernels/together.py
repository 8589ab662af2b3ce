"""Kernels that are compiled side by side: where each is compiled when it is first launched, a
machine's first run waits for one after the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

THREADS, TURN_S = 8, 2e-4
"""That compile at once, and for how long one of them may keep Python's lock while others want it:
with more of either, they mostly wait for that lock."""


def nothing_compiled() -> bool:
    """Whether no kernel lies where Triton keeps what it has compiled, in earlier processes, too."""
    kept = Path(knobs.cache.dir)
    return not (kept.is_dir() and any(kept.iterdir()))


@contextmanager
def compiled_together(device: torch.device) -> Iterator[None]:
    """Within the block, whatever thread is in it, a launch of a kernel computes nothing: what it
    was to write stays as it was, and must not be kept. In the end all these kernels are compiled
    and loaded. Raises what compiling them raised."""
    launch, coming, lock = JITFunction.run, dict[tuple[Any, ...], Future[object]](), Lock()

    def compile_only(kernel: Any, *args: Any, **options: Any) -> None:
        # A grid of no programs: Triton compiles, loads, and has nothing to launch.
        options["grid"] = (0, 1, 1)
        kind = kernel, tuple(map(_kind, args)), tuple(sorted(options.items()))
        with lock:
            if kind not in coming:
                coming[kind] = threads.submit(launch, kernel, *map(_stand_in, args), **options)

    number = torch.cuda.current_device() if device.index is None else device.index
    interval = sys.getswitchinterval()
    with ThreadPoolExecutor(THREADS, "compile", torch.cuda.set_device, (number,)) as threads:
        sys.setswitchinterval(TURN_S)
        try:
            with patch.object(JITFunction, "run", compile_only):
                yield
        finally:
            wait(coming.values())
            sys.setswitchinterval(interval)
    for future in coming.values():
        future.result()


def _stand_in(argument: Any) -> Any:
    """In place of a tensor a small one that kernels are compiled the same for: those that wait for
    their turn would keep what the pass has let go of."""
    if isinstance(argument, TensorDescriptor):
        shape = argument.block_shape
        return TensorDescriptor.from_tensor(argument.base.new_empty(shape), shape)
    if not isinstance(argument, Tensor):
        return argument
    # The second number of a piece of memory lies where nothing is aligned.
    two = argument.new_empty(2)
    return two[1:] if argument.data_ptr() % 16 else two


def _kind(argument: Any) -> tuple[Any, ...]:
    """What Triton compiles different kernels for."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.block_shape
    if isinstance(argument, int):
        return int, argument == 1, argument % 16 == 0
    return (type(argument),)
