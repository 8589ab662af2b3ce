"""Process group of a distributed run, and data parallelism. Collectives report failed ranks.

A launcher such as torchrun starts the ranks and sets their environment variables. The result of a
step does not depend on the world size: the samples are the same, and the gradients are all-reduced
in fp32 before every rank applies the same step (Li et al. 2020, arXiv:2006.15704, without overlap).
A run can resume with another world size. Rank 0, the main process, writes the run directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finesight.encode.batch import PackedBatch
from finesight.errors import Remedy, UserError
from finesight.model.trainable import trainable_parameters
from finesight.train.master_weight_optimizer import MasterWeightOptimizer
from finesight.train.oom import GpuOutOfMemoryError, MemoryBudget, propose_plan

if TYPE_CHECKING:
    from finesight.model.backend_model import BackendModel

T = TypeVar("T")

MAIN_RANK_TIMEOUT = timedelta(hours=2)
"""Time that a rank waits for the main process, which evaluates and writes files."""

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Time that the main process waits for other ranks; also the timeout of torch collectives."""

LATE_TIMEOUT = timedelta(seconds=10)
"""Time that ranks have to report after a timeout, before they are named as missing."""

EXIT_TIMEOUT = timedelta(seconds=10)
"""Time that rank 0 waits for the other ranks before it exits."""

REQUIRED_ENV_VARS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def count_launched_ranks() -> int | None:
    """Return the world size of the launcher that started this process; None without a launcher."""
    world_size = os.environ.get("WORLD_SIZE", "")
    if not world_size.isdecimal() or int(world_size) < 2:
        return None
    return int(world_size)


class PeerFailedError(UserError):
    """Raised when another rank has failed; no rank applies the current step."""


class RankTimeoutError(PeerFailedError):
    """Raised when a rank does not reach a barrier before the timeout."""


class RankDesyncError(UserError):
    """Raised when the ranks are in different steps or collectives.

    No further communication between the ranks is possible.
    """


