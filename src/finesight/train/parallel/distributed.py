"""Process group of a distributed run, whose collectives report failed ranks.

A launcher such as torchrun starts the ranks and sets their environment variables. The result of a
step does not depend on the world size: the samples are the same, and the gradients are all-reduced
in fp32 before every rank applies the same step (Li et al. 2020, arXiv:2006.15704, without overlap).
A run can resume with another world size. Rank 0, the main process, writes the run directory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from finesight.errors import UserError
from finesight.train.dataloader import SkippedSample, StepBatch
from finesight.train.oom import GpuOutOfMemoryError, MemoryBudget

T = TypeVar("T")

MAIN_RANK_TIMEOUT = timedelta(hours=2)
"""Time that a rank waits for the main process, which evaluates and writes files."""

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Time that the main process waits for other ranks; also the timeout of torch collectives."""

REQUIRED_ENV_VARS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class PeerFailedError(UserError):
    """Raised on all ranks when a rank has failed; no rank applies the current step."""


class RankCommand(IntEnum):
    """Command that the ranks exchange before each action.

    The main process sends the next action of all ranks. Another rank sends STEP if it is ready for
    a step, WAIT if it accepts any command, or FAILED after an error.
    """

    STEP = 0
    SAVE = 1
    EVALUATE = 2
    FINALIZE = 3
    """Audit the parameters and export the weights at the end of the run."""
    SHUTDOWN = 4
    WAIT = 5
    FAILED = 6
    TRAIN = 7
    """Build the vision cache, then run training steps."""


class RankTimeoutError(PeerFailedError):
    """Raised when a rank does not reach a barrier before the timeout."""


class RankDesyncError(UserError):
    """Raised when this rank fails within a step while others wait in a collective.

    No further communication between the ranks is possible.
    """


class GlobalStepStats(NamedTuple):
    """Statistics of a step over all ranks, and the command of the main process.

    Attributes:
        num_supervised_tokens: Number of tokens that contribute to the loss.
        num_samples: Number of samples.
        num_tokens: Number of tokens.
        max_packs: Largest number of packs on one rank.
        skipped: Samples that were skipped because reading or encoding failed.
        signal: Number of a stop signal that any rank received, or 0.
        command: Command of the main process.
        argument: Argument of the command, such as a step.
    """

    num_supervised_tokens: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    max_packs: int = 0
    skipped: tuple[SkippedSample, ...] = ()
    signal: int = 0
    command: RankCommand = RankCommand.STEP
    argument: int = 0

    @classmethod
    def from_step(cls, step_batch: StepBatch, signal: int = 0) -> GlobalStepStats:
        """Compute the statistics of a step on this rank alone."""
        metrics = (
            step_batch.num_supervised_tokens,
            step_batch.num_samples,
            step_batch.num_tokens,
            len(step_batch.packs),
        )
        return cls(*metrics, step_batch.skipped, signal)


