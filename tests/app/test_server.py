"""Tests of the server of the pages: sign-in, origins, limits, uploads, and pages of jobs."""

import asyncio
import contextlib
import http.client
import json
import re
import secrets
import select
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
import uvicorn
from case_files import load_cases
from label_fixtures import open_fields_session
from PIL import Image
from service_fixture import run_service
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from studio_fixtures import make_page
from tiny_task import ANSWER, THOUGHT
from web_server_fixture import (
    RunningWebPage,
    ScriptedService,
    get_image_pool,
    run_app,
    run_web_page,
)

from finesight.app import pages, server
from finesight.app.chat_page import MAX_FILE_BYTES, make_chat_app
from finesight.app.label_page import make_label_app
from finesight.app.pages import PREFIX_HEADER, create_app
from finesight.app.server import (
    MAX_MESSAGE_BYTES,
    Access,
    AccessMiddleware,
    make_proxy_route,
)
from finesight.app.studio_page import make_studio_app
from finesight.encode.family import ThinkingOptions
from finesight.errors import UserError
from finesight.serve.http_protocol import bind_unix_socket

CASES = load_cases("access")
PASSWORD = "right-password"
SIGN_IN = f"password={PASSWORD}".encode()
IMAGE, ANSWERS, UPLOADS = "/images/a", "/answers", "/uploads"
SETTINGS: dict[str, Any] = {"max_new_tokens": 60}


@pytest.fixture(scope="module")
def open_page() -> Iterator[RunningWebPage]:
    with run_web_page(ScriptedService()) as page:
        yield page


@pytest.fixture(scope="module")
def locked_page() -> Iterator[RunningWebPage]:
    with run_web_page(ScriptedService(), password=PASSWORD, loopback=False) as page:
        yield page


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def connect(page, address=""):
    source = (address, 0) if address else None
    return contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", page.port, timeout=20, source_address=source)
    )


def ask(page, method, path, body=None, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with connect(page) as connection:
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        given = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, given, answer.read())


def sign_in(page: RunningWebPage, **headers: str) -> str:
    """Return the cookie of a session."""
    right = ask(page, "POST", "/sign-in", SIGN_IN, **headers)
    assert right.status == 303
    return right.headers["set-cookie"].split(";")[0]


def start_upload(page: RunningWebPage, link: socket.socket, size: int, content: bytes) -> None:
    """Send the start of an upload with this content length."""
    request = (
        f"POST {UPLOADS}?name=a.png HTTP/1.1\r\nhost: 127.0.0.1:{page.port}\r\n"
        f"content-length: {size}\r\n\r\n"
    )
    link.sendall(request.encode() + content)


def converse(page: RunningWebPage, text: str, *files: bytes, thinking: bool = False) -> str:
    """Ask a question in a new conversation like the page, and return the HTML of its turn."""
    images = []
    for file in files:
        images += json.loads(ask(page, "POST", f"{UPLOADS}?name={quote(text)}", file).body)
    cookie = ask(page, "GET", "/").headers["set-cookie"].split(";")[0]
    body = {"text": text, "images": images, "settings": {**SETTINGS, "thinking": thinking}}
    sent = ask(page, "POST", ANSWERS, json.dumps(body).encode(), cookie=cookie)
    assert sent.status == 200, sent.body
    path, turn = f"/turns/{json.loads(sent.body)['chat']}", "streaming"
    while "streaming" in turn:
        turn = ask(page, "GET", path, cookie=cookie).body.decode()
    return turn


