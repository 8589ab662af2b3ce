"""CUDA graphs for the training step of small packs, which are launch-bound on the CPU.

A graph has a fixed shape (`train.graph_buffers`); packs are padded to it with a masked dummy
sequence. A graph covers the computation from image features to the loss and back. A trainable
vision
encoder is part of the graph (`train.graph_vision_buffers`), or is launched separately.

Shapes: M image tokens, K features per token, D width, L tokens that predict a supervised one.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from finesight.encode.packing import PackedBatch
from finesight.infer.cuda_graph_cache import CudaGraphCache
from finesight.model.attention import supports_varlen_attention
from finesight.model.auto_model import AnyModel
from finesight.model.decoder import DecoderLayer
from finesight.model.vision_encoder import VisionEncoder
from finesight.model.vlm import VisionLanguageModel
from finesight.train.graph_buffers import (
    MAX_GRAPH_TOKENS,
    MAX_GRAPH_TOKENS_CACHED,
    GraphInputs,
    GraphShape,
)
from finesight.train.graph_gradients import GraphGradients
from finesight.train.graph_timing import GraphTimer
from finesight.train.graph_vision_buffers import (
    GraphVisionShape,
    can_capture_vision,
    should_capture_vision,
)
from finesight.train.loss import fused_linear_cross_entropy

MAX_GRAPH_TOKENS_STARVED = 16384
"""Largest pack for a graph while the device is starved by the host.

The memory estimate of `plan` ignores these graphs.
"""

MIN_STARVED_PACKS = 8
"""Consecutive packs with an idle device that indicate starvation.

The first packs of a run and the first pack after a checkpoint are always late.
"""

MAX_GRAPHS = 16
"""Maximum number of graphs.

Each holds the features of a pack, or two copies of trainable features, and several hundred
kilobytes
per thousand kernels.
"""

NUM_WARMUP_PACKS = 3
"""Packs of a shape that run eagerly before the capture, which takes as long as a few packs save."""

MAX_TRAINABLE_PARAMS = 4_000_000_000
"""Maximum number of trainable parameters, because the static gradient buffers stay allocated."""


def has_few_trainable_params(model: nn.Module) -> bool:
    """Check if static gradient buffers of all trainable parameters are acceptable."""
    trainable_params = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return sum(parameter.numel() for parameter in trainable_params) <= MAX_TRAINABLE_PARAMS


def should_capture(
    model: VisionLanguageModel,
    num_tokens: int,
    num_labels: int,
    activation_checkpointing: float,
    max_tokens: int = MAX_GRAPH_TOKENS,
) -> bool:
    """Check if a pack of this size is faster as a CUDA graph."""
    if activation_checkpointing and not _has_fused_layers(model):
        # A graph cannot restore the random state for activation checkpointing of torch.
        return False
    return num_tokens <= max_tokens and num_labels > 0


def _has_fused_layers(model: VisionLanguageModel) -> bool:
    layers = model.model.layers
    return all(isinstance(layer, DecoderLayer) and layer.fusible_linears for layer in layers)


def _is_capturable(model: AnyModel, device: torch.device) -> bool:
    """Check if a pass can be captured as a CUDA graph.

    It must not synchronize, and attention must read the segment lengths on the device.
    """
    if (
        device.type != "cuda"
        or not isinstance(model, VisionLanguageModel)
        or not model.supports_cuda_graphs
    ):
        return False
    head_dim, dtype = model.config.decoder.head_dim, model.model.embed_tokens.weight.dtype
    return supports_varlen_attention(torch.empty(1, 1, head_dim, dtype=dtype, device=device))


def _record_event(device: torch.device) -> torch.cuda.Event | None:
    """Record a CUDA event after all queued work; return None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def _has_half_free(device: torch.device) -> bool:
    free, total = torch.cuda.mem_get_info(device)
    return 2 * free > total


