"""Multi-LoRA inference: several adapters on one base model, selected per token.

All adapters are computed for every token, and the LoRA activations of other adapters are multiplied
by zero. This needs no host synchronization, so that a decode step can be captured as a CUDA graph.
For a few adapters the cost is small compared with the base model.

Shapes: T tokens, N adapters, I inputs, O outputs of one layer, S ranks of all adapters of a fused
linear, layer after layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.model.linear import (
    FusedLinear,
    LoraDelta,
    LoraLinear,
    add_lora_delta,
    iter_adapters,
    linear_with_deltas,
)
from finesight.model.quant.base import QuantizedWeight


class LoraRouting:
    """Selection of the adapter of each token in the next forward pass.

    `rank_scales_TX` holds the LoRA scale of each rank of a token's adapter, and zeros for other
    adapters; a single row applies to all tokens. X counts the ranks of all adapters in all linears.
    Scales are in fp32, because alpha / rank may exceed the range of fp16.
    """

    def __init__(self, num_adapters: int, device: torch.device) -> None:
        self.num_adapters = num_adapters
        self._device = device
        self._scales: list[Tensor] = []
        self._scales_NX = torch.empty(num_adapters, 0, dtype=torch.float32, device=device)
        self.rank_scales_TX = self._scales_NX[:1]

    def register_ranks(self, scales_NS: Tensor) -> slice:
        """Register the ranks of a linear and return their slice of all ranks."""
        start = self._scales_NX.shape[1]
        self._scales.append(scales_NS)
        self._scales_NX = torch.cat(self._scales, 1)
        self.rank_scales_TX = torch.zeros_like(self._scales_NX[:1])
        return slice(start, start + scales_NS.shape[1])

    def build_mask(self, adapter_index: int | None) -> Tensor:
        mask_1N = torch.zeros(1, self.num_adapters, dtype=torch.float32)
        if adapter_index is not None:
            mask_1N[0, adapter_index] = 1
        return mask_1N.to(self._device)

    def set_mask(self, mask_TN: Tensor) -> None:
        self.rank_scales_TX = mask_TN @ self._scales_NX


class MultiLoraLinear(nn.Module):
    """Several LoRA adapters of a `FusedLinear`, for inference only.

    `lora_A_SI` stacks the down-projections of all adapters, grouped by layer. `lora_B_OS` is
    block-diagonal: it holds the up-projections in the rows of a layer's outputs and the columns of
    its ranks.
    """

    lora_A_SI: Tensor
    lora_B_OS: Tensor

    def __init__(
        self, linear: FusedLinear, adapters: Sequence[LoraLinear | None], routing: LoraRouting
    ) -> None:
        super().__init__()
        self._routing = routing
        self._output_sizes = tuple(linear.output_sizes.values())
        reference = next(adapter.lora_A for adapter in adapters if adapter is not None)
        lora_As_RI: list[Tensor] = []
        block_diagonals: list[Tensor] = []
        scales: list[Tensor] = []
        self._rank_slices: list[slice | None] = []
        """Columns of the stacked ranks of each layer; None for layers without an adapter."""
        start = 0
        for name, width in linear.output_sizes.items():
            lora_Bs_OR = [reference.new_zeros(width, 0)]
            for index, adapter in enumerate(adapters):
                if adapter is not None and name in adapter.configs:
                    lora_A_RI, lora_B_OR = adapter.factors()[name]
                    lora_As_RI.append(lora_A_RI)
                    lora_Bs_OR.append(lora_B_OR)
                    rank = len(lora_A_RI)
                    scales.append(lora_A_RI.new_zeros(len(adapters), rank, dtype=torch.float32))
                    scales[-1][index] = adapter.configs[name].scale
            block_diagonals.append(torch.cat(lora_Bs_OR, 1))
            stop = start + block_diagonals[-1].shape[1]
            self._rank_slices.append(slice(start, stop) if stop > start else None)
            start = stop
        lora_B_OS: Tensor = torch.block_diag(*block_diagonals)  # type: ignore[no-untyped-call]
        self.register_buffer("lora_A_SI", torch.cat(lora_As_RI).detach(), persistent=False)
        self.register_buffer("lora_B_OS", lora_B_OS.detach(), persistent=False)
        self._routing_slice = routing.register_ranks(torch.cat(scales, 1))

    @property
    def rank_scales_TS(self) -> Tensor:
        return self._routing.rank_scales_TX[:, self._routing_slice]

    def _compute_low(self, x_TI: Tensor) -> Tensor:
        return (F.linear(x_TI, self.lora_A_SI) * self.rank_scales_TS).to(x_TI.dtype)

    def add_delta(self, y_TO: Tensor, x_TI: Tensor) -> Tensor:
        """Add the LoRA deltas of an input to its concatenated base products, in place."""
        return add_lora_delta(y_TO, self._compute_low(x_TI), self.lora_B_OS)

    def forward(
        self, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        x_TI = x.reshape(-1, x.shape[-1])
        low_TS = self._compute_low(x_TI)
        lora_Bs_OS = torch.split(self.lora_B_OS, list(self._output_sizes))
        layers = zip(lora_Bs_OS, self._rank_slices, strict=True)
        deltas = []
        for layer_index, (lora_B_OS, ranks) in enumerate(layers):
            if ranks is not None:
                lora_B_OR = lora_B_OS[:, ranks]
                deltas.append(LoraDelta(layer_index, low_TS[:, ranks], lora_B_OR, scale=1.0))
        ys_TO = linear_with_deltas(x_TI, weight, bias, self._output_sizes, deltas)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys_TO)


def detach_adapter(model: nn.Module) -> dict[str, LoraLinear]:
    """Remove the adapter from the model and return its layers, for `install_lora_routing`."""
    detached: dict[str, LoraLinear] = {}
    for path, linear, adapter in list(iter_adapters(model)):
        detached[path] = adapter
        linear.adapter = None
    return detached


def install_lora_routing(
    model: nn.Module, adapters: Sequence[Mapping[str, LoraLinear]]
) -> LoraRouting | None:
    """Install detached adapters in the model; return None without any."""
    all_layers = chain.from_iterable(layers.values() for layers in adapters)
    any_adapter = next(all_layers, None)
    if any_adapter is None:
        return None
    routing = LoraRouting(len(adapters), any_adapter.lora_A.device)
    for path, linear in list(model.named_modules()):
        candidates = [layers.get(path) for layers in adapters]
        if isinstance(linear, FusedLinear) and any(layer is not None for layer in candidates):
            linear.adapter = MultiLoraLinear(linear, candidates, routing)
    return routing