class RankMonitor:
    """Barriers and all-gather of strings over a key-value store, which identify missing ranks."""

    def __init__(self, store: Any, rank: int, world_size: int, name: str = "finesight") -> None:
        """Create a monitor.

        Args:
            store: Store of torch.distributed, which has no precise public type.
            rank: Rank of this process.
            world_size: Number of ranks.
            name: Prefix of the keys.
        """
        self._store, self._rank, self._world_size, self._name = store, rank, world_size, name
        self._round = 0
        self.has_stepped = False
        """Whether all ranks have completed a step."""
        self._missing_ranks = ""

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
        keys = [f"{self._name}/{self._round}/{rank}" for rank in range(self._world_size)]
        self._store.set(keys[self._rank], value)
        # All ranks have left the barrier before the previous one.
        self._store.delete_key(f"{self._name}/{self._round - 2}/{self._rank}")
        try:
            self._store.wait(keys, timeout)
        except RuntimeError as error:
            self._missing_ranks = self._find_missing_ranks(keys) or "one"
            raise self._build_timeout_error(timeout) from error
        values: list[bytes] = self._store.multi_get(keys)
        return values

    def _build_timeout_error(self, timeout: timedelta) -> RankTimeoutError:
        return RankTimeoutError(
            f"rank {self._missing_ranks} of {self._world_size} did not respond within {timeout}",
            where="training",
            expected="a response from every rank",
            remedy="check the log of that rank, then start again with --resume",
        )

    def _find_missing_ranks(self, keys: Sequence[str]) -> str:
        try:
            has_arrived = [self._store.check([key]) for key in keys]
        except RuntimeError:
            # Rank 0, which hosts the store, has exited.
            return "0"
        return ", ".join(str(rank) for rank, arrived in enumerate(has_arrived) if not arrived)


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """Rank and world size of this process, with collectives over all ranks.

    Attributes:
        rank: Rank of this process.
        world_size: Number of ranks.
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
        return self if self.monitor is None else replace(self, monitor=self.monitor.new_channel())

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Return every `world_size`-th item, starting at the rank of this process."""
        return items[self.rank :: self.world_size]

    def sync_step(self, step_batch: StepBatch, signal: int = 0) -> GlobalStepStats:
        """Exchange step statistics with all ranks before a training step.

        All ranks must call this method before each step. If the main process sends another command
        instead, the result contains only that command.

        Args:
            step_batch: Step data of this rank.
            signal: Number of the stop signal that this rank received, or 0.

        Returns:
            Statistics over all ranks.

        Raises:
            PeerFailedError: A rank cannot continue, or the ranks have different steps or data.
        """
        local_stats = GlobalStepStats.from_step(step_batch, signal)
        if self.is_single_process:
            return local_stats
        stats = (
            step_batch.step_index,
            step_batch.split_checksum,
            *local_stats[:4],
            len(step_batch.skipped),
        )
        commands = self._all_gather_commands((*stats, signal, RankCommand.STEP))
        return self._aggregate_stats(commands, step_batch.skipped)

    def sync_command(
        self, command: RankCommand, argument: int = 0, signal: int = 0
    ) -> GlobalStepStats:
        """Exchange a command other than a training step.

        The main process sends the command for all ranks. Another rank sends WAIT to receive it, or
        FAILED if it cannot continue. Such a rank is not informed of failures of other ranks. It
        receives WAIT if the main process sends no command.

        Args:
            command: Command that this rank sends.
            argument: Argument of the command.
            signal: Number of the stop signal that this rank received, or 0.

        Returns:
            Command of the main process, with its argument and a stop signal of any rank.

        Raises:
            PeerFailedError: A rank failed; not raised on a rank that sends WAIT or FAILED.
            RankTimeoutError: A rank did not arrive.
        """
        if self.is_single_process:
            return GlobalStepStats(command=command, argument=argument)
        try:
            return self._aggregate_stats(
                self._all_gather_commands((argument, 0, 0, 0, 0, 0, 0, signal, command))
            )
        except RankTimeoutError:
            raise
        except PeerFailedError:
            if command not in (RankCommand.WAIT, RankCommand.FAILED):
                raise
            return GlobalStepStats(command=RankCommand.WAIT)

    def _raise_peer_failure(self, failed_ranks: Sequence[int]) -> None:
        if failed_ranks:
            raise PeerFailedError(
                f"rank {', '.join(map(str, failed_ranks))} of {self.world_size} failed",
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
        if len({*self.all_gather_str(digest)}) > 1:
            raise UserError(
                "the ranks have different models, data or settings",
                where="training",
                expected="the same files on every rank",
                remedy="put model, data and recipe on a disk shared by all machines",
            )

    def _all_gather_commands(self, command: Sequence[int]) -> list[list[int]]:
        return [
            json.loads(payload)
            for payload in self._all_gather_tagged(json.dumps(command), "command")
        ]

    def _all_gather_tagged(self, value: str, tag: str = "data") -> list[bytes]:
        """Exchange strings of one kind with every rank.

        Args:
            value: String of this rank.
            tag: Kind of the value, such as `command`.

        Raises:
            PeerFailedError: A rank sent a different kind of value.
            RankTimeoutError: A rank did not arrive.
        """
        assert self.monitor is not None, f"rank {self.rank} of {self.world_size} has no monitor"
        # Before the first step, other ranks may encode all images.
        timeout = (
            COLLECTIVE_TIMEOUT if self.is_main and self.monitor.has_stepped else MAIN_RANK_TIMEOUT
        )
        values = self.monitor.all_gather(f"{tag} {value}", timeout)
        tags, payloads = zip(*(tag_value.split(b" ", 1) for tag_value in values), strict=True)
        self._raise_peer_failure(
            [rank for rank, tag_value in enumerate(tags) if tag_value != tag.encode()]
        )
        return list(payloads)

    def _aggregate_stats(
        self, commands: list[list[int]], skipped: Sequence[SkippedSample] = ()
    ) -> GlobalStepStats:
        *stats, packs, skipped_counts, signals, rank_commands = zip(*commands, strict=True)
        steps, checksums, supervised, samples, tokens = stats
        own_command, main_command = rank_commands[self.rank], RankCommand(rank_commands[0])
        blocking_commands = (
            (RankCommand.FAILED, RankCommand.WAIT)
            if main_command is RankCommand.STEP
            else (RankCommand.FAILED,)
        )
        failed_ranks = [
            rank
            for rank, rank_command in enumerate(rank_commands)
            if rank_command in blocking_commands
        ]
        if failed_ranks and max(signals) and main_command is RankCommand.STEP:
            # That rank received a stop signal before its step.
            return GlobalStepStats(signal=max(signals), command=main_command, argument=steps[0])
        if own_command != RankCommand.FAILED:
            self._raise_peer_failure(failed_ranks)
        if main_command is not RankCommand.STEP or own_command != RankCommand.STEP:
            return GlobalStepStats(signal=max(signals), command=main_command, argument=steps[0])
        if len({*steps}) > 1:
            raise PeerFailedError(
                f"the ranks are at different steps: {', '.join(map(str, steps))}",
                where="training",
                expected="one output folder shared by all ranks",
                remedy="put the run on a disk shared by all machines",
            )
        if len({*checksums}) > 1:
            raise PeerFailedError(
                "a sample that is split over the ranks differs between them",
                where="training",
                expected="the same files on every rank during the run",
                remedy="verify that every machine can read the images of the sample, then start"
                " again with --resume",
            )
        all_skipped = self._all_gather_skipped(skipped) if any(skipped_counts) else ()
        if self.monitor is not None:
            self.monitor.has_stepped = True
        totals = sum(supervised), sum(samples), sum(tokens), max(packs)
        return GlobalStepStats(*totals, all_skipped, max(signals))

    def _all_gather_skipped(self, skipped: Sequence[SkippedSample]) -> tuple[SkippedSample, ...]:
        payloads = self.all_gather_str(json.dumps(skipped))
        return tuple(
            SkippedSample(*sample)
            for rank_skipped in map(json.loads, payloads)
            for sample in rank_skipped
        )

    def _all_gather_statuses(self, status: Any) -> list[Any]:
        return [
            json.loads(payload) for payload in self._all_gather_tagged(json.dumps(status), "status")
        ]

    def all_gather_str(self, value: str) -> list[bytes]:
        """Return the strings of all ranks in rank order, encoded in UTF-8."""
        return [value.encode()] if self.is_single_process else self._all_gather_tagged(value)

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """Exchange errors at the end of the context, so that all ranks fail at the same point.

        Raises:
            PeerFailedError: The context succeeded on this rank and failed on another one.
            GpuOutOfMemoryError: A rank ran out of GPU memory and can retry with a smaller budget;
                raised on all ranks with the same budget.
        """
        oom_error, succeeded = None, False
        try:
            yield
            succeeded = True
        except GpuOutOfMemoryError as error:
            oom_error = error
        finally:
            next_budget = oom_error and oom_error.next_budget
            status = [succeeded, next_budget.model_dump() if next_budget else None]
            statuses = [status] if self.is_single_process else self._all_gather_statuses(status)
        self._raise_oom_on_any_rank(statuses, oom_error)

    def _raise_oom_on_any_rank(
        self, statuses: list[Any], oom_error: GpuOutOfMemoryError | None
    ) -> None:
        if oom_error is not None and oom_error.next_budget is None:
            raise oom_error
        self._raise_peer_failure(
            [
                n
                for n, (succeeded, next_budget) in enumerate(statuses)
                if not succeeded and not next_budget
            ]
        )
        budgets = {
            n: MemoryBudget(**next_budget)
            for n, (_, next_budget) in enumerate(statuses)
            if next_budget
        }
        if not budgets:
            return
        oom_error = oom_error or GpuOutOfMemoryError(
            f"the GPU memory of rank {', '.join(map(str, budgets))} is full"
        )
        oom_error.next_budget = MemoryBudget(
            pack_tokens=min(budget.pack_tokens for budget in budgets.values()),
            activation_checkpointing=max(
                budget.activation_checkpointing for budget in budgets.values()
            ),
        )
        raise oom_error

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
            self._all_gather_tagged("")
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
    variables = {name: os.environ[name] for name in REQUIRED_ENV_VARS if name in os.environ}
    if variables.get("WORLD_SIZE", "1") == "1":
        yield SINGLE_PROCESS
        return
    missing = [name for name in REQUIRED_ENV_VARS if name not in variables]
    integer_vars = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    malformed = [name for name in integer_vars if not variables.get(name, "0").isdecimal()]
    if missing or malformed:
        problem = (
            f"{', '.join(missing)} is not set"
            if missing
            else f"{', '.join(malformed)} is not a number"
        )
        raise UserError(
            f"WORLD_SIZE is {variables['WORLD_SIZE']}, and {problem}",
            where="the environment",
            expected=f"the variables that torchrun sets: {', '.join(REQUIRED_ENV_VARS)}",
            remedy="start with torchrun --nproc-per-node N -m finesight train RECIPE",
        )
    local_rank = int(variables["LOCAL_RANK"])
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    rank, world_size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    # The key-value store of the rendezvous.
    monitor = RankMonitor(dist.distributed_c10d._get_default_store(), rank, world_size)
    yield ProcessGroup(rank, world_size, local_rank, local_world_size, monitor)
    # Skipped after an exception, because the other ranks may never reach this call.
    dist.destroy_process_group()
