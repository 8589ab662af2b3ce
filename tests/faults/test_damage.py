"""Corrupt checkpoints: flipped bits and missing files."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_task import TinyTask, assert_same_run

from finesight import storage
from finesight.errors import UserError
from finesight.train.checkpoint import CheckpointManager, CheckpointState
from finesight.train.oom import MemoryBudget


def write_small_checkpoint(folder: Path) -> CheckpointManager:
    """Write a checkpoint of small tensors."""
    checkpoints = CheckpointManager(folder, max_to_keep=2)
    state = CheckpointState(
        step=3,
        consumed_samples=12,
        last_eval_step=0,
        best=None,
        loss_scale={"scale": 1.0},
        budget=MemoryBudget(pack_tokens=100, activation_checkpointing=0.0),
        resume_config={},
    )
    checkpoints.save(state, {"a": torch.arange(8.0)}, {"exp_avg.a": torch.ones(8)})
    return checkpoints


def iter_bit_flips(folder: Path) -> Iterator[tuple[Path, int]]:
    """Flip each bit of each file while yielding it."""
    for file in sorted(folder.iterdir()):
        good = file.read_bytes()
        for bit in range(8 * len(good)):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bad)
            yield file, bit
        file.write_bytes(good)


def test_every_bit_flip_in_checkpoint_is_detected(tmp_path: Path) -> None:
    """Flip each bit of each file, including digests; loading must fail, and succeed after restoring
    it."""
    checkpoints = write_small_checkpoint(tmp_path)
    undetected = []
    for file, bit in iter_bit_flips(tmp_path / "step-3"):
        try:
            checkpoints.load(3, "")
        except UserError:
            continue
        undetected.append((file.name, bit))
    assert undetected == []
    state, values, _ = checkpoints.load(3, "")
    assert (state.step, values["a"].tolist()) == (3, list(range(8)))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    task = TinyTask(tmp_path_factory.mktemp("damage") / "task")
    task.recipe["train"]["keep_checkpoints"] = 3
    task.run()
    (task.folder / "run").rename(task.folder / "whole")
    return task


@pytest.fixture
def unfinished(finished: TinyTask) -> Path:
    """Run that was interrupted after the checkpoint of step 4."""
    run = finished.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(finished.folder / "whole", run)
    (run / "result.json").unlink()
    storage.remove_folder(run / "checkpoints" / "step-6")
    return run


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("trainable.safetensors", flip),
        ("optimizer.safetensors", truncate),
        ("state.json", flip),
        ("sha256.json", Path.unlink),
        ("optimizer.safetensors", Path.unlink),
    ],
)
def test_damaged_checkpoint_falls_back_to_previous(finished, unfinished, name, spoil):
    """Corrupt the newest checkpoint; the run resumes from the previous one with the same result."""
    task, run = finished, unfinished
    spoil(run / "checkpoints" / "step-4" / name)
    task.run(resume=True)
    assert "the checkpoint of step 4 is corrupt: " in task.console_output
    assert name in task.console_output
    assert "resuming from step 2" in task.console_output
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *("corrupt-step-4", "step-2", "step-4", "step-6")
    ]
    assert_same_run(run, task.folder / "whole")


def test_no_files_change_without_valid_checkpoint(finished: TinyTask, unfinished: Path) -> None:
    """Corrupt every checkpoint; the run fails with an error, and all files remain unchanged."""
    run = unfinished
    for folder in (run / "checkpoints").iterdir():
        flip(folder / "trainable.safetensors")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"step-4[\s\S]*to restart the run from step 0"):
        finished.run(resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