def test_wrong_password_or_cookie_is_rejected(locked_page):
    wrong = ask(locked_page, "POST", "/sign-in", b"password=wrong")
    assert (wrong.status, "set-cookie" in wrong.headers) == (401, False)
    for value in ("", "x", PASSWORD, "é"):
        cookie = f"finesight-chat-{locked_page.port}={value}".encode().decode("latin-1")
        assert ask(locked_page, "GET", IMAGE, cookie=cookie).status == 401
    # The query is kept over the sign-in. The form is sent to the address of the page.
    query = "?step=results&run=runs%2Fa"
    assert ask(locked_page, "GET", f"/{query}").headers["location"] == f"sign-in{query}"
    assert b"action=" not in ask(locked_page, "GET", f"/sign-in{query}").body
    right = ask(locked_page, "POST", f"/sign-in{query}", SIGN_IN)
    assert (right.status, right.headers["location"]) == (303, f"./{query}")
    cookie, *marks = right.headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=strict"} <= set(marks)
    assert ask(locked_page, "GET", IMAGE, cookie=cookie).status == 404
    assert ask(locked_page, "POST", "/sign-out").status == 401
    left = ask(locked_page, "POST", "/sign-out", cookie=cookie)
    name = cookie.partition("=")[0]
    assert (left.status, left.headers["location"]) == (303, "./")
    assert left.headers["set-cookie"].startswith(f'{name}=""; ')


def test_sign_out_ends_the_sign_in_of_one_browser(locked_page):
    """A stolen copy of its cookie is refused, and other browsers stay signed in."""
    first, second = sign_in(locked_page), sign_in(locked_page)
    assert first != second
    again = sign_in(locked_page, cookie=first)
    assert ask(locked_page, "GET", IMAGE, cookie=first).status == 401, "replaced by a new sign-in"
    ask(locked_page, "POST", "/sign-out", cookie=again)
    statuses = [ask(locked_page, "GET", IMAGE, cookie=one).status for one in (first, again, second)]
    assert statuses == [401, 401, 404]
    assert ask(locked_page, "POST", "/sign-out", cookie=again).status == 401


def test_sign_out_ends_the_running_requests_of_the_browser():
    started, is_ended = threading.Event(), threading.Event()

    async def stream(request: Request) -> Response:
        async def iterate() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"secret "
                    started.set()
                    await asyncio.sleep(0.01)
            finally:
                is_ended.set()

        return StreamingResponse(iterate())

    app = AccessMiddleware(create_app([Route("/stream", stream)]), Access(PASSWORD))
    with run_app(app) as port:
        page = RunningWebPage(f"http://127.0.0.1:{port}/", port, Path(), app)
        cookie, other = sign_in(page), sign_in(page)
        with connect(page) as connection:
            connection.request("GET", "/stream", headers={"cookie": cookie})
            answer = connection.getresponse()
            assert started.wait(20)
            ask(page, "POST", "/sign-out", cookie=other)
            answer.read(7)
            assert not is_ended.is_set()
            ask(page, "POST", "/sign-out", cookie=cookie)
            with contextlib.suppress(http.client.IncompleteRead):
                answer.read()
        assert is_ended.wait(20)


def test_first_of_too_many_browsers_is_signed_out(monkeypatch):
    monkeypatch.setattr(server, "MAX_SIGN_INS", 3)
    with run_web_page(ScriptedService(), password=PASSWORD) as page:
        cookies = [sign_in(page) for _ in range(5)]
        statuses = [ask(page, "GET", IMAGE, cookie=cookie).status for cookie in cookies]
    assert statuses == [401, 401, 404, 404, 404]


@pytest.mark.parametrize("proxies", [(), ("127.0.0.1",), ("10.0.0.1",)])
def test_wrong_passwords_have_a_budget_and_the_owner_is_admitted(monkeypatch, proxies):
    monkeypatch.setattr(server, "FAILED_LOGIN_DELAY_S", 0)

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
        assert ask(page, "GET", IMAGE, cookie=cookie).status == 404


FLOODED_SERVER = """
import asyncio, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
from finesight.app.pages import create_app
from finesight.app.server import Access, AccessMiddleware, PageServer
from finesight.serve.http_protocol import bind_socket
listener = bind_socket("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
PageServer(AccessMiddleware(create_app([]), Access("right-password")), None).run([listener])
"""


