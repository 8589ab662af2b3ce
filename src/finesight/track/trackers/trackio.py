"""Tracker for Trackio: a local folder, a Hugging Face Space, or a self-hosted server."""

from __future__ import annotations

import os
import re
from shlex import quote
from typing import TYPE_CHECKING, ClassVar

from finesight.track.tracker import ALERT_LEVEL_NAMES, LoggingTracker, make_folder_name
from finesight.tracker_components import TrackerComponent

if TYPE_CHECKING:
    from finesight.track.tracker_records import AlertRecord, FinishRecord, StartRecord

DESTINATION_VARIABLES = (
    "TRACKIO_SPACE_ID",
    "TRACKIO_SERVER_URL",
    "TRACKIO_BUCKET_ID",
    "TRACKIO_DATASET_ID",
    "TRACKIO_WEBHOOK_URL",
)
"""Environment variables by which Trackio sends data to other destinations than `uri`."""

_SPACE = re.compile(r"[\w.-]+/[\w.-]+")
"""Name of a Hugging Face Space with its owner."""


def is_server(uri: str) -> bool:
    """Return whether a value of `uri` is the address of a server, rather than a Space."""
    return uri.startswith(("http://", "https://"))


def check_uri(uri: str) -> str | None:
    """Return the problem of a value that names neither a Space nor a server."""
    if is_server(uri) or _SPACE.fullmatch(uri):
        return None
    return f"trackio does not support uri {uri!r}: use OWNER/SPACE, https://HOST"


class TrackioTracker(LoggingTracker):
    """Tracker for Trackio, which stores runs in its own folder unless `uri` is set.

    A run is resumed by its name, which contains the ID. A Space that the tracker creates is
    private. Machine and user are not recorded.
    """

    package = "trackio"
    image_options: ClassVar = {}

    def start_run(self, record: StartRecord) -> str:
        uri = record.tracker.uri
        project = record.tracker.project
        for variable in DESTINATION_VARIABLES:
            os.environ.pop(variable, None)
        space = None
        server = None
        if uri is not None and is_server(uri):
            server = uri
        elif uri is not None:
            space = uri
        if space is None:
            # Trackio asks Hugging Face for the name of the user, if there is a token.
            os.environ.update(HF_HUB_OFFLINE="1")
        import trackio

        config = {**record.settings}
        if record.description:
            config["description"] = record.description
        self._run = trackio.init(
            project=project,
            # Names of runs are those of folders, too. Runs in other folders may have the same one.
            name=make_folder_name(record.name, suffix=f"-{record.id}"),
            config=config,
            resume="allow",
            space_id=space,
            server_url=server,
            private=True,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._run.config["_Username"] = None
        if uri is None:
            return f"Trackio: trackio show --project {quote(project)}"
        return f"Trackio: {uri}"

    def send_alert(self, record: AlertRecord) -> None:
        import trackio

        level = trackio.AlertLevel[ALERT_LEVEL_NAMES[record.level]]
        self._run.alert(title=record.title, text=record.text, level=level, step=record.step)

    def finish_run(self, record: FinishRecord) -> None:
        import trackio

        trackio.finish()


COMPONENT = TrackerComponent(
    kind="trackers",
    name="trackio",
    title="Trackio",
    implementation="finesight.track.trackers.trackio:TrackioTracker",
    extra="trackio",
    check_uri=check_uri,
    telemetry_off_env={"HF_HUB_DISABLE_TELEMETRY": "1"},
    position=5,
)
