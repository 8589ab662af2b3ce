"""Crashes and power loss at every file operation of each writer.

The old or the complete new state must remain, and repeating the command must succeed. As in the
crash tests of SQLite, a child crashes before its first operation, the next child before the second,
until one completes.
"""

import csv
import json
from collections.abc import Callable, Collection
from itertools import count
from pathlib import Path

import pytest
import torch
from crash_disk import run_in_crashing_child
from PIL import Image
from tiny_task import TinyTask, make_checkpoint_state

from finesight.cli.app import run_command
from finesight.evaluate.prediction_file import read_predictions
from finesight.files.storage import DIGESTS_FILE, verify_folder
from finesight.samples.sample import read_samples
from finesight.train.checkpoint import CheckpointManager
from finesight.train.run_dir import RunDir

MOST = 400
"""Operations of an action that comes to its end."""

Action = Callable[[Path], object]
CrashTest = Callable[[Action, Action, Action, Action], int]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    task = TinyTask(tmp_path_factory.mktemp("finished"))
    task.run(tune={"language": "lora", "lora": {"rank": 2}}, eval={"metric": "ocr"})
    return task.folder


@pytest.fixture(params=["process", "power"])
def crash(request: pytest.FixtureRequest, tmp_path: Path, every_point: bool) -> CrashTest:
    """Crash an action at every operation, or at every ninth.

    The function takes the actions that begin a store, change it, and check it after each crash and
    at the end. It returns the number of operations.
    """
    torch.set_num_threads(1)  # a child that is forked has no other threads to wait for

    def crash_at_operations(begin: Action, act: Action, legal: Action, full: Action) -> int:
        for last in count(1, 1 if every_point else 9):
            assert last < MOST, "never came to its end"
            store = tmp_path / str(last)
            store.mkdir()
            begin(store)
            done = run_in_crashing_child(last, act, store, request.param)
            legal(store)
            if done:
                full(store)
                return last
            assert run_in_crashing_child(MOST, act, store, "process")
            full(store)
            hidden = [path for path in store.rglob(".*") if path.name.endswith(".partial")]
            assert not hidden, f"left over after operation {last}"
        raise AssertionError("unreachable")

    return crash_at_operations


def create_empty_folder(store: Path) -> None:
    """Begin with an empty folder."""


def run_finesight(*words: object) -> None:
    """Carry out a command, which may find its work done already."""
    run_command([str(word) for word in words])


def check_valid_folder(store: Path) -> None:
    """It is not there, or every byte is."""
    if (store / "out").exists():
        verify_folder(store / "out")


def check_complete_folder(store: Path, names: Collection[str] = ()) -> None:
    verify_folder(store / "out")
    assert set(names) <= json.loads((store / "out" / DIGESTS_FILE).read_text()).keys()


def test_crash_while_writing_checkpoint(crash: CrashTest) -> None:
    """Breaks: writing step 2 and deleting step 1. Survives: one of them, with every byte."""
    found: list[int] = []

    def save(store: Path, step: int) -> None:
        weights, moments = {"a": torch.full((9,), float(step))}, {"exp_avg.a": torch.ones(9)}
        state = make_checkpoint_state(step)
        CheckpointManager(store, max_to_keep=1).save(state, weights, moments)

    def load(store: Path) -> int:
        state, weights, _ = CheckpointManager(store, max_to_keep=1).load_latest(pytest.fail)
        assert weights["a"].tolist() == [state.step] * 9
        return state.step

    def resume(store: Path) -> None:
        load(store)
        save(store, 2)

    def check_complete(store: Path) -> None:
        assert load(store) == 2

    operations = crash(
        lambda store: save(store, 1),
        resume,
        lambda store: found.append(load(store)),
        check_complete,
    )
    assert found == sorted(found)
    assert set(found) == {1, 2}
    assert operations > 10


def test_crash_while_writing_metrics(crash: CrashTest) -> None:
    """Flushed lines survive without partial lines."""

    def append(run: RunDir, *steps: int) -> None:
        for step in steps:
            run.append_metrics({"step": step, "loss": 1.0})
        run.flush()

    def resume(store: Path) -> None:
        run = RunDir(store)
        run.truncate_metrics(2, -1)
        append(run, 3, 4)

    def check(store: Path, least: int = 2) -> None:
        steps = [line["step"] for line in RunDir(store).iter_metrics()]
        assert steps == [1, 2, 3, 4][: len(steps)]
        assert len(steps) >= least

    operations = crash(
        lambda store: append(RunDir(store), 1, 2), resume, check, lambda store: check(store, 4)
    )
    assert operations > 5


def test_crash_while_writing_predictions(finished: Path, crash: CrashTest) -> None:
    """Breaks: writing the answers of an evaluation. Survive: none of them, or every line."""

    def check_complete(store: Path) -> None:
        assert len(read_predictions(store / "answers.jsonl")) == 2

    def check(store: Path) -> None:
        if (store / "answers.jsonl").exists():
            check_complete(store)

    crash(
        create_empty_folder,
        lambda store: run_finesight(
            *("eval", finished / "run", "--out", store / "answers.jsonl", "--limit", 2)
        ),
        check,
        check_complete,
    )


def test_crash_while_merging_adapter(finished: Path, crash: CrashTest) -> None:
    """The result is absent or complete, and the run unchanged."""
    files = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    names = {"model.safetensors", "config.json", "manifest.json"}
    crash(
        create_empty_folder,
        lambda store: run_finesight("merge", finished / "run", store / "out"),
        check_valid_folder,
        lambda store: check_complete_folder(store, names),
    )
    assert {path: path.read_bytes() for path in files} == files


def test_crash_while_exporting_data(finished: Path, crash: CrashTest) -> None:
    source = ("data", "export", finished / "train.jsonl")
    crash(
        create_empty_folder,
        lambda store: run_finesight(*source, store / "out", "--to", "llava", "--copy-images"),
        check_valid_folder,
        check_complete_folder,
    )


def test_crash_while_importing_data(crash: CrashTest) -> None:
    """Survive: the source, and no folder, or one with every sample."""

    def write_source(store: Path) -> None:
        with (store / "labels.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "text"])
            for number in range(4):
                Image.new("RGB", (28, 28), (number, 0, 0)).save(store / f"{number}.png")
                rows.writerow([f"{number}.png", f"It says {number}."])

    def check_complete(store: Path) -> None:
        check_complete_folder(store)
        assert len(read_samples(store / "out" / "data.jsonl")) == 4

    maps = ["--map", "image=path", "--map", "answer=text", "--prompt", "What does it say?"]
    crash(
        write_source,
        lambda store: run_finesight("import", store / "labels.csv", store / "out", *maps),
        check_valid_folder,
        check_complete,
    )
