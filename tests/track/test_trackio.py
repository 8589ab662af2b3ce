"""Arguments that the tracker Trackio gives to its package, which is not needed here."""

import enum
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from finesight.errors import UserError
from finesight.settings.config import TrackerSettings
from finesight.settings.recipe import recipe_from_dict
from finesight.track.tracker_records import (
    AlertRecord,
    FinishRecord,
    ImagesRecord,
    MetricsRecord,
    StartRecord,
    StepMetrics,
    TrackedImage,
)
from finesight.tracker_components import TRACKERS, require_trackers

RECIPE = {"model": "m", "data": {"train": "train.jsonl"}, "output_dir": "run"}
PLANTED = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_WEBHOOK_URL")

Calls = list[tuple[str, dict[str, Any]]]


class AlertLevel(enum.Enum):
    """Like the class of the package."""

    INFO = "info"
    WARN = "warn"
    ERROR = "error"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Calls of the package by a fake one, which records its environment, too."""
    found: Calls = []

    def init(**given: Any) -> SimpleNamespace:
        environment = {name: os.environ.get(name) for name in (*PLANTED, "HF_HUB_OFFLINE")}
        found.append(("init", given | environment))
        return SimpleNamespace(
            config=given["config"],
            log=lambda values, step: found.append(("log", {"step": step} | values)),
            alert=lambda **given: found.append(("alert", given)),
        )

    package = SimpleNamespace(
        init=init,
        Image=lambda image, caption: (image.size, caption),
        AlertLevel=AlertLevel,
        finish=lambda: found.append(("finish", {})),
    )
    monkeypatch.setitem(sys.modules, "trackio", package)
    for name in PLANTED:
        monkeypatch.setenv(name, "planted")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return found


def start(folder: Path, uri: str | None, name: str = "one") -> tuple[Any, str]:
    """Start a run with a description; return the tracker and its message."""
    tracker = TRACKERS.load_tracker("trackio")()
    record = StartRecord(
        tracker=TrackerSettings(kind="trackio", project="my project", uri=uri),
        name=name,
        description="notes",
        folder=folder,
        settings={"tune": {"rank": 4}},
        id="0123abcd",
    )
    return tracker, tracker.start_run(record)


@pytest.mark.parametrize(
    ("uri", "space", "server", "offline"),
    [
        (None, None, None, "1"),
        ("me/space", "me/space", None, "0"),
        ("https://a.example", None, "https://a.example", "1"),
    ],
)
def test_only_uri_names_the_destination(uri, space, server, offline, tmp_path, calls):
    _, message = start(tmp_path, uri)
    ((_, given),) = calls
    assert (given["space_id"], given["server_url"]) == (space, server)
    assert given["HF_HUB_OFFLINE"] == offline
    assert not any(given[name] for name in PLANTED)
    assert given["private"] is True
    dashboard = uri or "trackio show --project 'my project'"
    assert message == f"Trackio: {dashboard}"


def test_records_reach_the_package(tmp_path, calls):
    tracker, _ = start(tmp_path, None)
    image = TrackedImage(image=Image.new("RGB", (8, 4)), caption="c")
    steps = tuple(StepMetrics(step=step, values={"loss": 1.0 / step}) for step in (1, 2))
    for record in (
        MetricsRecord(steps=steps),
        ImagesRecord(step=2, images=(image,)),
        AlertRecord(step=2, level="warning", title="t", text="x"),
        FinishRecord(state="failed", reason="a test"),
    ):
        tracker.handle(record)
    (_, given), *others = calls
    assert given["name"] == "one-0123abcd"
    assert given["resume"] == "allow"
    assert given["config"] == {"tune": {"rank": 4}, "description": "notes", "_Username": None}
    assert others == [
        ("log", {"step": 1, "loss": 1.0}),
        ("log", {"step": 2, "loss": 0.5}),
        ("log", {"step": 2, "examples/1": ((8, 4), "c")}),
        ("alert", {"step": 2, "level": AlertLevel.WARN, "title": "t", "text": "x"}),
        ("finish", {}),
    ]


@pytest.mark.parametrize("name", ["../../etc/x", "a/b", "训" * 100])
def test_name_of_a_run_is_that_of_a_folder(name, tmp_path, calls):
    """The package writes images to a folder with this name."""
    start(tmp_path, None, name)
    ((_, given),) = calls
    assert "/" not in given["name"]
    assert not given["name"].startswith(".")
    assert given["name"].endswith("-0123abcd")
    assert len(given["name"].encode()) <= 255


@pytest.mark.parametrize("uri", ["local", "a/b/c", "me/my space", "s3://bucket/x", "https//host"])
def test_other_uris_are_errors(uri):
    """A Space would be created for the name of a mode."""
    with pytest.raises(UserError, match="trackio does not support uri"):
        recipe_from_dict(RECIPE | {"track": {"kind": "trackio", "uri": uri}})


def test_missing_package_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("finesight.tracker_components.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'finesight\[trackio\]'"):
        require_trackers([TrackerSettings(kind="trackio")])
