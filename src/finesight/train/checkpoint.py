"""Checkpoints of a run in the folders `checkpoints/step-N`, written atomically.

A checkpoint contains the fp32 master weights, the optimizer state and `state.json`. Asynchronous
checkpoints copy the tensors to CPU memory, and a background thread writes the files while training
continues.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from finesight.errors import Remedy, UserError
from finesight.evaluate.eval_result import BestEval
from finesight.files.bounded_files import read_bytes
from finesight.files.storage import (
    move_folder,
    open_tensors,
    remove_folder,
    remove_partial_files,
    translate_os_errors,
    verify_folder,
    write_folder,
)
from finesight.settings.config import TrainSettings
from finesight.train.master_weight_optimizer import LazyTensors, resolve_steps
from finesight.train.oom import MemoryBudget
from finesight.train.parallel.distributed import SINGLE_PROCESS, ProcessGroup
from finesight.train.step_transfer import TensorBlock

WEIGHTS_FILE = "trainable.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"

FORMAT_VERSION: Literal[2] = 2

DEFAULT_SAVE_INTERVAL = 0.25
"""Default interval between two checkpoints, as a fraction of the run."""


def resolve_save_interval(train: TrainSettings, total_steps: int) -> int:
    """Return the number of steps between two checkpoints; 0 saves only the last step."""
    save_every = train.save_every
    if save_every is None:
        save_every = DEFAULT_SAVE_INTERVAL
    return resolve_steps(save_every, total_steps)


class TrainProgress(BaseModel):
    """Mutable progress of a run.

    Attributes:
        step: Number of finished steps.
        last_eval_step: Step of the last evaluation, or -1 before the first one.
        best: Best evaluation so far.
        nonfinite_steps: Number of skipped steps with a non-finite loss or gradient.
        consecutive_nonfinite_steps: Number of consecutive non-finite steps up to this step.
    """

    model_config = ConfigDict(extra="forbid")

    budget: MemoryBudget
    step: int
    last_eval_step: int
    best: BestEval | None
    nonfinite_steps: int = 0
    consecutive_nonfinite_steps: int = 0

    def restore(self, stored: TrainProgress) -> None:
        """Continue from a checkpoint, with the smaller of both memory budgets."""
        self.budget = stored.budget.min_with(self.budget)
        self.step = stored.step
        self.last_eval_step = stored.last_eval_step
        self.best = stored.best
        self.nonfinite_steps = stored.nonfinite_steps
        self.consecutive_nonfinite_steps = stored.consecutive_nonfinite_steps


class CheckpointState(TrainProgress):
    """Content of `state.json` in a checkpoint: the state of a run apart from tensors.

    Attributes:
        consumed_samples: Number of samples consumed since the start of the run.
        loss_scale: State of the fp16 loss scaler.
        resume_config: Settings and fingerprints that must be the same on resume, by name.
    """

    model_config = ConfigDict(frozen=True)

    format_version: Literal[2] = FORMAT_VERSION
    consumed_samples: int
    loss_scale: dict[str, float]
    resume_config: dict[str, Any]


class CorruptCheckpointError(UserError):
    """Raised when a checkpoint file is missing or was changed after it was written."""


class Checkpoint(NamedTuple):
    """State of a run without tensors, master weights and optimizer state, each by name."""

    state: CheckpointState
    weights: Mapping[str, Tensor]
    optimizer_state: Mapping[str, Tensor]


class CheckpointManager:
    """Checkpoint directory of a run; keeps the newest checkpoints and the best one.

    Args:
        checkpoint_dir: Directory of the checkpoint folders.
        max_to_keep: Number of newest checkpoints to keep (`train.keep_checkpoints`).
    """

    def __init__(self, checkpoint_dir: Path, max_to_keep: int) -> None:
        self.checkpoint_dir = checkpoint_dir
        self.max_to_keep = max_to_keep

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in ascending order."""
        steps = []
        for path in self.checkpoint_dir.glob("step-*"):
            suffix = path.name.removeprefix("step-")
            if suffix.isdecimal():
                steps.append(int(suffix))
        return sorted(steps)

    def step_dir(self, step: int) -> Path:
        """Return the folder of the checkpoint of a step."""
        return self.checkpoint_dir / f"step-{step}"

    def save(
        self,
        state: CheckpointState,
        weights: Mapping[str, Tensor],
        optimizer_state: Mapping[str, Tensor],
        process_group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        """Write a checkpoint atomically, then delete old checkpoints.

        An existing checkpoint of the same step is not overwritten. In a sharded run, all ranks must
        call this method with their shards.

        Args:
            state: State without tensors.
            weights: fp32 master weights, or the shards of this rank.
            optimizer_state: Optimizer state, or the shards of this rank.
            process_group: Ranks that write shards; a single process without sharding.
        """
        with ExitStack() as stack:
            folder = None
            try:
                if process_group.is_main and state.step not in self.steps():
                    folder = stack.enter_context(write_folder(self.step_dir(state.step)))
            finally:
                # The other ranks need an answer even after an error.
                folder_name = process_group.broadcast_str("" if folder is None else folder.name)
            if folder_name:
                with process_group.sync_errors():
                    tensors = {WEIGHTS_FILE: weights, OPTIMIZER_FILE: optimizer_state}
                    write_shards(self.checkpoint_dir / folder_name, tensors, process_group)
            if folder is not None:
                if not process_group.is_single_process:
                    # A shared disk may show the files of other ranks with a delay.
                    for name in (WEIGHTS_FILE, OPTIMIZER_FILE):
                        open_shards(folder, name)
                (folder / STATE_FILE).write_text(state.model_dump_json(indent=1) + "\n")
        if process_group.is_main:
            self._remove_old_checkpoints(state)

    def _remove_old_checkpoints(self, state: CheckpointState) -> None:
        """Delete all checkpoints but the newest ones and the one of the best evaluation."""
        old_steps = self.steps()[: -self.max_to_keep]
        best_step = state.step
        if state.best is not None:
            best_step = state.best.step
        for step in old_steps:
            if step != best_step:
                remove_folder(self.step_dir(step))

    def load_latest(self, log: Callable[[str], None]) -> Checkpoint | None:
        """Load the newest valid checkpoint after verifying the digests of its files.

        Corrupt checkpoints are logged and ignored; `quarantine_after` renames them later.

        Returns:
            State, weights and optimizer state; None if there is no checkpoint.

        Raises:
            UserError: All checkpoints are corrupt.
        """
        remove_partial_files(self.checkpoint_dir)
        latest_error: UserError | None = None
        for step in reversed(self.steps()):
            remedy = f"delete {self.checkpoint_dir} to restart the run from step 0"
            try:
                checkpoint = self.load(step, remedy)
            except CorruptCheckpointError as error:
                latest_error = latest_error or error
                log(f"the checkpoint of step {step} is corrupt: {error.where}: {error.what}")
            else:
                if latest_error is not None:
                    log(f"resuming from step {step}, the newest valid checkpoint")
                return checkpoint
        if latest_error is not None:
            raise latest_error
        return None

    def quarantine_after(self, step: int) -> None:
        """Rename the checkpoints of later steps to `corrupt-step-N`.

        A run that resumes from `step` writes these checkpoints again.
        """
        for later in self.steps():
            if later > step:
                move_folder(self.step_dir(later), self.checkpoint_dir / f"corrupt-step-{later}")

    def load(self, step: int, remedy: str, *, is_verified: bool = False) -> Checkpoint:
        """Load the checkpoint of a step after verifying the digests of its files.

        Args:
            step: Step of the checkpoint.
            remedy: Suggestion in the error if the checkpoint is invalid.
            is_verified: Whether another rank has verified the digests.

        Raises:
            CorruptCheckpointError: A file is missing or has changed.
            UserError: The checkpoint has a different format version.
        """
        folder = self.step_dir(step)
        try:
            if not is_verified:
                verify_folder(folder)
        except UserError as error:
            raise CorruptCheckpointError(
                error.what, where=error.where, expected=error.expected, remedy=remedy
            ) from error
        state = _read_state(folder / STATE_FILE, remedy)
        weights = open_shards(folder, WEIGHTS_FILE)
        return Checkpoint(state, weights, open_shards(folder, OPTIMIZER_FILE))


def write_shards(
    folder: Path, content: Mapping[str, Mapping[str, Tensor]], process_group: ProcessGroup
) -> None:
    """Write tensors by name to each file of a checkpoint, or those of this rank."""
    for name, tensors in content.items():
        file = folder / _shard_name(name, process_group.rank, process_group.world_size)
        # One at a time: GPU memory may not suffice for fp32 copies of all tensors.
        with translate_os_errors(file):
            save_file({key: t.cpu() for key, t in tensors.items()}, file)


def _shard_name(name: str, rank: int, world_size: int) -> str:
    if world_size == 1:
        return name
    stem, _, extension = name.rpartition(".")
    return f"{stem}-{rank + 1:05}-of-{world_size:05}.{extension}"


def open_shards(folder: Path, name: str) -> LazyTensors:
    """Return the tensors of a file in a checkpoint, which are read on access.

    A sharded run writes one file per rank. The rows of a tensor are then concatenated. Scalars are
    equal in all files.

    Raises:
        UserError: A file is missing or corrupt.
    """
    paths = [folder / name]
    if not paths[0].is_file():
        paths = _list_shards(folder, name)
    files: dict[str, list[Any]] = {}
    for path in paths:
        try:
            file = open_tensors(path)
            for key in file.keys():  # noqa: SIM118
                files.setdefault(key, []).append(file)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"not readable as safetensors: {error}",
                where=str(path),
                expected="a file as training wrote it",
                remedy=f"delete {folder} to resume from the previous checkpoint",
            ) from error

    def read(key: str) -> Tensor:
        shards: list[Tensor] = [file.get_tensor(key) for file in files[key]]
        if len(shards) == 1 or shards[0].dim() == 0:
            return shards[0]
        return torch.cat(shards)

    return LazyTensors({key: partial(read, key) for key in files})


