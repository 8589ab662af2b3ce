"""Tests of the Trackio database of a real run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tracking_fixtures import SCORE_KEY, TrackedRun

pytest.importorskip("trackio", reason="trackio is not installed (extra `trackio`)")

# It takes its folder from the environment when it is imported.
READ = """
import json
from trackio.sqlite_storage import SQLiteStorage as Store
runs = Store.get_runs("finesight")
print(json.dumps([runs, Store.get_run_config("finesight", runs[0]),
    Store.get_logs("finesight", runs[0]), Store.get_alerts("finesight")]))
"""


@pytest.fixture(scope="module")
def logged_data(tracked_run: TrackedRun) -> Any:
    tracked_run.folder("trackio")
    location = {
        "TRACKIO_DIR": str(tracked_run.trackio),
        "PATH": "",
        "HOME": str(tracked_run.trackio),
    }
    out = subprocess.run(
        [sys.executable, "-c", READ], env=location, capture_output=True, check=True
    )
    return json.loads(out.stdout)


def test_all_metrics_in_one_run(tracked_run: TrackedRun, logged_data: Any) -> None:
    names, _, logs, _ = logged_data
    assert len(names) == 1
    assert names[0].startswith("run-")
    assert {log["step"]: log["loss"] for log in logs if "loss" in log} == pytest.approx(
        tracked_run.losses
    )
    assert {log["step"] for log in logs if SCORE_KEY in log} == {0, 2, 4, 6}
    assert {log["step"] for log in logs if "learning_rate/language" in log} == set(range(1, 7))


def test_settings(logged_data: Any) -> None:
    settings = logged_data[1]
    assert settings["tune"]["lora"]["rank"] == 4
    assert settings["run"]["precision"] == "fp32"


def test_images_with_captions_and_alerts(tracked_run: TrackedRun, logged_data: Any) -> None:
    images = {log["step"]: log["examples/1"] for log in logged_data[2] if "examples/1" in log}
    assert sorted(images) == [0, 2, 4, 6]
    assert "question: Which colour?" in images[6]["caption"]
    assert "before: " in images[6]["caption"]
    assert (Path(tracked_run.trackio) / "media" / images[6]["file_path"]).is_file()
    assert ("run finished", "info") in {
        (alert["title"], alert["level"]) for alert in logged_data[3]
    }
