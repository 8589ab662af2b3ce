"""Tests of authentication, size limits and timeouts."""

import contextlib
import errno
import hmac
import io
import os
import resource
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
from api_server_fixtures import (
    CHAT,
    ENDLESS_REQUEST,
    KEY,
    LIMITS,
    POST_CHAT,
    RunningServer,
    make_auth_header,
    make_data_url,
    make_image_part,
    make_noise_png,
    make_request_body,
    post_chat,
    run_server,
    send_request,
    wait_until_idle,
)
from PIL import Image

from finesight import credentials
from finesight.errors import UserError
from finesight.serve.http_protocol import WARNING_INTERVAL_S, AcceptErrors, is_loopback
from finesight.serve.request_middleware import (
    ApiKeys,
    check_exposure,
    read_api_keys,
)

OTHER = "second-key-0123456789"


@pytest.fixture(scope="module")
def server_with_keys(inference_model, tmp_path_factory) -> Iterator[RunningServer]:
    with run_server(inference_model, tmp_path_factory.mktemp("locked"), keys=[KEY, OTHER]) as there:
        yield there


def routes(server: RunningServer) -> list[tuple[str, str]]:
    """Return all routes by method and path, and unknown paths."""
    found = [
        (method, route.path.replace("{name:path}", "a").replace("{name}", "a"))
        for route in server.app.app.routes
        for method in route.methods
    ]
    assert ("POST", CHAT) in found
    return [*found, ("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json"), ("PUT", "/v1/none")]


def test_every_route_requires_a_key(server_with_keys, monkeypatch):
    monkeypatch.setattr(credentials, "MAX_WRONG_GUESSES_PER_ADDRESS", 10**6)
    monkeypatch.setattr(credentials, "MAX_WRONG_GUESSES", 10**6)
    assert len(routes(server_with_keys)) > 10
    wrong_keys = "wrong-key-0123456789", "", KEY[:-1], KEY + "a"
    wrong = [{}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}]
    wrong += [make_auth_header(key) for key in wrong_keys]
    for method, path in routes(server_with_keys):
        for headers in wrong:
            status, output, answer = send_request(server_with_keys, method, path, headers=headers)
            assert status == 401, (method, path, headers)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert method == "HEAD" or output["error"]["code"] == "invalid_api_key"
        for headers in (make_auth_header(KEY), make_auth_header(OTHER)):
            status = send_request(server_with_keys, method, path, headers=headers)[0]
            assert status not in (401, 403)


def test_wrong_keys_have_a_budget_and_right_keys_are_accepted(server_with_keys, monkeypatch):
    monkeypatch.setattr(credentials, "MAX_WRONG_GUESSES", 10**6)
    monkeypatch.setattr(credentials, "GUESS_WINDOW_S", 1e6)
    wrong = make_auth_header("wrong-key-0123456789")
    answers = [send_request(server_with_keys, "GET", "/v1/models", headers=wrong) for _ in "a" * 12]
    assert (answers[-1][0], "retry-after" in answers[-1][2].headers) == (429, True)
    # A client without a key does not guess, and others are not locked out.
    for headers, status in ({}, 401), (make_auth_header(KEY), 200):
        assert send_request(server_with_keys, "GET", "/v1/models", headers=headers)[0] == status


@pytest.mark.parametrize(
    ("addresses", "num_allowed"),
    [
        ([f"127.7.0.{i}" for i in range(60)], 30),
        (["::ffff:10.0.0.1", "10.0.0.1"] * 30, 10),
        ([f"2001:db8:1:2::{i:x}" for i in range(60)], 10),
        (["fe80::1%eth0", "", "unknown"] * 20, 30),
    ],
)
def test_budget_of_wrong_secrets_is_for_all_addresses(addresses, num_allowed):
    keys = ApiKeys([KEY])
    waits = [keys.count_wrong(address) for address in addresses]
    assert (waits.count(0), max(waits)) == (num_allowed, 60)


def test_body_is_not_read_before_authentication(server_with_keys):
    with server_with_keys.connect(POST_CHAT + b"Content-Length: 1000\r\n\r\n") as there:
        assert b"401" in there.recv(100)


