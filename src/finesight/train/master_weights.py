"""fp32 master weights, stored as a residual next to bf16 or fp16 model parameters.

A bf16 parameter is the upper half of the bits of an fp32 value, rounded to nearest. The residual is
the lower half. Together they restore the fp32 value exactly: the highest bit of the residual
encodes whether the upper half was rounded up.

Shapes: E flat elements of a parameter group, N elements of a slice.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SplitBf16Master:
    """fp32 master weights of a parameter group, split into model parameters and a residual.

    Halfway values round away from zero, because rounding to even could not be inverted.

    Attributes:
        params_E: Flat model parameters.
        residual_E: Lower half of the fp32 bits for bf16 parameters, the full fp32 values for fp16,
            and None for fp32.
    """

    def __init__(self, params_E: Tensor) -> None:
        self.params_E = params_E
        self.residual_E: Tensor | None = None
        if params_E.dtype == torch.bfloat16:
            self.residual_E = torch.zeros_like(params_E, dtype=torch.int16)
        elif params_E.dtype != torch.float32:
            self.residual_E = params_E.float()

    def __len__(self) -> int:
        return len(self.params_E)

    def read(self, flat_slice: slice) -> Tensor:
        """Return a slice of the fp32 values [N]; pass it to `write` after changing it.

        The slice may be a view or a copy of the storage.
        """
        params_N = self.params_E[flat_slice]
        if self.residual_E is None:
            return params_N
        residual_N = self.residual_E[flat_slice]
        return merge_fp32(params_N, residual_N) if residual_N.dtype == torch.int16 else residual_N

    def write(self, master_N: Tensor, flat_slice: slice) -> None:
        """Store a slice of fp32 values that `read` returned and the caller changed."""
        if self.residual_E is None:
            return
        params_N, residual_N = self.params_E[flat_slice], self.residual_E[flat_slice]
        if residual_N.dtype == torch.int16:
            split_fp32(master_N, params_N, residual_N)
        else:
            params_N.copy_(master_N)

    def load(self, master_N: Tensor, flat_slice: slice) -> None:
        """Overwrite a slice with fp32 values from any tensor, such as those of a checkpoint."""
        own_N = self.read(flat_slice)
        own_N.copy_(master_N)
        self.write(own_N, flat_slice)


def merge_fp32(params_N: Tensor, residual_N: Tensor) -> Tensor:
    """Restore fp32 values from bf16 values and residuals; the inverse of `split_fp32`."""
    bits_N = params_N.view(torch.int16).int().bitwise_left_shift_(16)
    return bits_N.add_(residual_N).view(torch.float32)


def split_fp32(master_N: Tensor, params_N: Tensor, residual_N: Tensor) -> None:
    """Split fp32 values into bf16 values, rounded to nearest, and 16-bit residuals.

    Args:
        master_N: fp32 values.
        params_N: Output for the bf16 values.
        residual_N: Output for the lower half of the bits, as int16.
    """
    bits_N = master_N.view(torch.int32)
    residual_N.copy_(bits_N)
    # Integer addition of the bits carries into the exponent.
    upper_N = bits_N.add(1 << 15).bitwise_right_shift_(16)
    params_N.view(torch.int16).copy_(upper_N)


def break_bf16_ties(values: Tensor) -> Tensor:
    """Increase the magnitude of fp32 values halfway between two bf16 values by their last bit.

    Round-half-to-even, the rounding of PyTorch, then gives the same bf16 values as `split_fp32`.
    """
    bits = values.view(torch.int32)
    is_tie = bits.bitwise_and(0xFFFF).eq_(1 << 15)
    return bits.add(is_tie).view(torch.float32)
