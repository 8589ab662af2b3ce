"""Killed before each of its file operations, and the power gone at each, whatever writes: what is
left is what was there before, or all of the new, and the same command then comes to its end.

In the manner of SQLite's crash tests: a child dies before its first operation, another one before
its second, until one gets through.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from dying_disk import in_dying_child
from PIL import Image
from small_run import Task

from finesight.cli.app import run as command
from finesight.data.jsonl import read_samples
from finesight.digests import DIGESTS, verify_folder
from finesight.evaluate.saved import read_answers
from finesight.train.checkpoint import Checkpoints, State
from finesight.train.run import Run

MOST = 400
"""Operations of an action that comes to its end."""

Act = Callable[[Path], None]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A child that is forked has no other threads to wait for."""
    torch.set_num_threads(1)


@pytest.fixture(params=["process", "power"])
def crash(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Task:
    task = Task(tmp_path_factory.mktemp("finished"))
    task.run(tune={"language": "lora", "lora": {"rank": 2}}, eval={"metric": "ocr"})
    return task


def everywhere(
    home: Path, crash: str, every: bool, begin: Act, act: Act, legal: Act, whole: Act
) -> int:
    """Let `act` die at every operation, or at every ninth, of a store that `begin` has made: then
    the store is `legal`, and once the act was done again, `whole`, with nothing left lying. Gives
    the number of operations."""
    for last in count(1, 1 if every else 9):
        assert last < MOST, "never came to its end"
        store = home / str(last)
        store.mkdir(parents=True)
        begin(store)
        done = in_dying_child(last, act, store, crash)
        legal(store)
        if done:
            whole(store)
            return last
        assert in_dying_child(MOST, act, store, "process")
        whole(store)
        hidden = [path for path in store.rglob(".*") if path.name.endswith(".partial")]
        assert not hidden, f"left over after operation {last}"
    raise AssertionError("unreachable")


def nothing(store: Path) -> None:
    """Begin with an empty folder."""


def told(*words: object) -> None:
    """Carry out a command, which may find its work done already."""
    command([str(word) for word in words])


def legal_folder(store: Path) -> None:
    """It is not there, or every byte is."""
    if (store / "out").exists():
        verify_folder(store / "out")


def whole_folder(names: set[str]) -> Act:
    def check(store: Path) -> None:
        verify_folder(store / "out")
        listed: Mapping[str, Any] = json.loads((store / "out" / DIGESTS).read_text())
        assert names <= listed.keys()

    return check


def test_a_crash_while_a_checkpoint_is_written(tmp_path: Path, crash: str, every: bool) -> None:
    """Breaks: writing step 2 and deleting step 1. Survives: one of them, with every byte."""

    def save(store: Path, step: int) -> None:
        state = State(step=step, samples=step, measured=0, best=None, loss_scale={}, identity={})
        Checkpoints(store, keep=1).save(
            state, {"a": torch.full((9,), float(step))}, {"first.a": torch.ones(9)}
        )

    def newest(store: Path) -> int:
        found = Checkpoints(store, keep=1).newest(pytest.fail)
        assert found is not None
        assert found[1]["a"].tolist() == [found[0].step] * 9
        return found[0].step

    seen: list[int] = []

    def again(store: Path) -> None:
        # As a run does that goes on.
        newest(store)
        save(store, 2)

    def whole(store: Path) -> None:
        assert newest(store) == 2

    operations = everywhere(
        *(tmp_path, crash, every),
        begin=lambda store: save(store, 1),
        act=again,
        legal=lambda store: seen.append(newest(store)),
        whole=whole,
    )
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}
    assert operations > 10


def test_a_crash_while_metrics_are_noted(tmp_path: Path, crash: str, every: bool) -> None:
    """Breaks: noting steps. Survive: those noted before the last flush, and no torn line is read;
    a run that goes on cuts off what comes again."""

    def begin(store: Path) -> None:
        run = Run(store)
        for step in (1, 2):
            run.note({"step": step, "loss": 1.0})
        run.flush()

    def act(store: Path) -> None:
        run = Run(store)
        run.forget_after(2, -1)
        for step in (3, 4):
            run.note({"step": step, "loss": 1.0})
        run.flush()

    def steps(store: Path) -> list[int]:
        return [line["step"] for line in Run(store).history()]

    def legal(store: Path) -> None:
        assert steps(store) == [1, 2, 3, 4][: len(steps(store))]
        assert len(steps(store)) >= 2

    def whole(store: Path) -> None:
        assert steps(store) == [1, 2, 3, 4]

    assert everywhere(tmp_path, crash, every, begin, act, legal, whole) > 5


def test_a_crash_while_predictions_are_written(
    finished: Task, tmp_path: Path, crash: str, every: bool
) -> None:
    """Breaks: writing answers over those of an earlier evaluation. Survive: the old ones or the new
    ones, in every line."""
    before = (finished.folder / "run" / "predictions" / "before.jsonl").read_bytes()

    def act(store: Path) -> None:
        told("eval", finished.folder / "run", "--out", store / "answers.jsonl", "--limit", 2)

    def legal(store: Path) -> None:
        path = store / "answers.jsonl"
        assert path.read_bytes() == before or len(read_answers(path)) == 2

    def whole(store: Path) -> None:
        assert len(read_answers(store / "answers.jsonl")) == 2

    def begin(store: Path) -> None:
        (store / "answers.jsonl").write_bytes(before)

    everywhere(tmp_path, crash, every, begin, act, legal, whole)


def test_a_crash_while_an_adapter_is_merged(
    finished: Task, tmp_path: Path, crash: str, every: bool
) -> None:
    """Breaks: a merge. Survive: no folder, or a whole model; the run is not touched."""
    files = {path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()}

    def act(store: Path) -> None:
        told("merge", finished.folder / "run", store / "out")

    whole = whole_folder({"model.safetensors", "config.json", "manifest.json"})
    everywhere(tmp_path, crash, every, nothing, act, legal_folder, whole)
    assert {path: path.read_bytes() for path in files} == files


def test_a_crash_while_data_are_exported(
    finished: Task, tmp_path: Path, crash: str, every: bool
) -> None:
    """Breaks: an export with its pictures. Survive: no folder, or a whole one."""

    def act(store: Path) -> None:
        data = finished.folder / "train.jsonl"
        told("data", "export", data, store / "out", "--to", "llava", "--copy-pictures")

    everywhere(tmp_path, crash, every, nothing, act, legal_folder, whole_folder(set()))


def test_a_crash_while_data_are_imported(tmp_path: Path, crash: str, every: bool) -> None:
    """Breaks: an import. Survive: the source, and no folder, or one with every sample."""

    def begin(store: Path) -> None:
        with (store / "labels.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "text"])
            for number in range(4):
                Image.new("RGB", (28, 28), (number, 0, 0)).save(store / f"{number}.png")
                rows.writerow([f"{number}.png", f"It says {number}."])

    def act(store: Path) -> None:
        maps = ["--map", "image=path", "--map", "answer=text", "--prompt", "What does it say?"]
        told("data", "import", store / "labels.csv", store / "out", *maps)

    def whole(store: Path) -> None:
        verify_folder(store / "out")
        assert len(read_samples(store / "out" / "data.jsonl")) == 4

    everywhere(tmp_path, crash, every, begin, act, legal_folder, whole)
