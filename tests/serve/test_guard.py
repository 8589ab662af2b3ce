"""Keys, sizes and times: what does not get in, and what does not stay."""

from __future__ import annotations

import contextlib
import hmac
import json
import resource
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
from serving import (
    ENDLESS,
    KEY,
    LIMITS,
    Running,
    bearer,
    data_url,
    idle,
    image,
    png,
    question,
    running,
    send,
)

from finesight.errors import UserError
from finesight.serve import keys as area
from finesight.serve.keys import Keys, check_reach, is_loopback, read_keys
from finesight.serve.run import listen

OTHER = "second-key-0123456789"


@pytest.fixture(scope="module")
def locked(answerer, tmp_path_factory) -> Iterator[Running]:
    with running(answerer, tmp_path_factory.mktemp("locked"), keys=[KEY, OTHER]) as there:
        yield there


def routes(server: Running) -> list[tuple[str, str]]:
    """Every route by method and path, and paths that are none."""
    found = [
        (method, route.path.replace("{name:path}", "a").replace("{name}", "a"))
        for route in server.app._app.routes
        for method in route.methods
    ]
    assert ("POST", "/v1/chat/completions") in found
    return [*found, ("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json"), ("PUT", "/v1/none")]


def test_every_route_needs_a_key(locked):
    assert len(routes(locked)) > 10
    wrong = [{}, bearer("wrong-key-0123456789"), bearer(""), {"Authorization": KEY}]
    wrong += [{"Authorization": f"Basic {KEY}"}, bearer(KEY[:-1]), bearer(KEY + "a")]
    for method, path in routes(locked):
        for headers in wrong:
            status, said, answer = send(locked, method, path, headers=headers)
            assert status == 401, (method, path, headers)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert method == "HEAD" or said["error"]["code"] == "invalid_api_key"
        for key in (KEY, OTHER):
            assert send(locked, method, path, headers=bearer(key))[0] not in (401, 403)


def test_no_body_is_read_before_the_key(locked):
    with socket.create_connection(("127.0.0.1", locked.port), timeout=10) as there:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"
        there.sendall(head.encode())
        assert b"401" in there.recv(100)


def test_keys_are_compared_in_full_and_all_of_them(monkeypatch):
    compared: list[tuple[bytes, bytes]] = []

    def counted(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return constant_time(a, b)

    constant_time = hmac.compare_digest
    keys = Keys([KEY, OTHER, "third-key-0123456789"])
    monkeypatch.setattr(area.hmac, "compare_digest", counted)
    for given in (KEY, OTHER, "x", ""):
        compared.clear()
        keys.owner(f"Bearer {given}")
        assert len(compared) == 3
        # Digests: neither length nor content decides how long it takes.
        assert {len(value) for pair in compared for value in pair} == {32}


def test_files_belong_to_their_key(locked):
    first, second = locked.client(KEY), locked.client(OTHER)
    kept = first.files.create(file=("a.png", png()), purpose="vision")
    assert kept.id in [file.id for file in first.files.list()]
    assert kept.id not in [file.id for file in second.files.list()]
    status, said, _ = send(locked, "GET", f"/v1/files/{kept.id}", headers=bearer(OTHER))
    assert (status, said["error"]["type"]) == (404, "not_found_error")
    part = {"type": "file", "file": {"file_id": kept.id}}
    body = question(locked, part, "What?")
    assert send(locked, "POST", "/v1/chat/completions", body, bearer(OTHER))[0] == 404
    assert send(locked, "POST", "/v1/chat/completions", body, bearer(KEY))[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.com", "localhost.a.de"])
def test_nothing_listens_beyond_this_machine_without_a_key(host):
    with pytest.raises(UserError, match="there is no key") as raised:
        listen(host, 0, [])
    assert all((raised.value.where, raised.value.expected, raised.value.remedy))
    check_reach(host, [KEY])


def test_loopback():
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "127.0.0.1.example.com", ""]))


def test_a_taken_port():
    with listen("127.0.0.1", 0, []) as taken, pytest.raises(UserError, match="listened on"):
        listen("127.0.0.1", taken.getsockname()[1], [])


def test_key_files(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\n  {OTHER}\n")
    assert read_keys(file) == [KEY, OTHER]
    monkeypatch.setenv("FINESIGHT_KEY", KEY)
    assert read_keys(None) == [KEY]
    monkeypatch.delenv("FINESIGHT_KEY")
    assert read_keys(None) == []
    for content in ("", "# none\n", "short\n", f"{KEY} with spaces\n", f"{KEY}\u00e9\n"):
        file.write_text(content)
        with pytest.raises(UserError) as raised:
            read_keys(file)
        assert KEY not in str(raised.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "missing")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:80"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Host": "["},
        {"Origin": "http://["},
    ],
)
def test_without_a_key_other_sites_do_not_get_in_through_a_browser(server, headers):
    assert send(server, "GET", "/v1/models", headers=headers)[0] == 403
    assert send(server, "GET", "/v1/models", headers={"Origin": "http://localhost:3"})[0] == 200


def test_a_body_of_100_mb(server):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = 100 * 10**6
    status, said, _ = send(server, "POST", "/v1/chat/completions", _zeros(size), _length(size))
    assert (status, said["error"]["type"]) == (413, "invalid_request_error")
    # Without its length said beforehand.
    sent = _zeros(size)
    status, _, _ = send(server, "POST", "/v1/chat/completions", sent, chunked=True)
    assert status == 413
    for length in ("-1", "1e3", "99999999999999999999", "\xb2"):
        assert send(server, "POST", "/v1/files", headers={"Content-Length": length})[0] in (
            400,
            413,
        )
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # What was held up to the limit, once as pieces and once joined.
    assert grown < 300_000, f"{grown} KiB"
    assert send(server, "GET", "/health")[0] == 200


