"""Tracker for SwanLab."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from finesight.track.tracker import LoggingTracker
from finesight.tracker_components import TrackerComponent

if TYPE_CHECKING:
    from finesight.track.tracker_records import AlertRecord, FinishRecord, RunState, StartRecord

MODES = ("cloud", "local", "offline")

RUN_STATES: dict[RunState, str] = {
    "finished": "success",
    "failed": "crashed",
    "interrupted": "aborted",
}
"""States of ended runs in SwanLab."""


class SwanLabTracker(LoggingTracker):
    """Tracker for the SwanLab cloud, a self-hosted SwanLab server, or local SwanLab files.

    Machine, user, command, terminal output, code and packages are not recorded. Alerts are logged
    as texts, and sent to the webhook in the environment variable `SWANLAB_WEBHOOK`, if it is set.
    """

    package = "swanlab"

    def start_run(self, record: StartRecord) -> str:
        import swanlab

        tracker = record.tracker
        record.folder.mkdir(parents=True, exist_ok=True)
        is_self_hosted = tracker.uri not in (None, *MODES)
        extra_settings: dict[str, Any] = {}
        if is_self_hosted:
            extra_settings["api_host"] = tracker.uri
        probes = ("hardware", "runtime", "requirements", "git", "swanlab", "monitor")
        self._settings = settings = swanlab.Settings(
            interactive=False,
            probe=swanlab.Settings.Probe(**dict.fromkeys(probes, False)),
            terminal=swanlab.Settings.Terminal(proxy_type="none"),
            **extra_settings,
        )
        init_options: dict[str, Any] = {
            "project": tracker.project,
            "name": record.name,
            "description": record.description or None,
            "id": record.id,
            "resume": "allow",
            "config": record.settings,
            # A relative path, since SwanLab uploads it.
            "log_dir": ".",
            "settings": settings,
            "public": False,
        }
        os.chdir(record.folder)
        # Without a URI, SWANLAB_MODE applies.
        mode = tracker.uri or settings.mode
        reason = ""
        if mode not in ("local", "offline", "disabled"):
            mode = "offline"
            reason = " (no key)"
            if settings.api_key:
                try:
                    self._run = swanlab.init(mode="online", **init_options)
                    return f"SwanLab: {self._run.url}"
                except Exception as error:  # SwanLab, HTTP and OS errors
                    reason = f" ({type(error).__name__}: {error})"
        self._run = swanlab.init(mode=mode, **init_options)
        commands = {
            "offline": f"swanlab sync {record.folder / self._run.dir.name}",
            "local": f"swanlab watch {record.folder}",
        }
        return f"SwanLab: {mode}{reason}: {commands.get(mode, 'disabled')}"

    def send_alert(self, record: AlertRecord) -> None:
        import requests
        import swanlab

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
            # The content of the response, which may be endless, is not read.
            with requests.post(
                webhook.url, json=body, timeout=webhook.timeout, stream=True
            ) as response:
                response.raise_for_status()
        except requests.RequestException as error:
            # Not fatal. The webhook URL is a secret.
            print(f"webhook alert failed ({type(error).__name__})", flush=True)

    def finish_run(self, record: FinishRecord) -> None:
        error = record.reason if record.state == "failed" else None
        self._run.finish(state=RUN_STATES[record.state], error=error)


COMPONENT = TrackerComponent(
    kind="trackers",
    name="swanlab",
    title="SwanLab",
    implementation="finesight.track.trackers.swanlab:SwanLabTracker",
    extra="track",
    modes=MODES,
    mode_packages={"local": {"swanboard": "swanlab[dashboard]"}},
    position=1,
)
