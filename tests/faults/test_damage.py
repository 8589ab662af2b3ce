"""Corrupt checkpoints, with flipped bits and missing files, and images that vanish in a run."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nonfinite_step import before_steps
from tiny_task import TinyTask, assert_same_run, make_checkpoint_state

from finesight.errors import UserError
from finesight.files import storage
from finesight.train.checkpoint import CheckpointManager


def write_small_checkpoint(folder: Path) -> CheckpointManager:
    """Write a checkpoint of small tensors."""
    checkpoints = CheckpointManager(folder, max_to_keep=2)
    values, moments = {"a": torch.arange(8.0)}, {"exp_avg.a": torch.ones(8)}
    checkpoints.save(make_checkpoint_state(3), values, moments)
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


SETTINGS = ("train.vision_cache=never", "train.epochs=4", "train.save_every=1")


def read_skipped_samples(task: TinyTask) -> list[dict[str, Any]]:
    text = (task.folder / "run" / "skipped_samples.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_image_corrupted_during_run_is_skipped_and_counted(task: TinyTask) -> None:
    """Corrupt an image after the start; only its sample is skipped, and reported."""
    broken = task.folder / "train5.png"
    full = broken.read_bytes()
    with before_steps([2], lambda: broken.write_bytes(full[:-30])):
        result = task.run(*SETTINGS)
    lines = [line for line in task.read_metrics() if "loss" in line]
    skipped = [line["step"] for line in lines if line["skipped_samples"] == ["train5"]]
    assert len(skipped) >= 2
    assert min(skipped) > 2
    assert result.skipped_samples == len(skipped)
    (recorded,) = read_skipped_samples(task)
    assert (recorded["id"], recorded["step"]) == ("train5", min(skipped))
    assert f"skipped train5: {recorded['reason']}" in task.console_output
    assert [line["num_samples"] for line in lines if line["step"] in skipped] == [3] * len(skipped)
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert result.steps == len(lines) == 11


def test_vanished_image_folder_ends_the_run(task: TinyTask) -> None:
    """Remove all images; the run ends with an error, and resumes after restoring them."""
    images: dict[Path, bytes] = {}

    def vanish() -> None:
        for path in task.folder.glob("train*.png"):
            images[path] = path.read_bytes()
            path.unlink()

    with (
        before_steps([4], vanish),
        pytest.raises(UserError, match="of 11 samples have corrupt images") as one,
    ):
        task.run(*SETTINGS)
    assert "--resume" in str(one.value.remedy)
    assert len(images) == 11
    logged = re.findall(r"^skipped (\w+): ", task.console_output, re.M)
    assert len(logged) > len({*logged})
    assert [line["id"] for line in read_skipped_samples(task)] == [*dict.fromkeys(logged)]
    lines = [line for line in task.read_metrics() if "loss" in line]
    assert [line["loss"] is None for line in lines] == [line["num_samples"] == 0 for line in lines]
    assert lines[-1]["step"] < 11
    for path, content in images.items():
        path.write_bytes(content)
    assert task.run(*SETTINGS, resume=True).steps == 11
    again = [line for line in task.read_metrics() if "loss" in line]
    assert [line["step"] for line in again] == [*range(1, 12)]
    assert again[-1]["num_samples"] == 4
    assert not again[-1]["skipped_samples"]
    # Those of the repeated steps are no longer skipped.
    skipped = {name for line in again for name in line["skipped_samples"]}
    assert {line["id"] for line in read_skipped_samples(task)} == skipped
