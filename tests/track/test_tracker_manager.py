"""Tests that failing, hanging and crashing trackers do not affect the run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_task import TinyTask, read_final_files, read_losses
from tracking_fixtures import install_broken_tracker, install_package

from finesight.errors import TrainingInterrupted, UserError
from finesight.settings.config import Recipe
from finesight.track import tracker_manager
from finesight.track.tracker_manager import load_run_id, start_trackers

EVAL = {"metric": "ocr", "max_new_tokens": 4}


def read_outcome(run: Path) -> tuple[object, ...]:
    """Return losses, final files and result without the folder of the run."""
    result = json.loads((run / "result.json").read_text()) | {"run_dir": ""}
    return result, read_losses(run), read_final_files(run)


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    task = TinyTask(tmp_path_factory.mktemp("untracked"))
    task.run(eval=EVAL)
    return read_outcome(task.folder / "run")


FAULTS = {
    "raises": "swanlab: .*planted: the server is gone",
    "dies": "swanlab: the tracker process exited",
    "crashes": "swanlab: the tracker process exited",
    "hangs": "swanlab: stopped before all records were delivered",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_failing_tracker_does_not_affect_the_run(task, untracked, tmp_path, monkeypatch, fault):
    install_broken_tracker(monkeypatch, tmp_path, fault)
    install_package(monkeypatch, tmp_path, "wandb", "import a_missing_library\n")
    if fault == "hangs":
        monkeypatch.setitem(tracker_manager.FINISH_TIMEOUTS_S, "finished", 0.2)
    trackers = ["swanlab"] if fault == "hangs" else ["swanlab", "wandb", "tensorboard"]
    task.run(eval=EVAL, track=trackers)
    assert read_outcome(tmp_path / "run") == untracked
    output = task.console_output
    assert re.search(FAULTS[fault], output)
    failed = re.findall(r"^(\w+):.*not delivered", output, re.M)
    if fault == "hangs":
        assert failed == ["swanlab"]
        assert "waiting for swanlab (at most 0.2 s)" in output
    else:
        assert failed == ["swanlab", "wandb"]
        assert "wandb: ModuleNotFoundError: No module named 'a_missing_library'" in output
        (file,) = (tmp_path / "run" / "track" / "tensorboard").iterdir()
        assert b"run finished" in file.read_bytes(), "the working tracker continues"


def recipe(*trackers: Any) -> Recipe:
    settings = {"model": "m", "data": {"train": "t.jsonl"}, "output_dir": "runs/x"}
    return Recipe.model_validate(settings | {"track": trackers})


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

    def stopped() -> None:
        with start_trackers(recipe("tensorboard"), tmp_path, 0, print) as trackers:
            trackers.start_run({})
            trackers.log_metrics(3, {"loss": float("nan")})
            raise error

    with pytest.raises(type(error)):
        stopped()
    (file,) = (tmp_path / "track" / "tensorboard").iterdir()
    assert (b"run stopped" in file.read_bytes()) == (alerted is not None)
    assert alerted is None or alerted in file.read_bytes()


def test_run_that_does_not_start_sends_no_alert(tmp_path, monkeypatch):
    install_broken_tracker(monkeypatch, tmp_path, "raises")
    output: list[str] = []
    with (
        pytest.raises(UserError, match="the memory is full"),
        start_trackers(recipe("swanlab"), tmp_path, 0, output.append),
    ):
        raise UserError("the memory is full")
    assert output == []
    assert not (tmp_path / "track" / "swanlab").exists()


def test_run_id_is_random_and_stored(tmp_path):
    first, second = (load_run_id(tmp_path / name / "id.txt") for name in "ab")
    assert first != second
    assert load_run_id(tmp_path / "a" / "id.txt") == first
    (tmp_path / "a" / "id.txt").write_text("a/../b")
    assert re.fullmatch("[0-9a-f]{8}", load_run_id(tmp_path / "a" / "id.txt"))
    (tmp_path / "c").write_text("no folder")
    assert load_run_id(tmp_path / "c" / "id.txt") != load_run_id(tmp_path / "c" / "id.txt")