def _list_shards(folder: Path, name: str) -> list[Path]:
    """Return the files of a sharded run for a file name, in rank order.

    Raises:
        CorruptCheckpointError: A shard is missing.
    """
    stem, _, extension = name.rpartition(".")
    paths = sorted(folder.glob(f"{stem}-*-of-*.{extension}"))
    names = [path.name for path in paths]
    expected_names = [_shard_name(name, rank, len(names)) for rank in range(len(names))]
    if not names or names != expected_names:
        raise CorruptCheckpointError(
            f"contains {', '.join(names) or 'no shard'} of {name}",
            where=str(folder),
            expected=f"{name}, or all of its shards",
            remedy=f"delete {folder}, and start again with --resume",
        )
    return paths


def _read_state(path: Path, remedy: str) -> CheckpointState:
    expected = f"a state of format {FORMAT_VERSION}"
    content = read_bytes(path, expected=expected, remedy=remedy)
    try:
        return CheckpointState.model_validate_json(content)
    except ValidationError as error:
        problems = {}
        for problem in error.errors():
            location = ".".join(map(str, problem["loc"]))
            problems[location] = problem["msg"]
        name = next(iter(problems))
        if "format_version" in problems:
            # Another version explains all other problems.
            name = "format_version"
        raise UserError(
            f"{name or 'the file'}: {problems[name]}",
            where=str(path),
            expected=expected,
            remedy=f"continue with the finesight that wrote it, or {remedy}",
        ) from error


