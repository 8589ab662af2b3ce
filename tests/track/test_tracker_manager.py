"""Tests that failing, hanging and crashing trackers do not affect the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from broken_trackers import install_broken_tracker, make_unimportable
from tiny_task import TinyTask, read_final_files, read_losses

from finesight.config import Recipe
from finesight.errors import TrainingInterrupted, UserError
from finesight.track import tracker_manager
from finesight.track.tracker_manager import TrackerRun, start_trackers

EVAL = {"metric": "ocr", "max_new_tokens": 4}


@pytest.fixture(scope="module")
def untracked_result(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    task = TinyTask(tmp_path_factory.mktemp("untracked"))
    task.run(eval=EVAL)
    return task


def is_same_result(task: TinyTask, other: TinyTask) -> bool:
    """Return whether two runs have equal results, except for paths and times."""
    mine, theirs = (one.folder / "run" for one in (task, other))
    results = [json.loads((run / "result.json").read_text()) for run in (mine, theirs)]
    for result in results:
        del result["run_dir"]
    return (
        read_final_files(mine) == read_final_files(theirs)
        and read_losses(mine) == read_losses(theirs)
        and results[0] == results[1]
    )


def failed_trackers(task: TinyTask) -> list[str]:
    return [
        line.split(":")[0] for line in task.console_output.splitlines() if "not delivered" in line
    ]


@pytest.mark.parametrize("fault", ["raises", "dies", "crashes"])
def test_failing_tracker_does_not_affect_the_run(
    task: TinyTask,
    untracked_result: TinyTask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    install_broken_tracker(monkeypatch, tmp_path, fault)
    make_unimportable(monkeypatch, tmp_path, "wandb")
    task.run(eval=EVAL, track=["swanlab", "wandb", "tensorboard"])
    assert is_same_result(task, untracked_result)
    assert failed_trackers(task) == ["swanlab", "wandb"]
    output = "planted: the server is gone" if fault == "raises" else "the tracker process exited"
    assert task.console_output.count("swanlab: ") == 2
    assert output in task.console_output
    assert (
        "wandb: ModuleNotFoundError: No module named 'a_library_that_has_gone'"
        in task.console_output
    )
    written = [*(tmp_path / "run" / "track" / "tensorboard").iterdir()]
    assert len(written) == 1, "the working tracker continues"
    assert b"run finished" in written[0].read_bytes()


def test_hung_tracker_delays_only_the_end(
    task: TinyTask, untracked_result: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_broken_tracker(monkeypatch, tmp_path, "hangs")
    monkeypatch.setitem(tracker_manager.FINISH_TIMEOUTS_S, "finished", 0.2)
    task.run(eval=EVAL, track=["swanlab"])
    assert is_same_result(task, untracked_result)
    assert "waiting for swanlab (at most 0.2 s)" in task.console_output
    assert "swanlab: stopped before all records were delivered" in task.console_output
    assert failed_trackers(task) == ["swanlab"]


def recipe(**settings: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": "m", "data": {"train": "t.jsonl"}, "output_dir": "runs/x", **settings}
    )


def test_no_trackers_write_no_files(tmp_path: Path) -> None:
    with start_trackers(recipe(), tmp_path, 0, print) as trackers:
        trackers.start_run({})
        trackers.log_metrics(1, {"loss": 1.0})
    assert not trackers.is_active
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "alerted"),
    [
        (UserError("5 steps in a row had a loss that is no finite number"), b"5 steps in a row"),
        (RuntimeError("a fault of ours"), b"RuntimeError: a fault of ours"),
        (TrainingInterrupted("stopped by SIGTERM"), None),
    ],
)
def test_stopped_run_sends_alert(tmp_path: Path, error: Exception, alerted: bytes | None) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra `track`)")
    requested = recipe(track=["tensorboard"])

    def stopped() -> None:
        with start_trackers(requested, tmp_path, 0, print) as trackers:
            trackers.start_run({})
            trackers.log_metrics(3, {"loss": float("nan")})
            raise error

    with pytest.raises(type(error)):
        stopped()
    (file,) = (tmp_path / "track" / "tensorboard").iterdir()
    assert (b"run stopped" in file.read_bytes()) == (alerted is not None)
    if alerted is not None:
        assert alerted in file.read_bytes()


def test_run_that_does_not_start_sends_no_alert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_broken_tracker(monkeypatch, tmp_path, "raises")
    output: list[str] = []

    def stopped() -> None:
        with start_trackers(recipe(track=["swanlab"]), tmp_path, 0, output.append):
            raise UserError("the memory is full")

    with pytest.raises(UserError):
        stopped()
    assert output == []
    assert not (tmp_path / "track" / "swanlab").exists()


def test_run_id_is_reused_only_in_the_same_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_broken_tracker(monkeypatch, tmp_path, "raises")
    here = recipe(track=[{"kind": "swanlab", "project": "here"}])
    with start_trackers(here, tmp_path, 0, print) as trackers:
        trackers.start_run({})
    ids = tmp_path / "track" / "ids.json"
    retained = [TrackerRun.model_validate(one) for one in json.loads(ids.read_text())]
    assert [(one.tracker.project, one.id) for one in retained] == [("here", "fake")]
    assert trackers.get_run_id(here.track[0]) == "fake"
    assert trackers.get_run_id(here.track[0].model_copy(update={"project": "there"})) is None


def test_unreadable_ids_start_new_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_broken_tracker(monkeypatch, tmp_path, "raises")
    ids = tmp_path / "track" / "ids.json"
    ids.parent.mkdir()
    ids.write_text("[{")
    output: list[str] = []
    with start_trackers(recipe(track=["swanlab"]), tmp_path, 2, output.append) as trackers:
        trackers.start_run({})
    assert "trackers start new runs" in output[0]
    assert json.loads(ids.read_text())[0]["id"] == "fake"
