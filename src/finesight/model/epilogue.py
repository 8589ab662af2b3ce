"""Products and a GELU of their outputs, in one kernel where there is one.

To add a product to what is there already in such a kernel was tried as well: on an H200 it takes as
long as a sum and its norm take after it. Shapes: N rows, D inputs, F outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from finesight.model.fp8 import Rows
from finesight.model.frozen import KERNELS
from finesight.model.fused import has_kernels, quick_gelu
from finesight.model.layers import ALIGNED
from finesight.model.linear import GroupedLinear, only

if KERNELS:
    from finesight.model.kernels import product as kernels


@dataclass(frozen=True)
class Gelu:
    """x sigmoid(linear x + cubic x^3), which `alone` computes (Hendrycks & Gimpel 2016,
    arXiv:1606.08415)."""

    linear: float
    cubic: float
    alone: Callable[[Tensor], Tensor]

    def of(self, group: GroupedLinear, x_ND: Tensor | Rows) -> Tensor:
        """That of a layer's outputs, [N, D] to [N, F]."""
        operands = _operands(group, x_ND)
        if operands is None:
            return self.alone(only(group(x_ND)))
        return kernels.activated(*operands, group.bias, linear=self.linear, cubic=self.cubic)


QUICK = Gelu(1.702, 0.0, quick_gelu)
_TWICE = 2 * math.sqrt(2 / math.pi)
TANH = Gelu(_TWICE, _TWICE * 0.044715, partial(F.gelu, approximate="tanh"))


def _operands(group: GroupedLinear, x_ND: Tensor | Rows) -> tuple[Tensor, Tensor] | None:
    """Rows and weight of a layer where a kernel computes both steps; what goes back has others."""
    w_FD = group.weight
    if group.adapter is not None or torch.is_grad_enabled():
        return None
    if not (isinstance(x_ND, Tensor) and isinstance(w_FD, Tensor) and has_kernels(x_ND)):
        return None
    copied = _in_tiles(x_ND) and _in_tiles(w_FD) and len(w_FD) % ALIGNED == 0
    if copied and _is_hopper(x_ND.device) and kernels.fills(len(x_ND), len(w_FD), x_ND.device):
        return x_ND, w_FD
    return None


def _in_tiles(x: Tensor) -> bool:
    """Whether rows begin where tiles can be copied from."""
    return x.stride(1) == 1 and x.stride(0) % ALIGNED == 0 and x.data_ptr() % 16 == 0


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    """Newer cards have other tensor cores, for which nobody has tried it."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)
