"""Asynchronous checkpoints: tensors are copied to the CPU, and a thread writes the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import copy_context
from threading import Thread

import torch
from torch import Tensor

from finesight.train.checkpoint import CheckpointManager, CheckpointState
from finesight.train.parallel.distributed import SINGLE_PROCESS, ProcessGroup
from finesight.train.setup import TrainState

MAX_ASYNC_PARAMS = 400_000_000
"""Maximum number of trainable parameters per rank for asynchronous checkpoints.

The CPU copy takes 12 bytes per parameter.
"""

_ALIGNMENT = 64
"""Alignment of tensors in the staging buffer, in bytes."""


class _StagingBuffer:
    """Reusable CPU buffer, in pinned memory where possible for fast copies from the GPU."""

    def __init__(self) -> None:
        self._bytes_N: Tensor | None = None

    def copy_tensors(self, tensor_sets: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Copy sets of tensors into the buffer; shapes must not change between calls."""
        if self._bytes_N is None:
            # Iterate once: some tensors are computed on access.
            self._bytes_N = _allocate_pinned(
                sum(_align(t.nbytes) for tensors in tensor_sets for t in tensors.values())
            )
        offset, copies = 0, [dict[str, Tensor]() for _ in tensor_sets]
        for tensors, copied in zip(tensor_sets, copies, strict=True):
            for name, tensor in tensors.items():
                buffer = self._bytes_N[offset : offset + tensor.nbytes].view(tensor.dtype)
                copied[name] = buffer.view(tensor.shape).copy_(tensor, non_blocking=True)
                offset += _align(tensor.nbytes)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


def _allocate_pinned(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    except RuntimeError:
        # The system limits pinned memory.
        return torch.empty(size, dtype=torch.uint8)


def _align(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def build_async_checkpointer(
    state: TrainState, checkpoint_manager: CheckpointManager
) -> AsyncCheckpointer:
    """Create the checkpoint writer of a run, asynchronous on a GPU if the copy fits."""
    on_gpu = state.hardware.device.type == "cuda"
    is_async = on_gpu and state.optimizer.num_params <= MAX_ASYNC_PARAMS
    return AsyncCheckpointer(
        checkpoint_manager, is_async=is_async, process_group=state.shard_group.new_group()
    )


class AsyncCheckpointer:
    """Write one checkpoint at a time; the next call raises errors of the thread."""

    def __init__(
        self,
        checkpoint_manager: CheckpointManager,
        *,
        is_async: bool,
        process_group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self._checkpoint_manager, self._is_async, self._process_group = (
            checkpoint_manager,
            is_async,
            process_group,
        )
        self._staging_buffer = _StagingBuffer()
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        state: CheckpointState,
        weights: Mapping[str, Tensor],
        optimizer_state: Mapping[str, Tensor],
    ) -> None:
        """Start writing a checkpoint as `CheckpointManager.save`; call `wait` to complete it."""
        self.wait()
        is_written = (
            self._process_group.is_single_process and state.step in self._checkpoint_manager.steps()
        )
        if is_written or not self._is_async:
            self._checkpoint_manager.save(state, weights, optimizer_state, self._process_group)
            return
        copies = self._staging_buffer.copy_tensors((weights, optimizer_state))
        # The thread inherits the context variables.
        context = copy_context()
        self._thread = Thread(target=context.run, args=(self._write, state, *copies))
        self._thread.start()

    def _write(
        self,
        state: CheckpointState,
        weights: Mapping[str, Tensor],
        optimizer_state: Mapping[str, Tensor],
    ) -> None:
        try:
            self._checkpoint_manager.save(state, weights, optimizer_state, self._process_group)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Wait for the pending checkpoint, and raise its error if it failed."""
        error = self.join()
        if error is not None:
            raise error

    def join(self) -> BaseException | None:
        """Wait for the pending checkpoint and return its error, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error
