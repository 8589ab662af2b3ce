"""Crashes and power loss at every file operation of each writer.

The old or the complete new state must remain, and repeating the command must succeed. As in the
crash
tests of SQLite, a child crashes before its first operation, the next child before the second, until
one completes.
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
from crash_disk import run_in_crashing_child
from PIL import Image
from tiny_task import TinyTask

from finesight.cli.app import run_command as command
from finesight.data.sample import read_samples
from finesight.evaluate.metric_difference import read_predictions
from finesight.storage import DIGESTS_FILE, verify_folder
from finesight.train.checkpoint import CheckpointManager, CheckpointState
from finesight.train.oom import MemoryBudget
from finesight.train.run_dir import RunDir

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
def finished(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    task = TinyTask(tmp_path_factory.mktemp("finished"))
    task.run(tune={"language": "lora", "lora": {"rank": 2}}, eval={"metric": "ocr"})
    return task


def crash_at_every_operation(
    home: Path, crash: str, every: bool, begin: Act, act: Act, legal: Act, full: Act
) -> int:
    """Crash an action at every operation, or at every ninth, and check the store after each crash.

    Returns:
        The number of operations.
    """
    for last in count(1, 1 if every else 9):
        assert last < MOST, "never came to its end"
        store = home / str(last)
        store.mkdir(parents=True)
        begin(store)
        done = run_in_crashing_child(last, act, store, crash)
        legal(store)
        if done:
            full(store)
            return last
        assert run_in_crashing_child(MOST, act, store, "process")
        full(store)
        hidden = [path for path in store.rglob(".*") if path.name.endswith(".partial")]
        assert not hidden, f"left over after operation {last}"
    raise AssertionError("unreachable")


def create_empty_folder(store: Path) -> None:
    """Begin with an empty folder."""


def run_finesight(*words: object) -> None:
    """Carry out a command, which may find its work done already."""
    command([str(word) for word in words])


def is_valid_folder(store: Path) -> None:
    """It is not there, or every byte is."""
    if (store / "out").exists():
        verify_folder(store / "out")


def is_complete_folder(names: set[str]) -> Act:
    def check(store: Path) -> None:
        verify_folder(store / "out")
        listed: Mapping[str, Any] = json.loads((store / "out" / DIGESTS_FILE).read_text())
        assert names <= listed.keys()

    return check


def test_crash_while_writing_checkpoint(tmp_path: Path, crash: str, every_point: bool) -> None:
    """Breaks: writing step 2 and deleting step 1. Survives: one of them, with every byte."""

    def save(store: Path, step: int) -> None:
        state = CheckpointState(
            step=step,
            consumed_samples=step,
            last_eval_step=0,
            best=None,
            loss_scale={},
            budget=MemoryBudget(pack_tokens=100, activation_checkpointing=0.0),
            resume_config={},
        )
        CheckpointManager(store, max_to_keep=1).save(
            state, {"a": torch.full((9,), float(step))}, {"exp_avg.a": torch.ones(9)}
        )

    def newest(store: Path) -> int:
        found = CheckpointManager(store, max_to_keep=1).load_latest(pytest.fail)
        assert found[1]["a"].tolist() == [found[0].step] * 9
        return found[0].step

    seen: list[int] = []

    def again(store: Path) -> None:
        # As a resumed run does.
        newest(store)
        save(store, 2)

    def check_complete(store: Path) -> None:
        assert newest(store) == 2

    operations = crash_at_every_operation(
        *(tmp_path, crash, every_point),
        begin=lambda store: save(store, 1),
        act=again,
        legal=lambda store: seen.append(newest(store)),
        full=check_complete,
    )
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}
    assert operations > 10


def test_crash_while_writing_metrics(tmp_path: Path, crash: str, every_point: bool) -> None:
    """Inject a crash while metrics are written; flushed lines survive without partial lines."""

    def begin(store: Path) -> None:
        run = RunDir(store)
        for step in (1, 2):
            run.append_metrics({"step": step, "loss": 1.0})
        run.flush()

    def act(store: Path) -> None:
        run = RunDir(store)
        run.truncate_metrics(2, -1)
        for step in (3, 4):
            run.append_metrics({"step": step, "loss": 1.0})
        run.flush()

    def steps(store: Path) -> list[int]:
        return [line["step"] for line in RunDir(store).read_metrics()]

    def legal(store: Path) -> None:
        assert steps(store) == [1, 2, 3, 4][: len(steps(store))]
        assert len(steps(store)) >= 2

    def check_complete(store: Path) -> None:
        assert steps(store) == [1, 2, 3, 4]

    assert (
        crash_at_every_operation(tmp_path, crash, every_point, begin, act, legal, check_complete)
        > 5
    )


def test_crash_while_writing_predictions(
    finished: TinyTask, tmp_path: Path, crash: str, every_point: bool
) -> None:
    """Breaks: writing answers over those of an earlier evaluation. Survive: the old ones or the new
    ones, in every line."""
    before = (finished.folder / "run" / "predictions" / "before.jsonl").read_bytes()

    def act(store: Path) -> None:
        run_finesight(
            "eval", finished.folder / "run", "--out", store / "answers.jsonl", "--limit", 2
        )

    def legal(store: Path) -> None:
        path = store / "answers.jsonl"
        assert path.read_bytes() == before or len(read_predictions(path)) == 2

    def check_complete(store: Path) -> None:
        assert len(read_predictions(store / "answers.jsonl")) == 2

    def begin(store: Path) -> None:
        (store / "answers.jsonl").write_bytes(before)

    crash_at_every_operation(tmp_path, crash, every_point, begin, act, legal, check_complete)


def test_crash_while_merging_adapter(
    finished: TinyTask, tmp_path: Path, crash: str, every_point: bool
) -> None:
    """Inject a crash during a merge; the result is absent or complete, and the run unchanged."""
    files = {path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()}

    def act(store: Path) -> None:
        run_finesight("merge", finished.folder / "run", store / "out")

    full = is_complete_folder({"model.safetensors", "config.json", "manifest.json"})
    crash_at_every_operation(
        tmp_path, crash, every_point, create_empty_folder, act, is_valid_folder, full
    )
    assert {path: path.read_bytes() for path in files} == files


def test_crash_while_exporting_data(
    finished: TinyTask, tmp_path: Path, crash: str, every_point: bool
) -> None:
    """Inject a crash during an export; the result is absent or complete."""

    def act(store: Path) -> None:
        data = finished.folder / "train.jsonl"
        run_finesight("data", "export", data, store / "out", "--to", "llava", "--copy-images")

    crash_at_every_operation(
        tmp_path,
        crash,
        every_point,
        create_empty_folder,
        act,
        is_valid_folder,
        is_complete_folder(set()),
    )


def test_crash_while_importing_data(tmp_path: Path, crash: str, every_point: bool) -> None:
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
        run_finesight("import", store / "labels.csv", store / "out", *maps)

    def check_complete(store: Path) -> None:
        verify_folder(store / "out")
        assert len(read_samples(store / "out" / "data.jsonl")) == 4

    crash_at_every_operation(
        tmp_path, crash, every_point, begin, act, is_valid_folder, check_complete
    )
