"""Requests that try to stall the server: each ends at its limits, and no other one waits for it."""

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
from hostile_requests import (
    CHAT,
    FILES,
    SCHEMAS,
    Hostile,
    chat,
    form,
    header_flood,
    image_part,
    jpeg2000,
    long_text,
    progressive_jpeg,
    schema_format,
)
from PIL import Image
from serving import LIMITS, Running, idle, question, running, send

from finesight.encode.tokenizer import Tokenizer
from finesight.errors import UserError
from finesight.serve.errors import Refused
from finesight.serve.formats import read_formats
from finesight.serve.guard import ByteBudget, ByteReservation

SHORT = replace(LIMITS, image_seconds=0.4, schema_seconds=0.3, prepare_seconds=2.0)


@pytest.fixture(scope="module")
def strict(answerer, tmp_path_factory) -> Iterator[Running]:
    """A server with short limits of processor time."""
    with running(answerer, tmp_path_factory.mktemp("strict"), limits=SHORT) as there:
        yield there


def told(server: Running, body: bytes | str) -> tuple[int, dict[str, Any]]:
    """Status of a chat completion, and its error."""
    status, said, _ = send(server, "POST", CHAT, body)
    return status, said.get("error", {})


def name(server: Running) -> str:
    return server.service.names[0]


@contextlib.contextmanager
def beside(server: Running) -> Iterator[list[int]]:
    """Ordinary questions, one after the other, for the length of the block; their statuses."""
    statuses: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            statuses.append(told(server, question(server, f"Hello {len(statuses)}"))[0])

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
def test_schemas_that_are_slow_to_compile_or_to_follow(strict, schema):
    body = chat(name(strict), "Answer.", response_format=schema_format(SCHEMAS[schema]))
    with beside(strict) as statuses:
        status, error = told(strict, body)
    assert (status, error["param"]) == (400, "response_format")
    assert set(statuses) <= {200}
    idle(strict)


def test_a_schema_that_is_slow_to_follow_later(strict):
    """Its first masks are quick: only the answer that it holds is given up."""
    given = {"response_format": schema_format(SCHEMAS["later"]), "max_tokens": 400}
    with beside(strict) as statuses:
        status, error = told(strict, chat(name(strict), "Answer.", **given))
        stream = chat(name(strict), "Answer.", stream=True, n=2, **given)
        _, _, answer = send(strict, "POST", CHAT, stream)
    assert status == 400
    assert "too large to follow" in error["message"]
    assert answer.status == 200
    assert statuses
    assert set(statuses) == {200}
    idle(strict)


def test_tools_are_compiled_within_the_same_limits(strict):
    function = {"name": "f", "parameters": SCHEMAS["intersection"]}
    tools = [{"type": "function", "function": function}]
    body = chat(name(strict), "Call.", tools=tools, tool_choice="required")
    status, error = told(strict, body)
    assert (status, error["param"]) == (400, "tools")
    # Where nothing demands a call, the schema is text.
    assert told(strict, chat(name(strict), "Hello", tools=tools))[0] == 200


def test_a_client_that_goes_ends_the_process_of_its_schema(strict):
    body = chat(name(strict), "A.", response_format=schema_format(SCHEMAS["states"]))
    with socket.create_connection(("127.0.0.1", strict.port), timeout=10) as there:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        there.sendall(head.encode() + body)
    idle(strict)
    assert told(strict, question(strict, "Hello"))[0] == 200


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "PNG"])
def test_headers_that_are_slow_to_read(strict, kind):
    data = header_flood(kind, 12 << 20)
    content = [{"type": "text", "text": "What?"}, image_part(data)]
    with beside(strict) as statuses:
        status, error = told(strict, chat(name(strict), content))
        body, content_type = form(data)
        uploaded, said, _ = send(strict, "POST", FILES, body, {"Content-Type": content_type})
    assert (status, error["param"]) == (400, "messages.0.content.1")
    assert "processor time" in error["message"]
    assert (uploaded, said["error"]["param"]) == (400, "file")
    assert send(strict, "GET", FILES)[1]["data"] == []
    assert set(statuses) <= {200}


def test_pixels_that_are_slow_to_decode(strict):
    content = [image_part(progressive_jpeg())] * 4
    with beside(strict) as statuses, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: told(strict, chat(name(strict), content)), range(4)))
    assert [status for status, _ in found] == [400] * 4
    assert {error["param"] for _, error in found} == {"messages.0.content.0"}
    assert set(statuses) <= {200}


def test_many_images_have_one_budget_of_time(answerer, tmp_path):
    limits = replace(LIMITS, prepare_seconds=0.2)
    file = io.BytesIO()
    Image.new("RGB", (3000, 3000)).save(file, "JPEG")
    with running(answerer, tmp_path, limits=limits) as server:
        status, error = told(server, chat(name(server), [image_part(file.getvalue())] * 30))
    assert status == 400
    assert "processor time" in error["message"]


def saved(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (56, 56), (1, 2, 3)).save(file, kind)
    return file.getvalue()


