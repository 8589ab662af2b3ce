"""Checkpoints written while a run goes on: what was there at the time, whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor

from finesight.errors import UserError
from finesight.storage import Disk, using
from finesight.train.checkpoint import Checkpoints, State
from finesight.train.saving import Saving


class Held(Disk):
    """Makes no folder before it may."""

    def __init__(self) -> None:
        self.may, self.asked = Event(), Event()

    def make_folder(self, path: Path) -> None:
        self.asked.set()
        assert self.may.wait(20.0)
        super().make_folder(path)


class Full(Disk):
    def create(self, path: Path) -> int:
        raise OSError(errno.ENOSPC, "full")

    def sync_path(self, path: Path) -> None:
        raise OSError(errno.ENOSPC, "full")


def state(step: int) -> State:
    return State(step=step, samples=8 * step, measured=-1, best=None, loss_scale={}, identity={})


def numbers(value: float) -> dict[str, Tensor]:
    return {"layer.weight": torch.full((3, 4), value)}


def test_what_changes_while_it_is_written_is_not_in_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    saving, disk = Saving(checkpoints, meanwhile=True), Held()
    values, moments = numbers(1.0), numbers(2.0)
    with using(disk):
        saving.save(state(1), values, moments)
    assert disk.asked.wait(20.0)
    assert checkpoints.steps() == []
    values["layer.weight"].fill_(7.0)
    disk.may.set()
    saving.wait()
    found = checkpoints.newest(print)
    assert found is not None
    assert found[0].step == 1
    assert torch.equal(found[1]["layer.weight"], numbers(1.0)["layer.weight"])
    assert torch.equal(found[2]["layer.weight"], moments["layer.weight"])


def test_the_next_one_waits_for_the_last(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    saving = Saving(checkpoints, meanwhile=True)
    for step in (1, 2, 3):
        saving.save(state(step), numbers(step), numbers(step))
        assert step - 1 in {0, *checkpoints.steps()}
    saving.wait()
    assert checkpoints.steps() == [2, 3]
    saving.save(state(3), numbers(9), numbers(9))
    found = checkpoints.newest(print)
    assert found is not None
    assert float(found[1]["layer.weight"][0, 0]) == 3.0


def test_what_goes_wrong_is_said_by_the_next_call(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    saving = Saving(checkpoints, meanwhile=True)
    with using(Full()):
        saving.save(state(1), numbers(1.0), numbers(2.0))
    with pytest.raises(UserError, match="no space left"):
        saving.save(state(2), numbers(1.0), numbers(2.0))
    assert checkpoints.steps() == []
    # Said once: what follows is written.
    saving.save(state(2), numbers(1.0), numbers(2.0))
    saving.end()
    assert checkpoints.steps() == [2]


def test_at_once_where_nothing_goes_on_meanwhile(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    Saving(checkpoints, meanwhile=False).save(state(4), numbers(1.0), numbers(2.0))
    assert checkpoints.steps() == [4]
