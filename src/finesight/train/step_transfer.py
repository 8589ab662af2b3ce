"""Transfer of steps from data loader workers to the main process, in two memory blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from finesight.encode.batch import PackedBatch
from finesight.train.prefetch import DataWorkerError
from finesight.train.step_batch import StepBatch

_ALIGNMENT = 64
"""Alignment of the tensors in a `TensorBlock`, in bytes."""

TensorSpec = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""


@dataclass(frozen=True, slots=True)
class TensorBlock:
    """Tensors of several shapes and dtypes in one contiguous block of memory.

    Transferring a tensor from a worker costs a file descriptor, and pinning it costs a driver call.
    A shared block pays these costs once.
    """

    specs: tuple[TensorSpec, ...]
    bytes_N: Tensor

    @classmethod
    def allocate(cls, *specs: TensorSpec, pin_memory: bool = False) -> TensorBlock:
        """Allocate uninitialized tensors; data loader workers allocate them in shared memory.

        Shared memory avoids a copy to the main process, as in the default collate function of
        PyTorch.

        Args:
            pin_memory: Whether to pin the memory, if the system allows it and has a GPU.

        Raises:
            DataWorkerError: There is not enough shared memory.
        """
        size = sum(_aligned_size(dtype, shape) for dtype, shape in specs)
        if pin_memory and torch.cuda.is_available():
            with suppress(RuntimeError):  # The system limits pinned memory.
                return cls(specs, torch.empty(size, dtype=torch.uint8, pin_memory=True))
        if get_worker_info() is None:
            return cls(specs, torch.empty(size, dtype=torch.uint8))
        try:
            shared = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise DataWorkerError(
                f"no shared memory for {size:,} bytes of a step: {str(error).splitlines()[0]}",
                where="train.num_workers",
                expected="space for two steps per data loader worker in /dev/shm",
                remedy="lower train.num_workers, or increase the shared memory of the container"
                " (docker run --shm-size), then start again with --resume",
            ) from error
        return cls(specs, torch.empty(0, dtype=torch.uint8).set_(shared, 0, (size,), (1,)))

    def pin_memory(self) -> TensorBlock:
        """Return a copy in pinned memory; PyTorch's data loader calls it for items of tuples."""
        return replace(self, bytes_N=self.bytes_N.pin_memory())

    def tensors(self) -> Iterator[Tensor]:
        """Iterate over views of the tensors in the block."""
        offset = 0
        for dtype, shape in self.specs:
            size = dtype.itemsize * math.prod(shape)
            yield self.bytes_N[offset : offset + size].view(dtype).view(shape)
            offset += _aligned_size(dtype, shape)


def _aligned_size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    size = dtype.itemsize * math.prod(shape)
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class StepTransfer(NamedTuple):
    """Step data that a worker sends to the main process, with tensors in two blocks.

    The first block contains patches and cache inputs. They are the largest tensors, so the worker
    writes them to the block directly instead of copying them. The second block contains copies of
    all other tensors.
    """

    step_batch: StepBatch
    image_block: TensorBlock
    tensor_block: TensorBlock

    @classmethod
    def from_step(cls, step_batch: StepBatch, image_block: TensorBlock) -> StepTransfer:
        """Copy all tensors of a step to a new block, except those already in `image_block`."""
        tensors: list[Tensor] = []
        empty_tensor = torch.empty(0)

        def take(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return empty_tensor

        empty_packs = []
        for batch in step_batch.packs:
            empty_pack = _map_tensors(batch, take)
            empty_packs.append(replace(empty_pack, patches_ND=empty_tensor))
        specs = [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
        block = TensorBlock.allocate(*specs)
        for buffer, tensor in zip(block.tensors(), tensors, strict=True):
            buffer.copy_(tensor)
        empty_step = replace(step_batch, packs=tuple(empty_packs), cache_inputs=())
        return cls(empty_step, image_block, block)

    def unpack(self) -> StepBatch:
        """Restore the step data, whose tensors are views of the two blocks."""
        tensors = self.tensor_block.tensors()
        # The block has the patches of all packs before their cache inputs, so it is read in order.
        image_tensors = self.image_block.tensors()
        packs = []
        for batch in self.step_batch.packs:
            restored = _map_tensors(batch, lambda _: next(tensors))
            packs.append(replace(restored, patches_ND=next(image_tensors)))
        return replace(self.step_batch, packs=tuple(packs), cache_inputs=tuple(image_tensors))


def _map_tensors(batch: PackedBatch, fn: Callable[[Tensor], Tensor]) -> PackedBatch:
    """Replace all tensors of a packed batch except patches, in a fixed order."""
    names = (
        "ids_T",
        "position_ids_3T",
        "cu_seqlens_S1",
        "visual_indices_M",
        "logit_indices_L",
        "labels_L",
    )
    changes: dict[str, Any] = {}
    for name in names:
        changes[name] = fn(getattr(batch, name))
    changes["hf_inputs"] = {name: fn(tensor) for name, tensor in batch.hf_inputs.items()}
    return replace(batch, **changes)
