"""Images that become corrupt or vanish during a run."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from nonfinite_step import before_steps
from tiny_task import TinyTask

from finesight.errors import UserError

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
