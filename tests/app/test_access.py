"""Tests of the access middleware without a browser.

Only the functions from `upload` to `converse` depend on the routes and events of Gradio.
"""

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
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
from case_files import load_cases
from each_value import each
from finesight.web import access_middleware, web_server, web_sessions
from finesight.web.access_middleware import (
    ACTION_INPUT,
    BROWSER_COOKIE,
    BROWSER_COOKIE_AGE_S,
    MAX_MESSAGE_BYTES,
    MAX_UPLOAD_BYTES,
    QUESTION_INPUT,
    SESSION_COOKIE,
)
from finesight.web.chat_html import render_turns
from finesight.web.web_sessions import MAX_IMAGE_BYTES, MAX_MESSAGE_CHARS, UPLOAD_TTL_S
from PIL import Image
from service_fixture import run_service
from thinking_fixtures import ANSWER, THOUGHT
from web_server_fixture import RunningWebPage, ScriptedService, run_web_page

from finesight.encode.family import ThinkingOptions
from finesight.infer.request import GenerationOptions

CASES = load_cases("access_middleware")
PASSWORD = "right-password"
SIGN_IN = f"password={PASSWORD}".encode()
JOIN, UPLOAD = "/gradio_api/queue/join", "/gradio_api/upload"
FORM = {"content_type": "multipart/form-data; boundary=x"}
QUESTION = {"text": "What?", "files": []}
SETTINGS = [False, False, 9, 0, 1, 0, 1, -1, ""]
"""Settings of an answer, in the order of the fields of `ChatSettings`."""


@pytest.fixture(scope="module")
def open_page() -> Iterator[RunningWebPage]:
    with run_web_page(ScriptedService()) as page:
        yield page


@pytest.fixture(scope="module")
def locked_page() -> Iterator[RunningWebPage]:
    with run_web_page(ScriptedService(), password=PASSWORD, loopback=False) as page:
        yield page


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def connect(
    page: RunningWebPage, address: str = ""
) -> contextlib.closing[http.client.HTTPConnection]:
    source = (address, 0) if address else None
    return contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", page.port, timeout=20, source_address=source)
    )


def ask(
    page: RunningWebPage, method: str, path: str, body: bytes | None = None, **headers: str
) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with connect(page) as connection:
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        given = {name.lower(): value for name, value in answer.getheaders()}
        stream = given.get("content-type", "").startswith("text/event-stream")
        return Response(answer.status, given, b"" if stream else answer.read())


def sign_in(page: RunningWebPage, **headers: str) -> str:
    """Return the cookie of a session."""
    right = ask(page, "POST", "/sign-in", SIGN_IN, **headers)
    assert right.status == 303
    return right.headers["set-cookie"].split(";")[0]


def upload(page: RunningWebPage, name: str, content: bytes) -> tuple[int, str]:
    """Return the status and the path of an uploaded file."""
    head = f'--x\r\ncontent-disposition: form-data; name="files"; filename="{name}"\r\n'
    body = f"{head}content-type: image/png\r\n\r\n".encode() + content + b"\r\n--x--\r\n"
    status, _, output = ask(page, "POST", UPLOAD, body, **FORM)
    return status, json.loads(output)[0] if status == 200 else ""


def start_upload(page: RunningWebPage, link: socket.socket, size: int, content: bytes) -> None:
    """Send the start of an upload with this content length."""
    head = b'--x\r\ncontent-disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    request = (
        f"POST {UPLOAD} HTTP/1.1\r\nhost: 127.0.0.1:{page.port}\r\n"
        f"content-type: {FORM['content_type']}\r\ncontent-length: {size}\r\n\r\n"
    )
    link.sendall(request.encode() + head + content)


