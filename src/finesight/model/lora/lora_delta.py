"""Addition of LoRA deltas to base products without systematic rounding errors.

Adding a delta to a product that was already rounded to bf16, with rounding to nearest, loses values
below half a unit in the last place: six sevenths of a delta of 1/4,000 of the product. A fused
matmul (`model.lora.fused_weight`) accumulates in fp32 and rounds once. Otherwise:

- CPUs accumulate in fp32 when adding to a tensor and round once. The delta is computed first, the
  base product is added to it, and the bias last with another rounding.
- GPUs may round a product before adding it (cuBLAS on Hopper does). The base product is computed
  first, and the sum with the delta uses stochastic rounding, so that the expected value is exact.

Shapes: T tokens, I inputs, O outputs of one layer, R its rank.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from finesight.model.quant.base import HAS_TRITON, has_tensor_cores

if HAS_TRITON:
    from finesight.model.kernels import lora_gemm as lora_gemm_kernels


class LoraDelta(NamedTuple):
    """LoRA delta of one layer of a fused linear, scale * low B^T.

    `low_TR` are the LoRA activations.
    """

    layer_index: int
    low_TR: Tensor
    lora_B_OR: Tensor
    scale: float


def linear_with_delta(
    delta: LoraDelta, x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None
) -> Tensor:
    """Compute x W^T + bias plus a LoRA delta, [T, O], on a CPU.

    See the module docstring for the order of the operations.
    """
    _, low_TR, lora_B_OR, scale = delta
    y_TO = x_TI.new_empty(len(x_TI), len(w_OI))
    # With beta 0 the content of the buffer is not read.
    y_TO.addmm_(low_TR, lora_B_OR.T, beta=0, alpha=scale).addmm_(x_TI, w_OI.T)
    return y_TO if bias_O is None else y_TO.add_(bias_O)


def add_lora_delta(y_TO: Tensor, low_TR: Tensor, lora_B_OR: Tensor, scale: float = 1.0) -> Tensor:
    """Add a LoRA delta, scale * low B^T, to a base product on a GPU.

    The base product is changed in place. The sum is rounded stochastically if the kernel is
    available, else to nearest.
    """
    if HAS_TRITON and has_tensor_cores(y_TO.dtype, y_TO.device):
        lora_gemm_kernels.add_lora_up(y_TO, low_TR, lora_B_OR, scale)
        return y_TO
    return y_TO.addmm_(low_TR, lora_B_OR.T, alpha=scale)
