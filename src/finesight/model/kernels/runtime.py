"""Triton for the kernel modules, or placeholders where it is not installed.

With placeholders, kernel modules can be imported, kernels can be declared, and launches do nothing.
Memory estimates run the fused GPU path this way on machines without a GPU (`plan.dry_run`).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

__all__ = ["JITFunction", "TensorDescriptor", "knobs", "libdevice", "tl", "triton"]


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


if find_spec("triton") is not None:
    import triton
    import triton.language as tl
    from triton import knobs
    from triton.language.extra import libdevice
    from triton.runtime.jit import JITFunction
    from triton.tools.tensor_descriptor import TensorDescriptor
else:
    _placeholder: Any = _Placeholder()
    triton = tl = knobs = libdevice = JITFunction = TensorDescriptor = _placeholder
