"""Static gradient buffers for CUDA graph replay."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from finesight.model.lora.fused import write_gradients_to
from finesight.train.grad_accumulation import LARGE_PARAM_ELEMENTS


class GraphGradients:
    """Static gradient buffers of the trainable parameters, shared by all CUDA graphs.

    The optimizer accumulates the gradients before the next replay overwrites them. Gradients of
    large parameters are computed in their buffers or copied to them immediately, so that two copies
    of all gradients never exist at the same time.
    """

    def __init__(self, trainable_params: Sequence[nn.Parameter]) -> None:
        self._trainable_params = trainable_params
        self._large_indices = {
            id(one): n
            for n, one in enumerate(trainable_params)
            if one.numel() >= LARGE_PARAM_ELEMENTS
        }
        self._buffers: dict[int, Tensor] = {}

    def backward(self, loss: Tensor, extra_outputs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Compute the gradients of a loss and write them to static buffers.

        Args:
            loss: Loss of a pack.
            extra_outputs: Additional tensors that require gradients, each with its gradient buffer.
        """
        handles = [self._register_hook(index) for index in self._large_indices.values()]
        inputs = [*self._trainable_params, *(tensor for tensor, _ in extra_outputs)]
        try:
            with write_gradients_to(self._find_buffer):
                gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        param_gradients, extra_gradients = (
            gradients[: len(self._trainable_params)],
            gradients[len(self._trainable_params) :],
        )
        for (_, buffer), gradient in zip(extra_outputs, extra_gradients, strict=True):
            buffer.copy_(gradient)
        large = self._large_indices.values()
        small = {
            n: one for n, one in enumerate(param_gradients) if one is not None and n not in large
        }
        if small:
            torch._foreach_copy_([self._get_buffer(n) for n in small], [*small.values()])

    def assign_grads(self, excluded: Collection[int] = ()) -> None:
        """Set `parameter.grad` to the static buffers after a replay.

        Args:
            excluded: Indices of parameters that the graph does not use; their gradient is None.
        """
        for index, parameter in enumerate(self._trainable_params):
            parameter.grad = None if index in excluded else self._buffers.get(index)

    def clear(self) -> None:
        """Free the gradient buffers."""
        self._buffers.clear()

    def _register_hook(self, index: int) -> RemovableHandle:
        register: Callable[..., RemovableHandle] = self._trainable_params[index].register_hook
        return register(partial(self._copy_to_buffer, index))

    def _copy_to_buffer(self, index: int, gradient: Tensor) -> Tensor:
        buffer = self._get_buffer(index)
        return buffer if buffer.data_ptr() == gradient.data_ptr() else buffer.copy_(gradient)

    def _find_buffer(self, weight: Tensor) -> Tensor | None:
        index = self._large_indices.get(id(weight))
        return None if index is None else self._get_buffer(index)

    def _get_buffer(self, index: int) -> Tensor:
        if index not in self._buffers:
            # The layout of the parameter, because a gradient may be transposed.
            self._buffers[index] = torch.empty_like(
                self._trainable_params[index], requires_grad=False
            )
        return self._buffers[index]