def check_resume_config(
    stored: Mapping[str, Any],
    current: Mapping[str, Any],
    where: Path,
    suggest: Callable[[Mapping[str, Any]], Remedy],
) -> None:
    """Verify that settings and fingerprints have not changed since a checkpoint was written.

    Args:
        stored: `resume_config` of the checkpoint.
        current: Configuration of the resumed run.
        where: Location for the error message.
        suggest: Function that returns the remedy if only settings of `train` differ, from their
            current values by name.

    Raises:
        UserError: Settings or fingerprints differ; the error lists them.
    """
    current = json.loads(json.dumps(current))
    problems = []
    expected = []
    changes = {}
    for name in {**stored, **current}:
        stored_value = stored.get(name)
        value = current.get(name)
        if stored_value != value:
            problems.append(f"{name} is {value!r} now")
            expected.append(f"{name}={stored_value!r}")
            changes[name] = value
    if not changes:
        return
    remedy: Remedy = "resume with the same recipe, data and model, or set another output_dir"
    if all(name.startswith("train.") for name in changes):
        remedy = suggest(changes)
    raise UserError(
        "; ".join(problems), where=str(where), expected="; ".join(expected), remedy=remedy
    )


MIN_SAVE_INTERVAL_S = 10.0
"""Minimum seconds between two checkpoints on a GPU, unless `train.save_every` is set.

Steps of a short run would wait for the disk, to protect seconds of work.
"""

