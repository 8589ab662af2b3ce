"""FLOP counts of training steps, computed from shapes, and the peak FLOP/s of a device.

The counts contain attention and the matrix products with weights: the forward pass of all weights,
input gradients where an earlier or parallel weight is trainable, and weight gradients of trainable
weights. Activation checkpointing is not counted, since MFU measures useful computation only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from finesight.encode.batch import compute_context_lengths
from finesight.model.quant.base import QuantizedWeight
from finesight.model.trainable import (
    CONV_SUFFIX,
    EMBEDDING_SUFFIXES,
    MODEL_PARTS,
    ModelPart,
    get_part,
)
from finesight.train.device_timing import record_event
from finesight.vision.image_processing import GridTHW

if TYPE_CHECKING:
    from finesight.model.vlm import VisionLanguageModel

LAYER_PREFIXES = ("model.layers.", "visual.blocks.")
"""Name prefixes of the parameters in layers with activation checkpointing."""


class PackShape(Protocol):
    """Interface of the sizes of a packed batch that determine its FLOPs."""

    @property
    def lengths(self) -> Sequence[int]: ...

    @property
    def prefix_length(self) -> int: ...

    @property
    def grid_thw(self) -> Sequence[GridTHW]: ...

    @property
    def num_supervised_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class FlopBreakdown:
    """FLOPs of the forward and backward pass of a packed batch, by operation.

    Attributes:
        matmul_by_part: Matrix products with weights, by model part. The language model head counts
            as embeddings.
        decoder_attention: Attention of the decoder.
        vision_attention: Attention of the vision encoder.
    """

    matmul_by_part: Mapping[ModelPart, int]
    decoder_attention: int
    vision_attention: int

    @property
    def total(self) -> int:
        """Total FLOPs of all operations."""
        return sum(self.matmul_by_part.values()) + self.decoder_attention + self.vision_attention


class FlopCounter:
    """Counter of the training FLOPs of a model with its trainable and frozen parameters."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self._config = model.config
        self._window_config = model.visual.window_attention
        self._params_per_row = dict.fromkeys(MODEL_PARTS, 0)
        # The head and the last MLP process only the tokens that predict supervised ones.
        self._params_per_label = dict.fromkeys(MODEL_PARTS, 0)
        self._last_mlp = f"model.layers.{model.config.decoder.num_layers - 1}.mlp."
        # Activation checkpointing repeats the forward pass of layers only.
        self._layer_params = dict.fromkeys(MODEL_PARTS, 0)
        trainable_parts: set[ModelPart] = set()
        needs_input_grad = False
        # In forward order: all layers after the first trainable one need input gradients.
        for _, layer_weights in groupby(_iter_weights(model), _get_layer_name):
            has_trainable = False
            for name, num_params, is_matmul, is_trainable in layer_weights:
                part = get_part(name)
                has_trainable |= is_trainable and not name.endswith(EMBEDDING_SUFFIXES)
                if is_trainable:
                    trainable_parts.add(part)
                # The embedding is a lookup; the head is counted below.
                if is_matmul and part != "embeddings":
                    has_input_grad = needs_input_grad or ".adapter.lora_B." in name
                    num_passes = _count_passes(is_trainable, has_input_grad)
                    self._add_weight(name, part, num_params, num_passes)
            needs_input_grad = needs_input_grad or has_trainable
        decoder_config = model.config.decoder
        head = model.model.embed_tokens if model.lm_head is None else model.lm_head
        is_head_trainable = any(parameter.requires_grad for parameter in head.parameters())
        self._params_per_label["embeddings"] += (
            _count_passes(is_head_trainable, has_input_grad=True)
            * decoder_config.vocab_size
            * decoder_config.hidden_size
        )
        self._vision_passes = 3 if "vision" in trainable_parts else 1
        self._decoder_passes = 3 if trainable_parts else 1

    def _add_weight(self, name: str, part: ModelPart, num_params: int, num_passes: int) -> None:
        """Add the matrix products of a weight to the sums of its part."""
        if name.startswith(LAYER_PREFIXES):
            self._layer_params[part] += num_params
        flops = num_passes * num_params
        if name.startswith(self._last_mlp):
            self._params_per_label[part] += flops
            return
        patch_flops = int(flops * _patch_fraction(name))
        self._params_per_row["vision"] += patch_flops
        self._params_per_row[part] += flops - patch_flops

    def count(self, batch: PackShape) -> float:
        """Count the FLOPs of a forward and backward pass."""
        return float(self.count_by_part(batch).total)

    def count_by_part(self, batch: PackShape) -> FlopBreakdown:
        """Count the FLOPs of a forward and backward pass by model part and operation."""
        num_patches = _count_patches(batch.grid_thw)
        num_rows: dict[ModelPart, int] = {
            "vision": num_patches,
            "merger": num_patches // self._config.vision.merge_size**2,
            "language": sum(batch.lengths),
            "embeddings": 0,
        }
        matmul_by_part: dict[ModelPart, int] = {}
        for part in MODEL_PARTS:
            row_products = num_rows[part] * self._params_per_row[part]
            label_products = batch.num_supervised_tokens * self._params_per_label[part]
            matmul_by_part[part] = 2 * (row_products + label_products)
        decoder_attention, vision_attention = self.count_attention(
            batch.lengths, batch.grid_thw, batch.prefix_length
        )
        return FlopBreakdown(matmul_by_part, decoder_attention, vision_attention)

    def count_checkpointing(self, batch: PackShape, fraction: float) -> float:
        """Count the additional FLOPs of activation checkpointing."""
        flops = self.count_by_part(batch)
        num_patches = _count_patches(batch.grid_thw)
        language_flops = (
            2 * sum(batch.lengths) * self._layer_params["language"] + flops.decoder_attention / 3
        )
        vision_flops = 2 * num_patches * self._layer_params["vision"] + flops.vision_attention / 3
        return fraction * (
            language_flops * (self._decoder_passes == 3) + vision_flops * (self._vision_passes == 3)
        )

    def count_attention(
        self, lengths: Sequence[int], grid_thw: Sequence[GridTHW], prefix_length: int = 0
    ) -> tuple[int, int]:
        """Count the FLOPs of attention, separately for the decoder and the vision encoder.

        The forward pass takes 4 x queries x keys x width FLOPs, or half of them with a causal mask.
        The backward pass takes two times as many.
        """
        decoder_config = self._config.decoder
        vision_config = self._config.vision
        num_windowed, window = self._window_config
        width = decoder_config.num_heads * decoder_config.head_dim
        # Only the first sequence has queries in the shared prefix.
        context_lengths = compute_context_lengths(lengths, prefix_length)
        squared_lengths = sum(length**2 for length in context_lengths)
        squared_lengths -= prefix_length**2 * (len(lengths) - 1)
        causal = squared_lengths * 2 * width * decoder_config.num_full_attention_layers
        causal += self._count_linear_attention(lengths)
        num_full = vision_config.num_layers - num_windowed
        scores = 0
        for t, h, w in grid_thw:
            num_queries = h * w
            # Summed over the layers.
            num_keys = num_full * num_queries + num_windowed * min(window, num_queries)
            scores += t * num_queries * num_keys
        vision = 4 * vision_config.hidden_size * scores
        return causal * self._decoder_passes, vision * self._vision_passes

    def _count_linear_attention(self, lengths: Sequence[int]) -> int:
        """Count the FLOPs of the gated delta rule in a forward pass, as a recurrence.

        Each token reads the state of a head twice and updates it once, 2 x D x V FLOPs each.
        """
        decoder_config = self._config.decoder
        linear = decoder_config.linear_attention
        if linear is None:
            return 0
        num_layers = decoder_config.num_layers - decoder_config.num_full_attention_layers
        return 6 * sum(lengths) * num_layers * linear.key_head_dim * linear.value_size