class CudaGraphRunner:
    """Run forward and backward passes of packs, as CUDA graphs where faster."""

    def __init__(
        self, model: AnyModel, trainable_params: Sequence[nn.Parameter], *, is_local: bool = True
    ) -> None:
        """Create the runner.

        Args:
            model: Model to train.
            trainable_params: Parameters that receive gradients.
            is_local: Whether a pass needs no communication with other ranks.
        """
        self._model = model
        self._trainable_params = list(trainable_params)
        self._shape_counts: Counter[GraphShape] = Counter()
        self._inputs: dict[GraphShape, GraphInputs] = {}
        self._gradients = GraphGradients(self._trainable_params)
        self._launch_event: torch.cuda.Event | None = None
        self._num_starved = 0
        self._timer = GraphTimer()
        vision_param_ids = {id(p) for n, p in model.named_parameters() if n.startswith("visual.")}
        self._vision_param_indices = frozenset(
            n for n, p in enumerate(self._trainable_params) if id(p) in vision_param_ids
        )
        device = self._trainable_params[0].device
        self._captures_vision = isinstance(model, VisionLanguageModel) and can_capture_vision(model)
        use_graphs = is_local and _is_capturable(model, device) and has_few_trainable_params(model)
        self._graphs = CudaGraphCache(device) if use_graphs else None

    def forward_backward(
        self, batch: PackedBatch, features_MKD: Tensor | None, loss_weight: Tensor
    ) -> Tensor:
        """Return the weighted loss of a pack on the device, and set the parameter gradients."""
        if self._graphs is None or batch.context_shard is not None:
            return self._run_eager(batch, features_MKD, loss_weight)
        self._poll_launch()
        max_tokens = self._max_tokens(has_cached_features=features_MKD is not None)
        inputs = self._find_inputs(
            self._vision_graph_shape(batch, features_MKD), batch, None, max_tokens
        )
        if inputs is None:
            features_MKD = self._encode_images(batch, features_MKD)
            inputs = self._find_inputs(
                GraphShape.from_batch(batch), batch, features_MKD, max_tokens
            )
        if inputs is None:
            return self._run_eager(batch, features_MKD, loss_weight)
        inputs.copy_from(batch, features_MKD, loss_weight, self._vision_encoder)
        loss = self._replay(inputs)
        if loss is None:
            # Outside the except block, whose traceback holds tensors.
            self.release_graphs()
            return self._run_eager(batch, features_MKD, loss_weight)
        self._gradients.assign_grads(
            self._vision_param_indices if inputs.vision_inputs is None else ()
        )
        inputs.backward_features(features_MKD)
        return loss

    def _replay(self, inputs: GraphInputs) -> Tensor | None:
        """Replay or capture a graph, and return its loss; None on failure.

        A failure is usually a lack of memory. The eager pass that follows reports errors of the
        pack.
        """
        assert self._graphs is not None, "CUDA graphs are disabled"
        graph_index = [*self._inputs].index(inputs.shape)
        is_timed = inputs.vision_inputs is None and self._graphs.contains(graph_index)
        try:
            with self._timer.time_replay(inputs.shape.num_tokens) if is_timed else nullcontext():
                return self._graphs.run(graph_index, lambda: self._run_static(inputs)).clone()
        except RuntimeError as error:
            logging.getLogger(__name__).debug("CUDA graphs are disabled: %s", error)
            return None

    def warm_up(self, batch: PackedBatch) -> None:
        """Run a pack in eager and static mode, to compile all kernels."""
        loss_weight = torch.zeros((), device=batch.ids_T.device)
        self._run_eager(batch, None, loss_weight)
        if self._graphs is None:
            return
        uncaptured_vision = GraphShape.from_batch(batch), self._encode_images(batch, None)
        for shape, features_MKD in (
            (self._vision_graph_shape(batch, None), None),
            uncaptured_vision,
        ):
            if shape is None or not self._should_capture(
                shape, batch, features_MKD, MAX_GRAPH_TOKENS
            ):
                continue
            inputs = GraphInputs.allocate(shape, batch, features_MKD, self._vision_encoder)
            inputs.copy_from(batch, features_MKD, loss_weight, self._vision_encoder)
            try:
                self._run_static(inputs)
            finally:
                self._gradients.clear()
        # Launches of a warm-up do not measure the host.
        self._timer = GraphTimer()

    def release_graphs(self) -> bool:
        """Free all graphs and disable them; return whether there were any."""
        had_graphs = bool(self._inputs)
        for parameter in self._trainable_params:
            parameter.grad = None
        self._graphs = None
        self._gradients.clear()
        self._inputs.clear()
        return had_graphs

    @property
    def _vision_encoder(self) -> VisionEncoder:
        assert isinstance(self._model, VisionLanguageModel), "only native models use CUDA graphs"
        return self._model.visual

    def _vision_graph_shape(
        self, batch: PackedBatch, features_MKD: Tensor | None
    ) -> GraphShape | None:
        """Return the graph shape including the vision encoder, or None."""
        model = self._model
        assert isinstance(model, VisionLanguageModel), "only native models use CUDA graphs"
        if features_MKD is not None or not self._captures_vision:
            return None
        if not should_capture_vision(len(batch.patches_ND), model.activation_checkpointing):
            return None
        return GraphShape.from_batch(batch, GraphVisionShape.from_batch(batch, model.visual))

    def _find_inputs(
        self,
        shape: GraphShape | None,
        batch: PackedBatch,
        features_MKD: Tensor | None,
        max_tokens: int,
    ) -> GraphInputs | None:
        """Return the buffers of a graph for this shape, if it occurs frequently."""
        if shape is None:
            return None
        if shape in self._inputs:
            return self._inputs[shape]
        if not self._should_capture(shape, batch, features_MKD, max_tokens):
            return None
        if wider_inputs := self._find_wider_inputs(shape):
            return wider_inputs
        self._shape_counts[shape] += 1
        if len(self._inputs) == MAX_GRAPHS:
            return None
        device, is_frequent = batch.ids_T.device, self._shape_counts[shape] > NUM_WARMUP_PACKS
        if self._should_share_graph(shape, is_frequent) and _has_half_free(device):
            shape = shape.widen(
                [k for k, _ in self._shape_counts.most_common() if not self._is_covered(k)]
            )
        elif not is_frequent:
            return None
        elif len(batch.ids_T) > MAX_GRAPH_TOKENS and not _has_half_free(device):
            # The memory is worth more than the saved time.
            return None
        self._inputs[shape] = GraphInputs.allocate(shape, batch, features_MKD, self._vision_encoder)
        return self._inputs[shape]

    def _find_wider_inputs(self, shape: GraphShape) -> GraphInputs | None:
        """Return the buffers of the smallest graph that fits, unless eager packs are faster."""
        fitting = [inputs for inputs in self._inputs.values() if inputs.shape.fits(shape)]
        widest = min(
            fitting,
            key=lambda h: (h.shape.num_tokens, h.shape.max_seqlen, h.shape.num_labels),
            default=None,
        )
        if widest is None or self._timer.is_replay_faster(widest.shape.num_tokens) is False:
            return None
        return widest

    def _should_share_graph(self, shape: GraphShape, is_frequent: bool) -> bool:
        """Check if a new graph for packs of several shapes pays off.

        The last slots are reserved for frequent shapes.
        """
        if shape.vision_shape is not None:
            # Image sizes of several packs rarely match.
            return False
        is_faster = self._timer.is_replay_faster(shape.max_tokens)
        if is_faster is None:
            # One graph, to measure it.
            return self._is_starved and all(
                shape.vision_shape is not None for shape in self._inputs
            )
        return is_faster and (is_frequent or 2 * len(self._inputs) < MAX_GRAPHS)

    def _is_covered(self, shape: GraphShape) -> bool:
        return shape in self._inputs or any(inputs.fits(shape) for inputs in self._inputs)

    def _poll_launch(self) -> None:
        """Update the starvation count from the last pack's event."""
        if self._launch_event is not None:
            is_finished = self._launch_event.query()  # type: ignore[no-untyped-call]
            self._num_starved = self._num_starved + 1 if is_finished else 0
            self._launch_event = None

    def _encode_images(self, batch: PackedBatch, features_MKD: Tensor | None) -> Tensor | None:
        """Return the image features of the pack, with their autograd graph if trainable."""
        model = self._model
        assert isinstance(model, VisionLanguageModel), "only native models use CUDA graphs"
        if features_MKD is not None or not batch.grid_thw:
            return features_MKD
        return model.encode_images(batch.patches_ND, batch.grid_thw)

    @property
    def _is_starved(self) -> bool:
        """Return True if the device was idle before each of the last packs."""
        return self._num_starved >= MIN_STARVED_PACKS

    def _max_tokens(self, *, has_cached_features: bool) -> int:
        """Return the size of the largest pack for a graph."""
        if self._is_starved:
            return MAX_GRAPH_TOKENS_STARVED
        return MAX_GRAPH_TOKENS_CACHED if has_cached_features else MAX_GRAPH_TOKENS

    def _should_capture(
        self, shape: GraphShape, batch: PackedBatch, features_MKD: Tensor | None, max_tokens: int
    ) -> bool:
        model = self._model
        assert isinstance(model, VisionLanguageModel), "only native models use CUDA graphs"
        is_vision_trainable = features_MKD is not None and features_MKD.requires_grad
        if not (
            shape.vision_shape
            or is_vision_trainable
            or any(p.requires_grad for p in model.model.parameters())
        ):
            # A text-only pack, with a trainable vision encoder only.
            return False
        return should_capture(
            model, len(batch.ids_T), len(batch.labels_L), model.activation_checkpointing, max_tokens
        )

    def _run_eager(
        self, batch: PackedBatch, features_MKD: Tensor | None, loss_weight: Tensor
    ) -> Tensor:
        start = time.perf_counter()
        h_LD = self._model(batch, features_MKD)
        loss = fused_linear_cross_entropy(
            h_LD, self._model.lm_head_weight, batch.labels_L, loss_weight
        )
        if loss.requires_grad:  # False for text only, if only the vision encoder is trainable
            loss.backward()  # type: ignore[no-untyped-call]
            self._timer.record_launch(time.perf_counter() - start)
        if self._graphs is not None:
            self._launch_event = _record_event(loss.device)
        return loss.detach()

    def _run_static(self, inputs: GraphInputs) -> Tensor:
        """Run a pack from static buffers, writing gradients to static buffers."""
        model = self._model
        assert isinstance(model, VisionLanguageModel), "only native models use CUDA graphs"
        vision_inputs = inputs.vision_inputs
        features_MKD = (
            inputs.features_MKD if vision_inputs is None else vision_inputs.encode(model.visual)
        )
        h_LD = model(inputs.batch, features_MKD, inputs.seed_1)
        loss = fused_linear_cross_entropy(
            h_LD, model.lm_head_weight, inputs.batch.labels_L, inputs.loss_weight
        )
        self._gradients.backward(loss, inputs.trainable_features)
        return loss.detach()
