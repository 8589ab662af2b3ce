"""Triton for the kernel modules: placeholders, launch configs, building blocks, compilation.

Without Triton, placeholders replace it: kernel modules can be imported, kernels can be declared,
and launches do nothing. Memory estimates run the fused GPU path this way on machines without a GPU
(`plan.dry_run`), and CPU code uses the launch configs.

The building blocks reduce partial sums, compute a fast sigmoid, and recompute dropout masks from a
seed, so that no mask is stored. Triton compiles each kernel at its first launch, one after the
other, which delays the first run on a machine; `compile_in_parallel` avoids that.

Shapes: M rows (tokens), N columns of an input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["TensorDescriptor", "knobs", "libdevice", "tl", "triton"]

HAS_TRITON = find_spec("triton") is not None or torch.version.cuda is None
"""True if the Triton kernels can be imported.

Without GPU support in torch, the kernels are placeholders for memory estimates.
"""


class _Placeholder:
    """Object whose attributes and call results are placeholders, with the helpers of Triton."""

    def __getattr__(self, name: str) -> _Placeholder:
        return self

    def __getitem__(self, grid: object) -> _Placeholder:
        return self

    def __call__(self, *arguments: object, **options: object) -> _Placeholder:
        return self

    def cdiv(self, numerator: int, divisor: int) -> int:
        """Divide and round up."""
        return -(-numerator // divisor)

    def next_power_of_2(self, number: int) -> int:
        """Return the smallest power of two that is at least `number`."""
        return 1 << (number - 1).bit_length()


Launch = Callable[..., object]
"""Function that receives a kernel, its arguments, and its options with the grid."""


@dataclass(slots=True)
class _Overrides:
    """Replacements in this process, see `override_launches`."""

    launch: Launch | None = None
    capability: tuple[int, int] | None = None


_overrides = _Overrides()


@contextmanager
def override_launches(launch: Launch, capability: tuple[int, int] | None = None) -> Iterator[None]:
    """Call `launch` instead of launching kernels within the block, in all threads.

    Args:
        launch: Called for each launch.
        capability: Compute capability that `get_device_capability` returns for any device.
    """
    previous = _overrides.launch, _overrides.capability
    _overrides.launch, _overrides.capability = launch, capability
    try:
        yield
    finally:
        _overrides.launch, _overrides.capability = previous


def get_device_capability(device: torch.device) -> tuple[int, int]:
    """Return the CUDA compute capability of a device, or (0, 0) without CUDA."""
    if _overrides.capability is not None:
        return _overrides.capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


if find_spec("triton") is not None:
    import triton
    import triton.language as tl
    from triton import knobs
    from triton.language.extra import libdevice
    from triton.runtime.jit import JITFunction
    from triton.tools.tensor_descriptor import TensorDescriptor

    class _Kernel(JITFunction):  # type: ignore[misc]
        """Triton kernel whose launches `override_launches` replaces."""

        def run(self, *arguments: Any, **options: Any) -> Any:
            if _overrides.launch is not None:
                return _overrides.launch(self, *arguments, **options)
            return super().run(*arguments, **options)

    def jit(function: Any = None, **options: Any) -> Any:
        """Decorate a Triton kernel, like `triton.jit`."""
        if function is None:
            return partial(jit, **options)
        return (triton.jit if knobs.runtime.interpret else _Kernel)(function, **options)
else:
    _placeholder: Any = _Placeholder()
    triton = tl = knobs = libdevice = jit = JITFunction = TensorDescriptor = _placeholder


@lru_cache
def supports_pdl(device: torch.device) -> bool:
    """Return whether the GPU has programmatic dependent launch (PDL).

    A kernel with `launch_pdl` starts when all programs of the kernel before it have called
    `wait_for_previous_kernel`. Before its own call, it may read only what the kernel before it
    does not write, such as weights.
    """
    return device.type == "cuda" and get_device_capability(device) >= (9, 0)


@jit
def wait_for_previous_kernel() -> None:
    """Wait for the end of the kernel before this one, and allow the next one to start."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


TARGET_PROGRAMS, CONCURRENT_PROGRAMS = 2048, 264
"""Number of programs that saturates a large GPU, and two programs for each SM of an H200."""

