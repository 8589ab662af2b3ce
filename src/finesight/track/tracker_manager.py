"""Send metrics, images and alerts to all trackers of a run without blocking the training.

For each tracker, a thread passes queued records to a process, which runs the tracker package. This
limits side effects of the package, such as signal handlers, threads and hangs at exit. A tracker
that fails, times out or crashes is disabled, and its process is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from finesight.errors import TrainingInterrupted, UserError
from finesight.files.bounded_files import read_bytes
from finesight.files.storage import write_file
from finesight.settings.config import Recipe, TrackerKind
from finesight.settings.manifest import TRACKING_FOLDER
from finesight.track.tracker import Tracker
from finesight.track.tracker_records import (
    AlertRecord,
    FinishRecord,
    ImagesRecord,
    MetricsRecord,
    RunState,
    StartRecord,
    StepMetrics,
    TrackerRecord,
    redact,
)
from finesight.tracker_components import TRACKERS, AlertLevel

RESPONSE_TIMEOUT_S = 120.0
"""Maximum seconds until the tracker replies to a record.

It exceeds a network outage of a minute.
"""

ORPHAN_TIMEOUT_S = 300
"""Seconds after which a call ends the process of a tracker, if the training process has died."""

MAX_QUEUED_RECORDS = 1000
"""Maximum number of queued records; further ones are dropped."""

MAX_BATCHED_STEPS = 50
"""Maximum number of steps in a record.

With one request per step, a remote tracker would be slower than the training.
"""

EXIT_TIMEOUT_S = 5.0
"""Seconds that the tracker process may take to exit after the run is closed."""


def run_tracker(kind: TrackerKind, fd: int) -> None:
    """Pass records from a connection to one tracker until the run ends.

    This is the program of the tracker process. If the training process dies, the run is closed as
    failed.
    """
    # A scheduler signals all processes of a job. This process ends after the run.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    tracker: Tracker | None = None
    # The connection fails when the training process dies.
    with Connection(fd) as connection, suppress(EOFError, ConnectionError):
        while True:
            signal.alarm(0)
            record: TrackerRecord = connection.recv()
            signal.alarm(ORPHAN_TIMEOUT_S)
            error = ""
            message = None
            try:
                tracker = tracker or TRACKERS.load_tracker(kind)()
                message = tracker.handle(record)
            except Exception as problem:  # any error of the package
                traceback.print_exc()
                error = redact(f"{type(problem).__name__}: {problem}")
            connection.send((error, message))
            if error or isinstance(record, FinishRecord):
                return
    if tracker is not None:
        signal.alarm(ORPHAN_TIMEOUT_S)
        tracker.finish_run(FinishRecord(state="failed", reason="the training process died"))


PROGRAM = """
import sys
from finesight.track.tracker_manager import run_tracker
run_tracker(sys.argv[1], int(sys.argv[2]))
"""


def start_process(kind: TrackerKind, fd: int, log_file: Path) -> subprocess.Popen[bytes]:
    """Start the process of a tracker with the file descriptor of its connection."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as output:
        return subprocess.Popen(
            # -P: do not import packages from the working directory, such as a folder of runs.
            [sys.executable, "-P", "-c", PROGRAM, kind, str(fd)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**TRACKERS[kind].telemetry_off_env, **os.environ},
            pass_fds=[fd],
            # The run handles Ctrl-C and notifies its trackers.
            start_new_session=True,
        )


class TrackerClient:
    """Client that sends records to one tracker.

    Creating it starts the thread and the process of the tracker.

    Attributes:
        num_submitted: Number of submitted records, including dropped ones.
        process: Process of the tracker; None before it has started.
    """

    def __init__(self, kind: TrackerKind, log_file: Path) -> None:
        self.kind = kind
        self._log_file = log_file
        self.num_submitted = 0
        self.num_delivered = 0
        self._records: deque[TrackerRecord] = deque()
        self._has_records = threading.Condition()
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._finished = threading.Event()
        self.process: subprocess.Popen[bytes] | None = None
        self.thread = threading.Thread(target=self._run, name=f"track {kind}", daemon=True)
        self.thread.start()

    def submit(self, record: TrackerRecord) -> None:
        """Queue a record without blocking, and merge metrics with the previous ones.

        The record is dropped if the queue is full or the tracker has stopped.
        """
        self.num_submitted += 1
        is_required = isinstance(record, StartRecord | FinishRecord)
        with self._has_records:
            match self._records[-1] if self._records else None, record:
                case _ if self._finished.is_set():
                    self._records.clear()
                case MetricsRecord(steps=last), MetricsRecord(steps=new) if (
                    len(last) < MAX_BATCHED_STEPS
                ):
                    self._records[-1] = MetricsRecord(steps=last + new)
                case _ if len(self._records) < MAX_QUEUED_RECORDS or is_required:
                    self._records.append(record)
            self._has_records.notify()

    def poll_messages(self) -> Iterator[str]:
        """Yield the messages for the user since the last call."""
        while not self._messages.empty():
            yield self._messages.get()

    def wait(self, timeout_s: float) -> bool:
        """Wait until the tracker has finished or failed. Returns False after the timeout."""
        return self._finished.wait(timeout_s)

    def kill(self) -> None:
        """Stop the tracker immediately; queued records are lost."""
        if not self._finished.is_set():
            self._stop("stopped before all records were delivered")
            if self.process is not None:
                self.process.kill()

    def _stop(self, problem: str) -> None:
        self._messages.put(f"{self.kind}: {problem}")
        self._finished.set()

    def _run(self) -> None:
        connection, child_connection = multiprocessing.Pipe()
        problem = ""
        try:
            with connection:
                with child_connection:
                    self.process = start_process(
                        self.kind, child_connection.fileno(), self._log_file
                    )
                problem = self._deliver_records(connection)
        except (EOFError, ConnectionError):
            problem = f"the tracker process exited; see {self._log_file}"
        except (OSError, ValueError) as error:
            problem = str(error)
        # A killed tracker has reported its reason already.
        if problem and not self._finished.is_set():
            self._stop(f"{problem}; the run continues without it")
        self._finished.set()
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(EXIT_TIMEOUT_S)
            self.process.kill()
            self.process.wait()

    def _deliver_records(self, connection: Connection) -> str:
        """Send records until the run ends; return the error of the tracker, if any."""
        while not self._finished.is_set():
            with self._has_records:
                self._has_records.wait_for(lambda: self._records)
                record = self._records.popleft()
            connection.send(record)
            if not connection.poll(RESPONSE_TIMEOUT_S):
                return f"no response for {RESPONSE_TIMEOUT_S:g} s"
            error, message = connection.recv()
            if error:
                return str(error)
            self.num_delivered += len(record.steps) if isinstance(record, MetricsRecord) else 1
            if message is not None:
                self._messages.put(message)
            if isinstance(record, FinishRecord):
                break
        return ""


