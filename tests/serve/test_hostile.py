"""Tests of requests that try to stall the server: limits apply, and other requests continue."""

import contextlib
import http.client
import logging
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api_server_fixtures import (
    LIMITS,
    POST_CHAT,
    RunningServer,
    make_request_body,
    post_chat,
    run_server,
    send_request,
    wait_until_idle,
)
from attack_client import MIB, MODEL, run_attack, start_server_process
from hostile_requests import (
    CHAT,
    FILES,
    SCHEMAS,
    SLOW_TOOL,
    HostileRequest,
    hostile_requests,
    make_fuzzed_body,
    make_header_flood,
    make_image_content,
    make_jpeg2000,
    make_large_png,
    make_long_text,
    make_multipart_form,
    make_progressive_jpeg,
    make_schema_format,
    make_small_image,
    request_makers,
)
from image_fixtures import encode_image
from PIL import Image

from finesight.encode.tokenization import Tokenizer
from finesight.errors import UserError
from finesight.serve.api_schema import ApiError
from finesight.serve.chat_completions import (
    LARGE_BODY_BYTES,
    MAX_LARGE_BODIES,
    ActiveCompletion,
)
from finesight.serve.media_sources import read_formats
from finesight.serve.request_middleware import ByteBudget, ByteReservation
from finesight.serve.request_preprocessor import ParsedBody, RequestPreprocessor
from finesight.vision.image_processing import load_image

CLIENTS, REQUESTS, CASES = 8, 500, 20_000

SHORT = replace(LIMITS, max_image_cpu_s=0.4, max_schema_cpu_s=0.3, max_request_cpu_s=2.0)


@pytest.fixture(scope="module")
def strict_server(inference_model, tmp_path_factory) -> Iterator[RunningServer]:
    """Server with low CPU time limits."""
    with run_server(inference_model, tmp_path_factory.mktemp("strict"), limits=SHORT) as server:
        yield server


@contextlib.contextmanager
def ordinary_client(server: RunningServer) -> Iterator[list[int]]:
    """Send ordinary requests in sequence within the block; yields their statuses."""
    statuses: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            statuses.append(post_chat(server, f"Hello {len(statuses)}")[0])

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
    response_format = make_schema_format(SCHEMAS[schema])
    with ordinary_client(strict_server) as statuses:
        status, error = post_chat(strict_server, "Answer.", response_format=response_format)
    assert (status, error["param"]) == (400, "response_format")
    assert set(statuses) <= {200}
    wait_until_idle(strict_server)


def test_schema_with_slow_later_mask_is_rejected(strict_server):
    """The first masks are fast, so only the affected answer fails."""
    given = {"response_format": make_schema_format(SCHEMAS["later"]), "max_tokens": 400}
    with ordinary_client(strict_server) as statuses:
        status, error = post_chat(strict_server, "Answer.", **given)
        stream_status, _ = post_chat(strict_server, "Answer.", stream=True, n=2, **given)
    assert (status, stream_status, set(statuses)) == (400, 200, {200})
    assert "exceeds a limit" in error["message"]
    wait_until_idle(strict_server)


def test_tool_schemas_have_the_same_limits(strict_server):
    tools = [SLOW_TOOL]
    status, error = post_chat(strict_server, "Call.", tools=tools, tool_choice="required")
    assert (status, error["param"]) == (400, "tools")
    # Without a required call, the schema is prompt text only.
    assert post_chat(strict_server, "Hello", tools=tools)[0] == 200


def test_disconnect_ends_the_schema_worker(strict_server):
    response_format = make_schema_format(SCHEMAS["states"])
    send_and_disconnect(strict_server, "A.", response_format=response_format)
    wait_until_idle(strict_server)
    assert post_chat(strict_server, "Hello")[0] == 200


def send_and_disconnect(server: RunningServer, *parts: Any, wait_s: float = 0.0, **given: Any):
    body = make_request_body(server, *parts, **given).encode()
    with server.connect(POST_CHAT + b"Content-Length: %d\r\n\r\n" % len(body) + body):
        time.sleep(wait_s)


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "PNG"])
def test_slow_image_headers_are_rejected(strict_server, kind):
    data = make_header_flood(kind, 12 << 20)
    content = [{"type": "text", "text": "What?"}, make_image_content(data)]
    with ordinary_client(strict_server) as statuses:
        status, error = post_chat(strict_server, *content)
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
        found = list(pool.map(lambda _: post_chat(strict_server, *content), range(4)))
    assert [status for status, _ in found] == [400] * 4
    assert {error["param"] for _, error in found} == {"messages.0.content.0"}
    assert set(statuses) <= {200}


