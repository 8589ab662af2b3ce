"""Asynchronous checkpoints: consistent snapshots, complete or absent."""

from __future__ import annotations

import errno
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor

from finesight.errors import UserError
from finesight.storage import FileSystem, use_file_system
from finesight.train.checkpoint import AsyncCheckpointer, CheckpointManager, CheckpointState
from finesight.train.oom import MemoryBudget


class BlockingDisk(FileSystem):
    """Makes no folder before it may."""

    def __init__(self) -> None:
        self.may, self.started = Event(), Event()

    def make_folder(self, path: Path) -> None:
        self.started.set()
        assert self.may.wait(20.0)
        super().make_folder(path)


class FullDisk(FileSystem):
    def create(self, path: Path) -> int:
        raise OSError(errno.ENOSPC, "full")

    def sync_path(self, path: Path) -> None:
        raise OSError(errno.ENOSPC, "full")


def state(step: int) -> CheckpointState:
    return CheckpointState(
        step=step,
        consumed_samples=8 * step,
        last_eval_step=-1,
        best=None,
        loss_scale={},
        budget=MemoryBudget(pack_tokens=100, activation_checkpointing=0.0),
        resume_config={},
    )


def make_tensors(value: float) -> dict[str, Tensor]:
    return {"layer.weight": torch.full((3, 4), value)}


def test_async_checkpoint_is_a_snapshot(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path / "checkpoints", max_to_keep=2)
    saving, disk = AsyncCheckpointer(checkpoints, is_async=True), BlockingDisk()
    values, moments = make_tensors(1.0), make_tensors(2.0)
    with use_file_system(disk):
        saving.save(state(1), values, moments)
    assert disk.started.wait(20.0)
    assert checkpoints.steps() == []
    values["layer.weight"].fill_(7.0)
    disk.may.set()
    saving.wait()
    found = checkpoints.load_latest(print)
    assert found[0].step == 1
    assert torch.equal(found[1]["layer.weight"], make_tensors(1.0)["layer.weight"])
    assert torch.equal(found[2]["layer.weight"], moments["layer.weight"])


def test_next_save_waits_for_previous(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, max_to_keep=2)
    saving = AsyncCheckpointer(checkpoints, is_async=True)
    for step in (1, 2, 3):
        saving.save(state(step), make_tensors(step), make_tensors(step))
        assert step - 1 in {0, *checkpoints.steps()}
    saving.wait()
    assert checkpoints.steps() == [2, 3]
    saving.save(state(3), make_tensors(9), make_tensors(9))
    found = checkpoints.load_latest(print)
    assert float(found[1]["layer.weight"][0, 0]) == 3.0


def test_write_error_is_raised_by_next_call(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path / "checkpoints", max_to_keep=2)
    saving = AsyncCheckpointer(checkpoints, is_async=True)
    with use_file_system(FullDisk()):
        saving.save(state(1), make_tensors(1.0), make_tensors(2.0))
    with pytest.raises(UserError, match="no space left"):
        saving.save(state(2), make_tensors(1.0), make_tensors(2.0))
    assert checkpoints.steps() == []
    # Said once: what follows is written.
    saving.save(state(2), make_tensors(1.0), make_tensors(2.0))
    saving.join()
    assert checkpoints.steps() == [2]


def test_synchronous_save(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, max_to_keep=2)
    AsyncCheckpointer(checkpoints, is_async=False).save(
        state(4), make_tensors(1.0), make_tensors(2.0)
    )
    assert checkpoints.steps() == [4]
