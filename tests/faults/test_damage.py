"""Checkpoints damaged on the disk, a bit or a file at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_run import Task, final_files, losses

from finesight.errors import UserError
from finesight.train.checkpoint import Checkpoints, State


def small(folder: Path) -> Checkpoints:
    """One checkpoint of a few numbers, in every file that a checkpoint has."""
    checkpoints = Checkpoints(folder, keep=2)
    state = State(step=3, samples=12, measured=0, best=None, loss_scale={"value": 1.0}, identity={})
    checkpoints.save(state, {"a": torch.arange(8.0)}, {"first.a": torch.ones(8)})
    return checkpoints


def flips(folder: Path) -> Iterator[tuple[Path, int]]:
    """Each bit of each file, flipped while it is yielded."""
    for file in sorted(folder.iterdir()):
        good = file.read_bytes()
        for bit in range(8 * len(good)):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bad)
            yield file, bit
        file.write_bytes(good)


def test_every_flipped_bit_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    """Breaks: a bit of any file, digests included. Survives: nothing is taken for whole that is
    not, and what is put back is whole."""
    checkpoints = small(tmp_path)
    undetected = []
    for file, bit in flips(tmp_path / "step-3"):
        try:
            checkpoints.read(3, "")
        except UserError:
            continue
        undetected.append((file.name, bit))
    assert undetected == []
    state, values, _ = checkpoints.read(3, "")
    assert (state.step, values["a"].tolist()) == (3, list(range(8)))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def unfinished(task: Task) -> Path:
    task.recipe["train"]["keep"] = 3
    return task.unfinished()


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
def test_a_damaged_checkpoint_leads_to_the_one_before(
    task: Task, name: str, spoil: Callable[[Path], None]
) -> None:
    """Breaks: the newest checkpoint. Survive: the run, from the one before, and its last bits; the
    damaged one is set aside, and the run says so."""
    run = unfinished(task)
    spoil(run / "checkpoints" / "step-4" / name)
    task.run(resume=True)
    assert "the checkpoint of step 4 is damaged: " in task.screen
    assert name in task.screen
    assert "going on from that of step 2" in task.screen
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *("damaged-step-4", "step-2", "step-4", "step-6"),
    ]
    task.run(name="whole")
    assert final_files(run) == final_files(task.folder / "whole")
    assert losses(run) == losses(task.folder / "whole")


def test_without_a_whole_checkpoint_nothing_is_touched(task: Task) -> None:
    """Breaks: every checkpoint. Survive: all files as they are; the error says what is wrong."""
    run = unfinished(task)
    for folder in (run / "checkpoints").iterdir():
        flip(folder / "trainable.safetensors")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"step-4[\s\S]*to start from the beginning"):
        task.run(resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
