"""SwanLab's own log of a real run without a key, read back by SwanLab; and its webhook."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from tracked_run import SCORE, Tracked

from finesight.config import Tracker
from finesight.track.records import Alert, Begin, End

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
def parts(tracked: Tracked) -> list[list[Any]]:
    """The records of the run, those of the process that began it and those of the one after."""
    files = sorted(tracked.folder("swanlab").glob("run-*/*.swanlab"))
    return [list(records(file)) for file in files]


def values(part: list[Any], name: str) -> dict[int, float]:
    found = (r.scalar for r in part if r.HasField("scalar") and r.scalar.key == name)
    return {scalar.step: scalar.value.number for scalar in found}


def test_every_figure_under_one_experiment(tracked: Tracked, parts: list[list[Any]]) -> None:
    first, second = parts
    assert first[0].start.project == "finesight"
    assert first[0].start.name == "run"
    assert first[0].start.id == second[0].start.id
    assert sorted(values(first, "loss")) == [1, 2, 3, 4, 5, 6]
    assert values(first, "loss") | values(second, "loss") == pytest.approx(tracked.losses)
    assert sorted(values(second, "loss")) == [5, 6]
    assert sorted(values(first, SCORE)) == [0, 2, 4, 6]
    assert sorted(values(first, "learning_rate/language")) == [1, 2, 3, 4, 5, 6]


def test_pictures_with_captions_and_alerts(tracked: Tracked, parts: list[list[Any]]) -> None:
    media = [r.media for r in parts[0] if r.HasField("media")]
    shown = {m.step: m for m in media if m.key == "examples/1"}
    assert sorted(shown) == [0, 2, 4, 6]
    (item,) = shown[6].value.items
    assert "question: Which colour?" in item.caption
    assert "before: " in item.caption
    pictures = tracked.folder("swanlab").glob(f"run-*/media/image/{item.filename}")
    assert next(pictures).read_bytes()[:2] == b"\xff\xd8"
    assert any(m.key == "alerts" for m in media)


def test_settings_and_nothing_of_the_machine(tracked: Tracked) -> None:
    for folder in tracked.folder("swanlab").glob("run-*"):
        settings = yaml.safe_load((folder / "files" / "config.yaml").read_text())
        assert settings["tune"]["value"]["lora"]["rank"] == 4
        assert settings["run"]["value"]["precision"] == "fp32"
        machine = json.loads((folder / "files" / "swanlab-metadata.json").read_text())
        assert not any(machine[part] for part in ("hardware", "runtime", "git", "swanlab"))


def test_where_to_look_is_said(tracked: Tracked) -> None:
    folder = tracked.folder("swanlab")
    told = tracked.told("swanlab")
    assert all(line.startswith("SwanLab: offline (no key): swanlab sync") for line in told)
    assert [Path(line.split()[-1]) for line in told] == sorted(folder.glob("run-*"))


def test_an_alert_goes_to_the_webhook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a webhook that fails ends nothing."""
    from finesight.track.swanlab import SwanLab

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
    writer = SwanLab()
    tracker = Tracker(kind="swanlab", address="offline")
    writer.begin(Begin(tracker=tracker, name="one", folder=tmp_path / "swanlab", settings={}))
    for title in ("loss has jumped", "run stopped"):
        writer.alert(Alert(step=3, level="warning", title=title, text="to 7"))
    writer.end(End(state="failed", reason="a test"))
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
