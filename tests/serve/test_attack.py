"""500 hostile requests of 8 clients at once, and 20,000 fuzzed ones: the slow tier.

`pytest --slow -s tests/serve/test_attack.py` prints the figures.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from attacked_server import MIB, MODEL, attack, attacked_server
from fuzzed_bodies import fuzzed_body
from hostile_requests import CHAT, hostile_requests, kinds
from serving import LIMITS, idle, running, send

CLIENTS, REQUESTS, CASES = 8, 500, 20_000


@pytest.mark.slow
def test_500_hostile_requests_of_8_clients(tmp_path: Path):
    with attacked_server(tmp_path) as server:
        for number in range(8):
            assert server.ask("POST", CHAT, server.ordinary(number))[1] == 200
        time.sleep(2)
        before = server.memory()
        figures = attack(server, hostile_requests(MODEL, REQUESTS), CLIENTS)
        time.sleep(5)
        after = server.memory()
        grown = sum(after.values()) - sum(before.values())
        print(f"\n{figures}")
        print(f"memory: {sum(before.values()) // MIB} MiB, grown by {grown // MIB} MiB")
        assert grown <= 200 * MIB
        assert max(figures.health) <= 0.5
        assert {status for _, status in figures.ordinary} == {200}
        assert figures.largest_process <= 2048 * MIB
        # 0: the client, or the server, has closed the connection.
        assert {status for _, status in figures.hostile} <= {0, 200, 400, 413, 503}
        assert "Traceback" not in server.log.read_text()
        assert "not logged" not in server.log.read_text()
        began = time.monotonic()
        server.process.terminate()
        assert server.process.wait(90) == 0
        print(f"SIGTERM: ended after {time.monotonic() - began:.1f} s")


@pytest.mark.slow
def test_20000_fuzzed_bodies(tmp_path: Path):
    with attacked_server(tmp_path) as server:

        def ask(seed: int) -> tuple[float, int]:
            return server.ask("POST", CHAT, fuzzed_body(MODEL, seed))

        largest = 0
        statuses: dict[int, int] = {}
        slowest = 0.0
        with ThreadPoolExecutor(CLIENTS) as pool:
            for number, (seconds, status) in enumerate(pool.map(ask, range(CASES))):
                statuses[status] = statuses.get(status, 0) + 1
                slowest = max(slowest, seconds)
                if number % 200 == 0:
                    largest = max(largest, *server.memory().values())
        print(f"\n{statuses}, slowest {slowest:.1f} s, largest process {largest // MIB} MiB")
        assert set(statuses) <= {200, 400, 404, 413, 429}
        assert slowest <= 20
        assert largest <= 2048 * MIB
        assert "not logged" not in server.log.read_text()


def test_fuzzed_bodies(answerer, tmp_path, caplog):
    """A few of them, in the server of other tests."""
    caplog.set_level(logging.INFO, logger="finesight.serve")
    with running(answerer, tmp_path, limits=replace(LIMITS, answer_tokens=8)) as server:

        def ask(seed: int) -> int:
            return send(server, "POST", CHAT, fuzzed_body(MODEL, seed))[0]

        with ThreadPoolExecutor(4) as pool:
            statuses = list(pool.map(ask, range(300)))
        idle(server)
    assert set(statuses) <= {200, 400, 404}
    assert {200, 400} <= set(statuses)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_hostile_requests_of_the_other_kinds(answerer, tmp_path, caplog):
    """As the 500, without a clock; test_hostile.py has the slow schemas and images."""
    limits = replace(LIMITS, schema_seconds=0.3, answer_tokens=400)
    other = ("body", "text", "disconnect", "image: cut off", "schema: properties", "schema: states")
    makers = kinds(MODEL, flood=1 << 20, length=990_000)
    requests = [make(1) for name, make in makers.items() if name.startswith(other)]
    with running(answerer, tmp_path, limits=limits) as server, ThreadPoolExecutor(8) as pool:
        statuses = set(pool.map(lambda request: request.send(server.port), requests))
        idle(server)
    assert statuses <= {0, 200, 400, 413}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
