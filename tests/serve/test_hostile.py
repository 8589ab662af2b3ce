"""Tests of requests that try to stall the server: limits apply, and other requests continue."""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from api_server_fixtures import (
    LIMITS,
    RunningServer,
    make_request_body,
    run_server,
    send_request,
    wait_until_idle,
)
from hostile_requests import (
    CHAT,
    FILES,
    SCHEMAS,
    HostileRequest,
    make_chat_body,
    make_header_flood,
    make_image_content,
    make_jpeg2000,
    make_long_text,
    make_multipart_form,
    make_progressive_jpeg,
    make_schema_format,
)
from PIL import Image

from finesight.encode.tokenizer import Tokenizer
from finesight.errors import UserError
from finesight.serve.api_errors import ApiError
from finesight.serve.image_sources import read_formats
from finesight.serve.request_middleware import ByteBudget, ByteReservation

SHORT = replace(LIMITS, max_image_cpu_s=0.4, max_schema_cpu_s=0.3, max_request_cpu_s=2.0)


@pytest.fixture(scope="module")
def strict_server(inference_model, tmp_path_factory) -> Iterator[RunningServer]:
    """Server with low CPU time limits."""
    with run_server(
        inference_model, tmp_path_factory.mktemp("strict_server"), limits=SHORT
    ) as there:
        yield there


def post_request(server: RunningServer, body: bytes | str) -> tuple[int, dict[str, Any]]:
    """Post a chat completion and return its status and error."""
    status, output, _ = send_request(server, "POST", CHAT, body)
    return status, output.get("error", {})


def get_model_name(server: RunningServer) -> str:
    return server.service.model_names[0]


@contextlib.contextmanager
def ordinary_client(server: RunningServer) -> Iterator[list[int]]:
    """Send ordinary requests in sequence within the block; yields their statuses."""
    statuses: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            statuses.append(
                post_request(server, make_request_body(server, f"Hello {len(statuses)}"))[0]
            )

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        thread.join(60)


@pytest.mark.parametrize(
    "schema", ["intersection", "multiple of", "stars", "options", "letters", "negations"]
)
def test_slow_schemas_are_rejected(strict_server, schema):
    body = make_chat_body(
        get_model_name(strict_server),
        "Answer.",
        response_format=make_schema_format(SCHEMAS[schema]),
    )
    with ordinary_client(strict_server) as statuses:
        status, error = post_request(strict_server, body)
    assert (status, error["param"]) == (400, "response_format")
    assert set(statuses) <= {200}
    wait_until_idle(strict_server)


def test_schema_with_slow_later_mask_is_rejected(strict_server):
    """The first masks are fast, so only the affected answer fails."""
    given = {"response_format": make_schema_format(SCHEMAS["later"]), "max_tokens": 400}
    with ordinary_client(strict_server) as statuses:
        status, error = post_request(
            strict_server, make_chat_body(get_model_name(strict_server), "Answer.", **given)
        )
        stream = make_chat_body(get_model_name(strict_server), "Answer.", stream=True, n=2, **given)
        _, _, answer = send_request(strict_server, "POST", CHAT, stream)
    assert status == 400
    assert "exceeds a limit" in error["message"]
    assert answer.status == 200
    assert statuses
    assert set(statuses) == {200}
    wait_until_idle(strict_server)


def test_tool_schemas_have_the_same_limits(strict_server):
    function = {"name": "f", "parameters": SCHEMAS["intersection"]}
    tools = [{"type": "function", "function": function}]
    body = make_chat_body(
        get_model_name(strict_server), "Call.", tools=tools, tool_choice="required"
    )
    status, error = post_request(strict_server, body)
    assert (status, error["param"]) == (400, "tools")
    # Without a required call, the schema is prompt text only.
    assert (
        post_request(
            strict_server, make_chat_body(get_model_name(strict_server), "Hello", tools=tools)
        )[0]
        == 200
    )


