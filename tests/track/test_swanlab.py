"""Tests of the SwanLab log of a real run without a key, and of its webhook."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from tracking_fixtures import SCORE_KEY, TrackedRun

from finesight.config import TrackerSettings
from finesight.track.tracker_records import AlertRecord, FinishRecord, StartRecord

swanlab = pytest.importorskip("swanlab", reason="swanlab is not installed (extra `track`)")


def records(file: Path) -> Iterator[Any]:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    reader = DataStoreReader()
    reader.open(file)
    for line in reader:
        record = Record()
        record.ParseFromString(line)
        yield record


@pytest.fixture
def parts(tracked_run: TrackedRun) -> list[list[Any]]:
    """Return records of the original run and of the resumed one."""
    files = sorted(tracked_run.folder("swanlab").glob("run-*/*.swanlab"))
    return [list(records(file)) for file in files]


def values(part: list[Any], name: str) -> dict[int, float]:
    found = (r.scalar for r in part if r.HasField("scalar") and r.scalar.key == name)
    return {scalar.step: scalar.value.number for scalar in found}


def test_all_metrics_in_one_experiment(tracked_run: TrackedRun, parts: list[list[Any]]) -> None:
    first, second = parts
    assert first[0].start.project == "finesight"
    assert first[0].start.name == "run"
    assert first[0].start.id == second[0].start.id
    assert sorted(values(first, "loss")) == [1, 2, 3, 4, 5, 6]
    assert values(first, "loss") | values(second, "loss") == pytest.approx(tracked_run.losses)
    assert sorted(values(second, "loss")) == [5, 6]
    assert sorted(values(first, SCORE_KEY)) == [0, 2, 4, 6]
    assert sorted(values(first, "learning_rate/language")) == [1, 2, 3, 4, 5, 6]


def test_images_with_captions_and_alerts(tracked_run: TrackedRun, parts: list[list[Any]]) -> None:
    media = [r.media for r in parts[0] if r.HasField("media")]
    shown = {m.step: m for m in media if m.key == "examples/1"}
    assert sorted(shown) == [0, 2, 4, 6]
    (item,) = shown[6].value.items
    assert "question: Which colour?" in item.caption
    assert "before: " in item.caption
    images = tracked_run.folder("swanlab").glob(f"run-*/media/image/{item.filename}")
    assert next(images).read_bytes()[:2] == b"\xff\xd8"
    assert any(m.key == "alerts" for m in media)


def test_settings_without_machine_info(tracked_run: TrackedRun) -> None:
    for folder in tracked_run.folder("swanlab").glob("run-*"):
        settings = yaml.safe_load((folder / "files" / "config.yaml").read_text())
        assert settings["tune"]["value"]["lora"]["rank"] == 4
        assert settings["run"]["value"]["precision"] == "fp32"
        machine = json.loads((folder / "files" / "swanlab-metadata.json").read_text())
        assert not any(machine[part] for part in ("hardware", "runtime", "git", "swanlab"))


def test_dashboard_command_is_printed(tracked_run: TrackedRun) -> None:
    folder = tracked_run.folder("swanlab")
    result = tracked_run.console_lines("swanlab")
    assert all(line.startswith("SwanLab: offline (no key): swanlab sync") for line in result)
    assert [Path(line.split()[-1]) for line in result] == sorted(folder.glob("run-*"))


def test_alert_is_sent_to_webhook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing webhook does not stop the tracker."""
    from finesight.track.backends import SwanLabTracker

    bodies: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200 if len(bodies) < 3 else 500)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SWANLAB_WEBHOOK", f"http://127.0.0.1:{server.server_port}/hook")
    monkeypatch.setenv("SWANLAB_WEBHOOK_VALUE", "mine")
    writer = SwanLabTracker()
    tracker = TrackerSettings(kind="swanlab", uri="offline")
    writer.start_run(
        StartRecord(tracker=tracker, name="one", folder=tmp_path / "swanlab", settings={})
    )
    for title in ("loss has jumped", "run stopped"):
        writer.send_alert(AlertRecord(step=3, level="warning", title=title, text="to 7"))
    writer.finish_run(FinishRecord(state="failed", reason="a test"))
    server.shutdown()
    server.server_close()
    # The first is SwanLab's own, at the start.
    assert [body["value"] for body in bodies] == ["mine"] * 3
    assert bodies[1]["alert"] == {
        "step": 3,
        "level": "warning",
        "title": "loss has jumped",
        "text": "to 7",
    }
    assert str(tmp_path) not in json.dumps(bodies)