def test_flood_of_half_sent_requests_leaves_file_descriptors():
    """A process with 300 of them answers between 400 half-sent requests, and reports nothing."""
    script = [sys.executable, "-c", FLOODED_SERVER]
    with (
        subprocess.Popen(
            script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process,
        contextlib.ExitStack() as stack,
    ):
        port = int(process.stdout.readline())
        page = RunningWebPage(f"http://127.0.0.1:{port}/", port, Path(), None)
        for _ in range(3):
            for _ in range(400):
                link = stack.enter_context(socket.socket())
                link.setblocking(False)
                link.connect_ex(("127.0.0.1", port))
            assert ask(page, "GET", "/sign-in").status == 200
        process.terminate()
        assert process.communicate(timeout=60)[1] == ""


def test_half_sent_requests_keep_nobody_out(monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 5)
    monkeypatch.setattr(server, "REQUEST_TIMEOUT_S", 0.5)
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
        cookie = sign_in(page)
        assert ask(page, "GET", IMAGE, cookie=cookie).status == 404
        for link in links:
            with contextlib.suppress(ConnectionResetError):
                assert link.recv(100) == b""
        # So are those of known clients, and bodies in tiny chunks, which take long to parse.
        head = f"host: 127.0.0.1:{page.port}\r\ncookie: {cookie}\r\n".encode()
        post = b"POST /answers HTTP/1.1\r\n" + head + b"transfer-encoding: chunked\r\n\r\n"
        for content in (b"GET /im", post + b"1\r\na\r\n" * 1001):
            link = socket.create_connection(("127.0.0.1", page.port), timeout=20)
            with link, contextlib.suppress(ConnectionResetError):
                link.sendall(b"GET / HTTP/1.1\r\n" + head + b"\r\n")
                assert b"200 OK" in link.recv(1 << 16)
                link.sendall(content)
                while link.recv(1 << 16):
                    pass


def test_other_hosts_and_origins_are_rejected(open_page):
    hosts = ("evil.example", "127.0.0.1.evil.example:1", "", "[::2]:80", "[", "[::1]evil.example")
    for host in hosts:
        assert ask(open_page, "GET", "/", host=host).status in (400, 403), host
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        for path in (ANSWERS, UPLOADS):
            assert ask(open_page, "POST", path, b"{}", origin=origin).status == 403, origin
    for mode, status in (("no-cors", 403), ("navigate", 200)):
        site = {"sec_fetch_site": "cross-site", "sec_fetch_mode": mode}
        assert ask(open_page, "GET", "/", **site).status == status
    # Another name needs a password. Forwarding headers are not believed.
    refused = ask(open_page, "GET", "/", **BEHIND_PROXY)
    assert (refused.status, b"password" in refused.body) == (403, True)
    forged = {"x_forwarded_host": "evil.example"}
    assert b"evil.example" not in ask(open_page, "GET", "/", **forged).body


@pytest.mark.parametrize(
    ("host", "origin", "status"), CASES["test_origin_must_have_the_host_and_port_of_the_request"]
)
def test_origin_must_have_the_host_and_port_of_the_request(locked_page, host, origin, status):
    for forwarded in ({}, {"x_forwarded_host": "evil.example", "x_forwarded_proto": "https"}):
        headers = {"host": host, "origin": origin} | forwarded
        answer = ask(locked_page, "POST", "/sign-in", SIGN_IN, **headers)
        assert answer.status == status
        is_secure = "Secure" in answer.headers.get("set-cookie", "")
        assert is_secure == (status == 303 and origin.startswith("https:"))


BEHIND_PROXY = {"host": "chat.example.com", "origin": "https://chat.example.com"}


def test_request_body_limits(open_page):
    much = b"x" * (MAX_MESSAGE_BYTES + 1)
    assert ask(open_page, "POST", ANSWERS, much).status == 413
    for path, limit in ((UPLOADS, MAX_FILE_BYTES), (ANSWERS, MAX_MESSAGE_BYTES)):
        length = {"content_length": str(limit + 1)}
        assert ask(open_page, "POST", path, b"", **length).status == 413
    chunks = iter([b"x" * 65536] * (MAX_MESSAGE_BYTES // 65536 + 2))
    with (
        connect(open_page) as connection,
        contextlib.suppress(BrokenPipeError, ConnectionResetError),
    ):
        connection.request("POST", "/sign-in", chunks, encode_chunked=True)
        assert connection.getresponse().status in (303, 413)


def test_every_response_has_security_headers_and_loads_no_external_resources(open_page):
    for path in ("/", IMAGE, "/static/chat.css", "/no", "/sign-in"):
        headers = ask(open_page, "GET", path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
    # Python converts no number of so many digits.
    assert ask(open_page, "GET", f"{IMAGE}{'9' * 5000}").status == 414
    text = ask(open_page, "GET", "/").body.decode()
    assert re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:[^\"]*)", text) == []


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
            assert "http://93.184.216.34" in converse(page, "http://93.184.216.34/x.png")
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
            assert f">{name}</p>" in converse(page, name, content)
        assert stat.S_IMODE(page.folder.stat().st_mode) == 0o700
        assert any(page.folder.rglob("*.png")), "nothing was sent"
        files = list((tmp_path / "temp").rglob("*.png"))
        assert all(page.folder in file.parents for file in files), files
    assert not page.folder.exists()


def test_malformed_json_is_refused_without_a_traceback(open_page, capfd):
    for body in (b"", b"{", b"\xff", b"null", b"[" * 100_000, b"9" * 5000):
        assert ask(open_page, "POST", ANSWERS, body).status == 422, body[:20]
    for path in (f"static/{'a' * 1900}", f"images/{'a' * 1900}", "images/%00%ff"):
        assert ask(open_page, "GET", f"/{path}").status == 404, path
    with socket.create_connection(("127.0.0.1", open_page.port)) as link:
        start_upload(open_page, link, 1000, b"x" * 100)
    assert 'role="alert"' not in converse(open_page, "still there")
    assert capfd.readouterr().err == ""


def test_concurrent_uploads_keep_the_limit(monkeypatch):
    monkeypatch.setattr(pages, "MAX_STORED_BYTES", 1_000_000)
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
        # Before the others leave: the page deletes what they have sent.
        files = [file for file in page.folder.rglob("*") if file.is_file()]
        assert 0 < sum(file.stat().st_size for file in files) < 1_000_000
        stack.close()
        # What was reserved for those that have left is free again.
        deadline = time.monotonic() + 20
        path = f"{UPLOADS}?name=a.png"
        while ask(page, "POST", path, b"x" * 500_000).status != 422:
            assert time.monotonic() < deadline, "the space of aborted uploads is not free"
            time.sleep(0.05)


def test_upload_that_stops_is_ended(monkeypatch):
    monkeypatch.setattr(server, "UPLOAD_IDLE_TIMEOUT_S", 0.2)
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
        for thinks in (True, False):
            html = converse(page, "Which colour?", thinking=thinks)
            assert f">{ANSWER}</p>" in html
            assert ("<summary>Reasoning</summary>" in html) == (THOUGHT in html) == thinks


ACCESS = Access("right-password")

PREFIX = {PREFIX_HEADER: "/pages/1"}


def make_chat(folder: Path) -> AccessMiddleware:
    return make_chat_app(ScriptedService(), folder, get_image_pool(), ACCESS)


def make_label(folder: Path) -> AccessMiddleware:
    session = open_fields_session(folder)
    with closing(session.store):
        return make_label_app(session, ACCESS, get_image_pool())


def make_studio(folder: Path) -> AccessMiddleware:
    return make_studio_app(make_page(folder / "work"), ACCESS)


@pytest.mark.parametrize("make", [make_chat, make_label, make_studio])
def test_routes_need_the_sign_in(tmp_path: Path, make: Callable[[Path], AccessMiddleware]) -> None:
    app = make(tmp_path)
    assert isinstance(app.app, Starlette)
    routes = [route for route in app.app.routes if isinstance(route, Route)]
    assert len(routes) == len(app.app.routes) > 5
    client = TestClient(app, "http://127.0.0.1", follow_redirects=False)
    for route in routes:
        path = re.sub(r"{.*?}", "1", route.path)
        for method in sorted(route.methods or ()):
            answer = client.request(method, path)
            if path == "/static/1":
                assert answer.status_code == 404
            elif path == "/":
                assert (answer.status_code, answer.headers["location"]) == (303, "sign-in")
            else:
                assert answer.status_code == 401, (method, path)
    assert client.get("/favicon.ico").status_code == 204


@pytest.mark.parametrize("make", [make_chat, make_label])
def test_pages_of_jobs_link_to_their_studio(tmp_path, make):
    client = TestClient(make(tmp_path), "http://127.0.0.1")
    client.post("/sign-in", data={"password": ACCESS.password})
    link = 'href="studio?lang=en"'
    assert link in client.get("/", headers=PREFIX).text
    assert link not in client.get("/").text
    train_link = "../../?step=plan&amp;data="
    assert (train_link in client.get("/", headers=PREFIX).text) == (make is make_label)


async def describe(request: Request) -> Response:
    body = (await request.body()).decode()
    values = {"path": request.url.path, "query": request.url.query, "body": body}
    response = JSONResponse(values | {"prefix": request.headers.get(PREFIX_HEADER)})
    response.set_cookie("one", "1")
    response.set_cookie("two", "2")
    return response


def stream(request: Request) -> Response:
    return StreamingResponse(iter([b"first ", b"second"]), headers={"x-own": "kept"})


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Socket of a page. Its path is relative, because long paths cannot be bound."""
    monkeypatch.chdir(tmp_path)
    file = Path("socket")
    page = Starlette(
        routes=[Route("/stream", stream), Route("/{path:path}", describe, methods=["GET", "POST"])]
    )
    server = uvicorn.Server(uvicorn.Config(page, log_level="critical"))
    with contextlib.closing(bind_unix_socket(file)) as listener:
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield file
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(address: Path) -> TestClient:
    def find_socket(job_id: str) -> Path:
        sockets = {"1": address, "ended": Path("missing"), "linked": Path("link")}
        if job_id not in sockets:
            raise UserError("unknown job")
        return sockets[job_id]

    app = AccessMiddleware(create_app([make_proxy_route(find_socket)]), Access(PASSWORD))
    return TestClient(app, "http://localhost", follow_redirects=False)


def test_requests_are_forwarded_after_the_sign_in(client: TestClient) -> None:
    assert client.get("/pages/1/images/a").status_code == 401
    client.post("/sign-in", data={"password": PASSWORD})
    answer = client.post(
        "/pages/1/a%20b/c?x=%26&y", content=b"text", headers={PREFIX_HEADER: "/forged"}
    )
    expected = {"path": "/a b/c", "query": "x=%26&y", "body": "text", "prefix": "/pages/1"}
    assert answer.json() == expected
    assert {*answer.cookies} == {"one", "two"}
    assert client.get("/pages/1/a%00b%3Fc%23d").json()["path"] == "/a\0b%3Fc%23d"
    # The length of the client is not that of the body which is sent.
    answer = client.get("/pages/1/a", headers={"content-length": "9"})
    assert answer.json()["body"] == ""
    lengths = {"content-length": "9", "transfer-encoding": "chunked"}
    assert client.post("/pages/1/a", content=b"text", headers=lengths).json()["body"] == "text"
    answer = client.get("/pages/1/stream")
    assert "date" not in answer.headers, "the studio adds its own"
    assert (answer.text, answer.headers["x-own"]) == ("first second", "kept")
    assert "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("path", "status"), [("ended/", 503), ("other/", 422), ("1", 307), ("linked/", 404)]
)
def test_pages_that_do_not_answer_are_reported(client: TestClient, path: str, status: int) -> None:
    Path("link").symlink_to("socket")
    client.post("/sign-in", data={"password": PASSWORD})
    assert client.get(f"/pages/{path}").status_code == status
    opened = client.get(f"/pages/{path}", headers={"sec-fetch-mode": "navigate"})
    assert opened.status_code == (303 if path == "ended/" else status), "the studio instead"


def test_socket_is_private(address: Path) -> None:
    assert address.stat().st_mode & 0o077 == 0
    with pytest.raises(UserError, match="cannot listen"):
        bind_unix_socket(Path("x" * 200))
    with pytest.raises(UserError, match="another process uses"):
        bind_unix_socket(address)
    file, left = Path("notes.txt"), Path("left")
    file.write_text("mine")
    with pytest.raises(UserError, match="no socket"):
        bind_unix_socket(file)
    assert file.read_text() == "mine"
    for _ in range(2):
        bind_unix_socket(left).close()