MAX_PARTIAL_SUMS = 512
"""Maximum number of partial sums for the gradient of a norm weight, which a second kernel
reduces."""


class TileConfig(NamedTuple):
    """Tile of a Triton kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


SWIGLU_TILE, SWIGLU_BACKWARD_TILE = TileConfig(32, 64, 4, 3), TileConfig(32, 64, 4, 3)
"""Tiles of the kernels in `kernels.swiglu`; fastest on an H200."""

LORA_DOWN_BACKWARD_TILE = TileConfig(32, 64, 4, 4)
"""Tile of the backward kernel in `kernels.lora_gemm`; fastest on an H200."""


def rows_per_chunk(rows: int, programs_per_row: int, programs: int = TARGET_PROGRAMS) -> int:
    """Return the number of rows per program, a multiple of 64."""
    chunks = max(1, min(programs // programs_per_row, -(-rows // 64)))
    return max(1, -(-rows // (chunks * 64))) * 64


def columns_per_chunk(rows: int, width: int, tile: TileConfig) -> int:
    """Return the number of columns per program, a multiple of the tile's columns."""
    row_tiles = max(1, -(-rows // tile.block_m))
    chunks = max(1, min(TARGET_PROGRAMS // row_tiles, -(-width // (4 * tile.block_n))))
    return -(-width // (chunks * tile.block_n)) * tile.block_n


class SeededDropout(NamedTuple):
    """Dropout of an adapter's input, with a reproducible mask.

    The mask is a hash of seed, salt, row and column, so that the backward pass can recompute it.
    """

    seed_1: Tensor | None
    salt: int
    p: float
    scale: float

    def kernel_args(self, placeholder: Tensor) -> tuple[Tensor, int, int, float]:
        """Return the kernel arguments: seed, salt, threshold and scale.

        An element is dropped if its hash, a signed 32-bit integer, is below the threshold. Without
        a seed `placeholder` is passed, which kernels do not read.
        """
        seed_1 = placeholder if self.seed_1 is None else self.seed_1
        return seed_1, self.salt, round(self.p * 2**32) - 2**31, self.scale


NO_DROPOUT = SeededDropout(None, 0, 0.0, 1.0)


Ptr: TypeAlias = tl.tensor
"""Pointer to a tensor, in the signature of a Triton kernel."""

SMALL_REDUCTION = 1 << 16
"""Number of outputs up to which 1,024 elements per program do not saturate an H200."""


def rank_block_size(ranks: int) -> int:
    """Return the power-of-two block size that covers this number of LoRA ranks."""
    return max(16, int(triton.next_power_of_2(ranks)))


@jit
def times_sigmoid(x: tl.tensor, power: tl.tensor) -> tl.tensor:
    """Compute x / (1 + 2^power) with a fast division, in half the time.

    The exact division additionally handles divisors that do not occur here.
    """
    return libdevice.fast_dividef(x, 1.0 + tl.exp2(power))


@jit
def align_layouts(x: tl.tensor, y: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Convert two tensors to the same thread layout.

    Otherwise the compiler uses different layouts for loaded tensors and for matmul results, and
    duplicates computations on both.
    """
    pair = tl.split(tl.join(x, y))
    return pair[0], pair[1]


@jit
def _sum_partials_kernel(
    partial: Ptr, y: Ptr, total: int, chunks: int, block_chunks: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    offsets_N = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask_N = offsets_N < total
    sums_N = tl.zeros((block,), tl.float32)
    for first in range(0, chunks, block_chunks):
        chunk_C = tl.cast(first, tl.int64) + tl.arange(0, block_chunks)
        ptrs_CN = partial + chunk_C[:, None] * total + offsets_N[None, :]
        mask = (chunk_C < chunks)[:, None] & mask_N[None, :]
        sums_N += tl.sum(tl.load(ptrs_CN, mask=mask, other=0.0), 0)
    tl.store(y + offsets_N, sums_N, mask=mask_N)


def sum_partials(partial: Tensor, dtype: torch.dtype, is_sequential: bool = False) -> Tensor:
    """Sum partial results over the first dimension, rounded once to `dtype`."""
    chunks, *shape = partial.shape
    y = torch.empty(shape, dtype=dtype, device=partial.device)
    total = y.numel()
    # For small outputs a program processes fewer elements and several chunks at once.
    block_chunks, block = (64, 16)
    if is_sequential or total > SMALL_REDUCTION:
        block_chunks, block = 1, 1024
    _sum_partials_kernel[(triton.cdiv(total, block),)](
        partial, y, total, chunks, block_chunks=block_chunks, block=block
    )
    return y


@jit
def hash_u32(x: tl.tensor) -> tl.tensor:
    """Hash 32-bit integers with lowbias32 by Chris Wellons."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@jit
def keep_mask(
    seed: tl.tensor, salt: tl.tensor, m: tl.tensor, c: tl.tensor, threshold: tl.tensor
) -> tl.tensor:
    """Return the mask [M, N] of the elements that dropout retains.

    `m` and `c` are the indices of rows and columns. Most of the hash is computed per row and per
    column, not per element.
    """
    key = hash_u32(tl.load(seed).to(tl.uint32) ^ (salt.to(tl.uint32) * 0xC2B2AE35))
    key_M = hash_u32(m.to(tl.uint32) * 0x9E3779B1 + key)
    key_N = hash_u32(c.to(tl.uint32) * 0x85EBCA77 + 0x7FEB352D)
    x_MN = (key_M[:, None] ^ key_N[None, :]) * 0x9E3779B1
    x_MN = (x_MN ^ (x_MN >> 15)) * 0x846CA68B
    return x_MN.to(tl.int32, bitcast=True) >= threshold


COMPILE_THREADS, SWITCH_INTERVAL_S = 8, 2e-4
"""Compile threads, and their switch interval: with a longer one, most wait for the GIL."""


def is_compile_cache_empty() -> bool:
    """Return True if Triton's compile cache on disk has no kernels."""
    cache_dir = Path(knobs.cache.dir)
    return not (cache_dir.is_dir() and any(cache_dir.iterdir()))


def load_compiler(device: torch.device) -> None:
    """Load Triton's compiler and its driver, which takes half a second, by running a small kernel.

    Nothing happens before the first kernel of a machine, which `compile_in_parallel` compiles with
    all others.
    """
    if HAS_TRITON and device.type == "cuda" and not is_compile_cache_empty():
        sum_partials(torch.zeros(1, 1, device=device), torch.float32)


@contextmanager
def load_compiler_in_background(device: torch.device) -> Iterator[None]:
    """Run `load_compiler` in a thread during the block, whose end waits for it.

    Its errors are those of the first kernel, which raises them again. The block must neither fork
    nor launch kernels of Triton.
    """
    index = device.index
    if index is None and torch.cuda.is_initialized():
        index = torch.cuda.current_device()

    def load() -> None:
        if index is not None:
            torch.cuda.set_device(index)  # a setting of each thread
        load_compiler(device)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(load)
        yield


@contextmanager
def compile_in_parallel(device: torch.device) -> Iterator[None]:
    """Compile all kernels launched within the block, by any thread, without running them.

    The outputs of the kernels remain uninitialized and must be discarded. On exit all kernels are
    compiled and loaded. Raises the errors of the compiler.
    """
    pending, lock, loading = dict[tuple[Any, ...], Future[object]](), Lock(), Lock()

    def compile_and_load(kernel: Any, *args: Any, **options: Any) -> None:
        compiled = JITFunction.run(kernel, *args, **options)
        # Triton 3.6 loads the launchers of all kernels as modules with the same name. Python mixes
        # up their functions if two threads do so concurrently.
        with loading:
            _ = compiled.run

    def submit(kernel: Any, *args: Any, **options: Any) -> None:
        options |= {"grid": None, "warmup": True}
        key = kernel, tuple(map(_specialization_key, args)), tuple(sorted(options.items()))
        with lock:
            if key not in pending:
                pending[key] = threads.submit(
                    compile_and_load, kernel, *map(_dummy_argument, args), **options
                )

    device_index = torch.cuda.current_device() if device.index is None else device.index
    interval = sys.getswitchinterval()
    with ThreadPoolExecutor(
        COMPILE_THREADS, "compile", torch.cuda.set_device, (device_index,)
    ) as threads:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            with override_launches(submit):
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