def test_disconnect_ends_the_schema_worker(strict_server):
    body = make_chat_body(
        get_model_name(strict_server), "A.", response_format=make_schema_format(SCHEMAS["states"])
    )
    with socket.create_connection(("127.0.0.1", strict_server.port), timeout=10) as there:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        there.sendall(head.encode() + body)
    wait_until_idle(strict_server)
    assert post_request(strict_server, make_request_body(strict_server, "Hello"))[0] == 200


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "PNG"])
def test_slow_image_headers_are_rejected(strict_server, kind):
    data = make_header_flood(kind, 12 << 20)
    content = [{"type": "text", "text": "What?"}, make_image_content(data)]
    with ordinary_client(strict_server) as statuses:
        status, error = post_request(
            strict_server, make_chat_body(get_model_name(strict_server), content)
        )
        body, content_type = make_multipart_form(data)
        uploaded, output, _ = send_request(
            strict_server, "POST", FILES, body, {"Content-Type": content_type}
        )
    assert (status, error["param"]) == (400, "messages.0.content.1")
    assert "CPU time" in error["message"]
    assert (uploaded, output["error"]["param"]) == (400, "file")
    assert send_request(strict_server, "GET", FILES)[1]["data"] == []
    assert set(statuses) <= {200}


def test_slow_image_decoding_is_rejected(strict_server):
    content = [make_image_content(make_progressive_jpeg())] * 4
    with ordinary_client(strict_server) as statuses, ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(
                lambda _: post_request(
                    strict_server, make_chat_body(get_model_name(strict_server), content)
                ),
                range(4),
            )
        )
    assert [status for status, _ in found] == [400] * 4
    assert {error["param"] for _, error in found} == {"messages.0.content.0"}
    assert set(statuses) <= {200}


def test_cpu_time_limit_covers_all_images(inference_model, tmp_path):
    limits = replace(LIMITS, max_request_cpu_s=0.2)
    file = io.BytesIO()
    Image.new("RGB", (3000, 3000)).save(file, "JPEG")
    with run_server(inference_model, tmp_path, limits=limits) as server:
        status, error = post_request(
            server,
            make_chat_body(get_model_name(server), [make_image_content(file.getvalue())] * 30),
        )
    assert status == 400
    assert "CPU time" in error["message"]


def save_image(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (56, 56), (1, 2, 3)).save(file, kind)
    return file.getvalue()


def test_additional_image_formats(inference_model, strict_server, tmp_path):
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        assert (
            post_request(
                strict_server,
                make_chat_body(
                    get_model_name(strict_server), [make_image_content(save_image(kind))]
                ),
            )[0]
            == 200
        )
    others = {"JPEG2000": make_jpeg2000(), "TIFF": save_image("TIFF"), "BMP": save_image("BMP")}
    for data in others.values():
        status, error = post_request(
            strict_server,
            make_chat_body(get_model_name(strict_server), [make_image_content(data)] * 8),
        )
        assert status == 400
        assert "expected one of JPEG, PNG, WEBP, GIF" in error["message"]
    formats = read_formats(["tiff", "JPEG 2000"])
    assert formats == ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "JPEG2000")
    with run_server(inference_model, tmp_path, formats=formats) as server:
        assert (
            post_request(
                server,
                make_chat_body(get_model_name(server), [make_image_content(save_image("TIFF"))]),
            )[0]
            == 200
        )
        assert (
            post_request(
                server,
                make_chat_body(get_model_name(server), [make_image_content(save_image("BMP"))]),
            )[0]
            == 400
        )
    with pytest.raises(UserError, match="unknown image format 'EPS'") as raised:
        read_formats(["eps"])
    assert "TIFF" in raised.value.expected


@pytest.mark.parametrize("kind", ["digits", "jamo", "marks"])
def test_long_texts_are_rejected(strict_server, kind):
    for length in (990_000, 2_000_000):
        status, error = post_request(
            strict_server,
            make_chat_body(get_model_name(strict_server), make_long_text(kind, length, 1)),
        )
        assert status == 400
        assert "characters of text" in error["message"]