def _get_layer_name(weight: tuple[str, int, bool, bool]) -> str:
    """Return the name of the layer of a weight from `_iter_weights`."""
    name, *_ = weight
    if ".adapter." in name:
        # Adapters belong to the adapted layer.
        return name.partition(".adapter.")[0]
    return name.rpartition(".")[0]


def _count_patches(grid_thw: Sequence[GridTHW]) -> int:
    return sum(t * h * w for t, h, w in grid_thw)


def _patch_fraction(name: str) -> float:
    """Return the fraction of a merger parameter that is multiplied with patches.

    The rest is multiplied with image tokens. In a resampler, keys and values are computed from
    patches.
    """
    if name.startswith("visual.merger.attn_pool.kv_proj."):
        return 1.0
    if name == "visual.merger.attn_pool.attn.in_proj_weight":
        return 2 / 3
    return 0.0


def _iter_weights(model: VisionLanguageModel) -> Iterator[tuple[str, int, bool, bool]]:
    """Iterate over the parameters and quantized weights of a model in module order.

    Yields:
        Name; number of elements, in MoE layers of the active experts; whether the weight is used in
        a matrix product; whether it is trainable.
    """
    experts = model.config.decoder.moe
    for path, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            yield path, module.num_elements, True, False
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            num_params = parameter.numel()
            if ".experts." in name and experts is not None:
                num_params = num_params // experts.num_experts * experts.num_experts_per_tok
            is_matmul = (
                parameter.dim() > 1
                and not isinstance(module, nn.Embedding)
                and not name.endswith((*EMBEDDING_SUFFIXES, CONV_SUFFIX))
            )
            yield name, num_params, is_matmul, parameter.requires_grad


def _count_passes(is_trainable: bool, has_input_grad: bool) -> int:
    """Count the matrix products of a weight: forward, input gradient and weight gradient."""
    return 1 + int(has_input_grad) + int(is_trainable)


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product, the peak for MFU."""
    if device.type == "cuda":
        return _measure_gpu_flops(device, dtype)
    side = 512
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return float(2 * side**3 / best)


def _measure_gpu_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a matrix product by CUDA events, independent of other host threads."""
    side = 8192
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        start = record_event(device, enable_timing=True)
        a @ a
        end = record_event(device, enable_timing=True)
        assert start is not None, f"{device} has no events"
        assert end is not None, f"{device} has no events"
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)
    return float(2 * side**3 / best)
