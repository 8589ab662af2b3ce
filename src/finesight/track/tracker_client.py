"""Client that sends records to one tracker without blocking the training.

A thread passes queued records to a process, which runs the tracker package. A tracker that fails,
times out or crashes is disabled, and its process is killed.
"""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from finesight.config import TrackerKind
from finesight.track.tracker_records import (
    FinishRecord,
    MetricsRecord,
    RecordReply,
    RunStarted,
    StartRecord,
    StepMetrics,
    TrackerRecord,
)
from finesight.track.tracker_registry import TELEMETRY_OFF_ENV

RESPONSE_TIMEOUT_S = 120.0
"""Maximum seconds until the tracker replies to a record.

It exceeds a network outage of a minute.
"""

MAX_QUEUED_RECORDS = 10_000
"""Maximum number of queued records; further ones are dropped.

A record takes about a kilobyte, except for the images of an evaluation.
"""

MAX_BATCHED_STEPS = 50
"""Maximum number of training steps whose metrics are sent in one record."""

EXIT_TIMEOUT_S = 5.0
"""Seconds that the tracker process may take to exit after the run is closed."""


class _TrackerFailedError(Exception):
    """Raised when the tracker process exits or reports an error."""


class TrackerStopped(NamedTuple):
    """Response of a tracker that stopped before the end of the run, with the reason."""

    message: str


class TrackerClient:
    """Client that sends records to one tracker.

    Creating it starts the thread and the process of the tracker.

    Args:
        kind: Tracker package.
        log_file: File for the output of the tracker process.

    Attributes:
        num_submitted: Number of submitted records, including dropped ones.
        num_delivered: Number of records that the tracker accepted.
    """

    def __init__(self, kind: TrackerKind, log_file: Path) -> None:
        self.kind, self._log_file = kind, log_file
        self.num_submitted, self.num_delivered = 0, 0
        self._queue: queue.SimpleQueue[TrackerRecord] = queue.SimpleQueue()
        self._responses: queue.SimpleQueue[RunStarted | TrackerStopped] = queue.SimpleQueue()
        self._finished = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name=f"track {kind}", daemon=True)
        self._thread.start()

    def submit(self, record: TrackerRecord) -> None:
        """Queue a record without blocking.

        The record is dropped if the queue is full or the tracker has stopped.
        """
        self.num_submitted += 1
        has_capacity = (
            isinstance(record, StartRecord | FinishRecord)
            or self._queue.qsize() < MAX_QUEUED_RECORDS
        )
        if has_capacity and not self._finished.is_set():
            self._queue.put(record)

    def poll_responses(self) -> Iterator[RunStarted | TrackerStopped]:
        """Yield the responses of the tracker since the last call."""
        while not self._responses.empty():
            yield self._responses.get()

    def wait(self, timeout_s: float) -> bool:
        """Wait until the tracker has finished or failed. Returns False after the timeout."""
        return self._finished.wait(timeout_s)

    def kill(self) -> None:
        """Stop the tracker immediately; queued records are lost."""
        if self._finished.is_set():
            return
        self._responses.put(TrackerStopped("stopped before all records were delivered"))
        self._finished.set()
        if self._process is not None:
            self._process.kill()

    def _run(self) -> None:
        connection, child_connection = socket.socketpair()
        try:
            with connection, connection.makefile("rb") as response_file:
                with child_connection:
                    self._process = _start_process(self.kind, child_connection, self._log_file)
                if not self._finished.is_set():
                    self._send_records(connection, response_file)
        except (_TrackerFailedError, OSError, ValueError) as error:
            # A killed tracker has reported its reason already.
            if not self._finished.is_set():
                timed_out = isinstance(error, TimeoutError)
                reason = f"no response for {RESPONSE_TIMEOUT_S:g} s" if timed_out else str(error)
                self._responses.put(TrackerStopped(f"{reason}; the run continues without it"))
        finally:
            self._finished.set()
            if self._process is not None:
                _wait_or_kill(self._process)

    def _send_records(self, connection: socket.socket, response_file: BinaryIO) -> None:
        connection.settimeout(RESPONSE_TIMEOUT_S)
        for record in self._iter_batched():
            connection.sendall(record.model_dump_json().encode() + b"\n")
            line = response_file.readline()
            if not line.endswith(b"\n"):
                raise _TrackerFailedError(f"the tracker process exited; see {self._log_file}")
            reply = RecordReply.model_validate_json(line)
            if reply.error is not None:
                raise _TrackerFailedError(reply.error)
            self.num_delivered += len(record.steps) if isinstance(record, MetricsRecord) else 1
            if reply.started is not None:
                self._responses.put(reply.started)

    def _iter_batched(self) -> Iterator[TrackerRecord]:
        """Yield queued records up to the end of the run, with consecutive metrics merged.

        With one request per step, a remote tracker would be slower than the training.
        """
        record: TrackerRecord | None = None
        while True:
            record = self._queue.get() if record is None else record
            step_metrics: list[StepMetrics] = []
            while isinstance(record, MetricsRecord) and len(step_metrics) < MAX_BATCHED_STEPS:
                step_metrics += record.steps
                record = None if self._queue.empty() else self._queue.get()
            if step_metrics:
                yield MetricsRecord(steps=tuple(step_metrics))
            elif record is not None:
                yield record
                if isinstance(record, FinishRecord):
                    return
                record = None


def _start_process(
    kind: TrackerKind, connection: socket.socket, log_file: Path
) -> subprocess.Popen[bytes]:
    fd = connection.fileno()
    # -P: do not import packages from the working directory, such as a folder `wandb`.
    command = [sys.executable, "-P", "-m", "finesight.track.tracker_process", kind, str(fd)]
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=TELEMETRY_OFF_ENV[kind] | os.environ,
            pass_fds=[fd],
            # The run handles Ctrl-C and notifies its trackers.
            start_new_session=True,
        )


def _wait_or_kill(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(EXIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
