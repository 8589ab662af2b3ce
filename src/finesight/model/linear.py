"""Linear layers that share their input, with one fused weight and an optional LoRA adapter.

LoRA: Hu et al. 2021, arXiv:2106.09685. Adding a LoRA delta to a product that was already rounded to
bf16, with rounding to nearest, loses values below half a unit in the last place: six sevenths of a
delta of 1/4,000 of the product. A fused matmul (`model.lora.fused`) accumulates in fp32 and rounds
once. Otherwise:

- CPUs accumulate in fp32 when adding to a tensor and round once. The delta is computed first, the
  base product is added to it, and the bias last with another rounding.
- GPUs may round a product before adding it (cuBLAS on Hopper does). The base product is computed
  first, and the sum with the delta uses stochastic rounding, so that the expected value is exact.

Shapes: T tokens or patches, I inputs, O outputs of one layer, R rank of one layer, S ranks of all
layers of a fused linear.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finesight.model.fused_ops import dropout, dropout_matmul, has_tensor_cores, split_outputs
from finesight.model.kernels import lora_gemm as lora_gemm_kernels
from finesight.model.kernels.runtime import HAS_TRITON
from finesight.model.quant.base import (
    Fp8Rows,
    QuantizedMatrix,
    QuantizedWeight,
    require_dense,
)
from finesight.model.quant.fp8 import Fp8Weight


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


class RowRange(NamedTuple):
    """Smallest and largest number of rows of a matrix product."""

    start: int
    stop: int


class FusedLinear(nn.Module):
    """Linear layers with the same input, fused into one weight.

    For example, q_proj, k_proj and v_proj share one weight of shape [sum of widths, in_features]. A
    fused linear with a single layer has the name of this layer as its module name. A frozen weight
    may be quantized.
    """

    weight: nn.Parameter | QuantizedWeight

    def __init__(self, in_features: int, output_sizes: Mapping[str, int], *, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.output_sizes = dict(output_sizes)
        out_features = sum(self.output_sizes.values())
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.adapter: nn.Module | None = None
        self.fused_lora_weight: object = None
        """Frozen weight fused with LoRA up-projections (`model.lora.fused`), or None."""
        self.is_sharded = False
        """True if FSDP shards the weight, which then cannot be fused with LoRA up-projections."""
        self.row_range: RowRange | None = None
        """Rows of each matrix product of a fused layer whose rows must not depend on each other
        (`model.lora.fused.set_row_ranges`)."""

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
            self._replace_weight(nn.Parameter(self.weight.dequantize()))

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
    assert isinstance(x, Tensor), "FP8 input for a weight that is not FP8"
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
        # In fp32, because the product would otherwise be rounded before the delta is added.
        wide_TO = weight.linear_fp8(x_TI, bias, torch.float32)
        for layer_index, low_TR, lora_B_OR, scale in deltas:
            wide_TO[layer_index].addmm_(low_TR.float(), lora_B_OR.float().T, alpha=scale)
        return tuple(y_TO.to(x_TI.dtype) for y_TO in wide_TO)
    delta_by_layer = {delta.layer_index: delta for delta in deltas}
    weights: Iterable[Tensor]
    if isinstance(weight, Tensor):
        weights = torch.split(weight, list(output_sizes))
    else:
        weights = weight.dequantize_layers()
    biases = split_outputs(bias, output_sizes)
    outputs = []
    for layer, (w_OI, bias_O) in enumerate(zip(weights, biases, strict=True)):
        if layer not in delta_by_layer:
            outputs.append(F.linear(x_TI, w_OI, bias_O))
            continue
        _, low_TR, lora_B_OR, scale = delta_by_layer[layer]
        y_TO = x_TI.new_empty(len(x_TI), len(w_OI))
        # With beta 0 the content of the buffer is not read.
        y_TO.addmm_(low_TR, lora_B_OR.T, beta=0, alpha=scale).addmm_(x_TI, w_OI.T)
        if bias_O is not None:
            y_TO.add_(bias_O)
        outputs.append(y_TO)
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
    if isinstance(weight, QuantizedWeight):
        return weight.linear_concat_backward(dy)
    return dy @ weight


@dataclass(frozen=True)
class LoraConfig:
    """LoRA rank and alpha of one layer."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoraSlice(NamedTuple):
    """Position of one adapted layer within a fused linear."""

    layer_index: int
    output_slice: slice
    rank_slice: slice
    scale: float


