"""Tests of the shutdown of a busy server."""

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
from api_server_fixtures import LIMITS, run_server
from hostile_requests import (
    CHAT,
    HostileRequest,
    make_chat_body,
    make_header_flood,
    make_image_content,
)

from finesight.serve import api_server

HERE = Path(__file__).parents[1]
TEST_TIMEOUT_S = 120
"""Timeout for a server that does not end."""


def list_descendants(pid: int) -> set[int]:
    """Return all descendants of a process."""
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
def busy_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Server whose workers all read image headers that take minutes."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "slow_shutdown_server.py"), str(request.param)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        body = make_chat_body(
            "finesight-tiny", [make_image_content(make_header_flood("GIF", 16 << 20))]
        )
        for _ in range(4):
            ask = HostileRequest("slow", CHAT, body)
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
    ("busy_server", "signals"),
    [(1, [signal.SIGTERM]), (600, [signal.SIGINT] * 2)],
    indirect=["busy_server"],
    ids=["SIGTERM", "Ctrl-C twice"],
)
def test_slow_images_do_not_delay_shutdown(busy_server, signals, tmp_path):
    workers = list_descendants(busy_server.pid)
    assert len(workers) >= 5
    for number in signals:
        busy_server.send_signal(number)
        time.sleep(0.5)
    assert busy_server.wait(TEST_TIMEOUT_S) == 0
    for _ in range(100):
        left = {pid for pid in workers if Path(f"/proc/{pid}").exists()}
        if not left:
            break
        time.sleep(0.05)
    assert not left
    assert not list(tmp_path.iterdir()), "what clients sent is left"


def test_hung_process_is_aborted(inference_model, tmp_path, monkeypatch):
    """The time limit applies to any state of the threads."""
    monkeypatch.setattr(api_server, "FORCED_SECONDS", 0.0)
    monkeypatch.setattr(api_server, "ENDING_SECONDS", 0.0)
    with run_server(inference_model, tmp_path) as there:
        for seconds, signal_numbers in ((0.0, [signal.SIGTERM]), (600.0, [signal.SIGINT] * 2)):
            aborted = threading.Event()
            limits = replace(LIMITS, shutdown_timeout_s=seconds)
            server = api_server.ApiServer(there.app, limits, lambda: None, aborted.set)
            for number in signal_numbers:
                assert not aborted.is_set()
                server.handle_exit(number, None)
            assert aborted.wait(TEST_TIMEOUT_S)
            assert server.should_exit
            assert server.force_exit == (len(signal_numbers) == 2)
