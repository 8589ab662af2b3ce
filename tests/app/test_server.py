"""Requests under a prefix reach the page of a job over a Unix socket."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from finesight.app.pages import PREFIX_HEADER, create_app
from finesight.app.server import Access, AccessMiddleware, bind_unix_socket, make_proxy_route
from finesight.errors import UserError

PASSWORD = "correct horse battery"


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
    assert client.get("/pages/1/chats").status_code == 401
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


def test_socket_is_private(address: Path) -> None:
    assert address.stat().st_mode & 0o077 == 0
    with pytest.raises(UserError, match="cannot listen"):
        bind_unix_socket(Path("x" * 200))
