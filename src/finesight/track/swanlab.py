"""SwanLab: its cloud or a server of one's own with a key, else files to be synced."""

from __future__ import annotations

import os
from typing import Any

import requests
import swanlab

from finesight.config import WORDS
from finesight.track.records import Alert, Begin, Begun, End, Figures, Pictures, State
from finesight.track.writer import Writer

STATES: dict[State, str] = {"finished": "success", "failed": "crashed", "interrupted": "aborted"}


class SwanLab(Writer):
    """An experiment. Machine, user, command, terminal, code and packages are not recorded. Alerts
    are texts, and go to the webhook of SWANLAB_WEBHOOK, if it is set, as SwanLab's own do."""

    def begin(self, begin: Begin) -> Begun:
        tracker = begin.tracker
        begin.folder.mkdir(parents=True, exist_ok=True)
        hosted = tracker.address not in (None, *WORDS["swanlab"])
        given = {"api_host": tracker.address} if hosted else {}
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
            **given,
        )
        run: dict[str, Any] = {
            "project": tracker.project,
            "name": begin.name,
            "id": begin.id,
            "resume": "never" if begin.id is None else "allow",
            "config": begin.settings,
            # What it tells others of its folder is then no path of this machine.
            "log_dir": ".",
            "settings": settings,
            "public": False,
        }
        os.chdir(begin.folder)
        # Without an address SWANLAB_MODE counts.
        word = settings.mode if tracker.address is None else tracker.address
        mode = word if word in ("local", "offline", "disabled") else "online"
        why = ""
        if mode == "online" and not settings.api_key:
            mode, why = "offline", " (no key)"
        if mode == "online":
            try:
                self._run: Any = swanlab.init(mode="online", **run)
                return Begun(id=self._run.id, told=f"SwanLab: {self._run.url}")
            except Exception as error:  # its own, its HTTP client's and the system's have no base
                mode, why = "offline", f" ({type(error).__name__}: {error})"
        self._run = swanlab.init(mode=mode, **run)
        files = begin.folder / self._run.dir.name
        ways = {"offline": f"swanlab sync {files}", "local": f"swanlab watch {begin.folder}"}
        return Begun(id=self._run.id, told=f"SwanLab: {mode}{why}: {ways.get(mode, 'nowhere')}")

    def figures(self, figures: Figures) -> None:
        for row in figures.rows:
            self._run.log(dict(row.values), step=row.step)

    def pictures(self, pictures: Pictures) -> None:
        drawn = {
            name: swanlab.Image(picture.image(), caption=picture.caption, file_type="jpg")
            for name, picture in pictures.named()
        }
        self._run.log(drawn, step=pictures.step)

    def alert(self, alert: Alert) -> None:
        self._run.log({"alerts": swanlab.Text(f"{alert.title}: {alert.text}")}, step=alert.step)
        hook = self._settings.integration.webhook
        if not hook.url:
            return
        experiment = {
            "version": swanlab.__version__,
            "mode": self._run.mode,
            "run_dir": self._run.dir.name,
            "exp_url": self._run.url if self._run.mode == "online" else None,
        }
        told = alert.model_dump(include={"step", "level", "title", "text"})
        body = {"value": hook.value, "swanlab": experiment, "alert": told}
        try:
            requests.post(hook.url, json=body, timeout=hook.timeout).raise_for_status()
        except requests.RequestException as error:
            # The experiment is not worse for it; its address is a secret.
            print(f"the webhook did not take an alert ({type(error).__name__})", flush=True)

    def end(self, end: End) -> None:
        failed = end.state == "failed"
        self._run.finish(state=STATES[end.state], error=end.reason if failed else None)
