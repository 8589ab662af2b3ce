"""Weights & Biases: its cloud or a server of one's own with a key, else files to be synced."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import wandb
from wandb.errors import Error

from finesight.track.records import Alert, Begin, Begun, End, Figures, Level, Pictures
from finesight.track.writer import Writer

CONNECTED = 30
"""Seconds to find the server in; then files are written."""

LEVELS: dict[Level, Any] = {
    "info": wandb.AlertLevel.INFO,
    "warning": wandb.AlertLevel.WARN,
    "error": wandb.AlertLevel.ERROR,
}


class WeightsAndBiases(Writer):
    """A run whose axis is the step. Machine, user, command, code and packages are not recorded."""

    def begin(self, begin: Begin) -> Begun:
        address, folder = begin.tracker.address, begin.folder
        folder.mkdir(parents=True, exist_ok=True)
        given = {"base_url": address} if address not in (None, "cloud", "offline") else {}
        settings = wandb.Settings(
            init_timeout=CONNECTED,
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            **given,
        )
        run: dict[str, Any] = {
            "project": begin.tracker.project,
            "name": begin.name,
            "id": begin.id or secrets.token_hex(4),
            "resume": "allow",
            "config": begin.settings,
            "dir": str(folder),
            "settings": settings,
        }
        # Without an address WANDB_MODE counts.
        mode = address if address in (None, "offline") else "online"
        why = ""
        try:
            self._run: Any = wandb.init(mode=mode, **run)
        except Error as error:
            if mode == "offline":
                raise
            why = f" ({type(error).__name__}: {error})"
            # It holds the run's id, under which it would still try to connect.
            wandb.teardown()
            self._run = wandb.init(mode="offline", **run)
        # Not its own step, which refuses those that a resumed run does again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        files = Path(self._run.dir).parent
        told = (
            f"offline{why}: wandb sync {files}"
            if self._run.offline
            else self._run.url or "disabled"
        )
        return Begun(id=self._run.id, told=f"W&B: {told}")

    def figures(self, figures: Figures) -> None:
        for row in figures.rows:
            self._run.log({"step": row.step, **row.values})

    def pictures(self, pictures: Pictures) -> None:
        # Not as one list: those of other sizes would be squeezed.
        drawn = {
            name: wandb.Image(picture.image(), caption=picture.caption, file_type="jpg")
            for name, picture in pictures.named()
        }
        self._run.log({"step": pictures.step, **drawn})

    def alert(self, alert: Alert) -> None:
        text = f"{alert.text} (step {alert.step})"
        self._run.alert(title=alert.title, text=text, level=LEVELS[alert.level])

    def end(self, end: End) -> None:
        self._run.finish(exit_code=0 if end.state == "finished" else 1)
