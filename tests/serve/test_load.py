"""Tests of concurrent requests, disconnects, timeouts and shutdown."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from api_server_fixtures import (
    ENDLESS_REQUEST,
    LIMITS,
    make_data_url,
    make_image_part,
    make_messages,
    make_noise_png,
    run_server,
    wait_until_idle,
)
from openai import APIStatusError, RateLimitError


def test_concurrent_requests_with_images(ask_about_scene, server):
    """Takes long: 200 requests, more than the server runs at once."""
    before = server.service.get_stats()

    def ask(number: int) -> str:
        with server.client(timeout=120) as client:
            messages = make_messages(
                make_image_part(make_data_url(make_noise_png(56, 56, seed=number))),
                f"Question {number}?",
            )
            return ask_about_scene(client, messages=messages, max_tokens=4).choices[0].finish_reason

    with ThreadPoolExecutor(32) as pool:
        reasons = list(pool.map(ask, range(200)))
    assert len(reasons) == 200
    assert set(reasons) <= {"stop", "length"}
    after = wait_until_idle(server)
    assert after.num_completed - before.num_completed == 200


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
    limits = replace(LIMITS, max_num_seqs=1, max_waiting=1)
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
    with run_server(
        inference_model, tmp_path, limits=replace(LIMITS, request_timeout_s=0.05)
    ) as server:
        with pytest.raises(Exception, match="no complete answer within") as raised:
            list(ask_about_scene(server.client(), stream=stream, **ENDLESS_REQUEST))
        if not stream:
            assert isinstance(raised.value, APIStatusError)
            assert raised.value.status_code == 504
        wait_until_idle(server)


def test_shutdown_finishes_running_requests(ask_about_scene, inference_model, tmp_path):
    with run_server(inference_model, tmp_path) as server:
        client = server.client()
        stream = iter(ask_about_scene(client, stream=True, max_tokens=60))
        first = next(stream)
        server.server.should_exit = True
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason in ("stop", "length")
        assert first.id == rest[-1].id
        deadline = threading.Event()
        for _ in range(100):
            try:
                ask_about_scene(server.client())
            except Exception:
                break
            deadline.wait(0.1)
        else:
            raise AssertionError("requests are still taken")