def make_file(path: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def send_event(
    page: RunningWebPage, data: Any, kind: Any = QUESTION_INPUT, cookie: str = "", **other: Any
) -> Response:
    """Submit a question, or an action of the page."""
    event = next(number for number, inputs in page.app.inputs.items() if inputs is kind)
    body = {"data": data, "fn_index": event, "session_hash": "abc"} | other
    return ask(
        page,
        *("POST", JOIN, json.dumps(body).encode()),
        content_type="application/json",
        cookie=cookie,
    )


def receive(page: RunningWebPage, data: Any, kind: Any = QUESTION_INPUT, cookie: str = "") -> str:
    """Send an event from a new tab, and return its event stream until its end."""
    tab = secrets.token_hex(8)
    assert send_event(page, data, kind, cookie, session_hash=tab).status == 200
    stream = ""
    with connect(page) as connection:
        path = f"/gradio_api/queue/data?session_hash={tab}"
        connection.request("GET", path, headers={"cookie": cookie})
        for line in connection.getresponse():
            stream += line.decode()
            if b"process_completed" in line:
                assert b'"success":true' in line.replace(b" ", b""), line
                return stream
    raise AssertionError("the stream has ended")


def converse(page: RunningWebPage, text: str, *files: str, thinking: bool = False) -> str:
    """Submit a question like the page, and return the answer."""
    question = {"text": text, "files": [make_file(file) for file in files]}
    browser = secrets.token_urlsafe(32)
    settings = [False, thinking, 60, *SETTINGS[3:]]
    receive(page, [question, *settings], cookie=f"{BROWSER_COOKIE}={browser}")
    [session] = page.visitors.list_chats(browser)
    answer = session.chat.turns[-1].replies[0].text
    page.visitors.delete(session)
    return answer


def list_routes(page: RunningWebPage) -> list[tuple[str, str]]:
    """Return all routes of Gradio and the page, with parameters."""

    def below(routes: Any, prefix: str) -> Iterator[tuple[str, str]]:
        for route in routes:
            router = getattr(route, "original_router", None)
            inner = getattr(route, "routes", None) or getattr(router, "routes", None)
            path = prefix + getattr(route, "path", "")
            if inner:
                yield from below(inner, path.rstrip("/"))
            for method in getattr(route, "methods", None) or ():
                yield method, re.sub(r"\{[^}]*\}", "1", path)

    return sorted(set(below(page.app.app.routes, "")))


def test_every_route_requires_the_password(locked_page):
    routes = list_routes(locked_page)
    assert len(routes) > 60, "the walk finds no routes"
    for method, path in [*routes, ("GET", "/assets/x.js"), ("PUT", "/"), ("OPTIONS", "/config")]:
        status, headers, body = ask(locked_page, method, path)
        if path == "/page.css":
            continue
        # Browsers request the icon of the sign-in page; there is none.
        allowed = (204,) if path == "/favicon.ico" else (303, 401, 404)
        assert status in allowed, f"{method} {path}: {status}"
        assert body in (b"", b"sign-in required", b"not found"), f"{method} {path}"
        assert headers.get("location", "sign-in") == "sign-in"


def test_unneeded_routes_are_closed(open_page):
    closed = {(m, p) for m, p in list_routes(open_page) if ask(open_page, m, p)[2] == b"not found"}
    gets = ("gradio_api/proxy=1", "gradio_api/file/1", "monitoring", "gradio_api/openapi.json")
    posts = ("gradio_api/run/1", "gradio_api/call/1", "gradio_api/process_recording", "login")
    assert {("GET", f"/{path}") for path in gets} <= closed
    assert {("POST", f"/{path}") for path in posts} <= closed


def test_wrong_password_or_cookie_is_rejected(locked_page):
    wrong = ask(locked_page, "POST", "/sign-in", b"password=wrong")
    assert (wrong.status, "set-cookie" in wrong.headers) == (401, False)
    for value in ("", "x", PASSWORD, "é"):
        cookie = f"{SESSION_COOKIE}={value}".encode().decode("latin-1")
        assert ask(locked_page, "GET", "/config", cookie=cookie).status == 401
    # The query is kept over the sign-in. The form is sent to the address of the page.
    query = "?step=results&run=runs%2Fa"
    assert ask(locked_page, "GET", f"/{query}").headers["location"] == f"sign-in{query}"
    assert b"action=" not in ask(locked_page, "GET", f"/sign-in{query}").body
    right = ask(locked_page, "POST", f"/sign-in{query}", SIGN_IN)
    assert (right.status, right.headers["location"]) == (303, f"./{query}")
    cookie, *marks = right.headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=strict"} <= set(marks)
    assert ask(locked_page, "GET", "/config", cookie=cookie).status == 200


@pytest.mark.parametrize("proxies", [(), ("127.0.0.1",), ("10.0.0.1",)])
def test_wrong_passwords_have_a_budget_and_the_owner_is_admitted(monkeypatch, proxies):
    monkeypatch.setattr(access_middleware, "FAILED_LOGIN_DELAY_S", 0)

    def guess(address: str, **headers: str) -> int:
        with connect(page, address) as connection:
            connection.request("POST", "/sign-in", b"password=wrong", headers)
            answer = connection.getresponse()
            assert (answer.getheader("retry-after") is None) == (answer.status == 401)
            return answer.status

    with run_web_page(ScriptedService(), password=PASSWORD, proxies=proxies) as page:
        cookie = sign_in(page)
        # One address has a smaller budget. Only a trusted proxy names the address of its client.
        names = [{"x-forwarded-for": f"1.2.3.4, 5.6.7.{i}"} for i in range(12)]
        statuses = [guess("127.0.0.1", **headers) for headers in names]
        assert statuses.count(401) == (12 if "127.0.0.1" in proxies else 10)
        statuses += [guess(f"127.7.{i % 9}.{i}") for i in range(1, 30)]
        assert (statuses.count(401), statuses.count(429)) == (30, 11)
        sign_in(page)
        assert ask(page, "GET", "/config", cookie=cookie).status == 200


def test_half_sent_requests_keep_nobody_out(monkeypatch):
    monkeypatch.setattr(web_server, "MAX_UNKNOWN_CONNECTIONS", 5)
    monkeypatch.setattr(web_server, "REQUEST_TIMEOUT_S", 0.5)
    post = b"POST /sign-in HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\npass"
    starts = (b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: x\r\n", post)
    with (
        run_web_page(ScriptedService(), password=PASSWORD) as page,
        contextlib.ExitStack() as stack,
    ):
        links = []
        for index in range(20):
            link = socket.create_connection(("127.0.0.1", page.port), timeout=20)
            links.append(stack.enter_context(link))
            link.sendall(starts[index % 4])
        assert ask(page, "GET", "/config", cookie=sign_in(page)).status == 200
        for link in links:
            with contextlib.suppress(ConnectionResetError):
                assert link.recv(100) == b""


def test_other_hosts_and_origins_are_rejected(open_page):
    for host in ("evil.example", "127.0.0.1.evil.example:1", "", "[::2]:80", "["):
        assert ask(open_page, "GET", "/config", host=host).status in (400, 403), host
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        for path in (JOIN, UPLOAD):
            assert ask(open_page, "POST", path, b"{}", origin=origin).status == 403, origin
    # Another name needs a password. Forwarding headers are not believed.
    refused = ask(open_page, "GET", "/", **BEHIND_PROXY)
    assert (refused.status, b"password" in refused.body) == (403, True)
    forged = {"x_forwarded_host": "evil.example", "x_gradio_server": "http://evil.example"}
    for path in ("/", "/config"):
        assert b"evil.example" not in ask(open_page, "GET", path, **forged).body


@each(("host", "origin", "status"), CASES["test_origin_must_have_the_host_and_port_of_the_request"])
def test_origin_must_have_the_host_and_port_of_the_request(locked_page, host, origin, status):
    for forwarded in ({}, {"x_forwarded_host": "evil.example", "x_forwarded_proto": "https"}):
        headers = {"host": host, "origin": origin} | forwarded
        assert ask(locked_page, "POST", "/sign-in", SIGN_IN, **headers).status == status


BEHIND_PROXY = {"host": "chat.example.com", "origin": "https://chat.example.com"}


def test_page_works_behind_a_proxy_with_tls():
    with run_web_page(ScriptedService(), password=PASSWORD) as page:
        right = ask(page, "POST", "/sign-in", SIGN_IN, **BEHIND_PROXY)
        cookie, *marks = right.headers["set-cookie"].split("; ")
        assert {"HttpOnly", "SameSite=strict", "Secure"} <= set(marks)
        headers = BEHIND_PROXY | {"cookie": cookie}
        assert ask(page, "GET", "/", **headers).status == 200
        body = json.dumps({"event_id": "x"}).encode()
        assert ask(page, "POST", "/gradio_api/reset", body, **headers).status == 200


def test_only_uploaded_files_are_served(open_page, tmp_path):
    own = tmp_path / "secret.png"
    own.write_bytes(b"secret")
    _, path = upload(open_page, "a.png", b"picture")
    served = ask(open_page, "GET", f"/gradio_api/file={quote(path)}")
    assert (served.status, served.body) == (200, b"picture")
    assert "sandbox" in served.headers["content-security-policy"]
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
        requested = ask(open_page, "GET", f"/gradio_api/file={quote(outside)}")
        assert requested.status in (400, 404), outside
        data = [{"text": "What?", "files": [make_file(outside)]}, *SETTINGS]
        assert send_event(open_page, data).status == 403, outside
    for odd in (None, 7, ["x"], {"path": path}):
        data = [{"text": "What?", "files": [make_file(odd)]}, *SETTINGS]
        assert send_event(open_page, data).status == 422, odd
    for name in ("../../../x.png", "/etc/x.png", "..", "a/../../x.png", "\\..\\x.png"):
        status, path = upload(open_page, name, b"picture")
        assert status in (200, 400)
        assert not path or Path(path).resolve().is_relative_to(uploads)
    for path in ("/images/x/1", "/export/x/chat.zip", "/images/x/..%2f..%2fx", "/images/%C3%A9/1"):
        assert ask(open_page, "GET", path).status in (404, 422), path


def test_request_body_limits(open_page):
    much = b"x" * (MAX_MESSAGE_BYTES + 1)
    assert ask(open_page, "POST", JOIN, much).status == 413
    length = {"content_length": str(MAX_UPLOAD_BYTES + 1)}
    assert ask(open_page, "POST", UPLOAD, b"", **length, **FORM).status == 413
    length = {"content_length": str(MAX_UPLOAD_BYTES - 1)}
    assert ask(open_page, "POST", "/gradio_api/cancel", b"", **length).status == 413
    assert upload(open_page, "large.png", bytes(MAX_IMAGE_BYTES + 1))[0] == 413
    assert [*(open_page.folder / "uploads").rglob("large.png")] == []
    chunks = iter([b"x" * 65536] * (MAX_MESSAGE_BYTES // 65536 + 2))
    with (
        connect(open_page) as connection,
        contextlib.suppress(BrokenPipeError, ConnectionResetError),
    ):
        connection.request("POST", JOIN, chunks, encode_chunked=True)
        assert connection.getresponse().status == 413


def test_unused_uploads_are_removed(open_page):
    old, new = (Path(upload(open_page, f"{name}.png", name.encode())[1]) for name in ("old", "new"))
    past = time.time() - UPLOAD_TTL_S - 60
    os.utime(old, (past, past))
    assert upload(open_page, "next.png", b"next")[0] == 200
    assert (old.exists(), new.exists()) == (False, True)
    # The same again is as new.
    again = Path(upload(open_page, "old.png", b"old")[1])
    assert upload(open_page, "next.png", b"next")[0] == 200
    assert again.exists()


def test_every_response_has_security_headers_and_loads_no_external_resources(open_page):
    for path in ("/", "/config", "/theme.css", "/page.css", "/no", "/gradio_api/file=/etc/hosts"):
        headers = ask(open_page, "GET", path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in headers["content-security-policy"]
    pages = [ask(open_page, "GET", "/") for _ in range(2)]
    first, second = (page.headers["content-security-policy"] for page in pages)
    assert "nonce-" in first
    assert first != second
    assert "unsafe-inline" not in first.partition("script-src")[2].partition(";")[0]
    text = pages[0].body.decode()
    assert re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:[^\"]*)", text) == []
    assert "fonts.g" not in text + ask(open_page, "GET", "/theme.css").body.decode()


def test_server_opens_no_external_connections():
    tried: list[Any] = []
    watching = [True]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
            tried.append(arguments[-1] if event == "socket.connect" else arguments[0])

    sys.addaudithook(watch)  # for the rest of the process; `watching` turns it off
    try:
        with run_web_page(ScriptedService()) as page:
            assert ask(page, "GET", "/").status == 200
            file = make_file("http://93.184.216.34/x.png")
            assert send_event(page, [{"text": "", "files": [file]}, *SETTINGS]).status == 403
    finally:
        watching.clear()
    hosts = {one[0] if isinstance(one, tuple) else one for one in tried}
    assert hosts, "the watch saw nothing, not even the test's own requests"
    assert hosts <= {"127.0.0.1", "localhost", "::1"}, hosts


def test_files_are_stored_in_a_private_temp_folder(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    with run_web_page(ScriptedService()) as page:
        for name in ("a.png", "b.png"):
            assert converse(page, name, upload(page, name, content)[1]) == name
        assert stat.S_IMODE(page.folder.stat().st_mode) == 0o700
        assert any(page.folder.rglob("*.png")), "nothing was sent"
        files = list((tmp_path / "temp").rglob("*.png"))
        assert all(page.folder in file.parents for file in files), files
    assert not page.folder.exists()


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
    "deep": {"data": json.loads("[" * 500 + "]" * 500)},
}
# Invalid values of the settings, by their index.
for index, value in (
    *((0, "x"), (1, "x"), (2, "x"), (2, 0), (2, 1e308), (2, float("nan"))),
    *((3, -1), (3, None), (4, 0), (5, -1), (6, 9), (7, "x"), (7, float("inf"))),
    (8, "x" * (MAX_MESSAGE_CHARS + 1)),
):
    changed = [*SETTINGS[:index], value, *SETTINGS[index + 1 :]]
    MALFORMED[f"setting {index}: {value!r:.20}"] = {"data": [QUESTION, *changed]}


@each("name", MALFORMED)
def test_malformed_event_is_refused_without_a_traceback(open_page, name, capfd):
    response = send_event(open_page, **({"data": [QUESTION, *SETTINGS]} | MALFORMED[name]))
    assert (response.status, json.loads(response.body)) == (422, {"detail": "malformed event"})
    # Gradio answers first, and fails later.
    assert converse(open_page, "still there") == "still there"
    assert capfd.readouterr().err == ""


@each("path", ["queue/join", "cancel", "reset"])
def test_malformed_json_is_refused_without_a_traceback(open_page, path, capfd):
    odd = json.dumps({"event_id": "\ud800", "session_hash": "a", "fn_index": 1}).encode()
    for body in (b"", b"{", b"\xff", b"null", b"[" * 100_000, b"9" * 5000, odd):
        assert ask(open_page, "POST", f"/gradio_api/{path}", body).status == 422, body[:20]
    assert capfd.readouterr().err == ""


def test_malformed_requests_are_refused_without_a_traceback(open_page, capfd):
    field = b'--x\r\ncontent-disposition: form-data; name="files"\r\n\r\nabc\r\n--x--\r\n'
    assert ask(open_page, "POST", UPLOAD, field, **FORM).status == 422
    assert ask(open_page, "POST", UPLOAD, b"x", content_type="multipart/form-data").status == 400
    data = "gradio_api/queue/data"
    long = "a" * 5000
    for path in (f"{data}?session_hash=%00%ff", f"{data}?session_hash=nobody", data):
        assert ask(open_page, "GET", f"/{path}").status == 404, path
    for path in (f"static/{long}", f"gradio_api/file={long}"):
        assert ask(open_page, "GET", f"/{path}").status == 404, path
    with socket.create_connection(("127.0.0.1", open_page.port)) as link:
        start_upload(open_page, link, 1000, b"x" * 100)
    assert converse(open_page, "still there") == "still there"
    assert capfd.readouterr().err == ""


@each(
    ("seed", "expected"),
    [(None, None), (-1, None), (0, 0), (7.0, 7), (0.5, "is 0.5."), (-2, "is -2.0"), (2**53, "2^")],
)
def test_seeds_are_checked(open_page, seed, expected):
    requests = open_page.visitors.service.requests
    requests.clear()
    stream = receive(open_page, [QUESTION, *SETTINGS[:7], seed, ""])
    seeds = [options.sampling_params.seed for options in requests]
    is_refused = isinstance(expected, str)
    assert ("Enter a whole number" in stream) == is_refused
    assert seeds == ([] if is_refused else [expected])


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
    with run_web_page(ScriptedService()) as page, contextlib.ExitStack() as stack:
        links = [
            stack.enter_context(socket.create_connection(("127.0.0.1", page.port), timeout=20))
            for _ in range(8)
        ]
        for link in links:
            start_upload(page, link, size, secrets.token_bytes(size // 2))
        # All start before the first one ends.
        waiting, statuses = set(links), []
        while readable := select.select(waiting, [], [], 20 if len(statuses) < 5 else 0.5)[0]:
            waiting -= set(readable)
            statuses += [int(link.recv(12).split()[1]) for link in readable]
        assert statuses == [507] * 5
        stack.close()
        files = [file for file in (page.folder / "uploads").rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < 1_000_000
        # What was reserved for those that have left is free again.
        deadline = time.monotonic() + 20
        while upload(page, "a.png", b"x" * 500_000)[0] != 200:
            assert time.monotonic() < deadline, "the space of aborted uploads stays reserved"
            time.sleep(0.05)


def test_upload_that_stops_is_ended(monkeypatch):
    monkeypatch.setattr(access_middleware, "UPLOAD_IDLE_TIMEOUT_S", 0.2)
    with (
        run_web_page(ScriptedService()) as page,
        socket.create_connection(("127.0.0.1", page.port), timeout=20) as link,
    ):
        start_upload(page, link, 1000, b"")
        assert b" 408 " in link.recv(100)


@pytest.mark.parametrize("default", [None, False, True])
def test_page_selects_the_thinking_mode(default):
    service = ScriptedService(default_thinking=default)
    with run_web_page(service) as page:
        for chosen in (True, False):
            converse(page, "What?", thinking=chosen)
            expected = None if default is None else chosen
            assert service.requests[-1].thinking == ThinkingOptions(enable_thinking=expected)


def test_page_shows_reasoning_of_a_run(thinking_run):
    with run_service(str(thinking_run)) as service, run_web_page(service) as page:
        session = page.visitors.get_or_create("shown")
        for thinks in (True, False):
            assert converse(page, "Which colour?", thinking=thinks) == ANSWER
            options = GenerationOptions(thinking=ThinkingOptions(enable_thinking=thinks))
            turn = session.chat.send("Which colour?", [], [options])
            list(turn.replies[0])
            shown = render_turns(session, [turn])
            assert ANSWER in shown
            assert ("<summary>Reasoning</summary>" in shown) == (THOUGHT in shown) == thinks


def test_browser_id_is_secret_and_lasts(open_page, locked_page):
    assert "set-cookie" not in ask(locked_page, "GET", "/").headers, "before the sign-in"
    assert "set-cookie" not in ask(open_page, "GET", "/config").headers
    cookies = [ask(open_page, "GET", "/").headers["set-cookie"] for _ in range(2)]
    values = {re.fullmatch(rf"{BROWSER_COOKIE}=([\w-]{{43}}); (.*)", one)[1] for one in cookies}
    assert len(values) == 2
    given, *marks = cookies[0].split("; ")
    # Lax: a link from another site must not lead to a new ID.
    assert {"HttpOnly", "SameSite=lax", f"Max-Age={BROWSER_COOKIE_AGE_S}"} <= set(marks)
    assert "set-cookie" not in ask(open_page, "GET", "/", cookie=given).headers
    for odd in ("", "x", "a" * 42, "a" * 44, "../" * 15):
        cookie = f"{BROWSER_COOKIE}={odd}"
        assert "set-cookie" in ask(open_page, "GET", "/", cookie=cookie).headers


def test_malformed_actions_are_refused(open_page):
    for action in (
        *(None, [], {}, {"kind": "run"}, {"kind": "open", "token": "../x"}),
        {"kind": "open", "token": "a" * 65},
        {"kind": "edit", "index": -1},
        {"kind": "edit", "index": 10**30},
        {"kind": "edit", "index": "x"},
        {"kind": "edit", "text": None},
        {"kind": "edit", "text": "\ud800"},
        {"kind": "rename", "text": "x" * (MAX_MESSAGE_CHARS + 1)},
    ):
        refused = send_event(open_page, [action, *SETTINGS], ACTION_INPUT)
        assert refused.status == 422, action


def test_actions_reach_no_conversation_of_another_browser(open_page):
    store, owner = open_page.visitors, f"{BROWSER_COOKIE}={'v' * 43}"
    receive(open_page, [{"text": "secret", "files": []}, *SETTINGS], cookie=owner)
    [victim] = store.list_chats("v" * 43)
    for kind in ("open", "rename", "delete"):
        action = {"kind": kind, "token": victim.token, "text": "stolen"}
        for cookie in ("", f"{BROWSER_COOKIE}={'a' * 43}"):
            stream = receive(open_page, [action, *SETTINGS], ACTION_INPUT, cookie)
            assert "secret" not in stream
            assert victim.token not in stream
    assert victim in store.list_sessions()
    assert victim.title == ""
    action = {"kind": "open", "token": victim.token}
    assert "secret" in receive(open_page, [action, *SETTINGS], ACTION_INPUT, owner)
    store.delete(victim)