MAX_ASYNC_PARAMS = 400_000_000
"""Maximum number of trainable parameters per rank for asynchronous checkpoints.

The CPU copy takes 12 bytes per parameter: the fp32 weight and two fp32 moments.
"""


@dataclass
class AsyncCheckpointer:
    """Writer of checkpoints in a background thread, one checkpoint at a time.

    An error of the thread is raised by the next call of `save` or `wait`.

    Attributes:
        min_interval_s: Seconds after the start or a checkpoint until `is_due` returns True.
    """

    checkpoint_manager: CheckpointManager
    is_async: bool
    process_group: ProcessGroup = SINGLE_PROCESS
    min_interval_s: float = 0.0
    _last_save_s: float = field(default_factory=time.perf_counter, init=False)
    _staging_block: TensorBlock | None = field(default=None, init=False)
    _write: Future[None] | None = field(default=None, init=False)

    def is_due(self) -> bool:
        """Return whether the minimum interval since the start or the last checkpoint has passed."""
        return time.perf_counter() - self._last_save_s >= self.min_interval_s

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
        self._last_save_s = time.perf_counter()
        is_written = (
            self.process_group.is_single_process and state.step in self.checkpoint_manager.steps()
        )
        if is_written or not self.is_async:
            self.checkpoint_manager.save(state, weights, optimizer_state, self.process_group)
            return
        weights, optimizer_state = self._copy_to_cpu((weights, optimizer_state))
        arguments = state, weights, optimizer_state, self.process_group
        pool = ThreadPoolExecutor(1)
        self._write = pool.submit(self.checkpoint_manager.save, *arguments)
        # The thread still writes this checkpoint, and ends afterwards.
        pool.shutdown(wait=False)

    def allocate(self, tensor_sets: Sequence[Mapping[str, Tensor]]) -> None:
        """Allocate the CPU buffer of asynchronous checkpoints of these tensors, unless it exists.

        It is in pinned memory if the system allows it, because copies from a GPU are then faster.
        Pinning takes as long as several steps.
        """
        if self.is_async and self._staging_block is None:
            # The tensors are read once, because some are computed on access.
            specs = _list_specs(tensor_sets)
            self._staging_block = TensorBlock.allocate(*specs, pin_memory=True)

    def _copy_to_cpu(self, tensor_sets: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Copy several mappings of tensors to the reusable CPU buffer; complete on return.

        All calls must pass the same names and shapes.
        """
        self.allocate(tensor_sets)
        assert self._staging_block is not None, "only asynchronous checkpoints have a buffer"
        buffers = self._staging_block.tensors()
        copies = []
        for tensors in tensor_sets:
            copied: dict[str, Tensor] = {}
            for name, tensor in tensors.items():
                copied[name] = next(buffers).copy_(tensor, non_blocking=True)
            copies.append(copied)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def wait(self) -> None:
        """Wait until the pending checkpoint is written; raise its error if writing failed."""
        write = self._write
        self._write = None
        if write is not None:
            write.result()


def _list_specs(
    tensor_sets: Sequence[Mapping[str, Tensor]],
) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtypes and shapes of the tensors of several mappings, in order."""
    specs = []
    for tensors in tensor_sets:
        for tensor in tensors.values():
            specs.append((tensor.dtype, tuple(tensor.shape)))
    return specs
