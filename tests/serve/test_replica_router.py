"""Tests of the router of replicas, with scripted replicas and with killed processes."""

import asyncio
import contextlib
import json
import re
import socket
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import replica_load
from api_server_fixtures import CHAT, KEY, LIMITS, make_auth_header, make_messages
from starlette.testclient import TestClient

from finesight.errors import UserError
from finesight.serve import replica_router
from finesight.serve.http_protocol import bind_unix_socket
from finesight.serve.replica_router import Replica, ReplicaRouter, hash_prefixes
from finesight.serve.request_middleware import CLIENT_CLOSED_REQUEST

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: "
STREAM_HEAD = HEAD + b"text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
SLOW = b"slow"
"""Response that never starts."""


class ScriptedReplica(Replica):
    """Replica whose socket sends the same bytes for each request, and then closes."""

    def __init__(self, index: int, folder: Path) -> None:
        super().__init__(index, (), {}, folder / str(index), is_ready=True)
        self.requests: list[bytes] = []
        self.bodies: list[bytes] = []
        self.closed = threading.Event()
        self.response = f"{index}".encode()
        self.listener = bind_unix_socket(self.socket_file)
        self.listener.listen()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                with connection:
                    head, _, body = connection.recv(1 << 20).partition(b"\r\n\r\n")
                    length = re.search(rb"content-length: (\d+)", head.lower())
                    while length and len(body) < int(length[1]):
                        body += connection.recv(1 << 20)
                    self.requests.append(head)
                    self.bodies.append(body)
                    if self.response == SLOW:
                        while connection.recv(1 << 20):
                            pass
                        self.closed.set()
                    elif self.response.isdigit():
                        length = f"Content-Length: {len(self.response)}\r\n\r\n".encode()
                        connection.sendall(HEAD + b"text/plain\r\n" + length + self.response)
                    else:
                        connection.sendall(self.response)


@pytest.fixture
def replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ScriptedReplica]]:
    monkeypatch.chdir(tmp_path)  # long paths cannot be bound
    scripted = [ScriptedReplica(index, Path()) for index in range(2)]
    yield scripted
    for one in scripted:
        one.listener.close()


@pytest.fixture
def client(replicas: list[ScriptedReplica]) -> TestClient:
    return TestClient(ReplicaRouter(replicas).make_app((), LIMITS), "http://localhost")


@pytest.fixture
def ask(client: TestClient) -> Callable[..., str]:
    def send(*texts: str) -> str:
        messages = [message for text in texts for message in make_messages(text)]
        return client.post(CHAT, json={"messages": messages, "max_tokens": 5}).text

    return send


def test_conversation_stays_on_its_replica(ask, replicas):
    first, second = "a" * 500, "b" * 500
    assert {ask(first), ask(second)} == {"0", "1"}
    here = ask(first, "more")
    for number in range(4):
        assert ask(first, "more", *"x" * number) == here
        assert ask(second, str(number)) != here
    replicas[int(here)].load = replica_router.MAX_LOAD_DIFFERENCE + 1
    assert ask(first, "more") != here
    replicas[int(here)].load = 0
    # Most of the next two differs, as if the system prompt were the same.
    assert ask(first, "c" * 900) != ask(first, "d" * 900)


def test_prefixes_start_at_the_messages():
    messages = b'"messages": [%s]}' % (b"x" * 1000)
    first, second = (hash_prefixes(b'{"seed": %d, ' % n + messages) for n in (1, 22))
    assert first == second
    assert first[-1][0] > 1 / replica_router.PREFIX_GROWTH
    assert not hash_prefixes(b"--boundary" * 100)


def test_request_is_sent_again_only_if_no_replica_got_it(ask, client, replicas):
    replicas[0].socket_file.unlink()
    assert (ask("Hello"), replicas[0].is_ready) == ("1", False)
    replicas[1].response = b"HTTP/1.1 200"
    replicas[0].is_ready = True
    replicas[0].num_requests = 99  # the other one is next
    answer = client.post(CHAT, json={"messages": []})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_ended")
    assert int(answer.headers["retry-after"]) >= 1
    assert [one.load for one in replicas] == [0, 0]
    for replica in replicas:
        replica.is_ready = False
    answer = client.post(CHAT, json={"messages": []})
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
    assert client.get("/health").status_code == 503


def test_model_names_come_from_a_replica_that_answers(replicas):
    """One has ended after it was ready, and the other ends once during its response."""
    replicas[0].socket_file.unlink()
    replicas[1].response = b"HTTP/1.1 200"
    content = b'{"data": [{"id": "tiny"}]}'
    answer = HEAD + b"application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content

    async def get_names() -> list[str]:
        task = asyncio.create_task(ReplicaRouter(replicas).get_model_names())
        while not replicas[1].requests:
            await asyncio.sleep(0.01)
        replicas[1].response = answer
        return await task

    assert asyncio.run(get_names()) == ["tiny"]


@pytest.mark.parametrize("cut", [b"", b"data: 2, "])
def test_killed_replica_ends_a_stream_with_an_error_event(client, replicas, cut):
    chunk = b"data: 1\n\n" + cut
    for replica in replicas:
        replica.response = STREAM_HEAD + b"%x\r\n%b\r\n" % (len(chunk), chunk)
    first, error, *end = client.get("/").text.split("\n\n")
    assert (first, end) == ("data: 1", ["data: [DONE]", ""])
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_ended"


