"""What the page lets through, asked without a browser."""

from __future__ import annotations

import http.client
import json
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from served_page import Parrot, Served, served

from finesight.web.guard import COOKIE
from finesight.web.limits import MESSAGE_BYTES, PICTURE_BYTES, UPLOAD_BYTES, UPLOAD_SECONDS

PASSWORD = "right-password"


def _echo(text: str) -> tuple[str, tuple[()]]:
    return text, ()


@pytest.fixture(scope="module")
def open_page() -> Iterator[Served]:
    with served(Parrot(_echo)) as place:
        yield place


@pytest.fixture(scope="module")
def locked_page() -> Iterator[Served]:
    with served(Parrot(_echo), password=PASSWORD, loopback=False) as place:
        yield place


def _ask(
    place: Served, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=20)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        given = {name.lower(): value for name, value in answer.getheaders()}
        stream = given.get("content-type", "").startswith("text/event-stream")
        return answer.status, given, b"" if stream else answer.read()
    finally:
        connection.close()


def _upload(place: Served, name: str, content: bytes) -> tuple[int, str]:
    body = (
        f'--x\r\ncontent-disposition: form-data; name="files"; filename="{name}"\r\n'
        "content-type: image/png\r\n\r\n"
    ).encode() + content + b"\r\n--x--\r\n"  # fmt: skip
    kind = "multipart/form-data; boundary=x"
    status, _, said = _ask(place, "POST", "/gradio_api/upload", body, content_type=kind)
    return status, json.loads(said)[0] if status == 200 else ""


def _join(place: Served, path: Any) -> int:
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    message = {"text": "What?", "files": [file]}
    body = {"data": [message, False, 9, 0], "fn_index": 1, "session_hash": "abc"}
    return _ask(
        place, "POST", "/gradio_api/queue/join", json.dumps(body).encode(),
        content_type="application/json",
    )[0]  # fmt: skip


def _routes(place: Served) -> list[tuple[str, str]]:
    """Every route that Gradio and the page have, parameters filled in."""

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

    return sorted(set(below(place.app.app.routes, "")))


def test_no_route_answers_without_the_password(locked_page):
    routes = _routes(locked_page)
    assert len(routes) > 60, "the walk finds no routes"
    for method, path in [*routes, ("GET", "/assets/x.js"), ("PUT", "/"), ("OPTIONS", "/config")]:
        status, headers, body = _ask(locked_page, method, path)
        if path == "/page.css":
            continue
        assert status in (303, 401, 404), f"{method} {path}: {status}"
        assert body in (b"", b"sign in first", b"not here"), f"{method} {path}"
        assert headers.get("location", "sign-in") == "sign-in"


def test_routes_that_the_page_does_not_need_are_closed(open_page):
    closed = [(m, p) for m, p in _routes(open_page) if _ask(open_page, m, p)[2] == b"not here"]
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