LogFn = Callable[[str], None]

RUN_ID_FILE = "id.txt"

FINISH_TIMEOUTS_S: dict[RunState, float] = {"finished": 60.0, "failed": 20.0, "interrupted": 20.0}
"""Maximum seconds for all trackers to deliver queued records at the end of a run, by its state."""

WAIT_NOTICE_DELAY_S = 2.0


class TrackerManager:
    """Send records to all trackers of a run.

    Only `finish_run` blocks. Messages of trackers are logged at the next call of a method.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, step: int, log: LogFn) -> None:
        self._recipe = recipe
        self._run_dir = run_dir
        self._step = step
        self._log = log
        self._clients: list[TrackerClient] = []

    @property
    def is_active(self) -> bool:
        """True while any tracker accepts records."""
        return any(not client.wait(0) for client in self._clients)

    def start_run(self, run_facts: Mapping[str, Any]) -> None:
        """Start or resume the run in all trackers.

        The recipe and `run_facts`, such as the model size, are logged as its settings, and with
        them the values of `track.config` under `config`.
        """
        settings = self._recipe.model_dump(mode="json", exclude={"track"}) | {
            "run": dict(run_facts)
        }
        folder = self._run_dir.resolve() / TRACKING_FOLDER
        for tracker in self._recipe.track:
            client = TrackerClient(tracker.kind, folder / f"{tracker.kind}.log")
            self._clients.append(client)
            own_settings = {} if tracker.config is None else {"config": tracker.config}
            client.submit(
                StartRecord(
                    tracker=tracker,
                    name=tracker.run_name or folder.parent.name,
                    description=tracker.description or "",
                    folder=folder / tracker.kind,
                    settings=settings | own_settings,
                    id=load_run_id(folder / RUN_ID_FILE),
                    step=self._step,
                )
            )
        self._log_messages()

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Queue the metrics of a training step for all trackers."""
        self._step = step
        self._submit(MetricsRecord(steps=(StepMetrics(step=step, values=dict(values)),)))

    def log_examples(
        self, step: int, before: Path, after: Path, sample_ids: Collection[str] | None
    ) -> None:
        """Queue images of samples with the boxes of two prediction files for all trackers."""
        # Only needed with a tracker.
        from finesight.track.tracked_images import render_example_images

        images = render_example_images(before, after, sample_ids)
        if images:
            self._submit(ImagesRecord(step=step, images=tuple(images)))

    def send_alert(self, level: AlertLevel, title: str, text: str) -> None:
        """Queue an alert about the current step for all trackers."""
        self._submit(AlertRecord(step=self._step, level=level, title=title, text=text))

    def finish_run(self, record: FinishRecord) -> None:
        """Close the run in all trackers, and wait until queued records are delivered.

        After the time limit, trackers are stopped, and the number of lost records is logged.
        """
        for client in self._clients:
            client.submit(record)
        start_time = time.monotonic()
        timeout_s = FINISH_TIMEOUTS_S[record.state]
        self._wait_until(start_time + min(WAIT_NOTICE_DELAY_S, timeout_s))
        if unfinished := [client.kind for client in self._clients if not client.wait(0)]:
            self._log(f"waiting for {', '.join(unfinished)} (at most {timeout_s:g} s)")
        self._wait_until(start_time + timeout_s)
        for client in self._clients:
            client.kill()
        self._log_messages()
        for client in self._clients:
            if num_lost := client.num_submitted - client.num_delivered:
                self._log(
                    f"{client.kind}: {num_lost} of {client.num_submitted} records were not"
                    " delivered; metrics.jsonl contains all metrics"
                )

    def _wait_until(self, deadline: float) -> None:
        for client in self._clients:
            client.wait(max(0.0, deadline - time.monotonic()))

    def _submit(self, record: TrackerRecord) -> None:
        for client in self._clients:
            client.submit(record)
        self._log_messages()

    def _log_messages(self) -> None:
        """Log the new messages of trackers, in the training thread."""
        for client in self._clients:
            for message in client.poll_messages():
                self._log(message)


def load_run_id(file: Path) -> str:
    """Return the ID of a run in all trackers, which is random, and stored for a resume."""
    with suppress(UserError):
        run_id = read_bytes(file, expected="the ID of a run").decode(errors="replace").strip()
        if re.fullmatch("[0-9a-f]{8}", run_id):
            return run_id
    run_id = secrets.token_hex(4)
    # Without the file, a resume starts a new run.
    with suppress(UserError, OSError):
        write_file(file, f"{run_id}\n".encode())
    return run_id


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
