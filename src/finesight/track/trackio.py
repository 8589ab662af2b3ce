"""Trackio: its folder on this machine, a Space of its address, or a server of one's own."""

from __future__ import annotations

import secrets
from typing import Any

import trackio

from finesight.track.records import Alert, Begin, Begun, End, Figures, Level, Pictures
from finesight.track.writer import Writer

LEVELS: dict[Level, Any] = {
    "info": trackio.AlertLevel.INFO,
    "warning": trackio.AlertLevel.WARN,
    "error": trackio.AlertLevel.ERROR,
}


class Trackio(Writer):
    """A run, which Trackio goes on with by its name. A Space that has to be made is private."""

    def begin(self, begin: Begin) -> Begun:
        address, project = begin.tracker.address, begin.tracker.project
        served = address is not None and address.startswith(("http://", "https://"))
        self._run: Any = trackio.init(
            project=project,
            # Runs of other folders may be called the same.
            name=begin.id or f"{begin.name}-{secrets.token_hex(2)}",
            config=begin.settings,
            resume="never" if begin.id is None else "allow",
            space_id=None if served else address,
            server_url=address if served else None,
            private=True,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        where = address or f"trackio show --project {project}"
        return Begun(id=self._run.name, told=f"Trackio: {where}")

    def figures(self, figures: Figures) -> None:
        for row in figures.rows:
            self._run.log(dict(row.values), step=row.step)

    def pictures(self, pictures: Pictures) -> None:
        drawn = {
            name: trackio.Image(picture.image(), caption=picture.caption)
            for name, picture in pictures.named()
        }
        self._run.log(drawn, step=pictures.step)

    def alert(self, alert: Alert) -> None:
        level = LEVELS[alert.level]
        self._run.alert(title=alert.title, text=alert.text, level=level, step=alert.step)

    def end(self, end: End) -> None:
        self._run.finish()
