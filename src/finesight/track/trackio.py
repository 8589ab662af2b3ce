"""Tracker for Trackio: a local folder, a Hugging Face Space, or a self-hosted server."""

from __future__ import annotations

import secrets
from typing import Any

import trackio

from finesight.track.tracker import Tracker
from finesight.track.tracker_records import (
    AlertLevel,
    AlertRecord,
    FinishRecord,
    ImagesRecord,
    MetricsRecord,
    RunStarted,
    StartRecord,
)

ALERT_LEVELS: dict[AlertLevel, Any] = {
    "info": trackio.AlertLevel.INFO,
    "warning": trackio.AlertLevel.WARN,
    "error": trackio.AlertLevel.ERROR,
}


class TrackioTracker(Tracker):
    """Tracker that logs to a Trackio run, which is resumed by its name.

    A Space that it creates is private.
    """

    def start_run(self, record: StartRecord) -> RunStarted:
        uri, project = record.tracker.uri, record.tracker.project
        is_self_hosted = uri is not None and uri.startswith(("http://", "https://"))
        self._run: Any = trackio.init(
            project=project,
            # Runs in other folders may have the same name.
            name=record.id or f"{record.name}-{secrets.token_hex(2)}",
            config=record.settings,
            resume="never" if record.id is None else "allow",
            space_id=None if is_self_hosted else uri,
            server_url=uri if is_self_hosted else None,
            private=True,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        dashboard = uri or f"trackio show --project {project}"
        return RunStarted(id=self._run.name, message=f"Trackio: {dashboard}")

    def log_metrics(self, record: MetricsRecord) -> None:
        for step_metrics in record.steps:
            self._run.log(dict(step_metrics.values), step=step_metrics.step)

    def log_images(self, record: ImagesRecord) -> None:
        images = {
            name: trackio.Image(image.decode(), caption=image.caption)
            for name, image in record.iter_named()
        }
        self._run.log(images, step=record.step)

    def send_alert(self, record: AlertRecord) -> None:
        level = ALERT_LEVELS[record.level]
        self._run.alert(title=record.title, text=record.text, level=level, step=record.step)

    def finish_run(self, record: FinishRecord) -> None:
        self._run.finish()