def test_keys_are_compared_in_constant_time(monkeypatch):
    compared: list[tuple[bytes, bytes]] = []

    def counted(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return constant_time(a, b)

    constant_time = hmac.compare_digest
    keys = ApiKeys([KEY, OTHER, "third-key-0123456789"])
    monkeypatch.setattr(credentials.hmac, "compare_digest", counted)
    for given in (KEY, OTHER, "x", ""):
        compared.clear()
        keys.authenticate(f"Bearer {given}")
        assert len(compared) == 3
        # Digests: neither length nor content decides how long it takes.
        assert {len(value) for pair in compared for value in pair} == {32}


def test_files_belong_to_their_key(server_with_keys):
    first, second = server_with_keys.client(KEY), server_with_keys.client(OTHER)
    retained = first.files.create(file=("a.png", make_noise_png()), purpose="vision")
    assert retained.id in [file.id for file in first.files.list()]
    assert retained.id not in [file.id for file in second.files.list()]
    status, output, _ = send_request(
        server_with_keys, "GET", f"/v1/files/{retained.id}", headers=make_auth_header(OTHER)
    )
    assert (status, output["error"]["type"]) == (404, "not_found_error")
    part = {"type": "file", "file": {"file_id": retained.id}}
    for key, status in ((OTHER, 404), (KEY, 200)):
        headers = make_auth_header(key)
        assert post_chat(server_with_keys, part, "What?", headers=headers)[0] == status


@pytest.mark.parametrize(
    ("host", "proxies"),
    [
        *((host, []) for host in ("0.0.0.0", "::", "192.168.0.1", "example.com", "localhost.a.de")),
        ("127.0.0.1", ["127.0.0.1"]),
    ],
)
def test_public_host_and_trusted_proxy_require_a_key(host, proxies):
    option = "--trusted-proxy.*" if proxies else ""
    with pytest.raises(UserError, match=f"{option}there is no API key") as raised:
        check_exposure(host, [], proxies)
    assert all((raised.value.where, raised.value.expected, raised.value.remedy))
    check_exposure(host, [KEY], proxies)


def test_wait_is_for_the_wrong_secrets_of_the_own_network(monkeypatch):
    keys, clock = ApiKeys([KEY]), iter((0.0, *[30.0] * 11))
    # Threads of servers use the clock of the process.
    monkeypatch.setattr(credentials, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    waits = [keys.count_wrong(address) for address in ("10.0.0.1", *["10.0.0.2"] * 11)]
    assert waits == [0] * 11 + [60]


def test_loopback_detection():
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "127.0.0.1.example.com", ""]))


