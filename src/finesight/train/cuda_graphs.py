"""CUDA graph capture and replay of the training step for small packs.

Small packs are launch-bound on the CPU: the device computes kernels faster than the host launches
them. A graph has a fixed shape (`train.graph_buffers`), and packs are padded to it with a masked
dummy sequence. It contains the forward pass from image features to the loss and the backward pass.
A trainable vision encoder is part of the graph or runs eagerly before it.

Shapes: M image tokens, K features per token, D width, L tokens that predict a supervised token.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finesight.encode.batch import PackedBatch
from finesight.model.attention import supports_varlen_attention
from finesight.model.backend import as_native
from finesight.model.backend_model import BackendModel
from finesight.model.cuda_graph_cache import CudaGraphCache
from finesight.model.decoder import FusibleLayer
from finesight.model.kernels.runtime import HAS_TRITON
from finesight.model.vlm import VisionLanguageModel
from finesight.train.device_timing import record_event
from finesight.train.graph_buffers import (
    MAX_GRAPH_TOKENS,
    MAX_GRAPH_TOKENS_CACHED,
    GraphGradients,
    GraphInputs,
    GraphShape,
    GraphVisionShape,
    can_capture_vision,
    should_capture_vision,
)
from finesight.train.objectives.objective import Objective


class GraphTimer:
    """Timer of eager launches and graph replays, without synchronizing with the device."""

    def __init__(self) -> None:
        self.launch_s = math.inf
        self.replay_s_per_token = math.inf
        self._pending: tuple[int, torch.cuda.Event, torch.cuda.Event] | None = None

    def record_launch(self, seconds: float) -> None:
        """Record the host time for launching the kernels of an eager pack.

        The timer stores the minimum of all packs: the first packs include kernel compilation, and
        launches block when the queue of the device is full.
        """
        self.launch_s = min(self.launch_s, seconds)

    @contextmanager
    def time_replay(self, num_tokens: int) -> Iterator[None]:
        """Measure the device time of a graph replay in the context.

        The timer stores the minimum per token, because the device may also run other kernels. The
        graph must not contain the vision encoder.
        """
        self._poll()
        if self._pending is not None:
            yield
            return
        create: Callable[[], torch.cuda.Event] = partial(torch.cuda.Event, enable_timing=True)
        start = create()
        end = create()
        start.record()
        yield
        end.record()
        self._pending = num_tokens, start, end

    def _poll(self) -> None:
        if self._pending is None:
            return
        num_tokens, start, end = self._pending
        if end.query():  # type: ignore[no-untyped-call]
            self.replay_s_per_token = min(
                self.replay_s_per_token, start.elapsed_time(end) / 1000 / num_tokens
            )
            self._pending = None

    def is_replay_faster(self, num_tokens: int) -> bool | None:
        """Return whether a replay takes less device time than eager launches take host time.

        The result is None until both have been measured.
        """
        self._poll()
        if not (math.isfinite(self.replay_s_per_token) and math.isfinite(self.launch_s)):
            return None
        return num_tokens * self.replay_s_per_token < self.launch_s


MAX_GRAPH_TOKENS_STARVED = 16384
"""Maximum tokens of a pack in a CUDA graph while the host starves the device.

The memory estimate of a plan does not include these graphs.
"""

MIN_STARVED_PACKS = 8
"""Number of consecutive packs with an idle device after which the device counts as starved.

The first packs of a run and the first pack after a checkpoint always start late.
"""

MAX_GRAPHS = 16
"""Maximum number of captured CUDA graphs.

Each graph holds the image features of a pack (two copies if trainable), and several hundred
kilobytes per thousand kernels.
"""

NUM_WARMUP_PACKS = 3
"""Number of packs of a shape that run eagerly before their CUDA graph is captured.

