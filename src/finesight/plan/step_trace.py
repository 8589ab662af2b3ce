"""Memory of a training step, from its forward and backward pass on meta tensors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from finesight.encode.packing import PackedBatch
from finesight.model.vlm import VisionLanguageModel
from finesight.plan.dry_run import META, ComputeTarget, MemoryTracker, emulate_device
from finesight.plan.planned_pack import PlannedPack
from finesight.train.loss import fused_linear_cross_entropy


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Memory of the forward and backward pass of a pack, in bytes.

    Weights, optimizer states and the inputs are not included.

    Attributes:
        activations: Saved activations at the peak.
        workspace: Other temporary tensors at the peak.
        gradients: Gradients at the peak that wait for the optimizer step.
        saved: Saved activations at the end of the forward pass.
    """

    activations: int = 0
    workspace: int = 0
    gradients: int = 0
    saved: int = 0

    @property
    def total(self) -> int:
        """Total memory at the peak."""
        return self.activations + self.workspace + self.gradients


class StepTracer:
    """Traces the memory of training steps of a model on the meta device.

    The model must already be configured for tuning. Traces are cached.
    """

    def __init__(self, model: VisionLanguageModel, compute: ComputeTarget) -> None:
        self.model, self.compute = model, compute
        self._traces: dict[tuple[object, ...], StepMemory] = {}
        self._token_bytes: float | None = None
        self._patch_bytes: float | None = None
        self.persistent_bytes, self._is_warm = 0, False

    def _warm_up(self, batch: PackedBatch, features_MKD: Tensor | None) -> None:
        """Run a pack, and count the bytes that remain allocated in addition to the weights.

        Examples are padding columns for LoRA and transposed copies of FP8 weights.
        """
        weights = {id(s): s for s in (t.untyped_storage() for t in self._own_tensors())}
        tracker = self._run(batch, features_MKD, frozenset())
        self.model.zero_grad(set_to_none=True)
        still_used = {id(tensor.untyped_storage()) for tensor in self._own_tensors()}
        replaced = sum(s.nbytes() for key, s in weights.items() if key not in still_used)
        self.persistent_bytes, self._is_warm = tracker.live_bytes - replaced, True

    def _own_tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def trace(
        self,
        pack: PlannedPack,
        activation_checkpointing: float,
        accumulated_ids: Collection[int] = frozenset(),
        num_features: int | None = None,
    ) -> StepMemory:
        """Trace the forward and backward pass of a pack.

        Args:
            pack: Pack of the step.
            activation_checkpointing: Fraction of layers with activation checkpointing.
            accumulated_ids: ids of parameters whose gradients are added to the accumulation buffer
                immediately, so they do not wait for the optimizer step.
            num_features: Number of precomputed image features. None runs the vision encoder.
        """
        key = pack, activation_checkpointing, bool(accumulated_ids), num_features
        if key not in self._traces:
            self.model.activation_checkpointing = activation_checkpointing
            batch, features_MKD = self._build_batch(pack, num_features), None
            if num_features is not None:
                features_MKD = self._build_features(num_features)
            if not self._is_warm:
                self._warm_up(batch, features_MKD)
            tracker = self._run(batch, features_MKD, accumulated_ids)
            self.model.zero_grad(set_to_none=True)
            self._traces[key] = _summarize(tracker)
        return self._traces[key]

    def trace_vision(self, pack: PlannedPack, activation_checkpointing: float) -> StepMemory:
        """Trace the vision encoder alone, with its backward pass if it is trainable."""
        key = "vision", pack, activation_checkpointing
        if key not in self._traces:
            self.model.activation_checkpointing = activation_checkpointing
            batch = self._build_batch(pack, None)
            tracker = MemoryTracker([*self._own_tensors(), *_list_tensors(batch)])
            with emulate_device(self.compute), tracker:
                features_MKD = self.model.encode_images(batch.patches_ND, batch.grid_thw)
                tracker.start_backward()
                if features_MKD.requires_grad:
                    features_MKD.sum().backward()  # type: ignore[no-untyped-call]
            self.model.zero_grad(set_to_none=True)
            self._traces[key] = _summarize(tracker)
        return self._traces[key]

    def saved_bytes(self, pack: PlannedPack) -> float:
        """Estimate the bytes that a pack saves without activation checkpointing.

        Packs of a run are similar: the first one determines the bytes per token, and the first one
        with images the bytes per patch.
        """
        text_pack = replace(pack, grid_thw=())
        if self._token_bytes is None:
            self._token_bytes = self.trace(text_pack, 0.0).saved / pack.num_tokens
        if self._patch_bytes is None and pack.num_patches:
            vision_saved = self.trace(pack, 0.0).saved - self.trace(text_pack, 0.0).saved
            self._patch_bytes = vision_saved / pack.num_patches
        return self._token_bytes * pack.num_tokens + (self._patch_bytes or 0.0) * pack.num_patches

    def _run(
        self, batch: PackedBatch, features_MKD: Tensor | None, accumulated_ids: Collection[int]
    ) -> MemoryTracker:
        known = [*self._own_tensors(), *_list_tensors(batch)]
        tracker = MemoryTracker(known if features_MKD is None else [*known, features_MKD])

        def free_gradient(parameter: Tensor) -> None:
            parameter.grad = None

        parameters = [p for p in self.model.parameters() if p.requires_grad]
        hooks = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                free_gradient if id(parameter) in accumulated_ids else tracker.add_gradient
            )
            for parameter in parameters
        ]
        seed_1, scale = self._empty(1, dtype=torch.int32), self._empty(dtype=torch.float32)
        with emulate_device(self.compute), tracker:
            h_LD = self.model(batch, features_MKD, dropout_seed_1=seed_1)
            loss = fused_linear_cross_entropy(
                h_LD, self.model.lm_head_weight, batch.labels_L, scale
            )
            del h_LD
            tracker.start_backward()
            loss.backward()  # type: ignore[no-untyped-call]
        for hook in hooks:
            hook.remove()
        return tracker

    def _build_batch(self, pack: PlannedPack, num_features: int | None) -> PackedBatch:
        vision_config, num_tokens = self.model.config.vision, pack.num_tokens
        if num_features is None:
            num_features = pack.num_patches // vision_config.merge_size**2
        patch_shape = pack.num_patches, pack.stored_patch_dim(vision_config)
        return PackedBatch(
            ("",) * pack.num_samples,
            pack.lengths,
            pack.grid_thw,
            self._empty(num_tokens),
            self._empty(3, num_tokens),
            self._empty(len(pack.lengths) + 1, dtype=torch.int32),
            self._empty(*patch_shape, dtype=torch.uint8),
            self._empty(num_features),
            self._empty(pack.num_supervised_tokens),
            self._empty(pack.num_supervised_tokens),
            prefix_length=pack.prefix_length,
        )

    def _build_features(self, num_features: int) -> Tensor:
        encoder = self.model.visual
        shape = num_features, encoder.features_per_token, encoder.config.out_hidden_size
        features_MKD = self._empty(*shape, dtype=self.compute.dtype)
        return features_MKD.requires_grad_(any(p.requires_grad for p in encoder.parameters()))

    def _empty(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)


def _list_tensors(batch: PackedBatch) -> list[Tensor]:
    values = (getattr(batch, field.name) for field in fields(batch))
    return [value for value in values if isinstance(value, Tensor)]


def _summarize(tracker: MemoryTracker) -> StepMemory:
    """Split the peak of a trace into saved activations, gradients and other tensors."""
    gradients = tracker.grads_at_peak
    activations = min(tracker.forward_at_peak, tracker.saved_bytes)
    return StepMemory(
        activations, tracker.peak_bytes - gradients - activations, gradients, tracker.saved_bytes
    )