@contextlib.contextmanager
def hold_bodies(server: RunningServer, body: bytes, number: int) -> Iterator[None]:
    """Send equal requests, and disconnect at the end of the block."""
    head = POST_CHAT + b"Content-Length: %d\r\n\r\n" % len(body)
    with contextlib.ExitStack() as stack:
        for _ in range(number):
            stack.enter_context(server.connect(head + body))
        yield


@pytest.mark.parametrize("kind", ["images", "large bodies"])
def test_texts_do_not_wait_for_images_and_large_bodies(
    inference_model, tmp_path, monkeypatch, kind
):
    number = LIMITS.num_reader_threads
    started, ended = threading.Semaphore(0), threading.Event()
    parse, encode = RequestPreprocessor.parse_body, RequestPreprocessor.encode

    def parse_body(preprocessor: RequestPreprocessor, body: bytearray, *args: Any) -> Any:
        if len(body) > LARGE_BODY_BYTES:
            started.release()
            ended.wait()
        return parse(preprocessor, body, *args)

    def encode_files(preprocessor: RequestPreprocessor, body: ParsedBody, *args: Any) -> Any:
        if body.files and kind == "images":
            started.release()
            ended.wait()
        return encode(preprocessor, body, *args)

    monkeypatch.setattr(RequestPreprocessor, "parse_body", parse_body)
    monkeypatch.setattr(RequestPreprocessor, "encode", encode_files)
    with run_server(inference_model, tmp_path) as server:
        image = make_image_content(make_small_image("PNG"))
        padding = {} if kind == "images" else {"metadata": "x" * (LARGE_BODY_BYTES + 1)}
        body = make_request_body(server, image, **padding).encode()
        with hold_bodies(server, body, 2 * number):
            for _ in range(number if kind == "images" else MAX_LARGE_BODIES):
                assert started.acquire(timeout=60)
            try:
                assert post_chat(server, "Hello")[0] == 200
                assert send_request(server, "GET", FILES)[0] == 200
            finally:
                ended.set()


def test_cpu_time_limit_covers_all_images(inference_model, tmp_path):
    limits = replace(LIMITS, max_request_cpu_s=0.2)
    large = encode_image(Image.new("RGB", (3000, 3000)), "JPEG")
    with run_server(inference_model, tmp_path, limits=limits) as server:
        status, error = post_chat(server, *[make_image_content(large)] * 30)
    assert status == 400
    assert "CPU time" in error["message"]


def save_image(kind: str) -> bytes:
    return encode_image(Image.new("RGB", (56, 56), (1, 2, 3)), kind)


def test_additional_image_formats(inference_model, strict_server, tmp_path):
    def post_image(server: RunningServer, data: bytes, times: int = 1) -> tuple[int, Any]:
        return post_chat(server, *[make_image_content(data)] * times)

    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        assert post_image(strict_server, save_image(kind))[0] == 200
    for data in (make_jpeg2000(), save_image("TIFF"), save_image("BMP")):
        status, error = post_image(strict_server, data, 8)
        assert status == 400
        assert "expected one of JPEG, PNG, WEBP, GIF" in error["message"]
    formats = read_formats(["tiff", "JPEG 2000"])
    assert formats == ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "JPEG2000")
    with run_server(inference_model, tmp_path, image_formats=formats) as server:
        assert post_image(server, save_image("TIFF"))[0] == 200
        assert post_image(server, save_image("BMP"))[0] == 400
        assert post_image(server, save_image("PDF"))[0] == 400
    with pytest.raises(UserError, match="unknown image format 'EPS'") as raised:
        read_formats(["eps"])
    assert "TIFF" in raised.value.expected


