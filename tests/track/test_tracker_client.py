"""Tests of the queue, thread and process of a tracker with short timeouts."""

import io
import queue
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tracking_fixtures import install_broken_tracker

from finesight.config import TrackerSettings
from finesight.track import tracker_manager, tracker_process
from finesight.track.tracker_manager import TrackerClient, TrackerStopped
from finesight.track.tracker_records import (
    AlertRecord,
    FinishRecord,
    MetricsRecord,
    RunStarted,
    StartRecord,
    StepMetrics,
)

LONG = 60.0


def begin(folder: Path) -> StartRecord:
    tracker = TrackerSettings(kind="swanlab", uri="offline")
    return StartRecord(tracker=tracker, name="x", folder=folder / "swanlab", settings={})


def figures(step: int, loss: float = 1.0) -> MetricsRecord:
    return MetricsRecord(steps=(StepMetrics(step=step, values={"loss": loss}),))


@pytest.fixture
def working_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_broken_tracker(monkeypatch, tmp_path, "raises")  # at the third step only


class IdleClient(TrackerClient):
    """Client that delivers no records."""

    def _run(self) -> None:
        pass


def start_tracker(folder, steps=0, kind=TrackerClient):
    client = kind("swanlab", folder / "log")
    client.submit(begin(folder))
    for step in range(steps):
        client.submit(figures(step))
    return client


def test_unresponsive_tracker_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_broken_tracker(monkeypatch, tmp_path, "hangs")
    monkeypatch.setattr(tracker_manager, "RESPONSE_TIMEOUT_S", 0.3)
    client = start_tracker(tmp_path, steps=5)
    assert client.wait(LONG)
    assert client.num_delivered < client.num_submitted == 6
    reason = "no response for 0.3 s; the run continues without it"
    assert list(client.poll_responses())[-1] == TrackerStopped(reason)
    client.submit(FinishRecord(state="finished"))
    assert client.num_submitted == 7


def list_batched(client: TrackerClient) -> list[str | list[int]]:
    """Return the types of the queued records, or the steps of metrics."""
    client.submit(FinishRecord(state="finished"))
    return [
        [row.step for row in record.steps] if isinstance(record, MetricsRecord) else record.type
        for record in client.iter_batched()
    ]


def test_records_are_batched_in_order_up_to_the_queue_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker_manager, "MAX_BATCHED_STEPS", 3)
    client = start_tracker(tmp_path, 5, IdleClient)
    client.submit(AlertRecord(step=5, level="info", title="t", text="t"))
    client.submit(figures(6))
    assert list_batched(client) == ["start", [0, 1, 2], [3, 4], "alert", [6], "finish"]
    monkeypatch.setattr(tracker_manager, "MAX_QUEUED_RECORDS", 3)
    client = start_tracker(tmp_path, 50, IdleClient)
    assert list_batched(client) == ["start", [0, 1], "finish"]
    assert client.num_submitted == 52
    client.kill()
    assert client.wait(0)
    reason = "stopped before all records were delivered"
    assert list(client.poll_responses()) == [TrackerStopped(reason)]


@pytest.mark.usefixtures("working_tracker")
def test_working_tracker_receives_all_records(tmp_path: Path) -> None:
    client = start_tracker(tmp_path)
    client.submit(figures(1, float("nan")))
    client.submit(FinishRecord(state="finished"))
    assert client.wait(LONG)
    assert client.num_delivered == client.num_submitted == 3
    (started,) = client.poll_responses()
    assert isinstance(started, RunStarted)
    assert started.id == "fake"
    client.kill()
    assert list(client.poll_responses()) == [], "one that has ended is not ended again"


def test_tracker_process_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_manager.sys, "executable", str(tmp_path / "no-python"))
    client = start_tracker(tmp_path)
    assert client.wait(LONG)
    (stopped,) = client.poll_responses()
    assert "No such file" in str(stopped)


@pytest.mark.usefixtures("working_tracker")
@pytest.mark.parametrize("has_unread_data", [True, False])
def test_tracker_of_ended_run_marks_it_failed(tmp_path: Path, has_unread_data: bool) -> None:
    """Closing a socket with unread data resets the connection."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "finesight.track.tracker_process", "swanlab"]
    with theirs:
        fd = theirs.fileno()
        process = subprocess.Popen([*command, str(fd)], pass_fds=[fd])
    with ours:
        ours.sendall(begin(tmp_path).model_dump_json().encode() + b"\n")
        assert select.select([ours], [], [], LONG)[0], "no reply"
        if not has_unread_data:
            ours.recv(1 << 16)
    try:
        assert process.wait(LONG) == 0
    finally:
        process.kill()
    assert (tmp_path / "swanlab" / "finished-crashed").exists()


@pytest.mark.usefixtures("working_tracker")
def test_tracker_process_ignores_job_signals(tmp_path: Path) -> None:
    client = start_tracker(tmp_path)
    while not list(client.poll_responses()):
        assert not client.wait(0.01)
    assert client.process is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        client.process.send_signal(number)
    client.submit(FinishRecord(state="interrupted"))
    assert client.wait(LONG)
    assert client.num_delivered == 2
    assert (tmp_path / "swanlab" / "finished-aborted").exists()


def test_hung_tracker_of_dead_run_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(tracker_process, "ORPHAN_TIMEOUT_S", 0.01)
    monkeypatch.setattr(tracker_process.os, "_exit", ended.append)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    tracker_process.read_lines(io.BytesIO(b"one\ntwo\n"), lines)
    assert [lines.get() for _ in range(3)] == [b"one\n", b"two\n", b""]
    assert ended == [1]