def test_formats_of_images(answerer, strict, tmp_path):
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        assert told(strict, chat(name(strict), [image_part(saved(kind))]))[0] == 200
    others = {"JPEG2000": jpeg2000(), "TIFF": saved("TIFF"), "BMP": saved("BMP")}
    for data in others.values():
        status, error = told(strict, chat(name(strict), [image_part(data)] * 8))
        assert status == 400
        assert "expected one of JPEG, PNG, WEBP, GIF" in error["message"]
    formats = read_formats(["tiff", "JPEG 2000"])
    assert formats == ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "JPEG2000")
    with running(answerer, tmp_path, formats=formats) as server:
        assert told(server, chat(name(server), [image_part(saved("TIFF"))]))[0] == 200
        assert told(server, chat(name(server), [image_part(saved("BMP"))]))[0] == 400
    with pytest.raises(UserError, match="no image format 'EPS'") as raised:
        read_formats(["eps"])
    assert "TIFF" in raised.value.expected


@pytest.mark.parametrize("kind", ["digits", "jamo", "marks"])
def test_long_texts_are_refused_by_their_length(strict, kind):
    for length in (990_000, 2_000_000):
        status, error = told(strict, chat(name(strict), long_text(kind, length, 1)))
        assert status == 400
        assert "characters of text" in error["message"]


def test_nothing_is_tokenized_in_the_process_of_the_server(strict, monkeypatch):
    def fail(self: Tokenizer, text: str) -> tuple[int, ...]:
        raise AssertionError(f"{len(text)} characters are tokenized")

    monkeypatch.setattr(Tokenizer, "encode", fail)
    longest = strict.service.longest
    assert told(strict, question(strict, "Hello"))[0] == 200
    # Within the limit of characters, beyond that of tokens.
    status, error = told(strict, question(strict, "0123456789" * (longest // 8)))
    assert status == 400
    assert f"expected fewer than {longest}" in error["message"]


def test_bytes_that_all_requests_hold_together():
    budget = ByteBudget(100)
    first, second = ByteReservation(budget), ByteReservation(budget)
    first.reserve(60)
    with pytest.raises(Refused) as raised:
        second.reserve(60)
    assert (raised.value.status, raised.value.extra_headers) == (503, {"Retry-After": "2"})
    second.reserve(40)
    first.release()
    assert budget.used == 40
    second.reserve(60)
    second.release()
    assert budget.used == 0


def test_decoded_images_count_as_held(answerer, tmp_path):
    limits = replace(LIMITS, bodies_bytes=60_000)
    small, large = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (56, 56)).save(small, "PNG")
    Image.new("RGB", (560, 560)).save(large, "PNG")
    with running(answerer, tmp_path, limits=limits) as server:
        budget = server.app._budget
        assert told(server, chat(name(server), [image_part(small.getvalue())]))[0] == 200
        status, error = told(server, chat(name(server), [image_part(large.getvalue())]))
        assert (status, error["type"]) == (503, "overloaded_error")
        assert budget.used == 0


def test_a_client_that_disconnects_while_it_sends(strict, caplog):
    caplog.set_level(logging.INFO, logger="finesight.serve")
    body = chat(name(strict), long_text("digits", 500_000, 0))
    upload, content_type = form(b"\x89PNG" * 100_000)
    for number in range(10):
        request = Hostile("cut", CHAT, body, cut=number / 10)
        assert request.send(strict.port) == 0
        assert Hostile("cut", FILES, upload, content_type, cut=number / 10).send(strict.port) == 0
    for _ in range(200):
        lines = [r.getMessage() for r in caplog.records if r.name == "finesight.serve"]
        if sum(" 499 " in line for line in lines) >= 20:
            break
        time.sleep(0.05)
    assert sum(" 499 " in line for line in lines) == 20
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    figures = urllib.request.urlopen(f"{strict.url}/metrics").read().decode()
    assert 'status="499"' in figures
    assert 'status="500"' not in figures


def test_a_client_that_disconnects_before_its_answer(strict, caplog):
    caplog.set_level(logging.INFO, logger="finesight.serve")
    content = [image_part(progressive_jpeg())]
    body = chat(name(strict), content)
    with socket.create_connection(("127.0.0.1", strict.port), timeout=10) as there:
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


def test_chunks_of_a_byte(strict):
    with socket.create_connection(("127.0.0.1", strict.port), timeout=30) as there:
        there.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode())
        there.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                there.sendall(b"1\r\nx\r\n" * 10_000)
            raise AssertionError("all of it was read")
    # Small ones of a small body, or larger ones, are read.
    for size, length in ((7, 10), (300, 600_000)):
        body = question(strict, "Hello", metadata="x" * length).encode()
        pieces = (body[at : at + size] for at in range(0, len(body), size))
        assert send(strict, "POST", CHAT, pieces, chunked=True)[0] == 200


def test_heads_beyond_a_few_kilobytes(strict):
    for number, expected in ((100, 200), (10_000, 400)):
        with socket.create_connection(("127.0.0.1", strict.port), timeout=30) as there:
            head = "GET /health HTTP/1.1\r\nHost: localhost\r\n" + "a: b\r\n" * number + "\r\n"
            there.sendall(head.encode())
            assert f" {expected} ".encode() in there.recv(100)
