"""Disks that are full: at every operation of a run, before it, and before a checkpoint."""

from pathlib import Path
from unittest.mock import patch

import pytest
from crash_disk import FailingDisk
from tiny_task import TinyTask, assert_same_run, write_recipe

from finesight.cli.app import run_command as command
from finesight.files import storage
from finesight.files.storage import verify_folder


class NearlyFullDisk(storage.FileSystem):
    """Disk whose reported free space shrinks after some requests."""

    def __init__(self, questions: int, then: int) -> None:
        self.questions, self.then = questions, then

    def free_bytes(self, path: Path) -> int:
        self.questions -= 1
        return 10**15 if self.questions >= 0 else self.then


def recipe(task: TinyTask, name: str) -> str:
    output = task.recipe | {"output_dir": str(task.folder / name)}
    return str(write_recipe(task.folder / f"{name}.yaml", output, save_every=1))


def steps(run: Path) -> list[str]:
    """Names of the checkpoints, each with every byte verified."""
    folders = sorted((run / "checkpoints").glob("step-*")) if run.is_dir() else []
    for folder in folders:
        verify_folder(folder)
    return [folder.name for folder in folders]


def test_disk_full_at_any_write(task, every_point, capsys):
    """Earlier checkpoints stay valid, and the run resumes. Takes long: each write is a run."""
    assert command(["train", recipe(task, "whole")]) == 0
    retained: list[int] = []
    for last in range(1, 1000, 4 if every_point else 29):
        path, run = recipe(task, f"run{last}"), task.folder / f"run{last}"
        with patch.object(storage, "file_system", FailingDisk(last)):
            code = command(["train", path])
        output = capsys.readouterr().err
        if code == 0:
            break
        assert code == 2, output
        assert "cannot be written: no space left on device" in output
        assert "remedy: free some space" in output
        retained.append(len(steps(run)))
        assert not [path for path in run.rglob(".*") if path.is_file()]
        assert command(["train", path, "--resume"]) == 0
        assert_same_run(run, task.folder / "whole")
    assert code == 0
    assert retained == sorted(retained)
    assert len({*retained}) > 2


@pytest.mark.parametrize(
    ("questions", "message", "checkpoints"),
    [(0, "0.0001 GB are free", []), (3, "a checkpoint of step 3", ["step-1", "step-2"])],
)
def test_missing_disk_space_is_detected_before_writing(
    task: TinyTask,
    capsys: pytest.CaptureFixture[str],
    questions: int,
    message: str,
    checkpoints: list[str],
) -> None:
    """Before the run no file is written; before a checkpoint the run can resume."""
    with patch.object(storage, "file_system", NearlyFullDisk(questions, then=100_000)):
        assert command(["train", recipe(task, "run")]) == 2
    assert message in capsys.readouterr().err
    assert steps(task.folder / "run") == checkpoints
    assert (task.folder / "run").exists() is bool(checkpoints)
    assert command(["train", recipe(task, "run"), "--resume"]) == 0
