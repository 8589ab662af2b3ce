"""Parallel compilation of Triton kernels.

Triton compiles each kernel at its first launch, one after the other, which delays the first run on
a machine.
"""

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

from finesight.model.kernels.runtime import JITFunction, TensorDescriptor, knobs

COMPILE_THREADS, SWITCH_INTERVAL_S = 8, 2e-4
"""Number of compile threads, and the thread switch interval of the interpreter during compilation.

With a longer interval, the threads mostly wait for the GIL.
"""


def is_compile_cache_empty() -> bool:
    """Return True if Triton's compile cache on disk has no kernels."""
    cache_dir = Path(knobs.cache.dir)
    return not (cache_dir.is_dir() and any(cache_dir.iterdir()))


@contextmanager
def compile_in_parallel(device: torch.device) -> Iterator[None]:
    """Compile all kernels launched within the block, by any thread, without running them.

    The outputs of the kernels remain uninitialized and must be discarded. On exit all kernels are
    compiled and loaded. Raises the errors of the compiler.
    """
    launch, pending, lock = JITFunction.run, dict[tuple[Any, ...], Future[object]](), Lock()

    def compile_only(kernel: Any, *args: Any, **options: Any) -> None:
        # With an empty grid Triton compiles and loads the kernel without launching it.
        options["grid"] = (0, 1, 1)
        key = kernel, tuple(map(_specialization_key, args)), tuple(sorted(options.items()))
        with lock:
            if key not in pending:
                pending[key] = threads.submit(
                    launch, kernel, *map(_dummy_argument, args), **options
                )

    device_index = torch.cuda.current_device() if device.index is None else device.index
    interval = sys.getswitchinterval()
    with ThreadPoolExecutor(
        COMPILE_THREADS, "compile", torch.cuda.set_device, (device_index,)
    ) as threads:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            with patch.object(JITFunction, "run", compile_only):
                yield
        finally:
            wait(pending.values())
            sys.setswitchinterval(interval)
    for future in pending.values():
        future.result()


def _dummy_argument(argument: Any) -> Any:
    """Replace a tensor argument by a small one with the same specialization.

    Otherwise pending compilations would hold tensors that the forward pass has released.
    """
    if isinstance(argument, TensorDescriptor):
        shape = argument.block_shape
        return TensorDescriptor.from_tensor(argument.base.new_empty(shape), shape)
    if not isinstance(argument, Tensor):
        return argument
    # The second element of a buffer is unaligned.
    pair = argument.new_empty(2)
    return pair[1:] if argument.data_ptr() % 16 else pair


def _specialization_key(argument: Any) -> tuple[Any, ...]:
    """Return the properties of a kernel argument that Triton specializes on."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.block_shape
    if isinstance(argument, int):
        return int, argument == 1, argument % 16 == 0
    return (type(argument),)
