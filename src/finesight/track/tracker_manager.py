"""Send metrics, images and alerts to all trackers of a run without blocking the training.

For each tracker, a thread passes queued records to a process, which runs the tracker package. A
tracker that fails, times out or crashes is disabled, and its process is killed.
"""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, TypeAdapter, ValidationError

from finesight.bounded_files import read_bytes
from finesight.config import Recipe, TrackerKind, TrackerSettings
from finesight.errors import TrainingInterrupted, UserError
from finesight.manifest import TRACKING_FOLDER
from finesight.storage import write_file
from finesight.track.backends import TRACKERS
from finesight.track.tracker_records import (
    AlertLevel,
    AlertRecord,
    FinishRecord,
    ImagesRecord,
    MetricsRecord,
    RecordReply,
    RunStarted,
    RunState,
    StartRecord,
    StepMetrics,
    TrackedImage,
    TrackerRecord,
)

RESPONSE_TIMEOUT_S = 120.0
"""Maximum seconds until the tracker replies to a record.

It exceeds a network outage of a minute.
"""

MAX_QUEUED_RECORDS = 10_000
"""Maximum number of queued records; further ones are dropped.

A record takes about a kilobyte, except for the images of an evaluation.
"""

MAX_BATCHED_STEPS = 50

EXIT_TIMEOUT_S = 5.0
"""Seconds that the tracker process may take to exit after the run is closed."""


class _TrackerFailedError(Exception):
    """Raised when the tracker process exits or reports an error."""


@dataclass(frozen=True)
class TrackerStopped:
    """Response of a tracker that stopped before the end of the run, with the reason."""

    message: str


class TrackerClient:
    """Client that sends records to one tracker.

    Creating it starts the thread and the process of the tracker.

    Attributes:
        num_submitted: Number of submitted records, including dropped ones.
        process: Process of the tracker; None before it has started.
    """

    def __init__(self, kind: TrackerKind, log_file: Path) -> None:
        self.kind, self._log_file = kind, log_file
        self.num_submitted, self.num_delivered = 0, 0
        self._queue: queue.SimpleQueue[TrackerRecord] = queue.SimpleQueue()
        self._responses: queue.SimpleQueue[RunStarted | TrackerStopped] = queue.SimpleQueue()
        self._finished = threading.Event()
        self.process: subprocess.Popen[bytes] | None = None
        self.thread = threading.Thread(target=self._run, name=f"track {kind}", daemon=True)
        self.thread.start()

    def submit(self, record: TrackerRecord) -> None:
        """Queue a record without blocking.

        The record is dropped if the queue is full or the tracker has stopped.
        """
        self.num_submitted += 1
        is_required = isinstance(record, StartRecord | FinishRecord)
        has_capacity = self._queue.qsize() < MAX_QUEUED_RECORDS or is_required
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
        if self.process is not None:
            self.process.kill()

    def _run(self) -> None:
        connection, child_connection = socket.socketpair()
        try:
            with connection, connection.makefile("rb") as response_file:
                with child_connection:
                    self.process = _start_process(self.kind, child_connection, self._log_file)
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
            if self.process is not None:
                try:
                    self.process.wait(EXIT_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait()

    def _send_records(self, connection: socket.socket, response_file: BinaryIO) -> None:
        connection.settimeout(RESPONSE_TIMEOUT_S)
        for record in self.iter_batched():
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

    def iter_batched(self) -> Iterator[TrackerRecord]:
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
            env={**TRACKERS[kind].telemetry_off_env, **os.environ},
            pass_fds=[fd],
            # The run handles Ctrl-C and notifies its trackers.
            start_new_session=True,
        )


LogFn = Callable[[str], None]

RUN_IDS_FILE = "ids.json"

FINISH_TIMEOUTS_S: dict[RunState, float] = {"finished": 60.0, "failed": 20.0, "interrupted": 20.0}
"""Maximum seconds for all trackers to deliver queued records at the end of a run, by its state."""

WAIT_NOTICE_DELAY_S = 2.0


class TrackerRun(BaseModel):
    """Run id of a tracker, stored so that a resumed training continues its run."""

    tracker: TrackerSettings
    id: str


_RUN_IDS_ADAPTER: TypeAdapter[list[TrackerRun]] = TypeAdapter(list[TrackerRun])