def test_body_is_released_and_a_disconnect_reaches_the_replica(replicas):
    replicas[0].response = replicas[1].response = SLOW
    app = ReplicaRouter(replicas).make_app((), LIMITS)
    body = [b"x" * 1000]
    scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode()}
    headers = [(b"host", b"localhost"), (b"content-length", b"1000")]
    scope |= {"query_string": b"", "headers": headers, "state": {}}

    async def receive() -> dict[str, object]:
        if body:
            return {"type": "http.request", "body": body.pop()}
        assert app.budget.used_bytes == 1000
        while app.budget.used_bytes:
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    sent = []

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    (replica,) = (one for one in replicas if one.num_requests)
    assert replica.closed.wait(60)
    assert sent[0]["status"] == CLIENT_CLOSED_REQUEST


def test_keys_are_checked_once(replicas):
    client = TestClient(ReplicaRouter(replicas).make_app([KEY], LIMITS), "http://localhost")
    forged = {"x-finesight-owner": "other"}
    assert client.get("/v1/files", headers=forged).status_code == 401
    assert not replicas[0].requests + replicas[1].requests
    client.get("/v1/files?a=%20b", headers=make_auth_header(KEY) | forged)
    (request,) = replicas[0].requests + replicas[1].requests
    assert request.startswith(b"GET /v1/files?a=%20b HTTP/1.1\r\n")
    assert KEY.encode() not in request
    assert b"x-finesight-owner: " in request.lower()
    assert b"other" not in request


def test_unusual_headers_and_paths_are_forwarded_or_rejected(replicas):
    app = ReplicaRouter(replicas).make_app((), LIMITS)
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b""}
    headers = [(b"host", b"localhost"), (b"content-type", b"text/\xe9")]

    async def ask(raw_path: bytes) -> int:
        sent = []

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        given = scope | {"raw_path": raw_path, "headers": headers, "state": {}}
        await app(given, lambda: asyncio.sleep(0, {"type": "http.request"}), send)
        return sent[0]["status"]

    assert [asyncio.run(ask(path)) for path in (b"/a#b", b"/\xe9", b"/a")] == [404, 404, 200]
    (request,) = replicas[0].requests + replicas[1].requests
    assert b"text/\xe9" in request


def test_body_is_forwarded_in_pieces(client, replicas):
    body = bytes(range(251)) * 3000
    assert len(body) > 2 * replica_router.BODY_PIECE_BYTES
    client.post("/", content=body)
    assert replicas[0].bodies + replicas[1].bodies == [body]


def test_metrics_have_the_label_of_their_replica(client, replicas):
    for index, replica in enumerate(replicas):
        text = b"# TYPE finesight_tokens counter\nfinesight_tokens_total %d\n" % index
        length = b"text/plain\r\nContent-Length: %d\r\n\r\n" % len(text)
        replica.response = HEAD + length + text
    replicas[1].load = 3
    text = client.get("/metrics").text
    assert text.count("# TYPE finesight_tokens_total counter") == 1
    for line in (
        'finesight_tokens_total{replica="0"} 0.0',
        'finesight_tokens_total{replica="1"} 1.0',
        'finesight_replica_requests_in_progress{replica="1"} 3.0',
        'finesight_replica_ready{replica="0"} 1.0',
    ):
        assert f"\n{line}\n" in text
    assert "finesight_router_request_seconds" in text
    assert client.get("/health").json()["replicas"] == ["ready", "ready"]


def test_replica_that_cannot_load_is_an_error(caplog):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options = {"api_keys": (), "limits": LIMITS, "on_ready": pytest.fail}
        with pytest.raises(UserError, match="exit code 2 before"):
            replica_router.run_replicas(["--unknown"], [{}] * 2, listener, **options)
    assert "--unknown" in caplog.text


def test_ended_replica_restarts(tmp_path, monkeypatch, caplog):
    """The delay doubles, and the log names the replica."""
    monkeypatch.setattr(replica_router, "MIN_RESTART_DELAY_S", 0.01)
    command = [sys.executable, "-c", "import sys; sys.exit('broken')"]
    replica = Replica(3, command, {}, tmp_path / "none")

    async def run() -> None:
        replica.has_started.set()
        task = asyncio.create_task(replica.run())
        end = time.monotonic() + 60
        while replica.num_restarts < 2:
            assert time.monotonic() < end, "no restart"
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(run())
    assert "replica 3: broken" in caplog.text
    assert "restarts in 0.01 s" in caplog.text
    assert "restarts in 0.02 s" in caplog.text


def test_killed_replica_affects_only_its_requests():
    """Real replicas: loading three models takes most of the time."""
    options = Namespace(model="finesight-tiny", device="cpu", clients=6, replicas=2)
    summary = replica_load.run_load(Namespace(**vars(options), seconds=8.0, kills=1, seed=0))
    assert summary["lost_or_different"] == {}
    assert summary["retryable_errors_of_requests_not_in_flight_at_a_kill"] == 0
    assert summary["equal_answers"] == summary["requests"] > 0
    assert (summary["kills"], summary["exit_code"]) == (1, 0)
