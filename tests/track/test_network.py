"""Tests that offline trackers open no connections, not even for error reports."""

import os
import socket
import threading
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from PIL import Image

from finesight.settings.config import TrackerSettings
from finesight.track.tracker_manager import TrackerClient
from finesight.track.tracker_records import (
    AlertRecord,
    FinishRecord,
    ImagesRecord,
    MetricsRecord,
    StartRecord,
    StepMetrics,
    TrackedImage,
)
from finesight.tracker_components import TRACKERS

OFFLINE = {"wandb": "offline", "swanlab": "offline", "mlflow": "mlruns"}
"""URIs of offline modes."""

REFUSING = """
import ipaddress, os, sys

def refuse(event, given):
    if event == "socket.getaddrinfo":
        host = given[0]
    elif event == "socket.connect" and isinstance(given[1], tuple):
        host = given[1][0]
    else:
        return
    try:
        if host in (None, "", "localhost") or ipaddress.ip_address(host).is_loopback:
            return
    except ValueError:
        pass
    with open(os.environ["REFUSED"], "a") as log:
        log.write(f"{event} {host}\\n")
    raise OSError("refused")

sys.addaudithook(refuse)
"""
"""A `sitecustomize` module that rejects and records non-local connections."""


@pytest.fixture
def proxy() -> Iterator[tuple[int, list[bytes]]]:
    """Silent proxy: its port, and the first bytes of each connection."""
    requested: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    link, _ = server.accept()
                except OSError:
                    return
                with link:
                    requested.append(link.recv(200))

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield server.getsockname()[1], requested
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("kind", TRACKERS)
def test_offline_tracker_opens_no_connection(kind, tmp_path, monkeypatch, proxy):
    if find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed (extra `{TRACKERS[kind].extra}`)")
    port, requested = proxy
    (tmp_path / "sitecustomize.py").write_text(REFUSING)
    refused = tmp_path / "refused"
    # In tests and on build machines, some packages are quieter than with users.
    quiet = ("WANDB_", "SWANLAB_", "MLFLOW_", "PYTEST_", "DO_NOT_TRACK", "CI", "GITHUB_")
    for name in [n for n in os.environ if n.startswith(quiet)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("REFUSED", str(refused))
    # For programs that are not written in Python, such as wandb-core.
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    # With these variables, Trackio asks Hugging Face for the user, and sends data.
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "planted/space")
    monkeypatch.setenv("TRACKIO_WEBHOOK_URL", "http://planted.example")
    monkeypatch.chdir(tmp_path)
    image = TrackedImage(image=Image.new("RGB", (8, 8)), caption="c")
    tracker = TrackerSettings(kind=kind, uri=OFFLINE.get(kind))
    records = [
        StartRecord(
            tracker=tracker, name="x", folder=tmp_path / "track", settings={"a": 1}, id="0"
        ),
        MetricsRecord(steps=(StepMetrics(step=1, values={"loss": 1.0}),)),
        ImagesRecord(step=1, images=(image,)),
        AlertRecord(step=1, level="error", title="t", text="x"),
        FinishRecord(state="failed", reason="why"),  # packages report failures to their makers
    ]
    client = TrackerClient(kind, tmp_path / "log")
    for record in records:
        client.submit(record)
    client.thread.join(100)  # also for its process: some packages report when Python ends
    assert client.wait(0), (tmp_path / "log").read_text()
    assert client.num_delivered == len(records), (tmp_path / "log").read_text()
    assert not refused.exists(), refused.read_text()
    assert requested == []