def _zeros(size: int) -> Iterator[bytes]:
    for _ in range(size // 10**5):
        yield bytes(10**5)


def _length(size: int) -> dict[str, str]:
    return {"Content-Length": str(size)}


def test_bodies_of_many_clients_together(answerer, tmp_path):
    limits = replace(LIMITS, body_bytes=1000, bodies_bytes=1500, body_seconds=5.0)
    with running(answerer, tmp_path, limits=limits) as server, contextlib.ExitStack() as stack:
        for _ in range(2):
            there = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            stack.enter_context(there)
            there.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
            there.sendall(b"Content-Length: 900\r\n\r\n" + bytes(800))
        assert b" 503 " in there.recv(100)


@pytest.mark.parametrize("value", ["1", "[]", '{"a":1}', '"a"'])
def test_a_body_of_many_small_values(server, value):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many = ",".join([value] * 1_000_000)
    body = f'{{"model": "a", "messages": [{many}]}}'.encode()
    status, said, _ = send(server, "POST", "/v1/chat/completions", body)
    assert (status, said["error"]["type"]) == (400, "invalid_request_error")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_10000_pictures(server):
    body = question(server, *[image(data_url(b"no picture"))] * 10_000)
    status, said, _ = send(server, "POST", "/v1/chat/completions", body)
    assert status == 400
    assert "10000 pictures" in said["error"]["message"]


def _bomb(side: int) -> bytes:
    """A PNG of so many black pixels a side, in one bit each."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + (side + 7) // 8) * side), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def test_a_bomb_of_10000_x_10000_pixels(server):
    bomb = _bomb(10_000)
    assert len(bomb) < 20_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    body = question(server, image(data_url(bomb)), "What?")
    status, said, _ = send(server, "POST", "/v1/chat/completions", body)
    assert status == 400
    assert "100000000 pixels" in said["error"]["message"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '{"a": 1}', "[" * 100_000, "\xff\xfe"])
def test_bodies_that_are_none(server, body):
    status, said, _ = send(server, "POST", "/v1/chat/completions", body.encode("latin-1"))
    assert (status, said["error"]["type"]) == (400, "invalid_request_error")


def test_paths_and_methods_that_are_none(server):
    for method, path, expected in (
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/files/../../../etc/passwd", 404),
        ("GET", "/v1/files/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404),
        ("DELETE", "/v1/files/..%2frequests", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
    ):
        status, said, _ = send(server, method, path)
        assert status == expected, path
        assert said["error"]["message"]


QUICK = replace(LIMITS, header_seconds=0.4, body_seconds=0.4, idle_seconds=1.0, stalled_seconds=0.5)


@pytest.fixture(scope="module")
def impatient(answerer, tmp_path_factory) -> Iterator[Running]:
    limits = replace(QUICK, connections=8)
    with running(answerer, tmp_path_factory.mktemp("impatient"), limits=limits) as there:
        yield there


def closed(there: socket.socket) -> bool:
    """Wait until the server has closed the connection; what was still on its way is read first."""
    with contextlib.suppress(ConnectionResetError):
        while there.recv(100):
            pass
    return True


def test_heads_that_do_not_come(impatient):
    address = ("127.0.0.1", impatient.port)
    with socket.create_connection(address, timeout=10) as silent:
        assert closed(silent)
    with socket.create_connection(address, timeout=10) as slow:
        slow.settimeout(0.05)
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                # A byte now and then, which never makes a head.
                slow.sendall(b"G")
                with contextlib.suppress(TimeoutError):
                    if closed(slow):
                        break
            else:
                raise AssertionError("still open")


def test_a_body_that_does_not_come(impatient):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=10) as there:
        there.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        there.sendall(b"Content-Length: 900\r\n\r\n{")
        assert b" 408 " in there.recv(100)


def test_a_second_head_that_does_not_come(impatient):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=10) as there:
        there.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in there.recv(1000)
        there.sendall(b"GET /hea")
        assert closed(there)


def test_too_many_connections(impatient):
    address = ("127.0.0.1", impatient.port)
    with contextlib.ExitStack() as stack:
        many = [
            stack.enter_context(socket.create_connection(address, timeout=10)) for _ in "1" * 20
        ]
        time.sleep(0.1)
        shut = 0
        for there in many:
            there.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                shut += closed(there)
        assert shut >= 12
    time.sleep(0.2)
    assert send(impatient, "GET", "/health")[0] == 200


def test_a_client_that_takes_nothing_of_its_answer(impatient):
    before = impatient.service.facts().answer_tokens
    shape = json.loads(json.dumps(ENDLESS))
    # Long lines, so that what the sockets hold is soon full.
    more = {"stream": True, "n": 4, "logprobs": True, "top_logprobs": 20}
    body = question(impatient, "Count.", **{**shape, **more})
    there = socket.socket()
    with contextlib.closing(there):
        there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        there.connect(("127.0.0.1", impatient.port))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        there.sendall(head.encode() + body.encode())
        while not impatient.service.facts().running:
            time.sleep(0.01)
        idle(impatient, seconds=60)
    grown = impatient.service.facts().answer_tokens - before
    assert grown < 4 * 2000, "the answers went on to their end"
