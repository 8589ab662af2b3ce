"""Tracker for Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finesight.track.tracker import ALERT_LEVEL_NAMES, LoggingTracker
from finesight.tracker_components import TrackerComponent

if TYPE_CHECKING:
    from finesight.track.tracker_records import AlertRecord, FinishRecord, StartRecord

MODES = ("cloud", "offline")


class WandbTracker(LoggingTracker):
    """Tracker for the Weights & Biases cloud, a self-hosted server, or offline files.

    The x axis is the training step. Machine, user, command, code and packages are not recorded.
    """

    package = "wandb"

    def start_run(self, record: StartRecord) -> str:
        import wandb

        uri = record.tracker.uri
        folder = record.folder
        folder.mkdir(parents=True, exist_ok=True)
        extra_settings: dict[str, Any] = {}
        if uri not in (None, *MODES):
            extra_settings["base_url"] = uri
        settings = wandb.Settings(
            # Seconds to reach the server; afterwards, the run is logged offline.
            init_timeout=30,
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
            "notes": record.description or None,
            "id": record.id,
            "resume": "allow",
            "config": record.settings,
            "dir": str(folder),
            "settings": settings,
        }
        # Without a URI, WANDB_MODE applies.
        mode = uri if uri in (None, "offline") else "online"
        reason = ""
        try:
            self._run = wandb.init(mode=mode, **init_options)
        except wandb.errors.Error as error:
            if mode == "offline":
                raise
            reason = f" ({type(error).__name__}: {error})"
            # Otherwise wandb would continue to connect for this run ID.
            wandb.teardown()
            self._run = wandb.init(mode="offline", **init_options)
        # The built-in step rejects steps that a resumed run repeats.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        message = self._run.url or "disabled"
        if self._run.offline:
            message = f"offline{reason}: wandb sync {Path(self._run.dir).parent}"
        return f"W&B: {message}"

    def log_values(self, step: int, values: dict[str, Any]) -> None:
        self._run.log({"step": step, **values})

    def send_alert(self, record: AlertRecord) -> None:
        import wandb

        text = f"{record.text} (step {record.step})"
        level = wandb.AlertLevel[ALERT_LEVEL_NAMES[record.level]]
        self._run.alert(title=record.title, text=text, level=level)

    def finish_run(self, record: FinishRecord) -> None:
        self._run.finish(exit_code=0 if record.state == "finished" else 1)


COMPONENT = TrackerComponent(
    kind="trackers",
    name="wandb",
    title="Weights & Biases",
    implementation="finesight.track.trackers.wandb:WandbTracker",
    extra="wandb",
    modes=MODES,
    telemetry_off_env={"WANDB_ERROR_REPORTING": "false"},
    position=3,
)
