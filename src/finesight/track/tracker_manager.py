"""Send metrics, images and alerts to all trackers of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from finesight.bounded_files import read_bytes
from finesight.config import Recipe, TrackerSettings
from finesight.errors import TrainingInterrupted, UserError
from finesight.run_files import TRACKING_FOLDER
from finesight.storage import write_file
from finesight.track.tracker_client import TrackerClient, TrackerStopped
from finesight.track.tracker_records import (
    AlertLevel,
    AlertRecord,
    FinishRecord,
    ImagesRecord,
    MetricsRecord,
    RunStarted,
    RunState,
    StartRecord,
    StepMetrics,
    TrackedImage,
    TrackerRecord,
)

LogFn = Callable[[str], None]

RUN_IDS_FILE = "ids.json"

FINISH_TIMEOUTS_S: dict[RunState, float] = {"finished": 60.0, "failed": 20.0, "interrupted": 20.0}
"""Maximum seconds for all trackers to deliver queued records at the end of a run, by its state."""

WAIT_NOTICE_DELAY_S = 2.0
"""Seconds of waiting for trackers before a message is logged."""


class TrackerRun(BaseModel):
    """Run id of a tracker, stored so that a resumed training continues its run."""

    tracker: TrackerSettings
    id: str


_TRACKER_RUNS_ADAPTER: TypeAdapter[list[TrackerRun]] = TypeAdapter(list[TrackerRun])


class TrackerManager:
    """Send records to all trackers of a run.

    Only `finish_run` blocks. Messages of trackers are logged at the next call of a method.

    Args:
        recipe: Recipe with the trackers.
        run_dir: Run folder.
        step: Number of finished steps.
        log: Logs a message.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, step: int, log: LogFn) -> None:
        self._recipe, self._run_dir, self._step, self._log = recipe, run_dir, step, log
        self._folder = run_dir / TRACKING_FOLDER
        self._is_started = False
        self._tracker_runs = (
            _load_tracker_runs(self._folder / RUN_IDS_FILE, log) if recipe.track else []
        )
        self._clients = [
            (tracker, TrackerClient(tracker.kind, self._folder / f"{tracker.kind}.log"))
            for tracker in recipe.track
        ]

    @property
    def is_active(self) -> bool:
        """Whether any tracker still accepts records."""
        return any(not client.wait(0) for _, client in self._clients)

    def start_run(self, run_facts: Mapping[str, Any]) -> None:
        """Start or resume the run in all trackers.

        The recipe and `run_facts`, such as the model size, are logged as its settings.
        """
        self._is_started = True
        settings = self._recipe.model_dump(mode="json", exclude={"track"}) | {
            "run": dict(run_facts)
        }
        for tracker, client in self._clients:
            client.submit(
                StartRecord(
                    tracker=tracker,
                    name=self._run_dir.resolve().name,
                    folder=self._folder.resolve() / tracker.kind,
                    settings=settings,
                    step=self._step,
                    id=self.get_run_id(tracker),
                )
            )
        self._log_responses()

    def get_run_id(self, tracker: TrackerSettings) -> str | None:
        """Return the stored run id of a tracker, or None for a new run."""
        return next(
            (
                tracker_run.id
                for tracker_run in self._tracker_runs
                if tracker_run.tracker == tracker
            ),
            None,
        )

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
                match response:
                    case RunStarted():
                        self._log(response.message)
                        self._save_run_id(tracker, response.id)
                    case TrackerStopped():
                        self._log(f"{tracker.kind}: {response.message}")

    def _save_run_id(self, tracker: TrackerSettings, run_id: str | None) -> None:
        if run_id is None:
            return
        others = [
            tracker_run
            for tracker_run in self._tracker_runs
            if tracker_run.tracker.kind != tracker.kind
        ]
        self._tracker_runs = [*others, TrackerRun(tracker=tracker, id=run_id)]
        try:
            write_file(
                self._folder / RUN_IDS_FILE,
                _TRACKER_RUNS_ADAPTER.dump_json(self._tracker_runs, indent=1) + b"\n",
            )
        except (UserError, OSError) as error:
            self._log(f"{tracker.kind}: run ID not saved, so a resume starts a new run ({error})")


@contextmanager
def start_trackers(
    recipe: Recipe, run_dir: Path, step: int, log: LogFn
) -> Iterator[TrackerManager]:
    """Start the trackers of a recipe, and close their runs when the `with` block ends.

    An exception in the block marks the runs as interrupted or failed, and propagates.

    Args:
        recipe: Recipe with the trackers.
        run_dir: Run folder.
        step: Number of finished steps.
        log: Logs a message.
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


def _load_tracker_runs(path: Path, log: LogFn) -> list[TrackerRun]:
    if not path.exists():
        return []
    try:
        return _TRACKER_RUNS_ADAPTER.validate_json(read_bytes(path, expected="run IDs of trackers"))
    except (UserError, ValidationError) as error:
        log(f"{path} is unreadable, so trackers start new runs ({type(error).__name__})")
        return []
