"""Many at once, clients that go away, requests that take too long, and the end of the server."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from openai import APIStatusError, RateLimitError
from serving import ENDLESS, LIMITS, asked, data_url, idle, image, png, running


def test_200_requests_of_32_clients_with_pictures(plain, server):
    before = server.service.facts()

    def ask(number: int) -> str:
        with server.client(timeout=120) as client:
            messages = asked(image(data_url(png(56, 56, seed=number))), f"Question {number}?")
            return plain(client, messages=messages, max_tokens=4).choices[0].finish_reason

    with ThreadPoolExecutor(32) as pool:
        reasons = list(pool.map(ask, range(200)))
    assert len(reasons) == 200
    assert set(reasons) <= {"stop", "length"}
    after = idle(server)
    assert after.answers - before.answers == 200


def test_a_client_that_goes_away_frees_the_cache(plain, server):
    free = idle(server).pages_free
    with server.client() as client:
        streams = [plain(client, stream=True, **ENDLESS) for _ in range(4)]
        for stream in streams:
            # The first chunk comes before the first token.
            assert [next(stream) for _ in range(3)][-1].choices[0].delta.content
        assert server.service.facts().running > 0
        for stream in streams:
            stream.close()
    facts = idle(server)
    # What pictures left is kept for the next question about them, and given up where it is needed.
    assert facts.pages_free >= free - 4
    with server.client(timeout=0.5) as client, pytest.raises(Exception, match="timed out"):
        plain(client, **ENDLESS)
    idle(server)


def test_more_than_may_wait_is_told_to_come_again(plain, answerer, tmp_path):
    limits = replace(LIMITS, rows=1, waiting=1)
    with running(answerer, tmp_path, limits=limits) as server:
        client = server.client()
        streams = [plain(client, stream=True, **ENDLESS) for _ in range(2)]
        with pytest.raises(RateLimitError) as raised:
            plain(client)
        assert int(raised.value.response.headers["retry-after"]) >= 1
        for stream in streams:
            stream.close()
        idle(server)
        assert plain(client).choices
        # One request with more answers than may run and wait: those that were taken are let go.
        with pytest.raises(RateLimitError):
            plain(client, n=8, **ENDLESS)
        idle(server)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(plain, answerer, tmp_path, stream):
    with running(answerer, tmp_path, limits=replace(LIMITS, seconds=0.05)) as server:
        with pytest.raises(Exception, match="no answer within") as raised:
            list(plain(server.client(), stream=stream, **ENDLESS))
        if not stream:
            assert isinstance(raised.value, APIStatusError)
            assert raised.value.status_code == 504
        idle(server)


def test_told_to_stop_it_finishes_what_runs(plain, answerer, tmp_path):
    with running(answerer, tmp_path) as server:
        client = server.client()
        stream = iter(plain(client, stream=True, max_tokens=60))
        first = next(stream)
        server.server.should_exit = True
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason in ("stop", "length")
        assert first.id == rest[-1].id
        deadline = threading.Event()
        for _ in range(100):
            try:
                plain(server.client())
            except Exception:
                break
            deadline.wait(0.1)
        else:
            raise AssertionError("requests are still taken")
