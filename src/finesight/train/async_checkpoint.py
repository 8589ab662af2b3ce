"""Asynchronous checkpoints: training continues while a background thread writes the files.

The tensors are first copied to a buffer in CPU memory, so the next optimizer step cannot change
them.
"""

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

The CPU copy takes 12 bytes per parameter: the fp32 weight and two fp32 moments.
"""

_ALIGNMENT = 64
"""Alignment of the tensors in the staging buffer, in bytes."""


class _StagingBuffer:
    """Reusable CPU buffer for a copy of all checkpoint tensors.

    The buffer is in pinned memory if the system allows it, because copies from a GPU are then
    faster.
    """

    def __init__(self) -> None:
        self._bytes_N: Tensor | None = None

    def copy_tensors(self, tensor_sets: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Copy several mappings of tensors to the buffer and return the mappings of the copies.

        The first call allocates the buffer, so later calls must pass tensors of the same names and
        shapes. The copies are complete on return.
        """
        if self._bytes_N is None:
            # Only in the first call, because some tensors are computed on access.
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
    """Create the checkpoint writer of a run.

    It is asynchronous on a GPU with at most `MAX_ASYNC_PARAMS` trainable parameters per rank, and
    synchronous otherwise.
    """
    on_gpu = state.hardware.device.type == "cuda"
    is_async = on_gpu and state.optimizer.num_params <= MAX_ASYNC_PARAMS
    return AsyncCheckpointer(
        checkpoint_manager, is_async=is_async, process_group=state.shard_group.new_group()
    )


class AsyncCheckpointer:
    """Writer of checkpoints in a background thread, one checkpoint at a time.

    An error of the thread is raised by the next call of `save` or `wait`.
    """

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
        """Start writing a checkpoint in the background; call `wait` to complete it.

        A synchronous writer returns after the checkpoint is complete. See `CheckpointManager.save`
        for the arguments.
        """
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
        """Wait until the pending checkpoint is written; raise its error if writing failed."""
        error = self.join()
        if error is not None:
            raise error

    def join(self) -> BaseException | None:
        """Wait until the pending checkpoint is written; return its error instead of raising it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error
