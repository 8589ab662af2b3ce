"""Tests of the queue, thread and process of a tracker with short timeouts."""

import signal
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path

import pytest
from tracking_fixtures import install_broken_tracker

from finesight.settings.config import TrackerSettings
from finesight.track import tracker_manager
from finesight.track.tracker_manager import TrackerClient, start_process
from finesight.track.tracker_records import (
    AlertRecord,
    FinishRecord,
    MetricsRecord,
    StartRecord,
    StepMetrics,
    TrackerRecord,
)

LONG = 60.0


def begin(folder: Path) -> StartRecord:
    tracker = TrackerSettings(kind="swanlab", uri="offline")
    return StartRecord(tracker=tracker, name="x", folder=folder / "swanlab", settings={}, id="0")


def figures(step: int, loss: float = 1.0) -> MetricsRecord:
    return MetricsRecord(steps=(StepMetrics(step=step, values={"loss": loss}),))


@pytest.fixture
def working_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_broken_tracker(monkeypatch, tmp_path, "raises")  # at the third step only


class IdleClient(TrackerClient):
    """Client that delivers no records."""

    def _run(self) -> None:
        pass

    def take_records(self) -> Iterator[str | list[int]]:
        """Yield the types of the queued records, or the steps of metrics."""
        while self._records:
            record: TrackerRecord = self._records.popleft()
            is_metrics = isinstance(record, MetricsRecord)
            yield [row.step for row in record.steps] if is_metrics else type(record).__name__


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
    reason = "swanlab: no response for 0.3 s; the run continues without it"
    assert list(client.poll_messages())[-1] == reason
    client.submit(FinishRecord(state="finished"))
    assert client.num_submitted == 7
    assert not client._records, "records of a failed tracker occupy memory"


def test_records_are_merged_in_order_up_to_the_queue_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker_manager, "MAX_BATCHED_STEPS", 3)
    client = start_tracker(tmp_path, 5, IdleClient)
    client.submit(AlertRecord(step=5, level="info", title="t", text="t"))
    client.submit(figures(6))
    expected = ["StartRecord", [0, 1, 2], [3, 4], "AlertRecord", [6]]
    assert list(client.take_records()) == expected
    monkeypatch.setattr(tracker_manager, "MAX_QUEUED_RECORDS", 3)
    client = start_tracker(tmp_path, 50, IdleClient)
    client.submit(FinishRecord(state="finished"))
    assert list(client.take_records()) == ["StartRecord", [0, 1, 2], [3, 4, 5], "FinishRecord"]
    assert client.num_submitted == 52
    client.kill()
    assert client.wait(0)
    assert list(client.poll_messages()) == ["swanlab: stopped before all records were delivered"]


@pytest.mark.usefixtures("working_tracker")
def test_working_tracker_receives_all_records(tmp_path: Path) -> None:
    client = start_tracker(tmp_path)
    client.submit(figures(1, float("nan")))
    client.submit(FinishRecord(state="finished"))
    assert client.wait(LONG)
    assert client.num_delivered == client.num_submitted == 3
    (started,) = client.poll_messages()
    assert started.startswith("SwanLab: offline")
    client.kill()
    assert list(client.poll_messages()) == [], "one that has ended is not ended again"


def test_tracker_process_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_manager.sys, "executable", str(tmp_path / "no-python"))
    client = start_tracker(tmp_path)
    assert client.wait(LONG)
    (stopped,) = client.poll_messages()
    assert "No such file" in stopped


@pytest.mark.usefixtures("working_tracker")
@pytest.mark.parametrize("has_unread_data", [True, False])
def test_tracker_of_ended_run_marks_it_failed(tmp_path: Path, has_unread_data: bool) -> None:
    """Closing a socket with unread data resets the connection."""
    ours, theirs = Pipe()
    with theirs:
        process = start_process("swanlab", theirs.fileno(), tmp_path / "log")
    with ours:
        ours.send(begin(tmp_path))
        assert ours.poll(LONG), "no reply"
        if not has_unread_data:
            ours.recv()
    try:
        assert process.wait(LONG) == 0
    finally:
        process.kill()
    assert (tmp_path / "swanlab" / "finished-crashed").exists()


@pytest.mark.usefixtures("working_tracker")
def test_tracker_process_ignores_job_signals(tmp_path: Path) -> None:
    client = start_tracker(tmp_path)
    while not list(client.poll_messages()):
        assert not client.wait(0.01)
    assert client.process is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        client.process.send_signal(number)
    client.submit(FinishRecord(state="interrupted"))
    assert client.wait(LONG)
    assert client.num_delivered == 2
    assert (tmp_path / "swanlab" / "finished-aborted").exists()


def test_hung_tracker_of_dead_run_is_killed(tmp_path, monkeypatch):
    install_broken_tracker(monkeypatch, tmp_path, "hangs")
    program = "import finesight.track.tracker_manager as manager; manager.ORPHAN_TIMEOUT_S = 1"
    monkeypatch.setattr(tracker_manager, "PROGRAM", program + tracker_manager.PROGRAM)
    ours, theirs = Pipe()
    with theirs:
        process = start_process("swanlab", theirs.fileno(), tmp_path / "log")
    with ours:
        ours.send(begin(tmp_path))
        assert ours.recv()
        ours.send(figures(1))
    try:
        assert process.wait(LONG) == -signal.SIGALRM
    finally:
        process.kill()