A capture takes as long as several replays save, so it only pays off for frequent shapes.
"""

MAX_TRAINABLE_PARAMS = 4_000_000_000
"""Maximum number of trainable parameters for CUDA graphs, whose gradient buffers stay allocated."""


def has_few_trainable_params(model: nn.Module) -> bool:
    """Return whether the gradient buffers of all trainable parameters may stay allocated."""
    num_trainable = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            num_trainable += parameter.numel()
    return num_trainable <= MAX_TRAINABLE_PARAMS


def should_capture(
    model: VisionLanguageModel,
    num_tokens: int,
    num_labels: int,
    activation_checkpointing: float,
    max_tokens: int = MAX_GRAPH_TOKENS,
) -> bool:
    """Return whether a pack of this size is faster as a CUDA graph."""
    if activation_checkpointing:
        for layer in model.model.layers:
            # A graph cannot restore the random state for activation checkpointing of torch.
            if not isinstance(layer, FusibleLayer) or not layer.fusible_linears:
                return False
    return num_tokens <= max_tokens and num_labels > 0


def is_capturable(model: BackendModel, device: torch.device) -> bool:
    """Return whether the forward and backward pass can be captured as a CUDA graph.

    The pass must not synchronize with the host, and attention must read the segment lengths on the
    device.
    """
    if not HAS_TRITON or device.type != "cuda" or not model.supports_cuda_graphs:
        return False
    native_model = as_native(model)
    head_dim = native_model.config.decoder.head_dim
    dtype = native_model.model.embed_tokens.weight.dtype
    return supports_varlen_attention(torch.empty(1, 1, head_dim, dtype=dtype, device=device))


def has_half_free(device: torch.device) -> bool:
    """Return whether more than half of the GPU memory is free."""
    free, total = torch.cuda.mem_get_info(device)
    return 2 * free > total


def _find_vision_params(
    model: nn.Module, trainable_params: Sequence[nn.Parameter]
) -> frozenset[int]:
    """Return the indices of the trainable parameters that belong to the vision encoder."""
    vision_ids = set()
    for name, parameter in model.named_parameters():
        if name.startswith("visual."):
            vision_ids.add(id(parameter))
    return frozenset(
        index for index, parameter in enumerate(trainable_params) if id(parameter) in vision_ids
    )


class ForwardBackward(Protocol):
    """Type of `train.step.forward_backward`, which the runner captures."""

    def __call__(
        self,
        model: BackendModel,
        objective: Objective[Any],
        batch: PackedBatch,
        features_MKD: Tensor | None,
        loss_inputs: Mapping[str, Tensor],
        dropout_seed_1: Tensor | None = None,
        static_backward: Callable[[Tensor], None] | None = None,
    ) -> Tensor: ...


class CudaGraphRunner:
    """Runner of the forward and backward pass of a pack as a CUDA graph, if one fits.

    It has no graphs if the model, the device or the sharding mode does not support them.
    """

    def __init__(
        self,
        forward_backward: ForwardBackward,
        model: BackendModel,
        objective: Objective[Any],
        trainable_params: Sequence[nn.Parameter],
        *,
        is_local: bool = True,
    ) -> None:
        """Create the runner without capturing any graph.

        Args:
            forward_backward: Function that the runner calls or captures,
                `train.step.forward_backward`.
            is_local: Whether a pass needs no communication with other ranks. Otherwise, all passes
                are eager.
        """
        self._forward_backward = forward_backward
        self.model = model
        self.objective = objective
        self._trainable_params = list(trainable_params)
        self.shape_counts: Counter[GraphShape] = Counter()
        self.static_inputs: dict[GraphShape, GraphInputs] = {}
        self._gradients = GraphGradients(self._trainable_params)
        self._launch_event: torch.cuda.Event | None = None
        self._num_starved = 0
        self.timer = GraphTimer()
        self._vision_param_indices = _find_vision_params(model, self._trainable_params)
        device = self._trainable_params[0].device
        self._captures_vision = False
        if model.capabilities.image_features:
            self._captures_vision = can_capture_vision(as_native(model))
        use_graphs = is_local and is_capturable(model, device) and has_few_trainable_params(model)
        self.graphs = CudaGraphCache(device) if use_graphs else None

    def run(
        self, batch: PackedBatch, features_MKD: Tensor | None, loss_inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """Run `forward_backward` on a pack: as a CUDA graph if one fits and is faster, or eagerly.

        The runner must have graphs, and gradients must be enabled.

        Args:
            features_MKD: Cached image features; None to run the vision encoder.
            loss_inputs: Result of `Objective.loss_inputs`.

        Returns:
            Weighted sums of loss and metrics.
        """
        graph_loss, features_MKD = self.replay(batch, features_MKD, loss_inputs)
        if graph_loss is not None:
            return graph_loss
        start = time.perf_counter()
        loss = self._forward_backward(self.model, self.objective, batch, features_MKD, loss_inputs)
        if loss.requires_grad:
            self.timer.record_launch(time.perf_counter() - start)
        self._launch_event = record_event(loss.device)
        return loss.detach()

    def replay(
        self, batch: PackedBatch, features_MKD: Tensor | None, loss_inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run the forward and backward pass as a CUDA graph if one fits the pack and is faster.

        Args:
            features_MKD: Cached image features; None to run the vision encoder.

        Returns:
            Loss on the device, after setting `parameter.grad`; None if both passes have to run
            eagerly. Image features, if they are cached or were encoded.
        """
        if batch.context_shard is not None:
            return None, features_MKD
        self._count_starved_packs()
        inputs, features_MKD = self._select_inputs(batch, features_MKD, loss_inputs)
        if inputs is None:
            return None, features_MKD
        inputs.copy_from(batch, features_MKD, loss_inputs, self.native_model.visual)
        assert self.graphs is not None, "CUDA graphs are disabled"
        graph_index = [*self.static_inputs].index(inputs.shape)
        timing: AbstractContextManager[None] = nullcontext()
        if inputs.layout is None and self.graphs.contains(graph_index):
            timing = self.timer.time_replay(inputs.shape.num_tokens)
        run_static = partial(self.run_static, inputs)
        loss = None
        try:
            with timing:
                loss = self.graphs.run(graph_index, run_static).clone()
        except RuntimeError as error:
            # Usually for lack of memory. An eager pass raises the errors of the pack itself.
            logging.getLogger(__name__).debug("CUDA graphs are disabled: %s", error)
        if loss is None:
            # Outside the except block, because the traceback keeps tensors alive.
            self.release_graphs()
            return None, features_MKD
        # A vision encoder outside the graph gets its gradients from `backward_features`.
        unused_params: Collection[int] = ()
        if inputs.layout is None:
            unused_params = self._vision_param_indices
        self._gradients.assign_grads(unused_params)
        inputs.backward_features(features_MKD)
        return loss, features_MKD

    def _count_starved_packs(self) -> None:
        """Count the consecutive packs before which the device was idle."""
        if self._launch_event is None:
            return
        # The pack is starved if the device had finished the previous pack already.
        is_finished = self._launch_event.query()  # type: ignore[no-untyped-call]
        if is_finished:
            self._num_starved += 1
        else:
            self._num_starved = 0
        self._launch_event = None

    def _select_inputs(
        self, batch: PackedBatch, cached_MKD: Tensor | None, loss_inputs: Mapping[str, Tensor]
    ) -> tuple[GraphInputs | None, Tensor | None]:
        """Return the static buffers of the CUDA graph for a pack; None if it should run eagerly.

        The second value is the image features, if they are cached or were encoded.
        """
        if self._is_starved:
            max_tokens = MAX_GRAPH_TOKENS_STARVED
        elif cached_MKD is None:
            max_tokens = MAX_GRAPH_TOKENS
        else:
            max_tokens = MAX_GRAPH_TOKENS_CACHED
        features_MKD = cached_MKD
        for shape, features_MKD in self._iter_shapes(batch, cached_MKD):
            inputs = self._get_or_allocate_inputs(
                shape, batch, features_MKD, loss_inputs, max_tokens
            )
            if inputs is not None:
                return inputs, features_MKD
        return None, features_MKD

    def warm_up(self, batch: PackedBatch) -> None:
        """Run a pack eagerly and from static buffers, so that all its kernels are compiled."""
        loss_inputs = self.objective.loss_inputs(batch, torch.zeros((), device=batch.ids_T.device))
        loss = self._forward_backward(self.model, self.objective, batch, None, loss_inputs)
        if self.graphs is None:
            return
        self._launch_event = record_event(loss.device)
        for shape, features_MKD in self._iter_shapes(batch, None):
            if not self._should_capture(shape, batch, features_MKD, MAX_GRAPH_TOKENS):
                continue
            inputs = GraphInputs.allocate(
                shape, batch, features_MKD, loss_inputs, self.native_model.visual
            )
            inputs.copy_from(batch, features_MKD, loss_inputs, self.native_model.visual)
            try:
                self.run_static(inputs)
            finally:
                self._gradients.clear()
        # The launch times of the warm-up include kernel compilation.
        self.timer = GraphTimer()

    def release_graphs(self) -> bool:
        """Free all CUDA graphs and disable further captures; return whether any graph existed."""
        had_graphs = bool(self.static_inputs)
        for parameter in self._trainable_params:
            parameter.grad = None
        self.graphs = None
        self._gradients.clear()
        self.static_inputs.clear()
        return had_graphs

    @property
    def native_model(self) -> VisionLanguageModel:
        """Model with native code; others have no CUDA graphs."""
        return as_native(self.model)

    def _iter_shapes(
        self, batch: PackedBatch, features_MKD: Tensor | None
    ) -> Iterator[tuple[GraphShape, Tensor | None]]:
        """Yield the shapes of possible CUDA graphs, with the image features that are their input.

        A graph with the vision encoder saves the most launches, and comes first. The encoder runs
        before the other one, whose features have an autograd graph if they are trainable.
        """
        model = self.native_model
        if (
            features_MKD is None
            and self._captures_vision
            and should_capture_vision(len(batch.patches_ND), model.activation_checkpointing)
        ):
            vision_shape = GraphVisionShape.from_grids(
                model.visual, batch.grid_thw, *batch.patches_ND.shape
            )
            yield GraphShape.from_batch(batch, vision_shape), None
        if features_MKD is None and batch.grid_thw:
            features_MKD = model.encode_images(batch.patches_ND, batch.grid_thw)
        yield GraphShape.from_batch(batch), features_MKD

    def _get_or_allocate_inputs(
        self,
        shape: GraphShape,
        batch: PackedBatch,
        features_MKD: Tensor | None,
        loss_inputs: Mapping[str, Tensor],
        max_tokens: int,
    ) -> GraphInputs | None:
        """Return the static buffers of the CUDA graph for a pack.

        The result is None if the pack should run eagerly. New buffers are allocated when packs of
        this shape are frequent, or when one graph can serve several shapes.
        """
        # In order of cost: an exact graph, padding to a wider one, memory and warm-up of a new one.
        if shape in self.static_inputs:
            return self.static_inputs[shape]
        if not self._should_capture(shape, batch, features_MKD, max_tokens):
            return None
        if wider_inputs := self.find_wider_inputs(shape):
            return wider_inputs
        self.shape_counts[shape] += 1
        if len(self.static_inputs) == MAX_GRAPHS:
            return None
        device = batch.ids_T.device
        is_frequent = self.shape_counts[shape] > NUM_WARMUP_PACKS
        if self._should_share_graph(shape, is_frequent) and has_half_free(device):
            shape = shape.widen(self._list_shapes_without_graph())
        elif not is_frequent:
            return None
        elif len(batch.ids_T) > MAX_GRAPH_TOKENS and not has_half_free(device):
            # Keep the memory for eager passes.
            return None
        self.static_inputs[shape] = GraphInputs.allocate(
            shape, batch, features_MKD, loss_inputs, self.native_model.visual
        )
        return self.static_inputs[shape]

    def _list_shapes_without_graph(self) -> list[GraphShape]:
        """Return the shapes of packs that no existing graph fits, the most frequent first."""
        known = self.static_inputs
        shapes = []
        for shape, _ in self.shape_counts.most_common():
            if shape not in known and not any(wider.fits(shape) for wider in known):
                shapes.append(shape)
        return shapes

    def find_wider_inputs(self, shape: GraphShape) -> GraphInputs | None:
        """Return the buffers of the smallest existing graph that fits packs of this shape.

        The result is None if no graph fits, or if eager passes are faster than its replay.
        """
        fitting = [inputs for inputs in self.static_inputs.values() if inputs.shape.fits(shape)]
        widest = min(
            fitting,
            key=lambda h: (h.shape.num_tokens, h.shape.max_seqlen, h.shape.num_labels),
            default=None,
        )
        if widest is None or self.timer.is_replay_faster(widest.shape.num_tokens) is False:
            return None
        return widest

    def _should_share_graph(self, shape: GraphShape, is_frequent: bool) -> bool:
        """Return whether one new graph should serve packs of several similar shapes.

        Half of the `MAX_GRAPHS` graphs are reserved for frequent shapes.
        """
        if shape.vision_shape is not None:
            # Image sizes of several packs rarely match.
            return False
        is_faster = self.timer.is_replay_faster(shape.max_tokens)
        if is_faster is None:
            # Capture a single graph first, to measure its replay.
            return self._is_starved and all(
                shape.vision_shape is not None for shape in self.static_inputs
            )
        return is_faster and (is_frequent or 2 * len(self.static_inputs) < MAX_GRAPHS)

    @property
    def _is_starved(self) -> bool:
        """True if the device was idle before each of the last `MIN_STARVED_PACKS` packs."""
        return self._num_starved >= MIN_STARVED_PACKS

    def _should_capture(
        self, shape: GraphShape, batch: PackedBatch, features_MKD: Tensor | None, max_tokens: int
    ) -> bool:
        model = self.native_model
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

    def run_static(self, inputs: GraphInputs) -> Tensor:
        """Run the forward and backward pass from static buffers to static gradient buffers."""
        model = self.native_model
        loss = self._forward_backward(
            model,
            self.objective,
            inputs.batch,
            # The features have no name here, so that they are freed before the backward pass.
            inputs.load_features(model.visual),
            inputs.loss_inputs,
            inputs.seed_1,
            partial(self._gradients.backward, features_MKD=inputs.features_MKD),
        )
        return loss.detach()
