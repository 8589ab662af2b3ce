"""Tests of the queue, thread and process of a tracker with short timeouts."""

from __future__ import annotations

import io
import queue
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from broken_trackers import install_broken_tracker

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


def start_hanging_tracker(
    folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> TrackerClient:
    """Start a tracker without responses and submit metrics of several steps."""
    install_broken_tracker(monkeypatch, folder, "hangs")
    one = TrackerClient("swanlab", folder / "log")
    one.submit(begin(folder))
    for step in range(steps):
        one.submit(figures(step))
    return one


def test_unresponsive_tracker_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_manager, "RESPONSE_TIMEOUT_S", 0.3)
    one = start_hanging_tracker(tmp_path, monkeypatch, 5)
    assert one.wait(LONG)
    assert one.num_delivered < one.num_submitted == 6
    assert list(one.poll_responses())[-1] == TrackerStopped(
        "no response for 0.3 s; the run continues without it"
    )
    one.submit(FinishRecord(state="finished"))
    assert one.num_submitted == 7


def test_records_over_the_queue_limit_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_manager, "MAX_QUEUED_RECORDS", 3)
    one = start_hanging_tracker(tmp_path, monkeypatch, 50)
    one.kill()
    assert one.wait(0)
    assert one.num_submitted == 51
    assert one.num_delivered <= 1
    assert list(one.poll_responses())[-1] == TrackerStopped(
        "stopped before all records were delivered"
    )


def test_pending_metrics_are_batched_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Still(TrackerClient):
        """Client that delivers no records."""

        def _run(self) -> None:
            pass

    monkeypatch.setattr(tracker_manager, "MAX_BATCHED_STEPS", 3)
    one = Still("swanlab", tmp_path / "log")
    alert = AlertRecord(step=5, level="info", title="t", text="t")
    given = [
        begin(tmp_path),
        *map(figures, range(5)),
        alert,
        figures(6),
        FinishRecord(state="finished"),
    ]
    for record in given:
        one.submit(record)
    sent = list(one.iter_batched())
    steps = [
        [row.step for row in r.steps] if isinstance(r, MetricsRecord) else r.type for r in sent
    ]
    assert steps == ["start", [0, 1, 2], [3, 4], "alert", [6], "finish"]


def test_working_tracker_receives_all_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_broken_tracker(monkeypatch, tmp_path, "raises")
    one = TrackerClient("swanlab", tmp_path / "log")
    one.submit(begin(tmp_path))
    one.submit(figures(1, float("nan")))
    one.submit(FinishRecord(state="finished"))
    assert one.wait(LONG)
    assert one.num_delivered == one.num_submitted == 3
    (started,) = one.poll_responses()
    assert isinstance(started, RunStarted)
    assert started.id == "fake"
    one.kill()
    assert list(one.poll_responses()) == [], "one that has ended is not ended again"


def test_tracker_process_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_manager.sys, "executable", str(tmp_path / "no-python"))
    one = TrackerClient("swanlab", tmp_path / "log")
    one.submit(begin(tmp_path))
    assert one.wait(LONG)
    (gone,) = one.poll_responses()
    assert "No such file" in str(gone)


PARENT = """
import os, signal, sys
from pathlib import Path
from finesight.config import TrackerSettings
from finesight.track.tracker_manager import TrackerClient
from finesight.track.tracker_records import StartRecord

folder = Path(sys.argv[1])
one = TrackerClient("swanlab", folder / "log")
tracker = TrackerSettings(kind="swanlab", uri="offline")
record = StartRecord(tracker=tracker, name="x", folder=folder / "swanlab", settings={})
one.submit(record)
while not list(one.poll_responses()):
    assert not one.wait(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_tracker_of_killed_run_marks_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_broken_tracker(monkeypatch, tmp_path, "raises")
    killed = subprocess.run([sys.executable, "-c", PARENT, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    closed = tmp_path / "swanlab" / "finished-crashed"
    for _ in range(round(LONG / 0.02)):
        if closed.exists():
            return
        time.sleep(0.02)
    raise AssertionError("nobody has closed it")


def test_tracker_ends_when_its_connection_is_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_broken_tracker(monkeypatch, tmp_path, "raises")
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "finesight.track.tracker_process", "swanlab"]
    with theirs:
        fd = theirs.fileno()
        process = subprocess.Popen([*command, str(fd)], pass_fds=[fd])
    with ours:
        ours.sendall(begin(tmp_path).model_dump_json().encode() + b"\n")
        assert select.select([ours], [], [], LONG)[0], "no reply"
    # Closing a socket with unread data resets the connection.
    try:
        assert process.wait(LONG) == 0
    finally:
        process.kill()
    assert (tmp_path / "swanlab" / "finished-crashed").exists()


def test_tracker_process_ignores_job_signals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_broken_tracker(monkeypatch, tmp_path, "raises")
    one = TrackerClient("swanlab", tmp_path / "log")
    one.submit(begin(tmp_path))
    while not (result := list(one.poll_responses())):
        assert not one.wait(0.01)
    assert isinstance(result[0], RunStarted)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        one.process.send_signal(number)
    one.submit(FinishRecord(state="interrupted"))
    assert one.wait(LONG)
    assert one.num_delivered == 2
    assert (tmp_path / "swanlab" / "finished-aborted").exists()


def test_hung_tracker_of_dead_run_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(tracker_process, "ORPHAN_TIMEOUT_S", 0.01)
    monkeypatch.setattr(tracker_process.os, "_exit", ended.append)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    tracker_process.read_lines(io.BytesIO(b"one\ntwo\n"), lines)
    assert [lines.get() for _ in range(3)] == [b"one\n", b"two\n", b""]
    assert ended == [1]
