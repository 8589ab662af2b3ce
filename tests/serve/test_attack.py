"""Load tests with 500 hostile requests of 8 clients and 20,000 fuzzed requests (slow tier).

`pytest -m fuzz -s tests/serve/test_attack.py` prints the statistics.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from api_server_fixtures import LIMITS, run_server, send_request, wait_until_idle
from attack_client import MIB, MODEL, run_attack, start_server_process
from fuzzed_bodies import make_fuzzed_body
from hostile_requests import CHAT, hostile_requests, request_makers

CLIENTS, REQUESTS, CASES = 8, 500, 20_000


@pytest.mark.fuzz
def test_500_hostile_requests_of_8_clients(tmp_path: Path):
    with start_server_process(tmp_path) as server:
        for number in range(8):
            assert server.request("POST", CHAT, server.make_ordinary_body(number))[1] == 200
        time.sleep(2)
        before = server.read_memory()
        stats = run_attack(server, hostile_requests(MODEL, REQUESTS), CLIENTS)
        time.sleep(5)
        after = server.read_memory()
        growth = sum(after.values()) - sum(before.values())
        print(f"\n{stats}")
        print(f"memory: {sum(before.values()) // MIB} MiB, grown by {growth // MIB} MiB")
        assert growth <= 200 * MIB
        assert max(stats.health) <= 0.5
        assert {status for _, status in stats.ordinary} == {200}
        assert stats.largest_process <= 2048 * MIB
        # 0: the client, or the server, has closed the connection.
        assert {status for _, status in stats.hostile} <= {0, 200, 400, 413, 503}
        assert "Traceback" not in server.log.read_text()
        assert "not logged" not in server.log.read_text()
        began = time.monotonic()
        server.process.terminate()
        assert server.process.wait(90) == 0
        print(f"SIGTERM: ended after {time.monotonic() - began:.1f} s")


@pytest.mark.fuzz
def test_20000_fuzzed_bodies(tmp_path: Path):
    with start_server_process(tmp_path) as server:

        def ask(seed: int) -> tuple[float, int]:
            return server.request("POST", CHAT, make_fuzzed_body(MODEL, seed))

        largest = 0
        statuses: dict[int, int] = {}
        slowest = 0.0
        with ThreadPoolExecutor(CLIENTS) as pool:
            for number, (seconds, status) in enumerate(pool.map(ask, range(CASES))):
                statuses[status] = statuses.get(status, 0) + 1
                slowest = max(slowest, seconds)
                if number % 200 == 0:
                    largest = max(largest, *server.read_memory().values())
        print(f"\n{statuses}, slowest {slowest:.1f} s, largest process {largest // MIB} MiB")
        assert set(statuses) <= {200, 400, 404, 413, 429}
        assert slowest <= 20
        assert largest <= 2048 * MIB
        assert "not logged" not in server.log.read_text()


def test_fuzzed_bodies(inference_model, tmp_path, caplog):
    """Send 300 fuzzed bodies to an in-process server."""
    caplog.set_level(logging.INFO, logger="finesight.serve")
    with run_server(
        inference_model, tmp_path, limits=replace(LIMITS, max_completion_tokens=8)
    ) as server:

        def ask(seed: int) -> int:
            return send_request(server, "POST", CHAT, make_fuzzed_body(MODEL, seed))[0]

        with ThreadPoolExecutor(4) as pool:
            statuses = list(pool.map(ask, range(300)))
        wait_until_idle(server)
    assert set(statuses) <= {200, 400, 404}
    assert {200, 400} <= set(statuses)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_other_hostile_requests(inference_model, tmp_path, caplog):
    """Send hostile requests without slow schemas and images, which test_hostile.py covers."""
    limits = replace(LIMITS, max_schema_cpu_s=0.3, max_completion_tokens=400)
    other = ("body", "text", "disconnect", "image: cut off", "schema: properties", "schema: states")
    makers = request_makers(MODEL, flood=1 << 20, length=990_000)
    requests = [make(1) for name, make in makers.items() if name.startswith(other)]
    with (
        run_server(inference_model, tmp_path, limits=limits) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        statuses = set(pool.map(lambda request: request.send(server.port), requests))
        wait_until_idle(server)
    assert statuses <= {0, 200, 400, 413}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
