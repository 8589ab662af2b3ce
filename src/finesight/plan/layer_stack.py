"""Estimate saved activations and peaks of consecutive layers, in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from finesight.model.decoder import DecoderLayer
from finesight.model.layers import num_checkpointed_layers
from finesight.plan.fused_layer_memory import FusedLayerMemory
from finesight.plan.layer_memory import compute_unfused_layer_memory
from finesight.plan.saved_activations import ComputeConfig, LayerInputShape, LayerMemory

AnyLayerMemory: TypeAlias = LayerMemory | FusedLayerMemory


def compute_layer_memory(
    layer: nn.Module, has_input_grad: bool, compute: ComputeConfig
) -> AnyLayerMemory:
    """Estimate a layer as the model executes it, fused or unfused.

    Args:
        layer: Layer of the decoder or the vision encoder.
        has_input_grad: Whether the input needs a gradient.
        compute: Device properties.
    """
    if compute.uses_fused_layers and isinstance(layer, DecoderLayer) and layer.fusible_linears:
        return FusedLayerMemory.from_layer(layer, has_input_grad, compute)
    return compute_unfused_layer_memory(layer, has_input_grad, compute)


@dataclass(frozen=True, slots=True)
class LayerStack:
    """Consecutive layers; the first ones use activation checkpointing."""

    layers: tuple[AnyLayerMemory, ...]
    num_checkpointed: int

    @classmethod
    def from_modules(
        cls,
        layers: Iterable[nn.Module],
        has_input_grad: bool,
        compute: ComputeConfig,
        activation_checkpointing: float,
    ) -> LayerStack:
        """Build from modules. Gradients begin at the first trainable layer."""
        memories: list[AnyLayerMemory] = []
        for layer in layers:
            memories.append(compute_layer_memory(layer, has_input_grad, compute))
            has_input_grad = memories[-1].has_output_grad
        return cls(
            tuple(memories), num_checkpointed_layers(activation_checkpointing, len(memories))
        )

    @property
    def has_output_grad(self) -> bool:
        """True if the output of the last layer has a gradient."""
        return self.layers[-1].has_output_grad

    @property
    def saves_attention(self) -> bool:
        """True if a layer saves attention inputs; checkpointed layers hold rotary angles, too."""
        return any(layer.saves_attention for layer in self.layers)

    def sort_index_bytes(self, lengths: Sequence[int], compute: ComputeConfig) -> int:
        """Return bytes of the sort indices of tokens, shared by all layers."""
        layers = (layer for layer in self.layers if isinstance(layer, LayerMemory))
        attentions = (layer.attention for layer in layers if layer.attention is not None)
        return max(
            (attention.sort_index_bytes(lengths, compute) for attention in attentions), default=0
        )

    @property
    def persistent_bytes(self) -> int:
        """Bytes allocated once on the first pack, beside the weights."""
        return sum(layer.persistent_bytes for layer in self.layers)

    def saved_bytes(self, shapes: Sequence[LayerInputShape]) -> list[int]:
        """Return the saved bytes of each layer."""
        return [
            shape.num_tokens * layer.input_row_bytes
            if layer_index < self.num_checkpointed
            else layer.saved_bytes(shape)
            for layer_index, (layer, shape) in enumerate(zip(self.layers, shapes, strict=True))
        ]

    def forward_peak_layers(self) -> list[int]:
        """Layers whose forward pass may be the peak: the last ones without checkpointing."""
        last_index = len(self.layers) - 1
        return [
            layer_index
            for layer_index in (last_index - 1, last_index)
            if layer_index >= self.num_checkpointed
        ]

    def backward_peak_layers(self) -> list[int]:
        """Layers whose backward pass may be the peak.

        These are the last layer, the first checkpointed layer and the one after it, and the first
        layer, when all gradients exist.
        """
        last_index = len(self.layers) - 1
        candidates = {
            last_index,
            last_index - 1,
            self.num_checkpointed,
            self.num_checkpointed - 1,
            0,
        }
        return [
            layer_index
            for layer_index in sorted(candidates, reverse=True)
            if 0 <= layer_index <= last_index
        ]

    def forward_workspace(self, layer_index: int, shapes: Sequence[LayerInputShape]) -> int:
        """Return workspace bytes of the forward pass of a layer beside its saved bytes."""
        return max(0, self.layers[layer_index].forward_workspace(shapes[layer_index]))

    def backward_workspace(self, layer_index: int, shapes: Sequence[LayerInputShape]) -> int:
        """Return the backward workspace of a layer minus freed bytes."""
        layer, shape = self.layers[layer_index], shapes[layer_index]
        workspace = layer.backward_workspace(shape)
        if layer_index < self.num_checkpointed:
            second_forward_bytes = (
                layer.forward_workspace(shape) + shape.mlp_rows * layer.input_row_bytes
            )
            # The input of the layer already exists.
            activation_bytes = (
                layer.saved_bytes(shape)
                - shape.num_tokens * layer.input_row_bytes * layer.saves_input
            )
            workspace = activation_bytes + max(workspace, second_forward_bytes)
        return max(0, workspace)
