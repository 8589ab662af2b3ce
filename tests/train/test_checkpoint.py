"""Checkpoints of other versions, and snapshots that are written asynchronously."""

import errno
import json
from pathlib import Path
from threading import Event
from unittest.mock import patch

import pytest
import torch
from tiny_task import make_checkpoint_state as make_state
from torch import Tensor

from finesight.errors import UserError
from finesight.files import storage
from finesight.train.checkpoint import (
    OPTIMIZER_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    AsyncCheckpointer,
    CheckpointManager,
)


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path / "checkpoints", max_to_keep=2)


def make_tensors(value: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    flat_E = torch.arange(256.0) + value
    weights = {"a": flat_E[:100].view(10, 10), "b": flat_E[128:200]}
    return weights, {"num_steps": torch.tensor(float(value))}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 1, "step": None}, "format_version: Input should be 2"),
        ({"extra": 1}, "extra"),
        ({"step": "x"}, "step"),
        ({"step": None}, "step: Field required"),
        ({"last_eval_step": None}, "last_eval_step: Field required"),
    ],
)
def test_state_of_other_version_is_rejected(checkpoints, change, words):
    checkpoints.save(make_state(5), *make_tensors(5))
    folder = checkpoints.checkpoint_dir / "step-5"
    files = {name: (folder / name).read_bytes() for name in (WEIGHTS_FILE, OPTIMIZER_FILE)}
    stored = json.loads((folder / STATE_FILE).read_text()) | change
    for name in (name for name, value in change.items() if value is None):
        del stored[name]
    files[STATE_FILE] = json.dumps(stored).encode()
    storage.remove_folder(folder)
    with storage.write_folder(folder) as new:
        for name, data in files.items():
            (new / name).write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        checkpoints.load_latest(print)
    assert str(folder / STATE_FILE) in str(caught.value)


class BlockingDisk(storage.FileSystem):
    """Makes no folder before it may."""

    def __init__(self) -> None:
        self.may, self.started = Event(), Event()

    def make_folder(self, path: Path) -> None:
        self.started.set()
        assert self.may.wait(20.0)
        super().make_folder(path)


class FullDisk(storage.FileSystem):
    def create(self, path: Path) -> int:
        raise OSError(errno.ENOSPC, "full")

    def sync_path(self, path: Path) -> None:
        raise OSError(errno.ENOSPC, "full")


def test_async_checkpoint_is_a_snapshot(checkpoints):
    saving, disk = AsyncCheckpointer(checkpoints, is_async=True), BlockingDisk()
    weights, moments = make_tensors(1)
    with patch.object(storage, "file_system", disk):
        saving.save(make_state(1), weights, moments)
        assert disk.started.wait(20.0)
        assert checkpoints.steps() == []
        weights["a"].fill_(7.0)
        disk.may.set()
        saving.wait()
    state, loaded_weights, loaded_moments = checkpoints.load_latest(print)
    assert state == make_state(1)
    expected, expected_moments = make_tensors(1)
    assert loaded_moments == expected_moments
    assert all(torch.equal(dict(loaded_weights)[name], one) for name, one in expected.items())


@pytest.mark.parametrize("is_async", [True, False])
def test_next_save_waits_for_previous(checkpoints, is_async):
    saving = AsyncCheckpointer(checkpoints, is_async=is_async)
    for step in (1, 2, 3):
        saving.save(make_state(step), *make_tensors(step))
        assert (step - is_async) in {0, *checkpoints.steps()}
    saving.wait()
    assert checkpoints.steps() == [2, 3]


def test_write_error_is_raised_by_next_call(checkpoints):
    saving = AsyncCheckpointer(checkpoints, is_async=True)
    with patch.object(storage, "file_system", FullDisk()):
        saving.save(make_state(1), *make_tensors(1))
        with pytest.raises(UserError, match="no space left"):
            saving.save(make_state(2), *make_tensors(2))
    assert checkpoints.steps() == []
    # The error is raised once: the next checkpoint is written.
    saving.save(make_state(2), *make_tensors(2))
    saving.wait()
    assert checkpoints.steps() == [2]
