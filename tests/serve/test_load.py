"""Tests of concurrent requests, disconnects, timeouts, and the shutdown of a busy server."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from api_server_fixtures import (
    ENDLESS_REQUEST,
    LIMITS,
    run_server,
    wait_until_idle,
)
from attack_client import list_process_tree, list_running
from hostile_requests import (
    CHAT,
    HostileRequest,
    make_chat_body,
    make_header_flood,
    make_image_content,
)
from openai import APIError, APIStatusError, RateLimitError

from finesight.serve import api_server


def test_disconnected_client_frees_the_cache(ask_about_scene, server):
    free = wait_until_idle(server).num_free_blocks
    with server.client() as client:
        streams = [ask_about_scene(client, stream=True, **ENDLESS_REQUEST) for _ in range(4)]
        for stream in streams:
            # The first chunk precedes the first token.
            assert [next(stream) for _ in range(3)][-1].choices[0].delta.content
        assert server.service.get_stats().num_running > 0
        for stream in streams:
            stream.close()
    facts = wait_until_idle(server)
    # Prefix blocks of images stay cached until their memory is needed.
    assert facts.num_free_blocks >= free - 4
    with server.client(timeout=0.5) as client, pytest.raises(Exception, match="timed out"):
        ask_about_scene(client, **ENDLESS_REQUEST)
    wait_until_idle(server)


def test_full_queue_returns_retry_after(ask_about_scene, inference_model, tmp_path):
    limits = replace(LIMITS, max_num_seqs=1, max_queue=1)
    with run_server(inference_model, tmp_path, limits=limits) as server:
        client = server.client()
        streams = [ask_about_scene(client, stream=True, **ENDLESS_REQUEST) for _ in range(2)]
        with pytest.raises(RateLimitError) as raised:
            ask_about_scene(client)
        assert int(raised.value.response.headers["retry-after"]) >= 1
        for stream in streams:
            stream.close()
        wait_until_idle(server)
        assert ask_about_scene(client).choices
        # One request with more answers than may run and wait: those that were taken are let go.
        with pytest.raises(RateLimitError):
            ask_about_scene(client, n=8, **ENDLESS_REQUEST)
        wait_until_idle(server)


@pytest.mark.parametrize("stream", [False, True])
def test_request_timeout(ask_about_scene, inference_model, tmp_path, stream):
    with run_server(inference_model, tmp_path, limits=replace(LIMITS, timeout=0.05)) as server:
        with pytest.raises(Exception, match="no complete answer within") as raised:
            list(ask_about_scene(server.client(), stream=stream, **ENDLESS_REQUEST))
        if not stream:
            assert isinstance(raised.value, APIStatusError)
            assert raised.value.status_code == 504
        wait_until_idle(server)


def test_shutdown_finishes_running_requests(ask_about_scene, inference_model, tmp_path):
    limits = replace(LIMITS, shutdown_timeout_s=60.0)
    with run_server(inference_model, tmp_path, limits=limits) as server:
        client = server.client()
        stream = iter(ask_about_scene(client, stream=True, max_tokens=60))
        first = next(stream)
        server.server.should_exit = True
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason in ("stop", "length")
        assert first.id == rest[-1].id

        def is_refused() -> bool:
            try:
                return not ask_about_scene(server.client())
            except APIError:
                return True

        wait_for(is_refused)


HERE = Path(__file__).parents[1]
TEST_TIMEOUT_S = 120
"""Timeout for a server that does not end."""


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.05)


BusyServer = tuple[subprocess.Popen[str], int]


@pytest.fixture
def busy_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BusyServer]:
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
        image = make_image_content(make_header_flood("GIF", 16 << 20))
        ask = HostileRequest("slow", CHAT, make_chat_body("finesight-tiny", [image]))
        for _ in range(4):
            threading.Thread(target=ask.send, args=(port, 600.0), daemon=True).start()
        requests = next(tmp_path.glob("finesight-serve-*/requests"))
        wait_for(lambda: len(list(requests.glob("*/media-1"))) == 4)
        yield process, port
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
    server, port = busy_server

    def is_closing() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            return True
        return False

    _, *workers = list_process_tree(server.pid)
    assert len(workers) >= 5
    for number in signals:
        server.send_signal(number)
        wait_for(is_closing)
    assert server.wait(TEST_TIMEOUT_S) == 0
    assert not list_running([worker.pid for worker in workers])
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
