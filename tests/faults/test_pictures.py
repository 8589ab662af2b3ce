"""Pictures that break or vanish while a run learns from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_run import Task

from finesight.errors import UserError
from finesight.train import loop
from finesight.train.loader import Step
from finesight.train.prepare import Session
from finesight.train.step import Taken

SETTINGS = ("train.cache=never", "train.epochs=4", "train.save_every=1")


@contextmanager
def before_step(number: int, happens: Callable[[], object]) -> Iterator[None]:
    """Within the block it happens while a run is at its step of this number, counted from 1."""
    real = loop.take_step

    def taking(session: Session, step: Step, *rest: Any) -> Taken:
        if step.number + 1 == number:
            happens()
        return real(session, step, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "take_step", taking)
        yield


def test_a_picture_that_breaks_on_the_way_is_skipped_and_counted(task: Task) -> None:
    """Breaks: a picture that was whole when the run began. Survive: every other sample of its
    steps, and every step; it is said, counted and listed."""
    broken = task.folder / "train5.png"
    whole = broken.read_bytes()
    with before_step(2, lambda: broken.write_bytes(whole[:-30])):
        result = task.run(*SETTINGS)
    lines = [line for line in task.history() if "loss" in line]
    dropped = [line["step"] for line in lines if line["dropped"] == ["train5"]]
    assert len(dropped) >= 2
    assert min(dropped) > 2
    assert result.dropped == len(dropped)
    assert "dropped train5" in task.screen
    assert [line["samples"] for line in lines if line["step"] in dropped] == [3] * len(dropped)
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert result.steps == len(lines) == 11


def test_a_folder_of_pictures_that_vanishes_ends_the_run(task: Task) -> None:
    """Breaks: the disk with all pictures. Survive: the steps before; the error says how many are
    gone and what to do; with the pictures back the run goes on to its end."""
    pictures: dict[Path, bytes] = {}

    def vanish() -> None:
        for path in task.folder.glob("train*.png"):
            pictures[path] = path.read_bytes()
            path.unlink()

    with (
        before_step(4, vanish),
        pytest.raises(UserError, match="of 11 samples have pictures that cannot be decoded") as one,
    ):
        task.run(*SETTINGS)
    assert "--resume" in one.value.remedy
    assert len(pictures) == 11
    lines = [line for line in task.history() if "loss" in line]
    assert [line["loss"] is None for line in lines] == [line["samples"] == 0 for line in lines]
    assert lines[-1]["step"] < 11
    for path, content in pictures.items():
        path.write_bytes(content)
    assert task.run(*SETTINGS, resume=True).steps == 11
    again = [line for line in task.history() if "loss" in line]
    assert [line["step"] for line in again] == [*range(1, 12)]
    assert again[-1]["samples"] == 4
    assert not again[-1]["dropped"]
