"""Linear layers that share their input, with one fused weight and an optional adapter.

Adding a LoRA delta to a product that was already rounded to bf16, with rounding to nearest, loses
values below half a unit in the last place: six sevenths of a delta of 1/4,000 of the product. A
fused matmul (`model.lora.fused`) accumulates in fp32 and rounds once. Otherwise:

- CPUs accumulate in fp32 when adding to a tensor and round once. The delta is computed first, the
  base product is added to it, and the bias last with another rounding.
- GPUs may round a product before adding it (cuBLAS on Hopper does). The base product is computed
  first, and the sum with the delta uses stochastic rounding, so that the expected value is exact.

Shapes: T tokens, I inputs, O outputs of one layer, R its LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.model.quant.base import (
    HAS_TRITON,
    Fp8Rows,
    QuantizedMatrix,
    QuantizedWeight,
    has_tensor_cores,
    require_dense,
    split_outputs,
)
from finesight.model.quant.fp8 import Fp8Weight

if HAS_TRITON:
    from finesight.model.kernels import lora_gemm as lora_gemm_kernels


class LoraDelta(NamedTuple):
    """LoRA delta of one layer of a fused linear, scale * low B^T."""

    layer_index: int
    low_TR: Tensor
    lora_B_OR: Tensor
    scale: float


def add_lora_delta(y_TO: Tensor, low_TR: Tensor, lora_B_OR: Tensor, scale: float = 1.0) -> Tensor:
    """Add a LoRA delta, scale * low B^T, to a base product on a GPU.

    The base product is changed in place. The sum is rounded stochastically if the kernel is
    available, else to nearest.
    """
    if HAS_TRITON and has_tensor_cores(y_TO.dtype, y_TO.device):
        lora_gemm_kernels.add_lora_up(y_TO, low_TR, lora_B_OR, scale)
        return y_TO
    return y_TO.addmm_(low_TR, lora_B_OR.T, alpha=scale)


def single_output(outputs: tuple[Tensor, ...]) -> Tensor:
    """Return the only output of a `FusedLinear` with a single layer."""
    (y,) = outputs
    return y


class FusedLinear(nn.Module):
    """Linear layers with the same input, fused into one weight.

    For example, q_proj, k_proj and v_proj share one weight of shape [sum of widths, in_features]. A
    fused linear with a single layer has the name of this layer as its module name. A frozen weight
    may be quantized.
    """

    weight: nn.Parameter | QuantizedWeight

    def __init__(self, in_features: int, output_sizes: Mapping[str, int], *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.output_sizes = in_features, dict(output_sizes)
        out_features = sum(self.output_sizes.values())
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.adapter: nn.Module | None = None
        self.fused_lora_weight: object = None
        """Frozen weight fused with LoRA up-projections (`model.lora.fused`), or None."""
        self.is_sharded = False
        """True if FSDP shards the weight, which then cannot be fused with LoRA up-projections."""

    def set_quantized_weight(
        self,
        matrix_type: Callable[[int, int], QuantizedMatrix],
        weight_type: type[QuantizedWeight] = QuantizedWeight,
    ) -> None:
        """Replace the weight by empty quantized matrices, one per layer."""
        matrices = [matrix_type(size, self.in_features) for size in self.output_sizes.values()]
        self._replace_weight(weight_type(matrices, self.weight.dtype))

    @torch.no_grad()
    def dequantize(self) -> None:
        if isinstance(self.weight, QuantizedWeight):
            self._replace_weight(nn.Parameter(torch.cat(list(self.weight.dequantize_layers()))))

    def _replace_weight(self, weight: nn.Parameter | QuantizedWeight) -> None:
        # torch refuses to replace a parameter by another kind of object.
        del self.weight
        self.weight = weight

    @property
    def accepts_fp8_input(self) -> bool:
        """True if callers may quantize the input to FP8."""
        return (
            self.adapter is None and not torch.is_grad_enabled() and accepts_fp8_input(self.weight)
        )

    def forward(self, x: Tensor | Fp8Rows) -> tuple[Tensor, ...]:
        if self.adapter is not None:
            return tuple(self.adapter(x, self.weight, self.bias))
        return linear_per_layer(x, self.weight, self.bias, tuple(self.output_sizes.values()))


def accepts_fp8_input(weight: Tensor | QuantizedWeight) -> bool:
    """Return True if the weight quantizes its input to FP8."""
    return isinstance(weight, Fp8Weight) and weight.training


def linear_per_layer(
    x: Tensor | Fp8Rows,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    output_sizes: Sequence[int],
) -> tuple[Tensor, ...]:
    """Compute x W_i^T + bias_i for each layer, [..., in_features] to [..., width].

    Separate matmuls give contiguous outputs. Later kernels read those several times faster than
    slices of one output, and the backward pass need not concatenate gradients.
    """
    if isinstance(weight, QuantizedWeight):
        return weight.linear_per_layer(x, bias)
    x = require_dense(x)
    if len(output_sizes) == 1:
        return (F.linear(x, weight, bias),)
    weights = torch.split(weight, list(output_sizes))
    biases = split_outputs(bias, output_sizes)
    return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))


def linear_with_deltas(
    x_TI: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    output_sizes: Sequence[int],
    deltas: Sequence[LoraDelta],
) -> tuple[Tensor, ...]:
    """Compute x W_i^T + bias_i for each layer and add the LoRA deltas, without autograd."""
    if x_TI.is_cuda:
        ys_TO = linear_per_layer(x_TI, weight, bias, output_sizes)
        for layer_index, low_TR, lora_B_OR, scale in deltas:
            add_lora_delta(ys_TO[layer_index], low_TR, lora_B_OR, scale)
        return ys_TO
    if isinstance(weight, Fp8Weight) and weight.training:
        # Accumulate the sum in fp32.
        wide_TO = weight.linear_fp8(x_TI, bias, torch.float32)
        for layer_index, low_TR, lora_B_OR, scale in deltas:
            wide_TO[layer_index].addmm_(low_TR.float(), lora_B_OR.float().T, alpha=scale)
        return tuple(y_TO.to(x_TI.dtype) for y_TO in wide_TO)
    delta_by_layer = {delta.layer_index: delta for delta in deltas}
    weights = (
        torch.split(weight, list(output_sizes))
        if isinstance(weight, Tensor)
        else weight.dequantize_layers()
    )
    outputs = []
    for layer, (w_OI, bias_O) in enumerate(
        zip(weights, split_outputs(bias, output_sizes), strict=True)
    ):
        if layer not in delta_by_layer:
            outputs.append(F.linear(x_TI, w_OI, bias_O))
            continue
        _, low_TR, lora_B_OR, scale = delta_by_layer[layer]
        y_TO = x_TI.new_empty(len(x_TI), len(w_OI))
        # With beta 0 the content of the buffer is not read.
        y_TO.addmm_(low_TR, lora_B_OR.T, beta=0, alpha=scale).addmm_(x_TI, w_OI.T)
        outputs.append(y_TO if bias_O is None else y_TO.add_(bias_O))
    return tuple(outputs)


def add_input_gradient(
    dx_TI: Tensor, dys_TO: Sequence[Tensor], weight: Tensor | QuantizedWeight
) -> None:
    """Add the input gradient of fused linear layers, the sum of dy_i W_i, to `dx_TI`."""
    if isinstance(weight, QuantizedWeight):
        weight.add_input_gradient(dx_TI, dys_TO)
        return
    weights = torch.split(weight, [dy_TO.shape[1] for dy_TO in dys_TO])
    for dy_TO, w_OI in zip(dys_TO, weights, strict=True):
        dx_TI.addmm_(dy_TO, w_OI)


def linear_concat(
    x: Tensor | Fp8Rows, weight: Tensor | QuantizedWeight, bias: Tensor | None
) -> Tensor:
    """Compute x W^T + bias of all fused layers, concatenated to [T, sum of widths]."""
    if isinstance(weight, QuantizedWeight):
        return weight.linear_concat(x, bias)
    return F.linear(require_dense(x), weight, bias)


def linear_concat_backward(dy: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """Compute the input gradient of `linear_concat`, dy W."""
    return dy @ weight if isinstance(weight, Tensor) else weight.linear_concat_backward(dy)