def test_a_wrong_password_and_a_wrong_pass_let_nobody_in(locked_page):
    wrong = _ask(locked_page, "POST", "/sign-in", b"password=wrong")
    assert wrong[0] == 401
    assert "set-cookie" not in wrong[1]
    for value in ("", "x", PASSWORD, "é"):
        cookie = f"{COOKIE}={value}".encode().decode("latin-1")
        assert _ask(locked_page, "GET", "/config", cookie=cookie)[0] == 401
    right = _ask(locked_page, "POST", "/sign-in", f"password={PASSWORD}".encode())
    assert right[0] == 303
    cookie = right[1]["set-cookie"]
    assert {"HttpOnly", "SameSite=strict"} <= set(cookie.split("; "))
    assert _ask(locked_page, "GET", "/config", cookie=cookie.split(";")[0])[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:1", "", "[::2]:80", "["])
def test_other_names_for_this_machine_are_refused(open_page, host):
    assert _ask(open_page, "GET", "/config", host=host)[0] in (400, 403)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_other_pages_cannot_ask(open_page, origin):
    body = b"{}"
    assert _ask(open_page, "POST", "/gradio_api/queue/join", body, origin=origin)[0] == 403
    assert _ask(open_page, "POST", "/gradio_api/upload", body, origin=origin)[0] == 403


def test_files_that_were_not_uploaded_are_neither_served_nor_read(open_page, tmp_path):
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
        f"{uploads}/../talks",
        f"{uploads}/link/secret.png",
        f"{path}/../../../../../../etc/hosts",
        "http://127.0.0.1:9/x.png",
        "file:///etc/hosts",
        "\0",
        "",
    ):
        asked = _ask(open_page, "GET", f"/gradio_api/file={quote(outside)}")
        assert asked[0] in (400, 404), outside
        assert _join(open_page, outside) == 403, outside
    for odd in (None, 7, ["x"], {"path": path}):
        assert _join(open_page, odd) == 403, odd
    assert _ask(open_page, "POST", "/gradio_api/queue/join", b"{")[0] == 403
    assert _ask(open_page, "POST", "/gradio_api/queue/join", b"[" * 100_000)[0] == 403


def test_names_of_uploads_lead_nowhere(open_page, tmp_path):
    for name in ("../../../x.png", "/etc/x.png", "..", "a/../../x.png", "\\..\\x.png"):
        status, path = _upload(open_page, name, b"picture")
        assert status in (200, 400)
        if path:
            assert Path(path).resolve().is_relative_to(open_page.folder / "uploads")


def test_bodies_have_limits(open_page):
    much = b"x" * (MESSAGE_BYTES + 1)
    assert _ask(open_page, "POST", "/gradio_api/queue/join", much)[0] == 413
    length = str(100 << 20)
    assert UPLOAD_BYTES > 100 << 20, "told from the length alone below"
    told = {"content_length": str(UPLOAD_BYTES + 1), "content_type": "multipart/form-data"}
    assert _ask(open_page, "POST", "/gradio_api/upload", b"", **told)[0] == 413
    assert _ask(open_page, "POST", "/gradio_api/cancel", b"", content_length=length)[0] == 413
    assert _upload(open_page, "large.png", bytes(PICTURE_BYTES + 1))[0] == 413
    before = [*(open_page.folder / "uploads").rglob("large.png")]
    assert before == []


def test_uploads_that_nobody_asks_about_go(open_page):
    old, new = (
        Path(_upload(open_page, f"{name}.png", name.encode())[1]) for name in ("old", "new")
    )
    assert old.exists()
    past = time.time() - UPLOAD_SECONDS - 60
    os.utime(old, (past, past))
    assert _upload(open_page, "next.png", b"next")[0] == 200
    assert (old.exists(), new.exists()) == (False, True)
    # The same again is as new.
    again = Path(_upload(open_page, "old.png", b"old")[1])
    assert _upload(open_page, "next.png", b"next")[0] == 200
    assert again.exists()


def test_a_body_without_a_length_is_limited_too(open_page):
    connection = http.client.HTTPConnection("127.0.0.1", open_page.port, timeout=20)
    chunks = iter([b"x" * 65536] * (MESSAGE_BYTES // 65536 + 2))
    try:
        connection.request("POST", "/gradio_api/queue/join", chunks, encode_chunked=True)
        status = connection.getresponse().status
    except (BrokenPipeError, ConnectionResetError):
        status = 413
    finally:
        connection.close()
    assert status == 413


def test_secret_addresses_are_needed_for_pictures_and_talks(open_page):
    for path in (
        "/pictures/x/1",
        "/export/x/talk.zip",
        "/pictures/x/..%2f..%2fx",
        "/pictures/%C3%A9/1",
    ):
        assert _ask(open_page, "GET", path)[0] in (404, 422), path


def test_every_answer_says_what_a_browser_may_do_with_it(open_page):
    for path in ("/", "/config", "/theme.css", "/page.css", "/no", "/gradio_api/file=/etc/hosts"):
        headers = _ask(open_page, "GET", path)[1]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in headers["content-security-policy"]
    first, second = (_ask(open_page, "GET", "/")[1]["content-security-policy"] for _ in range(2))
    assert "nonce-" in first
    assert first != second
    assert "unsafe-inline" not in first.partition("script-src")[2].partition(";")[0]


def test_the_page_names_nothing_elsewhere_that_is_fetched(open_page):
    page = _ask(open_page, "GET", "/")[2].decode()
    fetched = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:[^\"]*)", page)
    assert fetched == []
    assert "fonts.g" not in page + _ask(open_page, "GET", "/theme.css")[2].decode()


def test_nothing_connects_anywhere():
    tried: list[Any] = []
    watching = [True]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
            tried.append(arguments[-1] if event == "socket.connect" else arguments[0])

    sys.addaudithook(watch)  # for the rest of the process; `watching` turns it off
    try:
        with served(Parrot(_echo)) as place:
            assert _ask(place, "GET", "/")[0] == 200
            assert _join(place, "http://93.184.216.34/x.png") == 403
    finally:
        watching.clear()
    hosts = {one[0] if isinstance(one, tuple) else one for one in tried}
    assert hosts, "the watch saw nothing, not even the test's own requests"
    assert hosts <= {"127.0.0.1", "localhost", "::1"}, hosts


def test_what_is_sent_lies_in_a_private_folder_that_goes():
    with served(Parrot(_echo)) as place:
        assert _upload(place, "a.png", b"picture")[0] == 200
        folder = place.folder
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not folder.exists()
