"""Trackers that fail, hang and die beside a run, which comes to the same end without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from broken_trackers import plant, unimportable
from small_run import Task, final_files, losses

from finesight.config import Recipe
from finesight.errors import Interrupted, UserError
from finesight.track import tracking
from finesight.track.tracking import Kept, tracked

EVAL = {"metric": "ocr", "max_new_tokens": 4}


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> Task:
    task = Task(tmp_path_factory.mktemp("untracked"))
    task.run(eval=EVAL)
    return task


def same(task: Task, other: Task) -> bool:
    """Whether two runs have come to the same end, but for where they are and how long they took."""
    mine, theirs = (one.folder / "run" for one in (task, other))
    results = [json.loads((run / "result.json").read_text()) for run in (mine, theirs)]
    for result in results:
        del result["run"]
    return (
        final_files(mine) == final_files(theirs)
        and losses(mine) == losses(theirs)
        and results[0] == results[1]
    )


def undelivered(task: Task) -> list[str]:
    return [line.split(":")[0] for line in task.screen.splitlines() if "not delivered" in line]


@pytest.mark.parametrize("fault", ["raises", "dies", "crashes"])
def test_a_tracker_that_fails_ends_alone(
    task: Task, untracked: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    plant(monkeypatch, tmp_path, fault)
    unimportable(monkeypatch, tmp_path, "wandb")
    task.run(eval=EVAL, track=["swanlab", "wandb", "tensorboard"])
    assert same(task, untracked)
    assert undelivered(task) == ["swanlab", "wandb"]
    said = "planted: the server is gone" if fault == "raises" else "its process has died"
    assert task.screen.count("swanlab: ") == 2
    assert said in task.screen
    assert "wandb: ModuleNotFoundError: No module named 'a_library_that_has_gone'" in task.screen
    written = [*(tmp_path / "run" / "track" / "tensorboard").iterdir()]
    assert len(written) == 1, "the one that does not fail goes on"
    assert b"run finished" in written[0].read_bytes()


def test_a_tracker_that_hangs_delays_no_step_and_the_end_by_a_bounded_time(
    task: Task, untracked: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path, "hangs")
    monkeypatch.setitem(tracking.WAIT, "finished", 0.2)
    task.run(eval=EVAL, track=["swanlab"])
    assert same(task, untracked)
    assert "waiting for swanlab, 0.2 s at most" in task.screen
    assert "swanlab: was not done yet, and was ended" in task.screen
    assert undelivered(task) == ["swanlab"]


def recipe(**settings: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": "m", "data": {"train": "t.jsonl"}, "output": "runs/x", **settings}
    )


def test_nothing_asked_nothing_done(tmp_path: Path) -> None:
    with tracked(recipe(), tmp_path, 0, print) as trackers:
        trackers.begin({})
        trackers.figures(1, {"loss": 1.0})
    assert not trackers.on
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "alerted"),
    [
        (UserError("5 steps in a row had a loss that is no finite number"), b"5 steps in a row"),
        (RuntimeError("a fault of ours"), b"RuntimeError: a fault of ours"),
        (Interrupted("stopped by SIGTERM"), None),
    ],
)
def test_a_run_that_is_stopped_alerts(
    tmp_path: Path, error: Exception, alerted: bytes | None
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra `track`)")
    asked = recipe(track=["tensorboard"])

    def stopped() -> None:
        with tracked(asked, tmp_path, 0, print) as trackers:
            trackers.begin({})
            trackers.figures(3, {"loss": float("nan")})
            raise error

    with pytest.raises(type(error)):
        stopped()
    (file,) = (tmp_path / "track" / "tensorboard").iterdir()
    assert (b"run stopped" in file.read_bytes()) == (alerted is not None)
    if alerted is not None:
        assert alerted in file.read_bytes()


def test_a_run_that_does_not_begin_is_nobodys_business(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path, "raises")
    said: list[str] = []

    def stopped() -> None:
        with tracked(recipe(track=["swanlab"]), tmp_path, 0, said.append):
            raise UserError("the memory is full")

    with pytest.raises(UserError):
        stopped()
    assert said == []
    assert not (tmp_path / "track" / "swanlab").exists()


def test_a_run_goes_on_under_its_id_only_at_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path, "raises")
    here = recipe(track=[{"kind": "swanlab", "project": "here"}])
    with tracked(here, tmp_path, 0, print) as trackers:
        trackers.begin({})
    ids = tmp_path / "track" / "ids.json"
    kept = [Kept.model_validate(one) for one in json.loads(ids.read_text())]
    assert [(one.tracker.project, one.id) for one in kept] == [("here", "fake")]
    assert trackers.known(here.track[0]) == "fake"
    assert trackers.known(here.track[0].model_copy(update={"project": "there"})) is None


def test_ids_that_cannot_be_read_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path, "raises")
    ids = tmp_path / "track" / "ids.json"
    ids.parent.mkdir()
    ids.write_text("[{")
    said: list[str] = []
    with tracked(recipe(track=["swanlab"]), tmp_path, 2, said.append) as trackers:
        trackers.begin({})
    assert "trackers begin new runs" in said[0]
    assert json.loads(ids.read_text())[0]["id"] == "fake"
