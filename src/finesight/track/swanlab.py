"""Tracker for the SwanLab cloud, a self-hosted SwanLab server, or local SwanLab files."""

from __future__ import annotations

import os
from typing import Any

import requests
import swanlab

from finesight.config import TRACKER_MODES
from finesight.track.tracker import Tracker
from finesight.track.tracker_records import (
    AlertRecord,
    FinishRecord,
    ImagesRecord,
    MetricsRecord,
    RunStarted,
    RunState,
    StartRecord,
)

SWANLAB_STATES: dict[RunState, str] = {
    "finished": "success",
    "failed": "crashed",
    "interrupted": "aborted",
}


class SwanLabTracker(Tracker):
    """Tracker that logs to a SwanLab experiment.

    Machine, user, command, terminal output, code and packages are not recorded. Alerts are logged
    as texts, and sent to the webhook in the environment variable `SWANLAB_WEBHOOK`, if it is set.
    """

    def start_run(self, record: StartRecord) -> RunStarted:
        tracker = record.tracker
        record.folder.mkdir(parents=True, exist_ok=True)
        is_self_hosted = tracker.uri not in (None, *TRACKER_MODES["swanlab"])
        extra_settings = {"api_host": tracker.uri} if is_self_hosted else {}
        self._settings = settings = swanlab.Settings(
            interactive=False,
            probe=swanlab.Settings.Probe(
                hardware=False,
                runtime=False,
                requirements=False,
                git=False,
                swanlab=False,
                monitor=False,
            ),
            terminal=swanlab.Settings.Terminal(proxy_type="none"),
            **extra_settings,
        )
        init_options: dict[str, Any] = {
            "project": tracker.project,
            "name": record.name,
            "id": record.id,
            "resume": "never" if record.id is None else "allow",
            "config": record.settings,
            # A relative path, since SwanLab uploads it.
            "log_dir": ".",
            "settings": settings,
            "public": False,
        }
        os.chdir(record.folder)
        # Without a URI, SWANLAB_MODE applies.
        requested_mode = settings.mode if tracker.uri is None else tracker.uri
        mode = requested_mode if requested_mode in ("local", "offline", "disabled") else "online"
        reason = ""
        if mode == "online" and not settings.api_key:
            mode, reason = "offline", " (no key)"
        if mode == "online":
            try:
                self._run: Any = swanlab.init(mode="online", **init_options)
                return RunStarted(id=self._run.id, message=f"SwanLab: {self._run.url}")
            except Exception as error:  # SwanLab, HTTP and OS errors
                mode, reason = "offline", f" ({type(error).__name__}: {error})"
        self._run = swanlab.init(mode=mode, **init_options)
        run_files = record.folder / self._run.dir.name
        commands = {
            "offline": f"swanlab sync {run_files}",
            "local": f"swanlab watch {record.folder}",
        }
        return RunStarted(
            id=self._run.id, message=f"SwanLab: {mode}{reason}: {commands.get(mode, 'disabled')}"
        )

    def log_metrics(self, record: MetricsRecord) -> None:
        for step_metrics in record.steps:
            self._run.log(dict(step_metrics.values), step=step_metrics.step)

    def log_images(self, record: ImagesRecord) -> None:
        images = {
            name: swanlab.Image(image.decode(), caption=image.caption, file_type="jpg")
            for name, image in record.iter_named()
        }
        self._run.log(images, step=record.step)

    def send_alert(self, record: AlertRecord) -> None:
        self._run.log({"alerts": swanlab.Text(f"{record.title}: {record.text}")}, step=record.step)
        webhook = self._settings.integration.webhook
        if not webhook.url:
            return
        experiment = {
            "version": swanlab.__version__,
            "mode": self._run.mode,
            "run_dir": self._run.dir.name,
            "exp_url": self._run.url if self._run.mode == "online" else None,
        }
        alert_fields = record.model_dump(include={"step", "level", "title", "text"})
        body = {"value": webhook.value, "swanlab": experiment, "alert": alert_fields}
        try:
            requests.post(webhook.url, json=body, timeout=webhook.timeout).raise_for_status()
        except requests.RequestException as error:
            # Not fatal. The webhook URL is a secret.
            print(f"webhook alert failed ({type(error).__name__})", flush=True)

    def finish_run(self, record: FinishRecord) -> None:
        has_failed = record.state == "failed"
        self._run.finish(
            state=SWANLAB_STATES[record.state], error=record.reason if has_failed else None
        )