class RankMonitor:
    """Barriers and all-gather of strings over a key-value store, which identify missing ranks."""

    def __init__(self, store: Any, rank: int, world_size: int, name: str = "finesight") -> None:
        """Create a monitor.

        Args:
            store: Store of torch.distributed, which has no precise public type.
        """
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._name = name
        self._round = 0
        self.step: int | None = None
        """Index of the last step that all ranks have started; None before the first one."""
        self._missing_ranks: list[int] = []

    def new_channel(self) -> RankMonitor:
        """Create an independent monitor of the same ranks, for use in another thread."""
        return RankMonitor(
            self._store.clone(), self._rank, self._world_size, f"{self._name}/background"
        )

    def all_gather(self, value: str, timeout: timedelta) -> list[bytes]:
        """Gather a string from all ranks on every rank (all-gather).

        Returns:
            The strings in rank order, encoded in UTF-8.

        Raises:
            RankTimeoutError: A rank did not arrive within the timeout, now or in an earlier call.
        """
        if self._missing_ranks:
            raise self._build_timeout_error(timeout)
        self._round += 1
        keys = self._list_keys(str(self._round))
        try:
            self._store.set(keys[self._rank], value)
            # All ranks have left the barrier before the previous one.
            self._store.delete_key(f"{self._name}/{self._round - 2}/{self._rank}")
            self._store.wait(keys, timeout)
            values: list[bytes] = self._store.multi_get(keys)
        except RuntimeError as error:
            self._missing_ranks = self._wait_for_late_ranks(keys)
            if self._missing_ranks:
                raise self._build_timeout_error(timeout) from error
            # The last ranks have reported after the timeout.
            values = self._store.multi_get(keys)
        return values

    def _wait_for_late_ranks(self, keys: Sequence[str]) -> list[int]:
        """Return the missing ranks, of several only those that are missing after `LATE_TIMEOUT`.

        A hung rank also stops ranks that exchange tensors with it. Their collective times out at
        about the same time as this wait, and they report after that.
        """
        end = time.monotonic() + LATE_TIMEOUT.total_seconds()
        missing_ranks = self._find_missing_ranks(keys)
        while len(missing_ranks) > 1 and time.monotonic() < end:
            time.sleep(0.1)
            missing_ranks = self._find_missing_ranks(keys)
        return missing_ranks

    def leave(self) -> None:
        """Announce that this rank makes no further calls. Rank 0 waits for the other ranks.

        Without a launcher that hosts the store, the store ends with the process of rank 0, while
        the other ranks still read the values of the last collective.
        """
        keys = self._list_keys("exit")
        # Ranks that have failed may not leave, or may have ended the store.
        with suppress(RuntimeError):
            self._store.set(keys[self._rank], "")
            if self._rank == 0 and not self._missing_ranks:
                self._store.wait(keys, EXIT_TIMEOUT)

    def _list_keys(self, event: str) -> list[str]:
        """Return the keys under which the ranks report an event, in rank order."""
        return [f"{self._name}/{event}/{rank}" for rank in range(self._world_size)]

    def _build_timeout_error(self, timeout: timedelta) -> RankTimeoutError:
        missing_ranks = ", ".join(map(str, self._missing_ranks))
        return RankTimeoutError(
            f"rank {missing_ranks} of {self._world_size} did not respond within {timeout}",
            where="training",
            expected="a response from every rank",
            remedy="check the log of that rank, then start again with --resume",
        )

    def _find_missing_ranks(self, keys: Sequence[str]) -> list[int]:
        missing_ranks = []
        try:
            for rank, key in enumerate(keys):
                if not self._store.check([key]):
                    missing_ranks.append(rank)
        except RuntimeError:
            # Rank 0, which hosts the store, has exited.
            return [0]
        return missing_ranks


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """Rank and world size of this process, with collectives over all ranks.

    Attributes:
        local_rank: Rank of this process on its machine.
        local_world_size: Number of ranks on this machine.
        monitor: Barriers that report missing ranks; None in a single-process run.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    monitor: RankMonitor | None = None

    @property
    def is_main(self) -> bool:
        """True if this is the main process (rank 0), which writes the run directory."""
        return self.rank == 0

    @property
    def is_single_process(self) -> bool:
        return self.world_size == 1

    def select_device(self, device: torch.device) -> torch.device:
        """Return the device of this rank; on a GPU, the one of its local rank.

        Raises:
            UserError: More processes than GPUs were started on this machine.
        """
        if self.is_single_process or device.type != "cuda":
            return device
        num_gpus = torch.cuda.device_count()
        # Some launchers expose only one GPU to each process.
        has_own_gpu = num_gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
        index = 0 if has_own_gpu else self.local_rank
        if self.local_world_size > num_gpus and not has_own_gpu:
            raise UserError(
                f"{self.local_world_size} processes were started on a machine with {num_gpus} GPUs",
                where="LOCAL_RANK",
                expected="one GPU per process",
                remedy=f"start {num_gpus} processes: torchrun --nproc-per-node {num_gpus}",
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)

    def new_group(self) -> ProcessGroup:
        """Create a process group of the same ranks for use in another thread."""
        if self.monitor is None:
            return self
        return replace(self, monitor=self.monitor.new_channel())

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Return every `world_size`-th item, starting at the rank of this process."""
        return items[self.rank :: self.world_size]

    def start_step(self, step_index: int, value: object) -> list[Any]:
        """Exchange JSON values at the start of a step; later collectives belong to this step.

        Raises:
            PeerFailedError: A rank has failed.
            RankDesyncError: The ranks are at different steps.
        """
        assert self.monitor is not None, f"rank {self.rank} of {self.world_size} has no monitor"
        values = self._exchange("step", value, step_index)
        self.monitor.step = step_index
        return values

    def sync_failure(self, own_state: Sequence[int]) -> list[list[int]]:
        """Report a failure to all ranks, and wait until every rank reports one.

        A rank that has not failed raises `PeerFailedError` in its next collective. It must then
        call this method as well.

        Args:
            own_state: Integers that describe this rank.

        Returns:
            Integers of all ranks, in rank order.

        Raises:
            RankTimeoutError: A rank did not arrive.
        """
        if self.is_single_process:
            return [[*own_state]]
        while True:
            messages = self._all_gather_messages("failure", [*own_state])
            if all(kind == "failure" for kind, _, _ in messages):
                return [state for _, _, state in messages]

    def _raise_peer_failure(self, has_failed: Iterable[bool]) -> None:
        failed_ranks = ", ".join(str(rank) for rank, failed in enumerate(has_failed) if failed)
        if failed_ranks:
            raise PeerFailedError(
                f"rank {failed_ranks} of {self.world_size} failed",
                where="training",
                expected="no failed rank",
                remedy="check the log of that rank, then start again with --resume",
            )

    def check_identical(self, config: Mapping[str, Any]) -> None:
        """Verify that all ranks have the same configuration, by comparing digests.

        Raises:
            UserError: The configurations differ.
        """
        if self.is_single_process:
            return
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        if len({*self.all_gather_object(digest)}) > 1:
            raise UserError(
                "the ranks have different models, data or settings",
                where="training",
                expected="the same files on every rank",
                remedy="put model, data and recipe on a disk shared by all machines",
            )

    def all_gather_object(self, value: object) -> list[Any]:
        """Return the JSON values of all ranks in rank order."""
        if self.is_single_process:
            return [value]
        return self._exchange("data", value)

    def broadcast_str(self, value: str) -> str:
        """Return the string of the main process on all ranks."""
        return str(self.all_gather_object(value)[0])

    def _exchange(self, kind: str, value: object, step: int | None = None) -> list[Any]:
        """Return the JSON values of all ranks, which must be in the same collective and step.

        Args:
            step: Index of the step that begins; the current step by default.

        Raises:
            PeerFailedError: A rank has failed.
            RankDesyncError: The ranks are in different steps or collectives.
            RankTimeoutError: A rank did not arrive.
        """
        messages = self._all_gather_messages(kind, value, step)
        self._raise_peer_failure(kind == "failure" for kind, _, _ in messages)
        positions = [f"{step} ({kind})" for kind, step, _ in messages]
        if len({*positions}) > 1:
            ranks = (f"rank {rank} at {position}" for rank, position in enumerate(positions))
            raise RankDesyncError(
                f"the ranks are at different steps: {', '.join(ranks)}",
                where="training",
                expected="one output folder shared by all ranks",
                remedy="put the run on a disk shared by all machines",
            )
        return [value for _, _, value in messages]

    def _all_gather_messages(
        self, kind: str, value: object, step: int | None = None
    ) -> list[tuple[str, int | None, Any]]:
        """Return kind and step of the collective of each rank, and its JSON value."""
        assert self.monitor is not None, f"rank {self.rank} of {self.world_size} has no monitor"
        if step is None:
            step = self.monitor.step
        timeout = MAIN_RANK_TIMEOUT
        # Before the first step, other ranks may encode all images.
        if self.is_main and self.monitor.step is not None:
            timeout = COLLECTIVE_TIMEOUT
        payloads = self.monitor.all_gather(json.dumps([kind, step, value]), timeout)
        return [json.loads(payload) for payload in payloads]

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """Exchange errors at the end of the context, so that all ranks fail at the same point.

        Raises:
            PeerFailedError: The context succeeded on this rank and failed on another one.
            GpuOutOfMemoryError: A rank ran out of GPU memory and can retry with a smaller budget;
                raised on all ranks with the same budget.
        """
        oom_error: GpuOutOfMemoryError | None = None
        # True after success, or the next budget. It stays False after any other error.
        status: object = False
        try:
            yield
            status = True
        except GpuOutOfMemoryError as error:
            if error.next_budget is None:
                raise
            oom_error = error
            status = error.next_budget.model_dump()
        finally:
            # The other ranks need an answer even after an error.
            statuses: list[Any] = [status]
            if not self.is_single_process:
                statuses = self._exchange("status", status)
        self._raise_peer_failure(not status for status in statuses)
        budgets: dict[int, MemoryBudget] = {}
        for rank, next_budget in enumerate(statuses):
            if next_budget is not True:
                budgets[rank] = MemoryBudget(**next_budget)
        if budgets:
            oom_error = oom_error or GpuOutOfMemoryError(
                f"the GPU memory of rank {', '.join(map(str, budgets))} is full"
            )
            oom_error.next_budget = reduce(MemoryBudget.min_with, budgets.values())
            raise oom_error

    @contextmanager
    def raise_desync(self) -> Iterator[None]:
        """Convert an error in the context, where other ranks wait, to a `RankDesyncError`."""
        try:
            yield
        except Exception as error:
            remedy: Remedy = "start again with --resume"
            if isinstance(error, GpuOutOfMemoryError):
                remedy = propose_plan(
                    "lower train.pack_tokens or set train.activation_checkpointing=true, then start"
                    " again with --resume"
                )
            raise RankDesyncError(
                f"rank {self.rank} of {self.world_size} failed in the middle of a step: {error}",
                where="training",
                expected="all ranks in every layer",
                remedy=remedy,
            ) from error

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks in-place.

        On a CPU, a missing rank raises `RankTimeoutError`. On a GPU, PyTorch aborts the collective
        after `COLLECTIVE_TIMEOUT`.
        """
        if self.is_single_process:
            return tensor
        try:
            dist.all_reduce(tensor)
        except RuntimeError:
            # Every rank on which the collective failed reports it here.
            self.all_gather_object(None)
            raise
        return tensor


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def init_distributed() -> Iterator[ProcessGroup]:
    """Initialize torch.distributed within the context if a launcher started several processes.

    Yields:
        Process group of the run; without a launcher, a single process.

    Raises:
        UserError: Environment variables of the launcher are missing or malformed.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield SINGLE_PROCESS
        return
    _check_launch_variables()
    rank = int(os.environ["RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    # The store of the rendezvous needs no further port, and has no public name.
    monitor = RankMonitor(dist.distributed_c10d._get_default_store(), rank, world_size)
    try:
        yield ProcessGroup(rank, world_size, local_rank, local_world_size, monitor)
    finally:
        monitor.leave()
    # Skipped after an exception, because the other ranks may never reach this call.
    dist.destroy_process_group()


def _check_launch_variables() -> None:
    """Verify the environment variables of a launcher that started several processes.

    Raises:
        UserError: A variable is missing or malformed.
    """
    missing = [name for name in REQUIRED_ENV_VARS if name not in os.environ]
    malformed = []
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        if not os.environ.get(name, "0").isdecimal():
            malformed.append(name)
    if missing:
        problem = f"{', '.join(missing)} is not set"
    elif malformed:
        problem = f"{', '.join(malformed)} is not a number"
    else:
        return
    raise UserError(
        f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {problem}",
        where="the environment",
        expected=f"the variables that torchrun sets: {', '.join(REQUIRED_ENV_VARS)}",
        remedy="start the training with torchrun --nproc-per-node N -m finesight ...",
    )


class ParallelStrategy:
    """Mode of `train.parallel`; all ranks call the same methods in the same order.

    This class is the mode `ddp`, and `FSDPStrategy` the others.

    - `ddp` replicates the model and all-reduces gradients.
    - `zero2` shards master weights, gradients and optimizer state (Rajbhandari et al. 2020,
      arXiv:1910.02054).
    - `fsdp` shards the model weights as well (Zhao et al. 2023, arXiv:2304.11277).
    - `fsdp_offload` is `fsdp` with shards in CPU memory.

    The sharded modes use `fully_shard` of PyTorch.
    """

    is_sharded = False
    """True if parameters, gradients or optimizer states are sharded over the ranks."""

    def __init__(self, model: BackendModel, process_group: ProcessGroup) -> None:
        self._process_group = process_group
        self.trainable_params: Mapping[str, nn.Parameter] = trainable_parameters(model)
        """Parameters that the optimizer of this rank updates, or its shards, by native name."""
        self.num_trainable_params = sum(p.numel() for p in self.trainable_params.values())
        """Number of trainable parameters of the complete model."""

    def prepare_batch(self, packed_batch: PackedBatch) -> PackedBatch:
        """Extend a packed batch where needed, so that every rank runs the same layers."""
        return packed_batch

    def accumulate_gradients(self, optimizer: MasterWeightOptimizer) -> None:
        """Add the gradients of a micro-batch to fp32 sums before the next micro-batch."""
        optimizer.accumulate_gradients()

    def reduce_gradients(self, optimizer: MasterWeightOptimizer) -> Tensor:
        """Sum the fp32 gradients of all ranks before the optimizer step.

        Communication and computation do not overlap. See Li et al. 2020 (arXiv:2006.15704).

        Returns:
            Euclidean norm of all gradients, a scalar on the device.
        """
        if not self._process_group.is_single_process:
            for group in optimizer.param_groups:
                group.gradients.all_reduce(self._process_group.all_reduce)
        return optimizer.grad_norm()

    def sync_params(self) -> None:
        """Copy the updated master weights to the model after an optimizer step."""
        return

    def zero_grad(self) -> None:
        """Discard the gradients of a skipped or aborted step outside of the optimizer."""
        return

    def shard_state(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Select the shard of this rank from complete checkpoint tensors.

        Args:
            tensors: Tensors by parameter name, optionally with a prefix such as `exp_avg.`.
        """
        return tensors

    def summon_full_params(self) -> AbstractContextManager[None]:
        """Provide the unsharded model on every rank within the context."""
        return nullcontext()
