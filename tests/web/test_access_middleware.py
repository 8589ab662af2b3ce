"""Tests of the access middleware without a browser."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import secrets
import select
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from case_files import load_cases
from service_fixture import run_service
from thinking_fixtures import ANSWER, THOUGHT
from web_server_fixture import RunningWebPage, ScriptedService, run_web_page

from finesight.encode.family import ThinkingOptions
from finesight.infer.chat_session import ChatReply
from finesight.infer.request import GenerationOptions
from finesight.web import access_middleware, web_server, web_sessions
from finesight.web.access_middleware import (
    ACTION_INPUT,
    BROWSER_COOKIE,
    BROWSER_COOKIE_AGE_S,
    MAX_MESSAGE_BYTES,
    MAX_UPLOAD_BYTES,
    SESSION_COOKIE,
)
from finesight.web.chat_html import render_turns
from finesight.web.web_sessions import MAX_IMAGE_BYTES, MAX_MESSAGE_CHARS, UPLOAD_TTL_S

CASES = load_cases("access_middleware")

PASSWORD = "right-password"


@pytest.fixture(scope="module")
def open_page() -> Iterator[RunningWebPage]:
    with run_web_page(ScriptedService()) as location:
        yield location


@pytest.fixture(scope="module")
def locked_page() -> Iterator[RunningWebPage]:
    with run_web_page(ScriptedService(), password=PASSWORD, loopback=False) as location:
        yield location


def _ask(
    location: RunningWebPage, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with _connect(location) as connection:
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        given = {name.lower(): value for name, value in answer.getheaders()}
        stream = given.get("content-type", "").startswith("text/event-stream")
        return answer.status, given, b"" if stream else answer.read()


def _connect(location: RunningWebPage) -> contextlib.closing[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", location.port, timeout=20)
    return contextlib.closing(connection)


def _upload(location: RunningWebPage, name: str, content: bytes) -> tuple[int, str]:
    body = (
        f'--x\r\ncontent-disposition: form-data; name="files"; filename="{name}"\r\n'
        "content-type: image/png\r\n\r\n"
    ).encode() + content + b"\r\n--x--\r\n"  # fmt: skip
    kind = "multipart/form-data; boundary=x"
    status, _, output = _ask(location, "POST", "/gradio_api/upload", body, content_type=kind)
    return status, json.loads(output)[0] if status == 200 else ""


SETTINGS = [False, False, 9, 0, 1, 0, 1, -1, ""]
"""Settings of an answer, in the order of the fields of `ChatSettings`."""


def _join(location: RunningWebPage, path: Any) -> int:
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    return _send_event(location, [{"text": "What?", "files": [file]}, *SETTINGS])[0]


def _event_id(location: RunningWebPage, inputs: int) -> int:
    """Return the ID of the first event with a number of inputs, that of a question."""
    config = json.loads(_ask(location, "GET", "/config")[2])
    return next(one["id"] for one in config["dependencies"] if len(one["inputs"]) == inputs)


def _send_event(location: RunningWebPage, data: Any, **other: Any) -> tuple[int, bytes]:
    body = {"data": data, "fn_index": _event_id(location, 10), "session_hash": "abc"} | other
    status, _, output = _ask(
        location, "POST", "/gradio_api/queue/join", json.dumps(body).encode(),
        content_type="application/json",
    )  # fmt: skip
    return status, output


def _routes(location: RunningWebPage) -> list[tuple[str, str]]:
    """Return all routes of Gradio and the page, with parameters."""

    def below(routes: Any, prefix: str) -> Iterator[tuple[str, str]]:
        for route in routes:
            inner = getattr(route, "routes", None) or getattr(
                getattr(route, "original_router", None), "routes", None
            )
            path = prefix + getattr(route, "path", "")
            if inner:
                yield from below(inner, path.rstrip("/"))
            for method in getattr(route, "methods", None) or ():
                yield method, re.sub(r"\{[^}]*\}", "1", path)

    return sorted(set(below(location.app.app.routes, "")))


def test_every_route_requires_the_password(locked_page):
    routes = _routes(locked_page)
    assert len(routes) > 60, "the walk finds no routes"
    for method, path in [*routes, ("GET", "/assets/x.js"), ("PUT", "/"), ("OPTIONS", "/config")]:
        status, headers, body = _ask(locked_page, method, path)
        if path == "/page.css":
            continue
        # Browsers request the icon of the sign-in page; there is none.
        allowed = (204,) if path == "/favicon.ico" else (303, 401, 404)
        assert status in allowed, f"{method} {path}: {status}"
        assert body in (b"", b"sign-in required", b"not found"), f"{method} {path}"
        assert headers.get("location", "sign-in") == "sign-in"


def test_unneeded_routes_are_closed(open_page):
    closed = [(m, p) for m, p in _routes(open_page) if _ask(open_page, m, p)[2] == b"not found"]
    for method, path in (
        ("GET", "/gradio_api/proxy=1"),
        ("GET", "/gradio_api/file/1"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/openapi.json"),
        ("POST", "/gradio_api/run/1"),
        ("POST", "/gradio_api/call/1"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/login"),
    ):
        assert (method, path) in closed, f"{method} {path}"


def test_wrong_password_or_cookie_is_rejected(locked_page):
    wrong = _ask(locked_page, "POST", "/sign-in", b"password=wrong")
    assert wrong[0] == 401
    assert "set-cookie" not in wrong[1]
    for value in ("", "x", PASSWORD, "é"):
        cookie = f"{SESSION_COOKIE}={value}".encode().decode("latin-1")
        assert _ask(locked_page, "GET", "/config", cookie=cookie)[0] == 401
    right = _ask(locked_page, "POST", "/sign-in", f"password={PASSWORD}".encode())
    assert right[0] == 303
    cookie = right[1]["set-cookie"]
    assert {"HttpOnly", "SameSite=strict"} <= set(cookie.split("; "))
    assert _ask(locked_page, "GET", "/config", cookie=cookie.split(";")[0])[0] == 200


def _guess(location: RunningWebPage, address: str, **headers: str) -> int:
    """Send a wrong password from an address of this machine, and return the status."""
    with contextlib.closing(
        http.client.HTTPConnection(
            "127.0.0.1", location.port, timeout=20, source_address=(address, 0)
        )
    ) as connection:
        connection.request("POST", "/sign-in", b"password=wrong", headers)
        answer = connection.getresponse()
        assert (answer.getheader("retry-after") is None) == (answer.status == 401)
        return answer.status


@pytest.mark.parametrize("proxies", [(), ("127.0.0.1",), ("10.0.0.1",)])
def test_wrong_passwords_have_a_budget_and_the_owner_is_admitted(monkeypatch, proxies):
    monkeypatch.setattr(access_middleware, "FAILED_LOGIN_DELAY_S", 0)
    with run_web_page(ScriptedService(), password=PASSWORD, proxies=proxies) as location:
        right = f"password={PASSWORD}".encode()
        cookie = _ask(location, "POST", "/sign-in", right)[1]["set-cookie"].split(";")[0]
        # One address has a smaller budget. Only a trusted proxy names the address of its client.
        names = [{"x-forwarded-for": f"1.2.3.4, 5.6.7.{i}"} for i in range(12)]
        is_proxied = "127.0.0.1" in proxies
        statuses = [_guess(location, "127.0.0.1", **headers) for headers in names]
        assert statuses.count(401) == (12 if is_proxied else 10)
        statuses += [_guess(location, f"127.7.{i % 9}.{i}") for i in range(1, 30)]
        assert (statuses.count(401), statuses.count(429)) == (30, 11)
        assert _ask(location, "POST", "/sign-in", right)[0] == 303
        assert _ask(location, "GET", "/config", cookie=cookie)[0] == 200


def test_half_sent_requests_keep_nobody_out(monkeypatch):
    monkeypatch.setattr(web_server, "MAX_UNKNOWN_CONNECTIONS", 5)
    monkeypatch.setattr(web_server, "REQUEST_TIMEOUT_S", 0.5)
    post = b"POST /sign-in HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\npass"
    starts = (b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: x\r\n", post)
    with (
        run_web_page(ScriptedService(), password=PASSWORD) as location,
        contextlib.ExitStack() as stack,
    ):
        links = []
        for index in range(20):
            link = socket.create_connection(("127.0.0.1", location.port), timeout=20)
            links.append(stack.enter_context(link))
            link.sendall(starts[index % 4])
        right = _ask(location, "POST", "/sign-in", f"password={PASSWORD}".encode())
        assert right[0] == 303
        cookie = right[1]["set-cookie"].split(";")[0]
        assert _ask(location, "GET", "/config", cookie=cookie)[0] == 200
        for link in links:
            with contextlib.suppress(ConnectionResetError):
                assert link.recv(100) == b""


def test_query_is_kept_over_the_sign_in(locked_page):
    query = "?step=results&run=runs%2Fa"
    assert _ask(locked_page, "GET", f"/{query}")[1]["location"] == f"sign-in{query}"
    # The form without an action is sent to the address of the page.
    assert b"action=" not in _ask(locked_page, "GET", f"/sign-in{query}")[2]
    right = _ask(locked_page, "POST", f"/sign-in{query}", f"password={PASSWORD}".encode())
    assert right[1]["location"] == f"./{query}"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:1", "", "[::2]:80", "["])
def test_invalid_host_headers_are_rejected(open_page, host):
    assert _ask(open_page, "GET", "/config", host=host)[0] in (400, 403)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_cross_origin_requests_are_rejected(open_page, origin):
    body = b"{}"
    for path in ("queue/join", "upload"):
        assert _ask(open_page, "POST", f"/gradio_api/{path}", body, origin=origin)[0] == 403


def test_only_uploaded_files_are_served(open_page, tmp_path):
    own = tmp_path / "secret.png"
    own.write_bytes(b"secret")
    status, path = _upload(open_page, "a.png", b"picture")
    assert status == 200
    served_file = _ask(open_page, "GET", f"/gradio_api/file={quote(path)}")
    assert (served_file[0], served_file[2]) == (200, b"picture")
    assert "sandbox" in served_file[1]["content-security-policy"]
    uploads = open_page.folder / "uploads"
    (uploads / "link").symlink_to(tmp_path)
    for outside in (
        str(own),
        "/etc/hosts",
        f"{uploads}/../chats",
        f"{uploads}/link/secret.png",
        f"{path}/../../../../../../etc/hosts",
        "http://127.0.0.1:9/x.png",
        "file:///etc/hosts",
        "\0",
        "",
    ):
        requested = _ask(open_page, "GET", f"/gradio_api/file={quote(outside)}")
        assert requested[0] in (400, 404), outside
        assert _join(open_page, outside) == 403, outside
    for odd in (None, 7, ["x"], {"path": path}):
        assert _join(open_page, odd) == 422, odd


def test_upload_names_cannot_escape_the_folder(open_page, tmp_path):
    for name in ("../../../x.png", "/etc/x.png", "..", "a/../../x.png", "\\..\\x.png"):
        status, path = _upload(open_page, name, b"picture")
        assert status in (200, 400)
        if path:
            assert Path(path).resolve().is_relative_to(open_page.folder / "uploads")


def test_request_body_limits(open_page):
    much = b"x" * (MAX_MESSAGE_BYTES + 1)
    assert _ask(open_page, "POST", "/gradio_api/queue/join", much)[0] == 413
    length = str(100 << 20)
    assert MAX_UPLOAD_BYTES > 100 << 20, "the rejection below depends on the Content-Length only"
    result = {"content_length": str(MAX_UPLOAD_BYTES + 1), "content_type": "multipart/form-data"}
    assert _ask(open_page, "POST", "/gradio_api/upload", b"", **result)[0] == 413
    assert _ask(open_page, "POST", "/gradio_api/cancel", b"", content_length=length)[0] == 413
    assert _upload(open_page, "large.png", bytes(MAX_IMAGE_BYTES + 1))[0] == 413
    before = [*(open_page.folder / "uploads").rglob("large.png")]
    assert before == []


def test_unused_uploads_are_removed(open_page):
    old, new = (
        Path(_upload(open_page, f"{name}.png", name.encode())[1]) for name in ("old", "new")
    )
    assert old.exists()
    past = time.time() - UPLOAD_TTL_S - 60
    os.utime(old, (past, past))
    assert _upload(open_page, "next.png", b"next")[0] == 200
    assert (old.exists(), new.exists()) == (False, True)
    # The same again is as new.
    again = Path(_upload(open_page, "old.png", b"old")[1])
    assert _upload(open_page, "next.png", b"next")[0] == 200
    assert again.exists()


def test_chunked_body_is_limited(open_page):
    chunks = iter([b"x" * 65536] * (MAX_MESSAGE_BYTES // 65536 + 2))
    with (
        _connect(open_page) as connection,
        contextlib.suppress(BrokenPipeError, ConnectionResetError),
    ):
        connection.request("POST", "/gradio_api/queue/join", chunks, encode_chunked=True)
        assert connection.getresponse().status == 413


def test_images_and_exports_need_secret_urls(open_page):
    for path in ("/images/x/1", "/export/x/chat.zip", "/images/x/..%2f..%2fx", "/images/%C3%A9/1"):
        assert _ask(open_page, "GET", path)[0] in (404, 422), path


def test_every_response_has_security_headers(open_page):
    for path in ("/", "/config", "/theme.css", "/page.css", "/no", "/gradio_api/file=/etc/hosts"):
        headers = _ask(open_page, "GET", path)[1]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in headers["content-security-policy"]
    first, second = (_ask(open_page, "GET", "/")[1]["content-security-policy"] for _ in range(2))
    assert "nonce-" in first
    assert first != second
    assert "unsafe-inline" not in first.partition("script-src")[2].partition(";")[0]


def test_page_loads_no_external_resources(open_page):
    page = _ask(open_page, "GET", "/")[2].decode()
    fetched = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:[^\"]*)", page)
    assert fetched == []
    assert "fonts.g" not in page + _ask(open_page, "GET", "/theme.css")[2].decode()


def test_server_opens_no_external_connections():
    tried: list[Any] = []
    watching = [True]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
            tried.append(arguments[-1] if event == "socket.connect" else arguments[0])

    sys.addaudithook(watch)  # for the rest of the process; `watching` turns it off
    try:
        with run_web_page(ScriptedService()) as location:
            assert _ask(location, "GET", "/")[0] == 200
            assert _join(location, "http://93.184.216.34/x.png") == 403
    finally:
        watching.clear()
    hosts = {one[0] if isinstance(one, tuple) else one for one in tried}
    assert hosts, "the watch saw nothing, not even the test's own requests"
    assert hosts <= {"127.0.0.1", "localhost", "::1"}, hosts


def test_uploads_are_stored_in_a_private_temp_folder():
    with run_web_page(ScriptedService()) as location:
        assert _upload(location, "a.png", b"picture")[0] == 200
        folder = location.folder
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not folder.exists()


QUESTION = {"text": "What?", "files": []}

MALFORMED: dict[str, dict[str, Any]] = {
    "no data": {"data": None},
    "data of another kind": {"data": {}},
    "too few inputs": {"data": [QUESTION]},
    "too many inputs": {"data": [QUESTION, *SETTINGS, 1]},
    "unknown event": {"fn_index": 99},
    "negative event": {"fn_index": -1},
    "huge event": {"fn_index": 10**3000},
    "no event": {"fn_index": None},
    "no session": {"session_hash": None},
    "empty session": {"session_hash": ""},
    "long session": {"session_hash": "a" * 65},
    "session with a surrogate": {"session_hash": "\ud800"},
    "odd trigger": {"trigger_id": "x"},
    "no question": {"data": [None, *SETTINGS]},
    "question as a text": {"data": ["What?", *SETTINGS]},
    "question as a list": {"data": [[], *SETTINGS]},
    "text as a number": {"data": [{"text": 1, "files": []}, *SETTINGS]},
    "text with a surrogate": {"data": [{"text": "\ud800", "files": []}, *SETTINGS]},
    "files as a text": {"data": [{"text": "", "files": "x"}, *SETTINGS]},
    "files without a path": {"data": [{"text": "", "files": [{}]}, *SETTINGS]},
    "comparison as a text": {"data": [QUESTION, "x", *SETTINGS[1:]]},
    "thinking mode as a text": {"data": [QUESTION, False, "x", *SETTINGS[2:]]},
    "length of no number": {"data": [QUESTION, False, False, "x", *SETTINGS[3:]]},
    "length below one": {"data": [QUESTION, False, False, 0, *SETTINGS[3:]]},
    "length beyond the most": {"data": [QUESTION, False, False, 1e308, *SETTINGS[3:]]},
    "length that is not finite": {"data": [QUESTION, False, False, float("nan"), *SETTINGS[3:]]},
    "negative temperature": {"data": [QUESTION, False, False, 9, -1, *SETTINGS[4:]]},
    "no temperature": {"data": [QUESTION, False, False, 9, None, *SETTINGS[4:]]},
    "no top-p": {"data": [QUESTION, *SETTINGS[:4], 0, *SETTINGS[5:]]},
    "negative top-k": {"data": [QUESTION, *SETTINGS[:5], -1, *SETTINGS[6:]]},
    "penalty beyond the most": {"data": [QUESTION, *SETTINGS[:6], 9, *SETTINGS[7:]]},
    "seed as a text": {"data": [QUESTION, *SETTINGS[:7], "x", ""]},
    "seed that is not finite": {"data": [QUESTION, *SETTINGS[:7], float("inf"), ""]},
    "long system prompt": {"data": [QUESTION, *SETTINGS[:8], "x" * (MAX_MESSAGE_CHARS + 1)]},
    "deep": {"data": json.loads("[" * 500 + "]" * 500)},
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_malformed_event_is_refused_without_a_traceback(open_page, change, capfd):
    status, output = _send_event(open_page, **({"data": [QUESTION, *SETTINGS]} | change))
    assert (status, json.loads(output)) == (422, {"detail": "malformed event"})
    # Gradio answers first, and fails later.
    assert _converse(open_page, "still there") == "still there"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"null", b"[" * 100_000, b"9" * 5000])
@pytest.mark.parametrize("path", ["queue/join", "cancel", "reset"])
def test_malformed_json_is_refused_without_a_traceback(open_page, path, body, capfd):
    assert _ask(open_page, "POST", f"/gradio_api/{path}", body)[0] == 422
    odd = json.dumps({"event_id": "\ud800", "session_hash": "a", "fn_index": 1}).encode()
    assert _ask(open_page, "POST", f"/gradio_api/{path}", odd)[0] == 422
    assert capfd.readouterr().err == ""


def test_malformed_requests_are_refused_without_a_traceback(open_page, capfd):
    field = b'--x\r\ncontent-disposition: form-data; name="files"\r\n\r\nabc\r\n--x--\r\n'
    kind = "multipart/form-data; boundary=x"
    for status, method, path, body, headers in (
        (422, "POST", "/gradio_api/upload", field, {"content_type": kind}),
        (400, "POST", "/gradio_api/upload", b"x", {"content_type": "multipart/form-data"}),
        (404, "GET", "/gradio_api/queue/data?session_hash=%00%ff", None, {}),
        (404, "GET", "/gradio_api/queue/data?session_hash=nobody", None, {}),
        (404, "GET", "/gradio_api/queue/data", None, {}),
        (404, "GET", "/static/" + "a" * 5000, None, {}),
        (404, "GET", "/gradio_api/file=" + "a" * 5000, None, {}),
    ):
        assert _ask(open_page, method, path, body, **headers)[0] == status, path
    assert capfd.readouterr().err == ""


def test_client_that_leaves_during_an_upload_leaves_no_traceback(open_page, capfd):
    with socket.create_connection(("127.0.0.1", open_page.port)) as link:
        link.sendall(_partial_upload(open_page, 1000) + b"x" * 100)
    assert _converse(open_page, "still there") == "still there"
    assert capfd.readouterr().err == ""


def _converse(location: RunningWebPage, text: str, *, thinking: bool = False) -> str:
    """Submit a question like the page, and read the answer from the event stream."""
    session = secrets.token_hex(8)
    question = {"text": text, "files": []}
    data = [question, False, thinking, 60, *SETTINGS[3:]]
    assert _send_event(location, data, session_hash=session)[0] == 200
    with _connect(location) as connection:
        connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        for line in connection.getresponse():
            event = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
            if event.get("msg") == "process_completed":
                assert event["success"], event
                visitor = next(v for v in location.visitors.list_sessions() if v.chat.turns)
                answer = visitor.chat.turns[-1].replies[0].text
                location.visitors.close(session)
                return answer
    raise AssertionError("the stream has ended without an answer")


@pytest.mark.parametrize(
    ("seed", "expected"),
    [(None, None), (-1, None), (0, 0), (7.0, 7), (0.5, "is 0.5."), (-2, "is -2.0"), (2**53, "2^")],
)
def test_seeds_are_checked(open_page, seed, expected):
    service = open_page.visitors.service
    service.requests.clear()
    data = [QUESTION, *SETTINGS[:7], seed, ""]
    body = {"data": data, "fn_index": _event_id(open_page, 10), "session_hash": "seeds"}
    page = _receive(open_page, body)
    seeds = [options.sampling_params.seed for options in service.requests]
    if isinstance(expected, str):
        assert ("Enter a whole number" in page, seeds) == (True, [])
    else:
        assert ("Enter a whole number" in page, seeds) == (False, [expected])


def _partial_upload(location: RunningWebPage, size: int) -> bytes:
    """Return the start of an upload request with a given content length."""
    head = b'--x\r\ncontent-disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    request = (
        f"POST /gradio_api/upload HTTP/1.1\r\nhost: 127.0.0.1:{location.port}\r\n"
        f"content-type: multipart/form-data; boundary=x\r\ncontent-length: {size}\r\n\r\n"
    )
    return request.encode() + head


def test_received_bytes_stay_reserved_until_they_are_written(tmp_path):
    reservation = web_sessions.DiskBudget(tmp_path, tmp_path).reserve(100)

    async def receive():
        return {"type": "http.request", "body": b"x" * 60, "more_body": True}

    async def run():
        receive_counted = access_middleware._count_received(receive, reservation)
        await receive_counted()
        assert reservation.remaining == 100
        await receive_counted()
        assert reservation.remaining == 40

    asyncio.run(run())


def test_concurrent_uploads_keep_the_limit(monkeypatch):
    monkeypatch.setattr(web_sessions, "MAX_STORED_BYTES", 1_000_000)
    size = 300_000
    with run_web_page(ScriptedService()) as location, contextlib.ExitStack() as stack:
        links = [
            stack.enter_context(socket.create_connection(("127.0.0.1", location.port), timeout=20))
            for _ in range(8)
        ]
        for link in links:
            link.sendall(_partial_upload(location, size) + secrets.token_bytes(size // 2))
        # All start before the first one ends.
        waiting, statuses = set(links), []
        while readable := select.select(waiting, [], [], 20 if len(statuses) < 5 else 0.5)[0]:
            waiting -= set(readable)
            statuses += [int(link.recv(12).split()[1]) for link in readable]
        assert statuses == [507] * 5
        stack.close()
        files = [file for file in (location.folder / "uploads").rglob("*") if file.is_file()]
        retained = sum(file.stat().st_size for file in files)
        assert retained < 1_000_000
        # What was reserved for those that have left is free again.
        deadline = time.monotonic() + 20
        while _upload(location, "a.png", b"x" * 500_000)[0] != 200:
            assert time.monotonic() < deadline, "the space of aborted uploads stays reserved"
            time.sleep(0.05)


def test_upload_that_stops_is_ended(monkeypatch):
    monkeypatch.setattr(access_middleware, "UPLOAD_IDLE_TIMEOUT_S", 0.2)
    with (
        run_web_page(ScriptedService()) as location,
        socket.create_connection(("127.0.0.1", location.port), timeout=20) as link,
    ):
        link.sendall(_partial_upload(location, 1000))
        assert b" 408 " in link.recv(100)


BEHIND_PROXY = {"host": "chat.example.com", "origin": "https://chat.example.com"}


def test_page_works_behind_a_proxy_with_tls():
    with run_web_page(ScriptedService(), password=PASSWORD) as location:
        right = _ask(location, "POST", "/sign-in", f"password={PASSWORD}".encode(), **BEHIND_PROXY)
        assert right[0] == 303
        cookie, *marks = right[1]["set-cookie"].split("; ")
        assert {"HttpOnly", "SameSite=strict", "Secure"} <= set(marks)
        headers = BEHIND_PROXY | {"cookie": cookie}
        assert _ask(location, "GET", "/", **headers)[0] == 200
        body = json.dumps({"event_id": "x"}).encode()
        assert _ask(location, "POST", "/gradio_api/reset", body, **headers)[0] == 200


@pytest.mark.parametrize(
    ("host", "origin", "status"), CASES["test_origin_must_have_the_host_and_port_of_the_request"]
)
def test_origin_must_have_the_host_and_port_of_the_request(locked_page, host, origin, status):
    for forwarded in ({}, {"x_forwarded_host": "evil.example", "x_forwarded_proto": "https"}):
        body = f"password={PASSWORD}".encode()
        headers = {"host": host, "origin": origin} | forwarded
        assert _ask(locked_page, "POST", "/sign-in", body, **headers)[0] == status


def test_forwarding_headers_are_not_believed(open_page):
    forged = {"x_forwarded_host": "evil.example", "x_gradio_server": "http://evil.example"}
    for path in ("/", "/config"):
        assert b"evil.example" not in _ask(open_page, "GET", path, **forged)[2]


def test_other_names_are_refused_without_a_password_alone(open_page):
    result = _ask(open_page, "GET", "/", **BEHIND_PROXY)
    assert result[0] == 403
    assert b"password" in result[2]


@pytest.mark.parametrize("default", [None, False, True])
def test_page_selects_the_thinking_mode(default):
    service = ScriptedService(default_thinking=default)
    with run_web_page(service) as location:
        config = json.loads(_ask(location, "GET", "/config")[2])
        [checkbox] = [
            x["props"] for x in config["components"] if x["props"].get("elem_id") == "thinking"
        ]
        assert checkbox["visible"] == (default is not None)
        assert checkbox["value"] == bool(default)
        for chosen in (True, False):
            _converse(location, "What?", thinking=chosen)
            expected = None if default is None else chosen
            assert service.requests[-1].thinking == ThinkingOptions(enable_thinking=expected)


def test_page_shows_reasoning_of_a_run(thinking_run):
    with run_service(str(thinking_run)) as service, run_web_page(service) as location:
        assert _converse(location, "Which colour?", thinking=True) == ANSWER
        assert _converse(location, "Which colour?", thinking=False) == ANSWER
        session = location.visitors.get_or_create("shown")
        for thinks in (True, False):
            options = GenerationOptions(thinking=ThinkingOptions(enable_thinking=thinks))
            turn = session.chat.send("Which colour?", [], [options])
            list(turn.replies[0])
            page = render_turns(session, [turn])
            assert ANSWER in page
            assert ("<summary>Reasoning</summary>" in page) == (THOUGHT in page) == thinks


def test_browser_id_is_secret_and_lasts(open_page, locked_page):
    assert "set-cookie" not in _ask(locked_page, "GET", "/")[1], "before the sign-in"
    assert "set-cookie" not in _ask(open_page, "GET", "/config")[1]
    cookies = [_ask(open_page, "GET", "/")[1]["set-cookie"] for _ in range(2)]
    values = {re.fullmatch(rf"{BROWSER_COOKIE}=([\w-]{{43}}); (.*)", one)[1] for one in cookies}
    assert len(values) == 2
    marks = set(cookies[0].split("; "))
    # Lax: a link from another site must not lead to a new ID.
    assert {"HttpOnly", "SameSite=lax", f"Max-Age={BROWSER_COOKIE_AGE_S}"} <= marks
    given = cookies[0].partition(";")[0]
    assert "set-cookie" not in _ask(open_page, "GET", "/", cookie=given)[1]
    for odd in ("", "x", "a" * 42, "a" * 44, "../" * 15):
        assert "set-cookie" in _ask(open_page, "GET", "/", cookie=f"{BROWSER_COOKIE}={odd}")[1]


@pytest.mark.parametrize(
    "action",
    [
        *(None, [], {}, {"kind": "run"}, {"kind": "open", "token": "../x"}),
        {"kind": "open", "token": "a" * 65},
        {"kind": "edit", "index": -1},
        {"kind": "edit", "index": 10**30},
        {"kind": "edit", "index": "x"},
        {"kind": "edit", "text": None},
        {"kind": "edit", "text": "\ud800"},
        {"kind": "rename", "text": "x" * (MAX_MESSAGE_CHARS + 1)},
    ],
)
def test_malformed_actions_are_refused(open_page, action):
    [event] = [i for i, inputs in open_page.app.inputs.items() if inputs is ACTION_INPUT]
    body = {"fn_index": event, "data": [action, *SETTINGS]}
    assert _send_event(open_page, **body)[0] == 422


def test_actions_reach_no_conversation_of_another_browser(open_page):
    [event] = [i for i, inputs in open_page.app.inputs.items() if inputs is ACTION_INPUT]
    store = open_page.visitors
    victim = store.restore("tab", "v" * 43, "")
    turn = victim.chat.send("secret", [], [GenerationOptions()])
    asyncio.run(_drain(turn.replies[0]))
    for kind in ("open", "rename", "delete"):
        action = {"kind": kind, "token": victim.token, "text": "stolen"}
        for cookie in ({}, {"cookie": f"{BROWSER_COOKIE}={'a' * 43}"}):
            body = {"fn_index": event, "data": [action, *SETTINGS], "session_hash": "tab"}
            page = _receive(open_page, body, **cookie)
            assert "secret" not in page
            assert victim.token not in page
    assert victim in store.list_sessions()
    assert victim.title == ""
    own = {"fn_index": event, "data": [{"kind": "open", "token": victim.token}, *SETTINGS]}
    own["session_hash"] = "other"
    assert "secret" in _receive(open_page, own, cookie=f"{BROWSER_COOKIE}={'v' * 43}")
    store.delete(victim)


async def _drain(reply: ChatReply) -> None:
    async for _ in reply:
        pass


def _receive(location: RunningWebPage, body: dict[str, Any], **headers: str) -> str:
    """Send an event, and return its event stream until its end."""
    result = _ask(
        location, "POST", "/gradio_api/queue/join", json.dumps(body).encode(),
        content_type="application/json", **headers,
    )  # fmt: skip
    assert result[0] == 200
    lines = []
    with _connect(location) as connection:
        path = f"/gradio_api/queue/data?session_hash={body['session_hash']}"
        connection.request("GET", path, headers=headers)
        for line in connection.getresponse():
            lines.append(line.decode())
            if "process_completed" in lines[-1]:
                assert '"success":true' in lines[-1].replace(" ", ""), lines[-1]
                return "".join(lines)
    raise AssertionError("the stream has ended")
