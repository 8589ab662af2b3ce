"""Estimate the activation memory of a training step from tensor shapes.

The estimate allocates no tensors, so the model may be on the meta device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from finesight.model.families.qwen2_5_vl import WindowVisionEncoder
from finesight.model.families.qwen_vl import QwenDecoder, QwenVisionBlock, QwenVisionEncoder
from finesight.model.layers import VisionBlock
from finesight.model.vision_encoder import VisionEncoder
from finesight.model.vlm import VisionLanguageModel
from finesight.plan.gradient_timeline import GradientTimeline
from finesight.plan.graph_plan import GraphPlan, plan_graph
from finesight.plan.layer_stack import LayerStack
from finesight.plan.merger_memory import saved_merger_bytes, transposed_merger_bytes
from finesight.plan.mlp_memory import count_up_features, frozen_mlp_row_bytes, frozen_norm_row_bytes
from finesight.plan.planned_pack import PlannedPack
from finesight.plan.saved_activations import (
    FP32_BYTES,
    ComputeConfig,
    LayerInputShape,
    is_trainable,
    saved_norm_bytes,
)
from finesight.train.loss import MAX_LOGITS_BYTES


@dataclass(frozen=True, slots=True)
class MemorySnapshot:
    """Estimated memory in use at one point of a training step, in bytes.

    The parts are saved activations, the workspace of the current operation, logits, and gradients
    that wait for the optimizer step. Weights and optimizer states are not included.
    """

    saved_activations: int
    workspace: int = 0
    logits: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        """Total memory of this snapshot in bytes."""
        return self.saved_activations + self.workspace + self.logits + self.gradients


class ActivationMemory:
    """Estimates the activation memory of a model during training, from tensor shapes.

    The model must already be configured for tuning, because frozen and trainable parts save
    different activations. All sizes are in bytes.
    """

    def __init__(
        self, model: VisionLanguageModel, compute: ComputeConfig, activation_checkpointing: float
    ) -> None:
        self._model, self._compute, self._activation_checkpointing = (
            model,
            compute,
            activation_checkpointing,
        )
        encoder, decoder = model.visual, model.model
        self._is_encoder_trainable = encoder.is_encoder_trainable
        inner_param_ids = {
            id(p)
            for module in (encoder.blocks, *_list_mergers(encoder))
            for p in module.parameters()
        }
        has_input_grad = any(
            p.requires_grad for p in encoder.parameters() if id(p) not in inner_param_ids
        )
        self._block_stack = LayerStack.from_modules(
            encoder.blocks, has_input_grad, compute, activation_checkpointing
        )
        self._has_feature_grad = encoder.is_encoder_trainable or any(
            map(is_trainable, _list_mergers(encoder))
        )
        has_input_grad = self._has_feature_grad or decoder.embed_tokens.weight.requires_grad
        self._layer_stack = LayerStack.from_modules(
            decoder.layers, has_input_grad, compute, activation_checkpointing
        )
        self._is_head_trainable = any(p.requires_grad for p in _head_parameters(model))

    @property
    def persistent_bytes(self) -> int:
        """Bytes that the first backward pass allocates and that remain allocated.

        Examples are transposed copies of FP8 weights. The weights themselves are not included.
        """
        encoder = self._model.visual
        merger_bytes = sum(
            transposed_merger_bytes(merger, self._is_encoder_trainable)
            for merger in _list_mergers(encoder)
        )
        return (
            self._layer_stack.persistent_bytes + self._block_stack.persistent_bytes + merger_bytes
        )

    def plan_graph(self, pack: PlannedPack) -> GraphPlan | None:
        """Return the CUDA graph plan of a pack, or None if no graph is used."""
        return plan_graph(self._model, self._compute, self._activation_checkpointing, pack)

    def saved_vision_bytes(self, pack: PlannedPack) -> int:
        """Return the bytes of vision activations that exist during the decoder pass.

        Includes activations saved for the backward pass and the image features of a frozen encoder.
        """
        return (
            self._saved_encoder_bytes(pack) if pack.num_patches else 0
        ) + self.frozen_feature_bytes(pack)

    def vision_forward_peak(self, pack: PlannedPack) -> MemorySnapshot:
        """Return the memory snapshot at the peak of the vision encoder's forward pass."""
        return MemorySnapshot(
            self._saved_encoder_bytes(pack) if self._is_encoder_trainable else 0,
            self._vision_forward_workspace(pack),
        )

    def iter_vision_snapshots(
        self, pack: PlannedPack, timeline: GradientTimeline
    ) -> Iterator[MemorySnapshot]:
        """Iterate over memory snapshots of the vision encoder that may be its peak.

        Yields nothing for a pack without images.
        """
        if not pack.num_patches:
            return
        yield self.vision_forward_peak(pack)
        if self._is_encoder_trainable:
            block_shapes, saved_vision = self._block_shapes(pack), self._saved_encoder_bytes(pack)
            yield MemorySnapshot(
                saved_vision,
                self._block_stack.forward_workspace(len(block_shapes) - 1, block_shapes),
            )
            yield from self._iter_vision_backward_snapshots(pack, saved_vision, timeline)

    def gradient_timeline(self, accumulated_ids: Collection[int] = ()) -> GradientTimeline:
        """Return the bytes of waiting gradients at each point of the backward pass.

        Gradients wait for the optimizer step.

        Args:
            accumulated_ids: ids of parameters whose gradients are added to the gradient
                accumulation buffer immediately, so they do not wait.
        """
        return GradientTimeline.from_model(self._model, accumulated_ids)

    def iter_snapshots(
        self, pack: PlannedPack, timeline: GradientTimeline
    ) -> Iterator[MemorySnapshot]:
        """Iterate over memory snapshots of a training step that may be its peak.

        Args:
            pack: Pack of the step.
            timeline: Gradient memory at each point of the backward pass.
        """
        if pack.num_patches:
            vision_peak, embedding_bytes = (
                self.vision_forward_peak(pack),
                pack.num_tokens * self._hidden_bytes,
            )
            yield replace(vision_peak, workspace=vision_peak.workspace + embedding_bytes)
        saved_vision = self.saved_vision_bytes(pack)
        yield from self._iter_forward_snapshots(pack, saved_vision)
        yield from self._iter_backward_snapshots(pack, saved_vision, timeline)
        yield from self.iter_vision_snapshots(pack, timeline)
        # The embedding gradient has a buffer of its own while the gradient of a tied head exists.
        table_bytes = self._element_size_if(self._is_embedding_trainable) * _count_params(
            [self._model.model.embed_tokens]
        )
        yield MemorySnapshot(
            self._pending_grad_bytes(pack), table_bytes, gradients=timeline.at_embedding
        )

    def _iter_forward_snapshots(
        self, pack: PlannedPack, saved_vision: int
    ) -> Iterator[MemorySnapshot]:
        """Iterate over candidate peaks of the decoder's forward pass and the loss."""
        num_labels, layer_shapes = pack.num_supervised_tokens, self._layer_shapes(pack)
        saved_by_layer, rotary_bytes = (
            self._layer_stack.saved_bytes(layer_shapes),
            self._rotary_bytes(pack),
        )
        for layer_index in self._layer_stack.forward_peak_layers():
            workspace = self._layer_stack.forward_workspace(layer_index, layer_shapes)
            yield MemorySnapshot(
                saved_vision + rotary_bytes + sum(saved_by_layer[: layer_index + 1]), workspace
            )
        head_bytes = num_labels * (self._saved_bytes_per_label() + self._hidden_bytes)
        saved = saved_vision + rotary_bytes + sum(saved_by_layer) + head_bytes
        yield MemorySnapshot(
            saved, self._head_workspace(num_labels), self._logits_bytes(num_labels)
        )

    def _iter_backward_snapshots(
        self, pack: PlannedPack, saved_before: int, timeline: GradientTimeline
    ) -> Iterator[MemorySnapshot]:
        """Iterate over candidate peaks of the decoder's backward pass.

        At each layer, the activations of later layers are already freed and their gradients exist.
        """
        layer_shapes = self._layer_shapes(pack)
        saved_by_layer = self._layer_stack.saved_bytes(layer_shapes)
        saved_before += self._rotary_bytes(pack) + self._pending_grad_bytes(pack)
        for layer_index in self._layer_stack.backward_peak_layers():
            workspace = self._layer_stack.backward_workspace(layer_index, layer_shapes)
            saved = saved_before + sum(saved_by_layer[: layer_index + 1])
            yield MemorySnapshot(saved, workspace, gradients=timeline.at_layer[layer_index])

    def _iter_vision_backward_snapshots(
        self, pack: PlannedPack, saved_vision: int, timeline: GradientTimeline
    ) -> Iterator[MemorySnapshot]:
        """Iterate over candidate peaks of the vision encoder's backward pass.

        The gradient of the input embeddings exists throughout this pass.
        """
        block_shapes = self._block_shapes(pack)
        saved_by_block, pending_bytes = (
            self._block_stack.saved_bytes(block_shapes),
            self._pending_grad_bytes(pack),
        )
        pending_bytes += pack.num_tokens * self._hidden_bytes * self._is_embedding_trainable
        for block_index in self._block_stack.backward_peak_layers():
            workspace = self._block_stack.backward_workspace(block_index, block_shapes)
            saved = saved_vision - sum(saved_by_block[block_index + 1 :]) + pending_bytes
            yield MemorySnapshot(saved, workspace, gradients=timeline.at_block[block_index])

    def saved_bytes(self, pack: PlannedPack) -> int:
        """Return the bytes that a pack saves for the backward pass.

        The gradients that the loss computes in the forward pass are included.
        """
        saved_vision = self._saved_encoder_bytes(pack) if pack.num_patches else 0
        saved_layers = sum(self._layer_stack.saved_bytes(self._layer_shapes(pack)))
        head_bytes = (
            pack.num_supervised_tokens * self._saved_bytes_per_label()
            + self._saved_head_bytes(pack.num_supervised_tokens)
        )
        return saved_vision + saved_layers + self._rotary_bytes(pack) + head_bytes

    @property
    def _hidden_bytes(self) -> int:
        """Bytes of the hidden state of one token."""
        return self._model.config.decoder.hidden_size * self._compute.element_size

    @property
    def _is_embedding_trainable(self) -> bool:
        return self._model.model.embed_tokens.weight.requires_grad

    def _pending_grad_bytes(self, pack: PlannedPack) -> int:
        """Return the bytes that the loss holds until the end of the backward pass.

        These are the hidden states of supervised tokens, and the head gradient if embeddings are
        tied.
        """
        is_tied = self._model.lm_head is None
        return pack.num_supervised_tokens * self._hidden_bytes + self._head_grad_bytes() * is_tied

    def frozen_feature_bytes(self, pack: PlannedPack) -> int:
        """Return the bytes of a pack's image features from a frozen vision encoder.

        Returns 0 on a CPU. Also returns 0 if the encoder or a merger is trainable, since its
        features are counted as saved activations.
        """
        encoder = self._model.visual
        if self._has_feature_grad or not self._compute.is_cuda:
            return 0
        num_features = pack.num_patches // encoder.config.merge_size**2
        return (
            num_features
            * encoder.features_per_token
            * encoder.config.out_hidden_size
            * self._compute.element_size
        )

    def _saved_bytes_per_label(self) -> int:
        """Return the bytes saved per supervised token at the final norm.

        Counts its input and the gradient of its output, which the loss computes.
        """
        decoder_config, decoder = self._model.config.decoder, self._model.model
        norm_bytes = saved_norm_bytes(
            decoder.norm,
            decoder_config.hidden_size,
            self._layer_stack.has_output_grad,
            self._compute,
        )
        return norm_bytes + self._hidden_bytes * (
            self._layer_stack.has_output_grad or is_trainable(decoder.norm)
        )

    def _head_grad_bytes(self) -> int:
        return sum(p.numel() for p in _head_parameters(self._model)) * self._element_size_if(
            self._is_head_trainable
        )

    def _saved_head_bytes(self, num_labels: int) -> int:
        """Return the bytes that the loss saves for the gradient of the output head (`train.loss`).

        If all logits fit in one chunk, the loss saves the logit gradients and the hidden states.
        Otherwise it computes the head gradient in chunks and saves that.
        """
        if num_labels > self._logits_chunk_rows:
            return self._head_grad_bytes()
        row_bytes = (
            self._model.config.decoder.vocab_size * self._compute.element_size + self._hidden_bytes
        )
        return num_labels * row_bytes * self._is_head_trainable

    def _head_workspace(self, num_labels: int) -> int:
        """Return the workspace bytes of the output head: its gradient and its dequantized weight.

        With several chunks of logits, the gradient has an fp32 sum and the contribution of one
        chunk.
        """
        num_elements = (
            self._model.config.decoder.vocab_size * self._model.config.decoder.hidden_size
        )
        head = self._model.lm_head
        is_quantized = head is not None and not isinstance(head.weight, nn.Parameter)
        grad_bytes = (
            FP32_BYTES * (num_labels > self._logits_chunk_rows) + self._compute.element_size
        ) * self._is_head_trainable
        return num_elements * (grad_bytes + self._element_size_if(is_quantized))

    def _element_size_if(self, condition: bool) -> int:
        return self._compute.element_size if condition else 0

    @property
    def _logits_chunk_rows(self) -> int:
        """Number of supervised tokens in one chunk of logits."""
        return max(1, MAX_LOGITS_BYTES // (FP32_BYTES * self._model.config.decoder.vocab_size))

    def _logits_bytes(self, num_labels: int) -> int:
        """Return the bytes of one chunk of logits.

        Without the loss kernel (`train.loss`), an fp32 copy is added.
        """
        vocab_size, element_size = self._model.config.decoder.vocab_size, self._compute.element_size
        num_rows = min(num_labels, self._logits_chunk_rows)
        if self._compute.uses_elementwise_kernels:
            return num_rows * vocab_size * element_size
        return (
            num_rows
            * vocab_size
            * (FP32_BYTES + (element_size if element_size < FP32_BYTES else 0))
        )

    def _rotary_bytes(self, pack: PlannedPack) -> int:
        """Return the bytes of rotary angles and sort indices shared by all decoder layers."""
        compute, config = self._compute, self._model.config
        num_bytes = 0
        if self._layer_stack.saves_attention:
            is_fp32 = isinstance(self._model.model, QwenDecoder)
            element_size = FP32_BYTES if is_fp32 else compute.element_size
            num_bytes += 2 * pack.num_tokens * config.decoder.head_dim * element_size
            num_bytes += self._layer_stack.sort_index_bytes(pack.context_lengths, compute)
        return num_bytes

    def _layer_shapes(self, pack: PlannedPack) -> list[LayerInputShape]:
        """Return the input shape of each decoder layer.

        The last layer runs its MLP for supervised tokens only.
        """
        mlp_rows = [pack.num_tokens] * (len(self._layer_stack.layers) - 1) + [
            pack.num_supervised_tokens
        ]
        return [
            LayerInputShape(pack.context_lengths, pack.num_tokens, num_rows)
            for num_rows in mlp_rows
        ]

    def _block_shapes(self, pack: PlannedPack) -> list[LayerInputShape]:
        """Return the input shape of each vision encoder block."""
        num_patches = pack.num_patches
        segment_lengths = self._model.visual.segment_lengths(pack.grid_thw)
        return [LayerInputShape(lengths, num_patches, num_patches) for lengths in segment_lengths]

    def _saved_encoder_bytes(self, pack: PlannedPack) -> int:
        """Return the bytes that the vision encoder and its mergers save for the backward pass."""
        encoder, compute = self._model.visual, self._compute
        element_size, num_bytes = compute.element_size, 0
        if self._is_encoder_trainable:
            if is_trainable(encoder.patch_embed):
                num_bytes += pack.num_patches * encoder.config.patch_dim * element_size
            if isinstance(encoder, QwenVisionEncoder):
                norm_bytes = saved_norm_bytes(
                    encoder.ln_pre, encoder.config.hidden_size, False, compute
                )
                num_bytes += pack.num_patches * norm_bytes
            block_shapes = self._block_shapes(pack)
            num_bytes += sum(self._block_stack.saved_bytes(block_shapes))
            if self._block_stack.saves_attention and self._uses_rotary():
                num_bytes += 2 * pack.num_patches * encoder.config.head_dim * FP32_BYTES
            for lengths in {tuple(shape.context_lengths) for shape in block_shapes}:
                num_bytes += self._block_stack.sort_index_bytes(lengths, compute)
        for merger in _list_mergers(encoder):
            num_bytes += saved_merger_bytes(
                merger, encoder.config, pack.num_patches, self._is_encoder_trainable, compute
            )
        if self._has_feature_grad:
            # Image features are scattered to their token positions.
            num_features = (
                pack.num_patches // encoder.config.merge_size**2 * encoder.features_per_token
            )
            num_bytes += num_features * encoder.config.out_hidden_size * element_size
        return num_bytes

    def _uses_rotary(self) -> bool:
        """Return False for the first Qwen-VL, which adds positions to the patch embeddings."""
        return not isinstance(self._model.model, QwenDecoder)

    def _vision_forward_workspace(self, pack: PlannedPack) -> int:
        """Return the peak workspace bytes of the vision encoder's forward pass.

        The peak is at the patch embedding or in a block. Rotary angles, which all blocks share, are
        included.
        """
        encoder, compute = self._model.visual, self._compute
        config = encoder.config
        hidden_bytes = config.hidden_size * compute.element_size
        # Residual stream, plus attention with its norm and fused product, or an MLP with its
        # norm. FP8 needs as much as 16 bits (half a norm, and half of the input of the last
        # product). Some blocks also hold the attention output during the MLP.
        residual_bytes = hidden_bytes * (not isinstance(encoder, QwenVisionEncoder))
        mlp_bytes = (
            residual_bytes
            + frozen_norm_row_bytes(mlp, compute)
            + frozen_mlp_row_bytes(mlp, config.hidden_size, compute)
            for mlp in self._iter_mlps()
        )
        row_bytes = self._num_residual_rows() * hidden_bytes + max(6 * hidden_bytes, *mlp_bytes)
        if self._uses_rotary():
            row_bytes += 2 * config.head_dim * FP32_BYTES
        return pack.num_patches * max(self._patch_embed_bytes(pack), row_bytes)

    def _num_residual_rows(self) -> int:
        """Return the maximum number of residual-stream rows per patch that exist at once.

        Counts the sum of the residual connection, its terms, and block outputs stored for the
        DeepStack mergers.
        """
        deepstack_indexes, num_blocks = (
            self._model.visual.deepstack_indexes,
            len(self._model.visual.blocks),
        )
        num_saved = [
            sum(index < block_index for index in deepstack_indexes)
            for block_index in range(num_blocks)
        ]
        num_inputs = [1] + [
            2 * (block_index - 1 not in deepstack_indexes) for block_index in range(1, num_blocks)
        ]
        return 1 + max(map(sum, zip(num_saved, num_inputs, strict=True)))

    def _patch_embed_bytes(self, pack: PlannedPack) -> int:
        """Return the bytes per patch at the patch embedding.

        Counts the packed patch, the patch repeated for all frames, and its embedding.
        """
        encoder, element_size = self._model.visual, self._compute.element_size
        config, patch_dim = encoder.config, encoder.config.patch_dim
        stored_dim = pack.stored_patch_dim(config)
        # Patches are reordered into windows while they are uint8.
        raw_bytes = stored_dim * isinstance(encoder, WindowVisionEncoder)
        return raw_bytes + (stored_dim + patch_dim + config.hidden_size) * element_size

    def _iter_mlps(self) -> Iterator[nn.Module]:
        for block in self._model.visual.blocks:
            assert isinstance(block, VisionBlock | QwenVisionBlock), (
                f"a block of {type(block).__name__}"
            )
            yield block.mlp

    def frozen_encoder_bytes(self, pack: PlannedPack) -> int:
        """Return the activation bytes of all blocks of a frozen vision encoder.

        Counts hidden states and MLP features, each written and read. The memory traffic estimate of
        `plan.step_time` uses this size. Returns 0 for a trainable encoder.
        """
        if self._is_encoder_trainable:
            return 0
        hidden_size, element_size = (
            self._model.visual.config.hidden_size,
            self._compute.element_size,
        )
        patch_elements = sum(hidden_size + count_up_features(mlp) for mlp in self._iter_mlps())
        return pack.num_patches * 2 * patch_elements * element_size


def _list_mergers(encoder: VisionEncoder) -> list[nn.Module]:
    return [encoder.merger, *encoder.deepstack_merger_list]


def _count_params(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _head_parameters(model: VisionLanguageModel) -> list[nn.Parameter]:
    head = model.model.embed_tokens if model.lm_head is None else model.lm_head
    return list(head.parameters())