def test_tokenization_runs_in_workers(strict_server, monkeypatch):
    def fail(self: Tokenizer, text: str) -> tuple[int, ...]:
        raise AssertionError(f"{len(text)} characters are tokenized")

    monkeypatch.setattr(Tokenizer, "encode", fail)
    max_model_len = strict_server.service.max_model_len
    assert post_request(strict_server, make_request_body(strict_server, "Hello"))[0] == 200
    # Within the limit of characters, beyond that of tokens.
    status, error = post_request(
        strict_server, make_request_body(strict_server, "0123456789" * (max_model_len // 8))
    )
    assert status == 400
    assert f"expected fewer than {max_model_len}" in error["message"]


def test_byte_budget_of_all_requests():
    budget = ByteBudget(100)
    first, second = ByteReservation(budget), ByteReservation(budget)
    first.reserve(60)
    with pytest.raises(ApiError) as raised:
        second.reserve(60)
    assert (raised.value.status, raised.value.response_headers) == (503, {"Retry-After": "2"})
    second.reserve(40)
    first.release()
    assert budget.used_bytes == 40
    second.reserve(60)
    second.release()
    assert budget.used_bytes == 0


def test_decoded_images_count_towards_the_budget(inference_model, tmp_path):
    limits = replace(LIMITS, max_total_body_bytes=60_000)
    small, large = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (56, 56)).save(small, "PNG")
    Image.new("RGB", (560, 560)).save(large, "PNG")
    with run_server(inference_model, tmp_path, limits=limits) as server:
        budget = server.app.budget
        assert (
            post_request(
                server,
                make_chat_body(get_model_name(server), [make_image_content(small.getvalue())]),
            )[0]
            == 200
        )
        status, error = post_request(
            server, make_chat_body(get_model_name(server), [make_image_content(large.getvalue())])
        )
        assert (status, error["type"]) == (503, "overloaded_error")
        assert budget.used_bytes == 0


def test_disconnect_during_the_request(strict_server, caplog):
    caplog.set_level(logging.INFO, logger="finesight.serve")
    body = make_chat_body(get_model_name(strict_server), make_long_text("digits", 500_000, 0))
    upload, content_type = make_multipart_form(b"\x89PNG" * 100_000)
    for number in range(10):
        request = HostileRequest("cut", CHAT, body, cut=number / 10)
        assert request.send(strict_server.port) == 0
        assert (
            HostileRequest("cut", FILES, upload, content_type, cut=number / 10).send(
                strict_server.port
            )
            == 0
        )
    for _ in range(200):
        lines = [r.getMessage() for r in caplog.records if r.name == "finesight.serve"]
        if sum(" 499 " in line for line in lines) >= 20:
            break
        time.sleep(0.05)
    assert sum(" 499 " in line for line in lines) == 20
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    stats = urllib.request.urlopen(f"{strict_server.url}/metrics").read().decode()
    assert 'status="499"' in stats
    assert 'status="500"' not in stats


def test_disconnect_before_the_response(strict_server, caplog):
    caplog.set_level(logging.INFO, logger="finesight.serve")
    content = [make_image_content(make_progressive_jpeg())]
    body = make_chat_body(get_model_name(strict_server), content)
    with socket.create_connection(("127.0.0.1", strict_server.port), timeout=10) as there:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        there.sendall(head.encode() + body)
        time.sleep(0.1)
    for _ in range(200):
        lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("POST")]
        if lines:
            break
        time.sleep(0.05)
    assert len(lines) == 1
    assert f"POST {CHAT} 499 " in lines[0]


def test_tiny_chunks_are_rejected(strict_server):
    with socket.create_connection(("127.0.0.1", strict_server.port), timeout=30) as there:
        there.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode())
        there.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                there.sendall(b"1\r\nx\r\n" * 10_000)
            raise AssertionError("all of it was read")
    # Small ones of a small body, or larger ones, are read.
    for size, length in ((7, 10), (300, 600_000)):
        body = make_request_body(strict_server, "Hello", metadata="x" * length).encode()
        pieces = (body[at : at + size] for at in range(0, len(body), size))
        assert send_request(strict_server, "POST", CHAT, pieces, chunked=True)[0] == 200


def test_large_request_headers_are_rejected(strict_server):
    for number, expected in ((100, 200), (10_000, 400)):
        with socket.create_connection(("127.0.0.1", strict_server.port), timeout=30) as there:
            head = "GET /health HTTP/1.1\r\nHost: localhost\r\n" + "a: b\r\n" * number + "\r\n"
            there.sendall(head.encode())
            assert f" {expected} ".encode() in there.recv(100)