def test_key_files(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    with (tmp_path / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 40)
    file.write_text(f"# ours\n{KEY}\n\n  {OTHER}\n  #indented-comment-without-spaces\n")
    assert read_api_keys(file) == [KEY, OTHER]
    monkeypatch.setenv("FINESIGHT_KEY", KEY)
    assert read_api_keys(None) == [KEY]
    monkeypatch.delenv("FINESIGHT_KEY")
    assert read_api_keys(None) == []
    for content in ("", "# none\n", "short\n", f"{KEY} with spaces\n", f"{KEY}\u00e9\n"):
        file.write_text(content)
        with pytest.raises(UserError) as raised:
            read_api_keys(file)
        assert KEY not in str(raised.value)
    for name in ("missing", "sparse"):
        with pytest.raises(UserError, match="cannot be read"):
            read_api_keys(tmp_path / name)


@pytest.mark.parametrize(
    "headers",
    [{"Host": host} for host in ("evil.example", "127.0.0.1.evil.example:80", "[")]
    + [{"Origin": origin} for origin in ("https://evil.example", "null", "http://[")],
)
def test_cross_origin_requests_are_rejected_without_key(server, headers):
    assert send_request(server, "GET", "/v1/models", headers=headers)[0] == 403
    local = {"Origin": "http://localhost:3"}
    assert send_request(server, "GET", "/v1/models", headers=local)[0] == 200


def test_body_of_100_mb_is_rejected(server):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    headers = {"Content-Length": str(1000 * 10**5)}
    zeros = [bytes(10**5)] * 1000
    status, output, _ = send_request(server, "POST", CHAT, iter(zeros), headers)
    assert (status, output["error"]["type"]) == (413, "invalid_request_error")
    # Without a Content-Length header.
    assert send_request(server, "POST", CHAT, iter(zeros), chunked=True)[0] == 413
    for length in ("-1", "1e3", "99999999999999999999", "\xb2"):
        headers = {"Content-Length": length}
        assert send_request(server, "POST", "/v1/files", headers=headers)[0] in (400, 413)
    generated = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # What was held up to the limit, once as pieces and once joined.
    assert generated < 300_000, f"{generated} KiB"
    assert send_request(server, "GET", "/health")[0] == 200


def test_total_body_size_limit(inference_model, tmp_path):
    limits = replace(LIMITS, max_body_bytes=1000, max_total_body_bytes=1500)
    head = POST_CHAT + b"Content-Length: 900\r\n\r\n" + bytes(800)
    with (
        run_server(inference_model, tmp_path, limits=limits) as server,
        server.connect(head),
        server.connect(head) as second,
    ):
        assert b" 503 " in second.recv(100)


@pytest.mark.parametrize("value", ["1", "[]", '{"a":1}', '"a"'])
def test_body_with_many_small_values_is_rejected(server, value):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many = ",".join([value] * 1_000_000)
    body = f'{{"model": "a", "messages": [{many}]}}'.encode()
    status, output, _ = send_request(server, "POST", CHAT, body)
    assert (status, output["error"]["type"]) == (400, "invalid_request_error")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_ten_thousand_images_are_rejected(server):
    status, error = post_chat(server, *[make_image_part(make_data_url(b"no picture"))] * 10_000)
    assert status == 400
    assert "10000 images" in error["message"]


def test_decompression_bomb_is_rejected(server):
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    bomb = file.getvalue()
    assert len(bomb) < 20_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status, error = post_chat(server, make_image_part(make_data_url(bomb)), "What?")
    assert status == 400
    assert "100000000 pixels" in error["message"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '{"a": 1}', "[" * 100_000, "\xff\xfe"])
def test_invalid_bodies(server, body):
    status, output, _ = send_request(server, "POST", CHAT, body.encode("latin-1"))
    assert (status, output["error"]["type"]) == (400, "invalid_request_error")


