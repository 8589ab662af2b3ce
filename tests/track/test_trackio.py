"""Trackio's database after a real run, read back by Trackio."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tracked_run import SCORE, Tracked

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
def found(tracked: Tracked) -> Any:
    tracked.folder("trackio")
    place = {"TRACKIO_DIR": str(tracked.trackio), "PATH": "", "HOME": str(tracked.trackio)}
    out = subprocess.run([sys.executable, "-c", READ], env=place, capture_output=True, check=True)
    return json.loads(out.stdout)


def test_every_figure_under_one_run(tracked: Tracked, found: Any) -> None:
    names, _, logs, _ = found
    assert len(names) == 1
    assert names[0].startswith("run-")
    assert {log["step"]: log["loss"] for log in logs if "loss" in log} == pytest.approx(
        tracked.losses
    )
    assert {log["step"] for log in logs if SCORE in log} == {0, 2, 4, 6}
    assert {log["step"] for log in logs if "learning_rate/language" in log} == set(range(1, 7))


def test_settings(found: Any) -> None:
    settings = found[1]
    assert settings["tune"]["lora"]["rank"] == 4
    assert settings["run"]["precision"] == "fp32"


def test_pictures_with_captions_and_alerts(tracked: Tracked, found: Any) -> None:
    pictures = {log["step"]: log["examples/1"] for log in found[2] if "examples/1" in log}
    assert sorted(pictures) == [0, 2, 4, 6]
    assert "question: Which colour?" in pictures[6]["caption"]
    assert "before: " in pictures[6]["caption"]
    assert (Path(tracked.trackio) / "media" / pictures[6]["file_path"]).is_file()
    assert ("run finished", "info") in {(alert["title"], alert["level"]) for alert in found[3]}