class TrackerManager:
    """Send records to all trackers of a run.

    Only `finish_run` blocks. Messages of trackers are logged at the next call of a method.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, step: int, log: LogFn) -> None:
        self._recipe, self._run_dir, self._step, self._log = recipe, run_dir, step, log
        self._folder = run_dir / TRACKING_FOLDER
        self._is_started = False
        self._run_ids = _load_run_ids(self._folder / RUN_IDS_FILE, log) if recipe.track else []
        self._clients = [
            (tracker, TrackerClient(tracker.kind, self._folder / f"{tracker.kind}.log"))
            for tracker in recipe.track
        ]

    @property
    def is_active(self) -> bool:
        """True while any tracker accepts records."""
        return any(not client.wait(0) for _, client in self._clients)

    def start_run(self, run_facts: Mapping[str, Any]) -> None:
        """Start or resume the run in all trackers.

        The recipe and `run_facts`, such as the model size, are logged as its settings.
        """
        self._is_started = True
        settings = self._recipe.model_dump(mode="json", exclude={"track"}) | {
            "run": dict(run_facts)
        }
        name, folder = self._run_dir.resolve().name, self._folder.resolve()
        for tracker, client in self._clients:
            client.submit(
                StartRecord(
                    tracker=tracker,
                    name=name,
                    folder=folder / tracker.kind,
                    settings=settings,
                    step=self._step,
                    id=self.get_run_id(tracker),
                )
            )
        self._log_responses()

    def get_run_id(self, tracker: TrackerSettings) -> str | None:
        """Return the stored run id of a tracker, or None for a new run."""
        return next((run.id for run in self._run_ids if run.tracker == tracker), None)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Queue the metrics of a training step for all trackers."""
        self._step = step
        self._submit(MetricsRecord(steps=(StepMetrics(step=step, values=dict(values)),)))

    def log_images(self, step: int, images: Sequence[TrackedImage]) -> None:
        """Queue the images of an evaluation after `step` steps for all trackers."""
        if images:
            self._submit(ImagesRecord(step=step, images=tuple(images)))

    def send_alert(self, level: AlertLevel, title: str, text: str) -> None:
        """Queue an alert about the current step for all trackers."""
        self._submit(AlertRecord(step=self._step, level=level, title=title, text=text))

    def finish_run(self, record: FinishRecord) -> None:
        """Close the run in all trackers, and wait until queued records are delivered.

        After the time limit, trackers are stopped, and the number of lost records is logged.
        """
        if not self._is_started:
            for _, client in self._clients:
                client.kill()
            return
        for _, client in self._clients:
            client.submit(record)
        start_time, timeout_s = time.monotonic(), FINISH_TIMEOUTS_S[record.state]
        self._wait_until(start_time + min(WAIT_NOTICE_DELAY_S, timeout_s))
        if unfinished := [tracker.kind for tracker, client in self._clients if not client.wait(0)]:
            self._log(f"waiting for {', '.join(unfinished)} (at most {timeout_s:g} s)")
        self._wait_until(start_time + timeout_s)
        for _, client in self._clients:
            client.kill()
        self._log_responses()
        for tracker, client in self._clients:
            if client.num_delivered < client.num_submitted:
                num_lost = client.num_submitted - client.num_delivered
                self._log(
                    f"{tracker.kind}: {num_lost} of {client.num_submitted} records were not"
                    " delivered; metrics.jsonl contains all metrics"
                )

    def _wait_until(self, deadline: float) -> None:
        for _, client in self._clients:
            client.wait(max(0.0, deadline - time.monotonic()))

    def _submit(self, record: TrackerRecord) -> None:
        if self._is_started:
            for _, client in self._clients:
                client.submit(record)
            self._log_responses()

    def _log_responses(self) -> None:
        """Log the new messages of trackers, and save their run ids.

        It runs in the training thread, not in the threads of the clients.
        """
        for tracker, client in self._clients:
            for response in client.poll_responses():
                if isinstance(response, TrackerStopped):
                    self._log(f"{tracker.kind}: {response.message}")
                    continue
                self._log(response.message)
                if response.id is not None:
                    self._save_run_id(TrackerRun(tracker=tracker, id=response.id))

    def _save_run_id(self, run: TrackerRun) -> None:
        kind = run.tracker.kind
        self._run_ids = [*(one for one in self._run_ids if one.tracker.kind != kind), run]
        content = _RUN_IDS_ADAPTER.dump_json(self._run_ids, indent=1) + b"\n"
        try:
            write_file(self._folder / RUN_IDS_FILE, content)
        except (UserError, OSError) as error:
            self._log(f"{kind}: run ID not saved, so a resume starts a new run ({error})")


@contextmanager
def start_trackers(
    recipe: Recipe, run_dir: Path, step: int, log: LogFn
) -> Iterator[TrackerManager]:
    """Start the trackers of a recipe, and close their runs when the `with` block ends.

    An exception in the block marks the runs as interrupted or failed, and propagates.
    """
    tracker_manager = TrackerManager(recipe, run_dir, step, log)
    try:
        yield tracker_manager
    except TrainingInterrupted as interruption:
        tracker_manager.finish_run(FinishRecord(state="interrupted", reason=str(interruption)))
        raise
    except BaseException as error:
        reason = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        tracker_manager.send_alert("error", "run stopped", reason)
        tracker_manager.finish_run(FinishRecord(state="failed", reason=reason))
        raise
    tracker_manager.finish_run(FinishRecord(state="finished"))


def _load_run_ids(path: Path, log: LogFn) -> list[TrackerRun]:
    if not path.exists():
        return []
    try:
        return _RUN_IDS_ADAPTER.validate_json(read_bytes(path, expected="run IDs of trackers"))
    except (UserError, ValidationError) as error:
        log(f"{path} is unreadable, so trackers start new runs ({type(error).__name__})")
        return []