class LoraFactors(NamedTuple):
    """LoRA matrices of one layer: A [rank, inputs] and B [outputs, rank]."""

    lora_A: Tensor
    lora_B: Tensor


class LoraLinear(nn.Module):
    """LoRA adapter of some or all layers of a `FusedLinear`: its parameters and reference forward.

    `lora_A` stacks the down-projections of the adapted layers, [sum of ranks, inputs], so that the
    input is read once. `lora_B` holds one up-projection [outputs, rank] per layer. In training the
    layers share one dropout mask, unlike peft, which samples a mask per layer. The base weight must
    be frozen.
    """

    def __init__(
        self,
        linear: FusedLinear,
        configs: Mapping[str, LoraConfig],
        dropout: float,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert configs, "an adapter without layers"
        unknown = [name for name in configs if name not in linear.output_sizes]
        assert not unknown, f"unknown layers {unknown} of {list(linear.output_sizes)}"
        # Listings of adapted layers follow this order: of the fused layers, not of the caller.
        self.configs = {name: configs[name] for name in linear.output_sizes if name in configs}
        self.dropout = dropout
        self.output_sizes = tuple(linear.output_sizes.values())
        device = linear.weight.device
        factor_dtype = dtype or linear.weight.dtype
        rank_sum = sum(config.rank for config in self.configs.values())
        self.lora_A = nn.Parameter(
            torch.zeros(rank_sum, linear.in_features, dtype=factor_dtype, device=device)
        )
        # Add them one by one: ParameterDict sorts the keys of a dict.
        self.lora_B = nn.ParameterDict()
        self.slices: dict[str, LoraSlice] = {}
        column = row = 0
        for index, (name, size) in enumerate(linear.output_sizes.items()):
            if name in self.configs:
                config = self.configs[name]
                lora_B_OR = torch.zeros(size, config.rank, dtype=factor_dtype, device=device)
                self.lora_B[name] = nn.Parameter(lora_B_OR)
                output_slice = slice(column, column + size)
                rank_slice = slice(row, row + config.rank)
                self.slices[name] = LoraSlice(index, output_slice, rank_slice, config.scale)
                row += config.rank
            column += size

    def forward(
        self, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Compute base product plus LoRA delta of each layer, [..., I] to [..., O]."""
        is_trainable = isinstance(weight, Tensor) and weight.requires_grad
        assert not is_trainable, "the base weight of an adapter must be frozen"
        outputs = _LoraLinearFunction.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.shape[-1]),
            weight,
            bias,
            self,
            self.dropout if self.training else 0.0,
            self.lora_A,
            *self.lora_B.values(),
        )
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    def factors(self) -> dict[str, LoraFactors]:
        """Return A and B of each adapted layer by layer name."""
        return {
            name: LoraFactors(self.lora_A[lora_slice.rank_slice], self.lora_B[name])
            for name, lora_slice in self.slices.items()
        }

    @torch.no_grad()
    def reset_parameters(self, seed: int, path: str) -> None:
        """Initialize A from the uniform distribution on +-1/sqrt(I) and B with zeros, as peft does.

        The values depend only on the seed and the layer's hub name, where `path` is the module path
        of the fused linear. They are drawn in fp32 on the CPU, so that they are equal for any
        dtype, device and set of adapted layers. A layer on the meta device has no values.
        """
        if self.lora_A.is_meta:
            return
        for name, (lora_A_RI, lora_B_OR) in self.factors().items():
            digest = hashlib.sha256(f"{seed}:{hub_name(path, name)}".encode()).digest()
            layer_seed = int.from_bytes(digest[:8], "little") >> 1
            generator = torch.Generator().manual_seed(layer_seed)
            bound = lora_A_RI.shape[1] ** -0.5
            lora_A_RI.copy_(
                torch.empty(lora_A_RI.shape).uniform_(-bound, bound, generator=generator)
            )
            lora_B_OR.zero_()


class _LoraLinearFunction(torch.autograd.Function):
    """Autograd function of a fused linear with LoRA.

    y_i = x W_i^T + bias_i + scale_i dropout(x) A_i^T B_i^T for each layer i.

    Base product and delta are one autograd node, so that one is added to the other in place, in
    both passes, without copies of the outputs or of the input gradient. Each layer has its own
    output gradient; they need not be concatenated. Quantized weights are dequantized again in the
    backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight: Tensor | QuantizedWeight,
        bias_O: Tensor | None,
        adapter: LoraLinear,
        p: float,
        lora_A_SI: Tensor,
        *lora_Bs_OR: Tensor,
    ) -> tuple[Tensor, ...]:
        full_TI = x_TI
        dropout_mask = None
        if p > 0.0:
            x_TI, dropout_mask = dropout(x_TI.contiguous(), p)
        low_TS = F.linear(x_TI, lora_A_SI)
        slices = tuple(adapter.slices.values())
        deltas = [
            LoraDelta(s.layer_index, low_TS[:, s.rank_slice], lora_B_OR, s.scale)
            for s, lora_B_OR in zip(slices, lora_Bs_OR, strict=True)
        ]
        ys_TO = linear_with_deltas(full_TI, weight, bias_O, adapter.output_sizes, deltas)
        ctx.save_for_backward(x_TI, dropout_mask, low_TS, lora_A_SI, *lora_Bs_OR)
        # The weight is frozen and unchanged until the backward pass.
        ctx.weight = weight
        ctx.slices = slices
        ctx.dropout = p
        return ys_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, dropout_mask, low_TS, lora_A_SI, *lora_Bs_OR = ctx.saved_tensors
        needs_x, _, _, _, _, needs_a, *needs_b = ctx.needs_input_grad
        dlow_TS = torch.empty_like(low_TS)
        dbs_OR: list[Tensor | None] = []
        for s, lora_B_OR, needs_grad in zip(ctx.slices, lora_Bs_OR, needs_b, strict=True):
            dy_TO = dys_TO[s.layer_index]
            # With beta 0 the first operand is only a buffer; its content is not read.
            dlow_TS[:, s.rank_slice].addmm_(dy_TO, lora_B_OR, beta=0, alpha=s.scale)
            db_OR = None
            if needs_grad:
                low_TR = low_TS[:, s.rank_slice]
                db_OR = torch.addmm(lora_B_OR, dy_TO.T, low_TR, beta=0, alpha=s.scale)
            dbs_OR.append(db_OR)
        da_SI = dlow_TS.T @ x_TI if needs_a else None
        dx_TI: Tensor | None = None
        if needs_x:
            if dropout_mask is None:
                dx_TI = dlow_TS @ lora_A_SI
            else:
                dx_TI = dropout_matmul(dlow_TS, lora_A_SI, dropout_mask, ctx.dropout)
            add_input_gradient(dx_TI, dys_TO, ctx.weight)
        return dx_TI, None, None, None, None, da_SI, *dbs_OR


class LinearRef(NamedTuple):
    """Reference to one layer of a fused linear: module, module path and output name."""

    linear: FusedLinear
    path: str
    output_name: str


def stacked_row_counts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the number of rows of each layer in stacked parameters, by parameter name."""
    row_counts: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        if isinstance(module, FusedLinear):
            row_counts[f"{path}.weight"] = tuple(module.output_sizes.values())
            if isinstance(module.adapter, LoraLinear):
                configs = module.adapter.configs.values()
                row_counts[f"{path}.adapter.lora_A"] = tuple(config.rank for config in configs)
    return row_counts


def find_adaptable_layers(model: nn.Module) -> dict[str, LinearRef]:
    """Return the linear layers that support an adapter, by hub name without `.weight`."""
    layers: dict[str, LinearRef] = {}
    for path, module in model.named_modules():
        if isinstance(module, FusedLinear) and not path.startswith(("lm_head", "visual.patch_")):
            for output_name in module.output_sizes:
                layers[hub_name(path, output_name)] = LinearRef(module, path, output_name)
    return layers


def iter_adapters(model: nn.Module) -> Iterator[tuple[str, FusedLinear, LoraLinear]]:
    """Yield module path, fused linear and adapter of each linear with a LoRA adapter."""
    for path, module in model.named_modules():
        if isinstance(module, FusedLinear) and isinstance(module.adapter, LoraLinear):
            yield path, module, module.adapter


@contextmanager
def disable_dropout(model: nn.Module) -> Iterator[None]:
    """Disable the dropout of all adapters within the context."""
    saved: list[tuple[LoraLinear, float]] = []
    for _, _, adapter in iter_adapters(model):
        saved.append((adapter, adapter.dropout))
        adapter.dropout = 0.0
    try:
        yield
    finally:
        for adapter, p in saved:
            adapter.dropout = p


def hub_name(path: str, output_name: str) -> str:
    parent, dot, _ = path.rpartition(".")
    return f"{parent}{dot}{output_name}"
