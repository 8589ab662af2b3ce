"""Disks that are full: at every operation of a run, before it, and before a checkpoint."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from small_run import Task, final_files, losses, write_recipe

from finesight import storage
from finesight.cli.app import run as command
from finesight.digests import verify_folder


class FullDisk(storage.Disk):
    """Full from its operation number `last` on: nothing can be made or written any more, what is
    there can be removed."""

    def __init__(self, last: int) -> None:
        self.left = last

    def _take(self) -> None:
        self.left -= 1
        if self.left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    def make_folder(self, path: Path) -> None:
        self._take()
        super().make_folder(path)

    def create(self, path: Path) -> int:
        self._take()
        return super().create(path)

    def open_to_append(self, path: Path) -> int:
        self._take()
        return super().open_to_append(path)

    def write(self, file: int, data: memoryview) -> int:
        if self.left == 1:
            super().write(file, data[: len(data) // 2])
        self._take()
        return super().write(file, data)

    def sync(self, file: int) -> None:
        self._take()
        super().sync(file)

    def sync_path(self, path: Path) -> None:
        self._take()
        super().sync_path(path)


class SmallDisk(storage.Disk):
    """Says that so many bytes are free: more than enough at first, `then` after some questions."""

    def __init__(self, questions: int, then: int) -> None:
        self.questions, self.then = questions, then

    def free(self, path: Path) -> int:
        self.questions -= 1
        return 10**15 if self.questions >= 0 else self.then


def recipe(task: Task, name: str) -> str:
    output = task.recipe | {"output": str(task.folder / name)}
    return str(write_recipe(task.folder / f"{name}.yaml", output, save_every=1))


def steps(run: Path) -> list[str]:
    """Names of the checkpoints, each with every byte verified."""
    folders = sorted((run / "checkpoints").glob("step-*")) if run.is_dir() else []
    for folder in folders:
        verify_folder(folder)
    return [folder.name for folder in folders]


def test_a_disk_that_fills_up_at_any_write(
    task: Task, every: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks: every write from one on. Survive: the checkpoints before it, whole; the error names
    the file and what to do, exit code 2; with room again the run ends with the same bits."""
    assert command(["train", recipe(task, "whole")]) == 0
    kept: list[int] = []
    for last in range(1, 1000, 4 if every else 29):
        path, run = recipe(task, f"run{last}"), task.folder / f"run{last}"
        with storage.using(FullDisk(last)):
            code = command(["train", path])
        said = capsys.readouterr().err
        if code == 0:
            break
        assert code == 2, said
        assert "cannot be written: no space left on device" in said
        assert "remedy: free some space" in said
        kept.append(len(steps(run)))
        assert not [path for path in run.rglob(".*") if path.is_file()]
        assert command(["train", path, "--resume"]) == 0
        assert final_files(run) == final_files(task.folder / "whole")
        assert losses(run) == losses(task.folder / "whole")
    assert code == 0
    assert kept == sorted(kept)
    assert len({*kept}) > 2


def test_a_run_without_room_is_refused_before_it_begins(
    task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks: the disk is nearly full. Survives: everything: no file is written."""
    with storage.using(SmallDisk(0, then=100_000)):
        assert command(["train", recipe(task, "run")]) == 2
    assert "0.0001 GB are free" in capsys.readouterr().err
    assert not (task.folder / "run").exists()


def test_a_checkpoint_without_room_is_refused_before_it_is_written(
    task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks: the disk fills up before the third checkpoint. Survive: the two before; with room
    again the run goes on from there."""
    with storage.using(SmallDisk(3, then=100_000)):
        assert command(["train", recipe(task, "run")]) == 2
    assert "a checkpoint of step 3" in capsys.readouterr().err
    assert steps(task.folder / "run") == ["step-1", "step-2"]
    assert command(["train", recipe(task, "run"), "--resume"]) == 0