def test_pages_of_a_pdf_are_images(inference_model, tmp_path):
    pages = [Image.effect_noise((28, 28 * n), 90).convert("RGB") for n in (1, 2)]
    pages[0].save(tmp_path / "a.pdf", save_all=True, append_images=pages[1:])
    content = (tmp_path / "a.pdf").read_bytes()
    images = [load_image(tmp_path / f"a.pdf#page={n}") for n in (1, 2)]
    parts = []
    for image in images:
        image.save(tmp_path / "page.png")
        parts.append(make_image_content((tmp_path / "page.png").read_bytes()))
    url = make_image_content(content)["image_url"]["url"].replace("image/png", "application/pdf")
    documents = [{"type": "image_url", "image_url": {"url": url}}]
    documents.append({"type": "file", "file": {"file_data": url, "filename": "a.pdf"}})
    limits = replace(LIMITS, max_images=3)
    options = {"image_formats": read_formats(["pdf"]), "limits": limits}
    with run_server(inference_model, tmp_path, **options) as server:
        status, expected = post_chat(server, *parts, max_tokens=8)
        assert status == 200, expected
        for document in documents:
            status, answer = post_chat(server, document, max_tokens=8)
            assert status == 200, answer
            assert answer["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
            assert answer["choices"] == expected["choices"]
        status, error = post_chat(server, *documents)
        assert (status, "4 images" in error["message"]) == (400, True)
        both = {"type": "file", "file": {"file_data": url, "file_id": "file-1"}}
        assert post_chat(server, both)[0] == 400


@pytest.mark.parametrize("kind", ["digits", "jamo", "marks"])
@pytest.mark.parametrize("length", [990_000, 2_000_000])
def test_long_texts_are_rejected(strict_server, kind, length):
    status, error = post_chat(strict_server, make_long_text(kind, length, 1))
    assert status == 400
    assert "characters of text" in error["message"]


def test_tokenization_runs_in_workers(strict_server, monkeypatch):
    def fail(self: Tokenizer, text: str) -> tuple[int, ...]:
        raise AssertionError(f"{len(text)} characters are tokenized")

    monkeypatch.setattr(Tokenizer, "encode", fail)
    max_model_len = strict_server.service.max_model_len
    assert post_chat(strict_server, "Hello")[0] == 200
    # Within the limit of characters, beyond that of tokens.
    status, error = post_chat(strict_server, "0123456789" * (max_model_len // 8))
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
    large = encode_image(Image.new("RGB", (560, 560)))
    with run_server(inference_model, tmp_path, limits=limits) as server:
        budget = server.app.budget
        assert post_chat(server, make_image_content(save_image("PNG")))[0] == 200
        status, error = post_chat(server, make_image_content(large))
        assert (status, error["type"]) == (503, "overloaded_error")
        assert budget.used_bytes == 0


def wait_for_log(caplog: pytest.LogCaptureFixture, text: str, count: int) -> list[str]:
    """Wait for log lines of the server that contain a text."""
    end = time.monotonic() + 60
    while True:
        messages = [r.getMessage() for r in caplog.records if r.name == "finesight.serve"]
        lines = [message for message in messages if text in message]
        if len(lines) >= count or time.monotonic() > end:
            return lines
        time.sleep(0.05)


def test_disconnect_during_the_request(strict_server, caplog):
    caplog.set_level(logging.INFO, logger="finesight.serve")
    body = make_request_body(strict_server, make_long_text("digits", 500_000, 0)).encode()
    upload, content_type = make_multipart_form(b"\x89PNG" * 100_000)
    for number in range(10):
        cut = number / 10
        for request in (
            HostileRequest("cut", CHAT, body, cut=cut),
            HostileRequest("cut", FILES, upload, content_type, cut=cut),
        ):
            assert request.send(strict_server.port) == 0
    send_and_disconnect(strict_server, make_image_content(make_large_png()), wait_s=0.1)
    lines = wait_for_log(caplog, " 499 ", 21)
    # Their order is that of the handled disconnects.
    assert (len(lines), sum(f"POST {CHAT} 499 " in line for line in lines)) == (21, 11)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    stats = urllib.request.urlopen(f"{strict_server.url}/metrics").read().decode()
    assert 'status="499"' in stats
    assert 'status="500"' not in stats


def test_disconnect_before_the_generation(strict_server, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="finesight.serve")
    submit = ActiveCompletion._submit

    def disconnect(completion, *args):
        completion.close()
        submit(completion, *args)

    monkeypatch.setattr(ActiveCompletion, "_submit", disconnect)
    for count, is_stream in enumerate((False, True), 1):
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            options = {"stream": is_stream, "stream_options": {"include_usage": True}}
            post_chat(strict_server, "Hello", **options if is_stream else {})
        assert len(wait_for_log(caplog, " 499 ", count)) == count
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_tiny_chunks_are_rejected(strict_server):
    head = POST_CHAT + b"Transfer-Encoding: chunked\r\n\r\n"
    with strict_server.connect(head, timeout=30) as there, contextlib.suppress(ConnectionError):
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
        head = "GET /health HTTP/1.1\r\nHost: localhost\r\n" + "a: b\r\n" * number + "\r\n"
        with strict_server.connect(head.encode(), timeout=30) as there:
            assert f" {expected} ".encode() in there.recv(100)


@pytest.mark.fuzz
def test_500_hostile_requests_of_8_clients(tmp_path: Path):
    with start_server_process(tmp_path) as server:
        for number in range(8):
            assert server.request("POST", CHAT, server.make_ordinary_body(number))[1] == 200
        time.sleep(2)
        before = server.read_memory()
        stats = run_attack(server, hostile_requests(MODEL, REQUESTS), CLIENTS)
        time.sleep(5)
        after = server.read_memory()
        growth = sum(after.values()) - sum(before.values())
        assert growth <= 200 * MIB
        assert max(stats.health) <= 0.5
        assert {status for _, status in stats.ordinary} == {200}
        assert stats.largest_process <= 2048 * MIB
        # 0: the client, or the server, has closed the connection.
        assert {status for _, status in stats.hostile} <= {0, 200, 400, 413, 503}
        assert "Traceback" not in server.log.read_text()
        assert "not logged" not in server.log.read_text()
        server.process.terminate()
        assert server.process.wait(90) == 0


@pytest.mark.fuzz
def test_20000_fuzzed_bodies(tmp_path: Path):
    with start_server_process(tmp_path) as server:

        def ask(seed: int) -> tuple[float, int]:
            return server.request("POST", CHAT, make_fuzzed_body(MODEL, seed))

        largest = 0
        statuses: dict[int, int] = {}
        slowest = 0.0
        with ThreadPoolExecutor(CLIENTS) as pool:
            for number, (seconds, status) in enumerate(pool.map(ask, range(CASES))):
                statuses[status] = statuses.get(status, 0) + 1
                slowest = max(slowest, seconds)
                if number % 200 == 0:
                    largest = max(largest, *server.read_memory().values())
        assert set(statuses) <= {200, 400, 404, 413, 429}
        assert slowest <= 20
        assert largest <= 2048 * MIB
        assert "not logged" not in server.log.read_text()


def test_fuzzed_bodies(inference_model, tmp_path, caplog):
    """Send 300 fuzzed bodies to an in-process server."""
    caplog.set_level(logging.INFO, logger="finesight.serve")
    limits = replace(LIMITS, max_completion_tokens=8)
    with run_server(inference_model, tmp_path, limits=limits) as server:

        def ask(seed: int) -> int:
            return send_request(server, "POST", CHAT, make_fuzzed_body(MODEL, seed))[0]

        with ThreadPoolExecutor(4) as pool:
            statuses = list(pool.map(ask, range(300)))
        wait_until_idle(server)
    assert set(statuses) <= {200, 400, 404}
    assert {200, 400} <= set(statuses)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_other_hostile_requests(inference_model, tmp_path, caplog):
    """Send hostile requests without slow schemas and images, which test_hostile.py covers."""
    limits = replace(LIMITS, max_schema_cpu_s=0.3, max_completion_tokens=400)
    other = (
        "body",
        "text",
        "disconnect",
        "video",
        "image: cut off",
        "schema: properties",
        "schema: states",
    )
    makers = request_makers(MODEL, flood=1 << 20, length=990_000)
    requests = [make(1) for name, make in makers.items() if name.startswith(other)]
    with (
        run_server(inference_model, tmp_path, limits=limits) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        statuses = set(pool.map(lambda request: request.send(server.port), requests))
        wait_until_idle(server)
    assert statuses <= {0, 200, 400, 413}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
