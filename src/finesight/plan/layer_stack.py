"""Estimate saved activations and memory peaks of a sequence of layers, in bytes."""

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
    """Estimate the memory of a layer, fused or unfused as in training.

    Args:
        layer: Decoder layer or vision encoder block.
        has_input_grad: Whether the input of the layer needs a gradient.
        compute: Device properties.
    """
    if compute.uses_fused_layers and isinstance(layer, DecoderLayer) and layer.fusible_linears:
        return FusedLayerMemory.from_layer(layer, has_input_grad, compute)
    return compute_unfused_layer_memory(layer, has_input_grad, compute)


@dataclass(frozen=True, slots=True)
class LayerStack:
    """Memory of all decoder layers or of all vision encoder blocks.

    Attributes:
        layers: Memory of each layer.
        num_checkpointed: Number of layers at the start that use activation checkpointing.
    """

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
        """Build the memory estimates of consecutive layers.

        A layer needs an input gradient if the input of the first layer does, or if any earlier
        layer has trainable parameters.
        """
        memories: list[AnyLayerMemory] = []
        for layer in layers:
            memories.append(compute_layer_memory(layer, has_input_grad, compute))
            has_input_grad = memories[-1].has_output_grad
        return cls(
            tuple(memories), num_checkpointed_layers(activation_checkpointing, len(memories))
        )

    @property
    def has_output_grad(self) -> bool:
        """True if the output of the last layer needs a gradient."""
        return self.layers[-1].has_output_grad

    @property
    def saves_attention(self) -> bool:
        """True if any layer saves queries, keys and values for the backward pass.

        The rotary angles then remain allocated, even if all layers use activation checkpointing.
        """
        return any(layer.saves_attention for layer in self.layers)

    def sort_index_bytes(self, lengths: Sequence[int], compute: ComputeConfig) -> int:
        """Return the bytes of the indices that sort tokens by sequence length.

        All layers share these indices. Only attention without a varlen kernel needs them.
        """
        layers = (layer for layer in self.layers if isinstance(layer, LayerMemory))
        attentions = (layer.attention for layer in layers if layer.attention is not None)
        return max(
            (attention.sort_index_bytes(lengths, compute) for attention in attentions), default=0
        )

    @property
    def persistent_bytes(self) -> int:
        """Bytes that the first pack allocates and that remain allocated, without the weights."""
        return sum(layer.persistent_bytes for layer in self.layers)

    def saved_bytes(self, shapes: Sequence[LayerInputShape]) -> list[int]:
        """Return the bytes that each layer saves for the backward pass.

        A layer with activation checkpointing saves its input only.
        """
        return [
            shape.num_tokens * layer.input_row_bytes
            if layer_index < self.num_checkpointed
            else layer.saved_bytes(shape)
            for layer_index, (layer, shape) in enumerate(zip(self.layers, shapes, strict=True))
        ]

    def forward_peak_layers(self) -> list[int]:
        """Return the indices of layers whose forward pass may be the peak.

        These are the last two layers, unless they use activation checkpointing.
        """
        last_index = len(self.layers) - 1
        return [
            layer_index
            for layer_index in (last_index - 1, last_index)
            if layer_index >= self.num_checkpointed
        ]

    def backward_peak_layers(self) -> list[int]:
        """Return the indices of layers whose backward pass may be the peak, last layer first.

        Candidates are the last two layers, the layers on both sides of the activation checkpointing
        limit, and the first layer, at which almost all gradients exist.
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
        """Return the workspace bytes of a layer's forward pass, without its saved bytes."""
        return max(0, self.layers[layer_index].forward_workspace(shapes[layer_index]))

    def backward_workspace(self, layer_index: int, shapes: Sequence[LayerInputShape]) -> int:
        """Return the workspace bytes of a layer's backward pass, minus saved bytes freed by then.

        With activation checkpointing, the recomputed activations are included.
        """
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
