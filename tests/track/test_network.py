"""Connections of trackers that write files alone: there are none, not even to report errors."""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from finesight.config import Tracker
from finesight.track.kinds import EXTRAS
from finesight.track.lane import Lane
from finesight.track.records import Alert, Begin, End, Figures, Picture, Pictures, Row

OFFLINE = {"wandb": "offline", "swanlab": "offline", "mlflow": "mlruns"}
"""Addresses that name no server; other trackers need none."""

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
"""A `sitecustomize` that refuses and records all but connections of this machine to itself."""


@pytest.fixture
def proxy() -> Iterator[tuple[int, list[bytes]]]:
    """A proxy that answers nothing: its port, and the first bytes of each connection to it."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    link, _ = server.accept()
                except OSError:
                    return
                with link:
                    asked.append(link.recv(200))

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield server.getsockname()[1], asked
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("kind", EXTRAS)
def test_offline_tracker_opens_no_connection(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: tuple[int, list[bytes]]
) -> None:
    if find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed (extra `{EXTRAS[kind]}`)")
    port, asked = proxy
    (tmp_path / "sitecustomize.py").write_text(REFUSING)
    refused = tmp_path / "refused"
    # In tests and on build machines, some packages are quieter than with users.
    quiet = ("WANDB_", "SWANLAB_", "MLFLOW_", "PYTEST_", "DO_NOT_TRACK", "CI", "GITHUB_")
    for name in [n for n in os.environ if n.startswith(quiet)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ["PYTHONPATH"])))
    monkeypatch.setenv("REFUSED", str(refused))
    # For programs that are not written in Python, such as wandb-core.
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    lane = Lane(kind, tmp_path / "log")
    tracker = Tracker(kind=kind, address=OFFLINE.get(kind))
    lane.put(Begin(tracker=tracker, name="x", folder=tmp_path / "track", settings={"a": 1}))
    lane.put(Figures(rows=(Row(step=1, values={"loss": 1.0}),)))
    lane.put(Pictures(step=1, pictures=(Picture(jpeg=jpeg.getvalue(), caption="c"),)))
    lane.put(Alert(step=1, level="error", title="t", text="x"))
    # What failed is what packages report to their makers.
    lane.put(End(state="failed", reason="why"))
    # Also of its process: some packages report when Python ends.
    lane._thread.join(100)
    assert lane.wait(0), (tmp_path / "log").read_text()
    assert lane.delivered == lane.taken == 5, (tmp_path / "log").read_text()
    assert not refused.exists(), refused.read_text()
    assert asked == []