def test_invalid_paths_and_methods(server):
    for method, path, expected in (
        ("GET", CHAT, 405),
        ("GET", "/v1/files/../../../etc/passwd", 404),
        ("GET", "/v1/files/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404),
        ("DELETE", "/v1/files/..%2frequests", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
    ):
        status, output, _ = send_request(server, method, path)
        assert status == expected, path
        assert output["error"]["message"]


SHORT_TIMEOUT_LIMITS = replace(
    LIMITS, header_timeout_s=0.4, body_timeout_s=0.4, keep_alive_timeout_s=1.0, send_timeout_s=0.5
)


@pytest.fixture(scope="module")
def short_timeout_server(inference_model, tmp_path_factory) -> Iterator[RunningServer]:
    folder, limits = tmp_path_factory.mktemp("impatient"), SHORT_TIMEOUT_LIMITS
    with run_server(inference_model, folder, limits=limits) as there:
        yield there


def wait_until_closed(there: socket.socket) -> bool:
    """Read until the server has closed the connection."""
    with contextlib.suppress(ConnectionResetError):
        while there.recv(100):
            pass
    return True


def test_timeouts_of_headers_bodies_and_kept_connections(short_timeout_server):
    with short_timeout_server.connect() as silent:
        assert wait_until_closed(silent)
    with short_timeout_server.connect() as slow:
        slow.settimeout(0.05)
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                # Single bytes that never complete the headers.
                slow.sendall(b"G")
                with contextlib.suppress(TimeoutError):
                    if wait_until_closed(slow):
                        break
            else:
                raise AssertionError("still open")
    with short_timeout_server.connect(POST_CHAT + b"Content-Length: 900\r\n\r\n{") as there:
        assert b" 408 " in there.recv(100)
    with short_timeout_server.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as there:
        assert b" 200 " in there.recv(1000)
        there.sendall(b"GET /hea")
        assert wait_until_closed(there)


def test_connections_beyond_the_limit_get_status_503(inference_model, tmp_path):
    # Without short timeouts, which could end a connection before the last one is open.
    limits = replace(LIMITS, max_connections=8)
    with run_server(inference_model, tmp_path, limits=limits) as server:
        with contextlib.ExitStack() as stack:
            # Connections without a request would give way to others.
            for _ in range(8):
                there = stack.enter_context(
                    server.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                )
                assert b" 200 " in there.recv(1000)
            status, output, answer = send_request(server, "POST", "/health", "x" * 999)
            assert (status, output["error"]["type"]) == (503, "overloaded_error")
            assert int(answer.headers["retry-after"]) >= 1
        # The server counts a connection until it has read its end.
        while (status := send_request(server, "GET", "/health")[0]) == 503:
            time.sleep(0.02)
        assert status == 200


def test_all_connections_may_wait_for_their_first_request(inference_model, tmp_path):
    limits = replace(LIMITS, max_connections=8)
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with (
        run_server(inference_model, tmp_path, limits=limits) as server,
        contextlib.ExitStack() as stack,
    ):
        links = [stack.enter_context(server.connect()) for _ in range(8)]
        for link in links:
            link.sendall(request)
            assert b" 200 " in link.recv(1000)


@pytest.mark.parametrize(
    "start", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\n", POST_CHAT]
)
def test_half_sent_requests_keep_no_client_out(inference_model, tmp_path, start):
    limits = replace(LIMITS, max_connections=8)
    with (
        run_server(inference_model, tmp_path, limits=limits) as server,
        contextlib.ExitStack() as stack,
    ):
        for number in range(40):
            stack.enter_context(server.connect(start))
            if number % 8 == 0:
                assert send_request(server, "GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("path", "expected"), [(CHAT, (b" 503 ", b"retry-after: 2")), ("/v1/none", (b" 404 ", b""))]
)
def test_refused_client_that_sends_slowly_receives_the_response(
    inference_model, tmp_path, path, expected
):
    """A connection that is closed with unread data would be reset."""
    limits = replace(
        SHORT_TIMEOUT_LIMITS, body_timeout_s=20.0, max_total_body_bytes=1000, send_timeout_s=9.0
    )
    head = POST_CHAT.replace(CHAT.encode(), path.encode()) + b"Content-Length: 900000\r\n\r\n"
    with run_server(inference_model, tmp_path, limits=limits) as server:
        with server.connect(head) as there:
            for _ in range(9):
                there.sendall(b" " * 100_000)
                time.sleep(0.05)
            answer = there.recv(1000)
        assert all(part in answer for part in expected)
        assert (b"retry-after" in answer) == bool(expected[1])
        assert server.app.budget.used_bytes == 0


def test_stalled_client_is_disconnected(short_timeout_server):
    before = short_timeout_server.service.get_stats().completion_tokens
    # Long lines, so that what the sockets hold is soon full.
    more = {"stream": True, "n": 4, "logprobs": True, "top_logprobs": 20}
    body = make_request_body(short_timeout_server, "Count.", **{**ENDLESS_REQUEST, **more})
    there = socket.socket()
    with contextlib.closing(there):
        there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        there.connect(("127.0.0.1", short_timeout_server.port))
        there.sendall(POST_CHAT + b"Content-Length: %d\r\n\r\n" % len(body) + body.encode())
        while not short_timeout_server.service.get_stats().num_running:
            time.sleep(0.01)
        wait_until_idle(short_timeout_server, seconds=60)
    generated = short_timeout_server.service.get_stats().completion_tokens - before
    assert generated < 4 * 2000, "the answers were not canceled"


def test_missing_descriptors_are_reported_once(capsys, monkeypatch):
    errors, others = AcceptErrors(), []
    loop = SimpleNamespace(default_exception_handler=others.append)
    for code in (errno.EMFILE, errno.ENFILE):
        errors.handle(loop, {"exception": OSError(code, os.strerror(code))})
    (line,) = capsys.readouterr().err.splitlines()
    assert "Too many open files" in line
    assert "ulimit -n" in line
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + WARNING_INTERVAL_S + 1)
    errors.handle(loop, {"exception": OSError(errno.EMFILE, "full")})
    assert len(capsys.readouterr().err.splitlines()) == 1
    context = {"exception": OSError(errno.ECONNABORTED, "aborted")}
    errors.handle(loop, context)
    assert others == [context]
    assert not capsys.readouterr().err
