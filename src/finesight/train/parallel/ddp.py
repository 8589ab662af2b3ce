"""Parallelism strategies for distributed training, and the replicated strategy (DDP).

Modes of `train.parallel`:

- `ddp` replicates the model and all-reduces gradients.
- `zero2` shards master weights, gradients and optimizer state (Rajbhandari et al. 2020,
  arXiv:1910.02054).
- `fsdp` shards the model weights as well (Zhao et al. 2023, arXiv:2304.11277).
- `fsdp_offload` is `fsdp` with shards in CPU memory.

The sharded modes use `fully_shard` of PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn

from finesight.config import Recipe
from finesight.encode.packing import PackedBatch
from finesight.errors import UserError
from finesight.model.hf_backend import AnyModel, HfModel
from finesight.model.trainable import trainable_parameters
from finesight.train.optimizer import MasterWeightOptimizer
from finesight.train.parallel.distributed import ProcessGroup


class ParallelStrategy(Protocol):
    """Interface of a parallelism strategy, which a training step calls.

    All ranks must call the same methods in the same order.
    """

    is_sharded: bool
    """True if parameters, gradients or optimizer states are sharded over the ranks."""

    num_trainable_params: int
    """Number of trainable parameters of the complete model."""

    trainable_params: Mapping[str, nn.Parameter]
    """Parameters that the optimizer of this rank updates, by native name.

    These are all trainable parameters, or the shard of this rank of each.
    """

    def prepare_batch(self, packed_batch: PackedBatch) -> PackedBatch:
        """Extend a packed batch where needed, so that every rank runs the same layers."""
        ...

    def reduce_gradients(self, optimizer: MasterWeightOptimizer) -> Tensor:
        """Sum the gradients of all ranks before the optimizer step.

        Returns:
            Euclidean norm of all gradients, a scalar on the device.
        """
        ...

    def sync_params(self) -> None:
        """Copy the updated master weights to the model after an optimizer step."""
        ...

    def zero_grad(self) -> None:
        """Discard the gradients of a skipped or aborted step."""
        ...

    def shard_state(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Select the shard of this rank from complete checkpoint tensors.

        Args:
            tensors: Tensors by parameter name, optionally with a prefix such as `exp_avg.`.
        """
        ...

    def summon_full_params(self) -> AbstractContextManager[None]:
        """Provide the unsharded model on every rank within the context."""
        ...


class DDPStrategy:
    """Data parallelism with a replica of the model on every rank."""

    is_sharded = False

    def __init__(self, model: AnyModel, process_group: ProcessGroup) -> None:
        self.trainable_params: Mapping[str, nn.Parameter] = trainable_parameters(model)
        self.num_trainable_params = sum(
            parameter.numel() for parameter in self.trainable_params.values()
        )
        self._process_group = process_group

    def prepare_batch(self, packed_batch: PackedBatch) -> PackedBatch:
        """Return the batch unchanged."""
        return packed_batch

    def reduce_gradients(self, optimizer: MasterWeightOptimizer) -> Tensor:
        """Sum the fp32 gradients of all ranks by an all-reduce after the backward pass.

        Communication and computation do not overlap. See Li et al. 2020 (arXiv:2006.15704).
        """
        if not self._process_group.is_single_process:
            optimizer.all_reduce_gradients(self._process_group.all_reduce)
        return optimizer.grad_norm()

    def sync_params(self) -> None:
        """No-op: the model parameters are part of the master weights."""

    def zero_grad(self) -> None:
        """No-op: the optimizer clears the gradients."""

    def shard_state(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return all tensors, since the model is not sharded."""
        return tensors

    @contextmanager
    def summon_full_params(self) -> Iterator[None]:
        """No-op: every rank has the complete model."""
        yield


def parallelize_model(
    recipe: Recipe, model: AnyModel, dtype: torch.dtype, process_group: ProcessGroup
) -> ParallelStrategy:
    """Distribute a model over the ranks according to `train.parallel`.

    Raises:
        UserError: The model or the optimizer does not support sharding.
    """
    mode = recipe.train.parallel
    if mode == "ddp" or process_group.is_single_process:
        return DDPStrategy(model, process_group)
    if isinstance(model, HfModel):
        _raise_unsupported(mode, "models of the transformers backend")
    if mode == "fsdp_offload" and model.model.embed_tokens.weight.device.type == "cpu":
        _raise_unsupported(mode, "models on a CPU")
    if recipe.train.optimizer != "adamw":
        _raise_unsupported(mode, f"the state of train.optimizer={recipe.train.optimizer}")
    # Imported on demand, because the FSDP modules of torch take a second to import.
    from finesight.train.parallel.fsdp import FSDPStrategy

    return FSDPStrategy(model, dtype, mode)


def _raise_unsupported(mode: str, feature: str) -> NoReturn:
    raise UserError(
        f"train.parallel={mode} does not support {feature}",
        where="train.parallel",
        expected="a natively implemented model family and train.optimizer=adamw",
        remedy="set train.parallel=ddp, which replicates the model on every rank",
    )
