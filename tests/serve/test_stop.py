"""The end of the server while it is busy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hostile_requests import CHAT, Hostile, chat, header_flood, image_part
from serving import LIMITS, running

from finesight.serve import run as area

HERE = Path(__file__).parents[1]
GUARD_SECONDS = 120
"""For a server that does not end: nothing is said of how long one that does may take."""


def children(pid: int) -> set[int]:
    """All processes below one, and those of its workers."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if stat[0] != "Z":
                parents[int(entry)] = int(stat[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


@pytest.fixture
def busy(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A server all of whose workers read headers of images that take minutes."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "patient_server.py"), str(request.param)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        body = chat("finesight-tiny", [image_part(header_flood("GIF", 16 << 20))])
        for _ in range(4):
            ask = Hostile("slow", CHAT, body)
            threading.Thread(target=ask.send, args=(port, 600.0), daemon=True).start()
        requests = next(tmp_path.glob("finesight-serve-*/requests"))
        for _ in range(600):
            if len(list(requests.glob("*/image-1"))) == 4:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("the images were not written")
        time.sleep(0.3)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    ("busy", "signals"),
    [(1, [signal.SIGTERM]), (600, [signal.SIGINT] * 2)],
    indirect=["busy"],
    ids=["SIGTERM", "Ctrl-C twice"],
)
def test_slow_images_do_not_keep_it_from_ending(busy, signals, tmp_path):
    workers = children(busy.pid)
    assert len(workers) >= 5
    for number in signals:
        busy.send_signal(number)
        time.sleep(0.5)
    assert busy.wait(GUARD_SECONDS) == 0
    for _ in range(100):
        left = {pid for pid in workers if Path(f"/proc/{pid}").exists()}
        if not left:
            break
        time.sleep(0.05)
    assert not left
    assert not list(tmp_path.iterdir()), "what clients sent is left"


def test_a_process_that_does_not_end_is_ended(answerer, tmp_path, monkeypatch):
    """Whatever its threads do, within a time that is sure."""
    monkeypatch.setattr(area, "FORCED_SECONDS", 0.0)
    monkeypatch.setattr(area, "ENDING_SECONDS", 0.0)
    with running(answerer, tmp_path) as there:
        for seconds, numbers in ((0.0, [signal.SIGTERM]), (600.0, [signal.SIGINT] * 2)):
            aborted = threading.Event()
            limits = replace(LIMITS, closing_seconds=seconds)
            server = area.Server(there.app, limits, lambda: None, aborted.set)
            for number in numbers:
                assert not aborted.is_set()
                server.handle_exit(number, None)
            assert aborted.wait(GUARD_SECONDS)
            assert server.should_exit
            assert server.force_exit == (len(numbers) == 2)
