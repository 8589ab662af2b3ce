"""Tracker for the Weights & Biases cloud, a self-hosted server, or offline files."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import wandb
from wandb.errors import Error

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

INIT_TIMEOUT_S = 30
"""Maximum seconds to reach the server; afterwards, the run is logged offline."""

ALERT_LEVELS: dict[AlertLevel, Any] = {
    "info": wandb.AlertLevel.INFO,
    "warning": wandb.AlertLevel.WARN,
    "error": wandb.AlertLevel.ERROR,
}


class WandbTracker(Tracker):
    """Tracker that logs to a W&B run, with the training step as x axis.

    Machine, user, command, code and packages are not recorded.
    """

    def start_run(self, record: StartRecord) -> RunStarted:
        uri, folder = record.tracker.uri, record.folder
        folder.mkdir(parents=True, exist_ok=True)
        extra_settings = {"base_url": uri} if uri not in (None, "cloud", "offline") else {}
        settings = wandb.Settings(
            init_timeout=INIT_TIMEOUT_S,
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            **extra_settings,
        )
        init_options: dict[str, Any] = {
            "project": record.tracker.project,
            "name": record.name,
            "id": record.id or secrets.token_hex(4),
            "resume": "allow",
            "config": record.settings,
            "dir": str(folder),
            "settings": settings,
        }
        # Without a URI, WANDB_MODE applies.
        mode = uri if uri in (None, "offline") else "online"
        reason = ""
        try:
            self._run: Any = wandb.init(mode=mode, **init_options)
        except Error as error:
            if mode == "offline":
                raise
            reason = f" ({type(error).__name__}: {error})"
            # Otherwise wandb would continue to connect for this run ID.
            wandb.teardown()
            self._run = wandb.init(mode="offline", **init_options)
        # The built-in step rejects steps that a resumed run repeats.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        run_files = Path(self._run.dir).parent
        message = (
            f"offline{reason}: wandb sync {run_files}"
            if self._run.offline
            else self._run.url or "disabled"
        )
        return RunStarted(id=self._run.id, message=f"W&B: {message}")

    def log_metrics(self, record: MetricsRecord) -> None:
        for step_metrics in record.steps:
            self._run.log({"step": step_metrics.step, **step_metrics.values})

    def log_images(self, record: ImagesRecord) -> None:
        # Separate keys, since a list would be resized to one size.
        images = {
            name: wandb.Image(image.decode(), caption=image.caption, file_type="jpg")
            for name, image in record.iter_named()
        }
        self._run.log({"step": record.step, **images})

    def send_alert(self, record: AlertRecord) -> None:
        text = f"{record.text} (step {record.step})"
        self._run.alert(title=record.title, text=text, level=ALERT_LEVELS[record.level])

    def finish_run(self, record: FinishRecord) -> None:
        self._run.finish(exit_code=0 if record.state == "finished" else 1)
