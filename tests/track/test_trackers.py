"""Logs of each tracker about a real run, and missing packages of trackers."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from fake_hub_servers import FakeHubServer, HubHandler, run_in_thread
from tracking_fixtures import READERS, TrackedRun

from finesight.errors import UserError
from finesight.settings.config import TrackerKind, TrackerSettings
from finesight.track.tracker_records import AlertRecord, FinishRecord, StartRecord
from finesight.tracker_components import TRACKERS, require_trackers

EVALUATED = [0, 2, 4, 6]
TRAINED = [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", TRACKERS)
def test_run_is_logged_once(kind: TrackerKind, tracked_run: TrackedRun) -> None:
    pytest.importorskip(kind, reason=f"{kind} is not installed (extra `{TRACKERS[kind].extra}`)")
    logged = READERS[kind](tracked_run)
    (names,) = logged.names
    assert any(name.startswith("run") for name in names)
    assert logged.metrics["loss"] == pytest.approx(tracked_run.losses)
    assert [sorted(part) for part in logged.parts] in ([], [TRAINED, [5, 6]])
    for name in ("grad_norm", "learning_rate/language", "tokens_per_s", "mfu"):
        assert sorted(logged.metrics[name]) == TRAINED, name
    for name in ("scores/similarity", "validation_loss"):
        assert sorted(logged.metrics[name]) == EVALUATED, name
    assert logged.settings["tune.lora.rank"] == "4"
    assert logged.settings["run.precision"] == "fp32"
    assert sorted(logged.captions) == EVALUATED
    assert "question: Which colour?" in logged.captions[0]
    assert "before: " not in logged.captions[0]
    assert "before: " in logged.captions[6]
    assert logged.image[:2] == b"\xff\xd8" or logged.image[1:4] == b"PNG"
    assert "run finished" in logged.alerts


def test_swanlab_log_has_no_machine_info(tracked_run: TrackedRun) -> None:
    pytest.importorskip("swanlab", reason="swanlab is not installed (extra `track`)")
    for folder in tracked_run.folder("swanlab").glob("run-*"):
        machine = json.loads((folder / "files" / "swanlab-metadata.json").read_text())
        assert not any(machine[part] for part in ("hardware", "runtime", "git", "swanlab"))


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Address of a server that fails from its third request on, and the received bodies."""
    bodies: list[dict[str, Any]] = []

    class Hook(HubHandler):
        def receive(self, path: str, body: bytes) -> None:
            bodies.append(json.loads(body))
            self.send(200 if len(bodies) < 3 else 500)

    with run_in_thread(FakeHubServer(Hook)) as server:
        yield f"{server.url}/hook", bodies


def test_swanlab_sends_alerts_to_webhook(tmp_path, monkeypatch, webhook):
    """A failing webhook does not stop the tracker."""
    pytest.importorskip("swanlab", reason="swanlab is not installed (extra `track`)")
    from finesight.track.trackers.swanlab import SwanLabTracker

    url, bodies = webhook
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SWANLAB_WEBHOOK", url)
    monkeypatch.setenv("SWANLAB_WEBHOOK_VALUE", "mine")
    writer, folder = SwanLabTracker(), tmp_path / "swanlab"
    tracker = TrackerSettings(kind="swanlab", uri="offline")
    writer.start_run(StartRecord(tracker=tracker, name="one", folder=folder, settings={}, id="0"))
    alerts = [
        {"step": 3, "level": "warning", "title": title, "text": "to 7"}
        for title in ("loss has jumped", "run stopped")
    ]
    for alert in alerts:
        writer.send_alert(AlertRecord.model_validate(alert))
    writer.finish_run(FinishRecord(state="failed", reason="a test"))
    # The first is SwanLab's own, at the start.
    assert [body["value"] for body in bodies] == ["mine"] * 3
    assert [body["alert"] for body in bodies[1:]] == alerts
    assert str(tmp_path) not in json.dumps(bodies)


@pytest.mark.parametrize("kind", [one.name for one in TRACKERS.list_built_in()])
def test_missing_package_error_names_the_extra(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, kind, None)
    install = rf"{kind} is not[\s\S]*pip install 'finesight\[{TRACKERS[kind].extra}\]'"
    with pytest.raises(UserError, match=install):
        require_trackers([TrackerSettings(kind=kind)])
