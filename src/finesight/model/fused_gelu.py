"""Linear layers followed by GELU, as one fused kernel if available.

Vision encoders use this. The kernel requires that gradients are disabled. Fusing the residual
addition as well was no faster on an H200 than the fused add-and-norm kernel.

Shapes: N rows, D inputs, F outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from finesight.model.fused_linear import FusedLinear, single_output
from finesight.model.fused_ops import has_kernels, quick_gelu
from finesight.model.layers import ALIGNMENT
from finesight.model.quant.base import HAS_TRITON
from finesight.model.quant.fp8 import Fp8Rows

if HAS_TRITON:
    from finesight.model.kernels import gemm_gelu as gemm_gelu_kernels


@dataclass(frozen=True)
class FusedGelu:
    """GELU approximation of the form x sigmoid(linear x + cubic x^3).

    See Hendrycks & Gimpel 2016, arXiv:1606.08415. `eager` computes the same function without the
    fused kernel.
    """

    linear: float
    cubic: float
    eager: Callable[[Tensor], Tensor]

    def apply_linear(self, linear: FusedLinear, x_ND: Tensor | Fp8Rows) -> Tensor:
        """Apply a linear layer and the GELU, [N, D] to [N, F]."""
        operands = _kernel_operands(linear, x_ND)
        if operands is None:
            return self.eager(single_output(linear(x_ND)))
        return gemm_gelu_kernels.gemm_gelu(
            *operands, linear.bias, linear=self.linear, cubic=self.cubic
        )


QUICK_GELU = FusedGelu(1.702, 0.0, quick_gelu)
_TANH_SCALE = 2 * math.sqrt(2 / math.pi)
TANH_GELU = FusedGelu(_TANH_SCALE, _TANH_SCALE * 0.044715, partial(F.gelu, approximate="tanh"))


def _kernel_operands(linear: FusedLinear, x_ND: Tensor | Fp8Rows) -> tuple[Tensor, Tensor] | None:
    """Return the operands of the fused kernel, or None if it cannot be used.

    The kernel requires 16-bit dense rows and weight without gradients or an adapter, a Hopper GPU
    and a sufficiently large matmul.
    """
    w_FD = linear.weight
    if linear.adapter is not None or torch.is_grad_enabled():
        return None
    if not (isinstance(x_ND, Tensor) and isinstance(w_FD, Tensor) and has_kernels(x_ND)):
        return None
    tma_aligned = _is_tma_aligned(x_ND) and _is_tma_aligned(w_FD) and len(w_FD) % ALIGNMENT == 0
    if (
        tma_aligned
        and _is_hopper(x_ND.device)
        and gemm_gelu_kernels.saturates_device(len(x_ND), len(w_FD), x_ND.device)
    ):
        return x_ND, w_FD
    return None


def _is_tma_aligned(x: Tensor) -> bool:
    """Return True if the rows of a matrix are aligned for TMA copies."""
    return x.stride(1) == 1 and x.stride(0) % ALIGNMENT == 0 and x.data_ptr() % 16 == 0


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    """Return True for Hopper GPUs; the fused kernel is untested on newer tensor cores."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)
