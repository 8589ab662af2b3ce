"""Measure memory and response times of `finesight serve`, `web` and `label` under attack.

    python benchmarks/hostile_load.py [--requests 500] [--clients 8] [--out FILE] [--servers serve]

Several clients send hostile requests without pause: decompression bombs, JPEG 2000, progressive
JPEGs with thousands of scans, huge dimensions, deep JSON, incomplete bodies, wrong passwords and
keys, NUL, wrong content types and paths outside of the server. Meanwhile, another client requests
`/health` of the server, or a page with the cookie of its owner and the sign-in page, with pauses
of 0.1 s. The labelling page has the hostile images among those to label. Prints and writes JSON:
memory of all processes of the server in MB before, at the peak, 5 s after the attack and once the
server is idle, the seconds until then, response times and load average, and statuses by request.
After the last client, the server may decode images for a while. Status 0 is a connection that
either side closed, and status -1 an answer that a client did not wait for. Before the attack, the
owner of the chat page asks 20 questions about images of 448 x 448 pixels.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import itertools
import json
import os
import platform
import random
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlencode

import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from attack_client import MODEL, AttackedServer, list_process_tree, start_server_process
from edge_case_images import build_png
from hostile_requests import (
    CHAT,
    FILES,
    HostileRequest,
    hostile_requests,
    make_chat_body,
    make_header_flood,
    make_image_content,
    make_jpeg2000,
    make_progressive_jpeg,
    make_small_image,
)

PASSWORD, API_KEY = "correct-password", "correct-key-of-the-owner-of-the-server"
KEY_HEADERS = {"Authorization": f"Bearer {API_KEY}"}
FORM = "application/x-www-form-urlencoded"
SETTINGS = {"max_new_tokens": 9}

VERSIONED_PACKAGES = ("pillow", "uvicorn", "starlette", "torch")

MAX_ANSWER_S = 60.0
"""Seconds after which a hostile client of the chat page does not wait for an answer any more."""

MAX_IDLE_WAIT_S = 300.0
"""Seconds after which the memory is read although the server still works."""

NUM_QUESTIONS = 20
"""Number of ordinary questions before the attack."""

Attack = Callable[[], tuple[str, int]]
"""Sends a request, and returns its name and status."""


def make_images() -> dict[str, bytes]:
    """Make hostile images by name."""
    zeros = zlib.compress(bytes(12_000 * (3 * 12_000 + 1)), 9)
    return {
        "JPEG 2000": make_jpeg2000(),
        "progressive JPEG": make_progressive_jpeg(),
        "image bomb": build_png(12_000, 12_000, zeros),
        "huge dimensions": build_png(30_000, 30_000, zeros),
        "long header": make_header_flood("GIF", 4 << 20),
        "truncated image": make_small_image("PNG")[:60],
        "text as image": b"no image",
    }


def make_photo(seed: int) -> bytes:
    """Make an ordinary image of 448 x 448 pixels."""
    file = io.BytesIO()
    Image.effect_noise((448, 448), 64 + seed).convert("RGB").save(file, "PNG")
    return file.getvalue()


def get_status(port: int, path: str, headers: Mapping[str, str], body: bytes | None = None) -> int:
    """Send a request, receive the complete answer, and return its status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    with contextlib.closing(connection):
        kind = {"Content-Type": "application/json"}
        connection.request("GET" if body is None else "POST", path, body, {**kind, **headers})
        answer = connection.getresponse()
        answer.read()
        return answer.status


def send_request(request: HostileRequest, port: int) -> tuple[str, int]:
    """Send a request, and return its name and status."""
    return request.name, request.send(port)


def make_api_attacks(port: int, number: int) -> Iterator[Attack]:
    """Yield attacks on the API server in a fixed random order."""
    others = [
        *(
            HostileRequest(name, CHAT, make_chat_body(MODEL, [make_image_content(data)] * 4))
            for name, data in make_images().items()
        ),
        HostileRequest("deep JSON", CHAT, b'{"model":' + b'{"a":' * 200_000),
        HostileRequest("half a body", CHAT, bytes(1 << 20), cut=0.5),
        HostileRequest("wrong key", CHAT, make_chat_body(MODEL, "What?")),
        HostileRequest("NUL", CHAT, make_chat_body(MODEL, "\0" * 1000)),
        HostileRequest("wrong content type", FILES, b"x" * 1000, "multipart/form-data"),
        HostileRequest("path outside", "/v1/files/..%2f..%2fetc%2fpasswd", b"{}"),
    ]
    requests = [*hostile_requests(MODEL, number // 2), *others * (number // 2 // len(others) + 1)]
    random.Random(0).shuffle(requests)
    for request in requests[:number]:
        key = "guess" if request.name == "wrong key" else API_KEY
        headers = f"Authorization: Bearer {key}\r\n"
        yield partial(send_request, replace(request, headers=headers), port)


class PageClient:
    """Client of a page that has signed in."""

    def __init__(self, port: int) -> None:
        self.port = port
        body = urlencode({"password": PASSWORD}).encode()
        _, headers, _ = self.request("POST", "/sign-in", body, FORM)
        self.cookie = "; ".join(
            value.split(";")[0] for name, value in headers if name.lower() == "set-cookie"
        )

    def request(
        self, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Send a request; returns status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        with contextlib.closing(connection):
            headers = {"Content-Type": kind, "Cookie": getattr(self, "cookie", "")}
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            end, received = time.monotonic() + MAX_ANSWER_S, b""
            while chunk := answer.read1(1 << 16):
                received += chunk
                if time.monotonic() > end:
                    return -1, answer.getheaders(), b""
            return answer.status, answer.getheaders(), received


class ChatPageClient(PageClient):
    """Client of the chat page that has signed in, with conversations of its own."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        headers = dict(self.request("GET", "/")[1])
        self.cookie += f"; {headers['set-cookie'].split(';')[0]}"

    def ask(self, name: str, data: bytes, copies: int = 1) -> tuple[str, int]:
        """Upload an image, ask a question about copies of it, and wait for the answer."""
        images: list[Any] = []
        for _ in range(copies):
            status, _, output = self.request("POST", "/uploads?name=a.png", data)
            if status != 200:
                return name, status
            images += json.loads(output)
        body = json.dumps({"text": "What?", "images": images, "settings": SETTINGS}).encode()
        status, _, output = self.request("POST", "/answers", body)
        while status == 200 and (chat := json.loads(output).get("chat")):
            page = self.request("GET", f"/turns/{chat}")[2]
            if b"streaming" not in page:
                break
            time.sleep(0.05)
        return name, status


def make_page_attacks(port: int, number: int) -> Iterator[Attack]:
    """Yield attacks on the chat page in a fixed random order, half of them without password."""
    visitor = ChatPageClient(port)
    cookie = f"Cookie: {visitor.cookie}\r\n"
    send, upload = "/answers", "/uploads?name=a.png"
    others = [
        HostileRequest("wrong password", "/sign-in", b"password=guess", FORM),
        HostileRequest("NUL password", "/sign-in", b"password=%00" + b"%00" * 5000, FORM),
        HostileRequest("half a sign-in", "/sign-in", bytes(1 << 16), FORM, cut=0.5),
        HostileRequest("half an upload", upload, bytes(1 << 20), cut=0.5, headers=cookie),
        HostileRequest("deep JSON", send, b"[" * 500_000, headers=cookie),
        HostileRequest("long name", f"{upload}{'a' * 5000}", b"x" * 1000, headers=cookie),
        HostileRequest("path outside", "/static/..%2f..%2fetc%2fpasswd", b"", headers=cookie),
        HostileRequest("no cookie", send, b"{}"),
    ]
    repeated = others * (number // 2 // len(others) + 1)
    attacks: list[Attack] = [
        partial(send_request, request, port) for request in repeated[: number // 2]
    ]
    for (name, data), index in zip(
        itertools.cycle(make_images().items()), range(number - len(attacks)), strict=False
    ):
        attacks.append(partial(visitor.ask, name, data, 1 + index % 4))
    random.Random(0).shuffle(attacks)
    yield from attacks


def make_label_attacks(port: int, number: int) -> Iterator[Attack]:
    """Yield attacks on the labelling page in a fixed random order."""
    visitor = PageClient(port)
    cookie = f"Cookie: {visitor.cookie}\r\n"
    requests = [
        HostileRequest("wrong password", "/sign-in", b"password=guess", FORM),
        HostileRequest("half a sign-in", "/sign-in", bytes(1 << 16), FORM, cut=0.5),
        HostileRequest("deep JSON", "/decision", b"[" * 500_000, headers=cookie),
        HostileRequest("half a decision", "/decision", bytes(1 << 20), cut=0.5, headers=cookie),
        HostileRequest("NaN", "/decision", b'{"index": NaN}', headers=cookie),
        HostileRequest("path outside", "/images/..%2f..%2fetc/0", b"", headers=cookie),
        HostileRequest("no cookie", "/decision", b"{}"),
    ]
    attacks: list[Attack] = [
        partial(send_request, request, port) for request in requests * (number // 14)
    ]

    def view(name: str, index: int) -> tuple[str, int]:
        return name, visitor.request("GET", f"/images/{index}/0?small={index % 2 > 0}")[0]

    names = itertools.cycle(enumerate(make_images()))
    for index, name in itertools.islice(names, number - len(attacks)):
        attacks.append(partial(view, name, index))
    random.Random(0).shuffle(attacks)
    yield from attacks


def run_attacks(
    server: AttackedServer,
    attacks: Iterator[Attack],
    clients: int,
    probes: Mapping[str, Callable[[], int]],
) -> dict[str, Any]:
    """Run attacks from several clients, while probes measure response times."""
    time.sleep(2)
    load = os.getloadavg()[0]
    before = sum(server.read_memory().values())
    peak, statuses = before, Counter[str]()
    seconds: dict[str, list[float]] = {name: [] for name in probes}
    lock, is_over, start = threading.Lock(), threading.Event(), time.monotonic()

    def attack() -> None:
        while True:
            with lock:
                one = next(attacks, None)
            if one is None:
                return
            try:
                name, status = one()
            except (OSError, http.client.HTTPException) as error:
                name, status = f"no answer, {type(error).__name__}", -1
            with lock:
                statuses[f"{name}: {status}"] += 1

    def probe(name: str, request: Callable[[], int]) -> None:
        while not is_over.is_set():
            began = time.monotonic()
            status = request()
            seconds[name].append(time.monotonic() - began)
            with lock:
                statuses[f"{name}: {status}"] += 1
            is_over.wait(0.1)

    threads = [threading.Thread(target=attack) for _ in range(clients)]
    probe_threads = [threading.Thread(target=probe, args=pair) for pair in probes.items()]
    for thread in (*threads, *probe_threads):
        thread.start()
    while any(thread.is_alive() for thread in threads):
        peak = max(peak, sum(server.read_memory().values()))
        time.sleep(0.2)
    is_over.set()
    for thread in probe_threads:
        thread.join()
    duration = time.monotonic() - start
    time.sleep(5)
    after = sum(server.read_memory().values())
    idle_wait_s = 5 + wait_until_idle(server)
    idle = sum(server.read_memory().values())
    return {
        "requests": sum(statuses.values()) - sum(map(len, seconds.values())),
        "seconds": round(duration, 1),
        "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
        "memory_mb": {
            name: round(value / 1e6)
            for name, value in (
                ("before", before),
                ("peak", peak),
                ("after", after),
                ("idle", idle),
            )
        },
        "growth_mb": round((idle - before) / 1e6),
        "idle_wait_s": round(idle_wait_s, 1),
        "response_s": {name: summarize(found) for name, found in seconds.items()},
        "tracebacks": server.log.read_text().count("Traceback"),
        "statuses": dict(sorted(statuses.items())),
    }


def wait_until_idle(server: AttackedServer) -> float:
    """Wait until the processes of the server compute nothing for 3 s. Return the duration."""
    start, used = time.monotonic(), read_cpu_seconds(server)
    while time.monotonic() - start < MAX_IDLE_WAIT_S:
        time.sleep(3)
        before, used = used, read_cpu_seconds(server)
        if abs(used - before) < 0.1:
            break
    return time.monotonic() - start


def read_cpu_seconds(server: AttackedServer) -> float:
    """Return the CPU seconds of the server and its descendants, of those that still run."""
    total = 0.0
    for process in list_process_tree(server.process.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def summarize(seconds: Sequence[float]) -> dict[str, float]:
    """Return median and maximum of durations, and their number."""
    return {
        "median": round(median(seconds), 4),
        "max": round(max(seconds), 3),
        "n": len(seconds),
    }


def measure_api_server(number: int, clients: int, folder: Path) -> dict[str, Any]:
    """Attack `finesight serve`."""
    key_file = folder / "key.txt"
    key_file.write_text(API_KEY)
    with start_server_process(folder, options=["--key-file", str(key_file)]) as server:
        for index in range(8):
            body = server.make_ordinary_body(index)
            status = get_status(server.port, CHAT, KEY_HEADERS, body)
            assert status == 200, f"ordinary request: status {status}"
        probes = {"health": partial(get_status, server.port, "/health", KEY_HEADERS)}
        return run_attacks(server, make_api_attacks(server.port, number), clients, probes)


def measure_chat_page(number: int, clients: int, folder: Path) -> dict[str, Any]:
    """Attack `finesight web`."""
    password_file = folder / "password.txt"
    password_file.write_text(PASSWORD)
    with start_server_process(folder, "web", ["--password-file", str(password_file)]) as server:
        owner = ChatPageClient(server.port)
        seconds = []
        for index in range(NUM_QUESTIONS):
            began = time.monotonic()
            _, status = owner.ask("ordinary", make_photo(index))
            assert status == 200, f"question {index}: status {status}"
            seconds.append(time.monotonic() - began)
        probes = {
            "owner's page": partial(get_status, server.port, "/", {"Cookie": owner.cookie}),
            "sign-in page": partial(get_status, server.port, "/sign-in", {}),
        }
        result = run_attacks(server, make_page_attacks(server.port, number), clients, probes)
        return {"question_s": summarize(seconds), **result}


def measure_label_page(number: int, clients: int, folder: Path) -> dict[str, Any]:
    """Attack `finesight label`, with hostile images among those to label."""
    password_file, images = folder / "password.txt", folder / "images"
    password_file.write_text(PASSWORD)
    images.mkdir()
    for index, data in enumerate([*make_images().values(), make_photo(0)]):
        (images / f"{index}.png").write_bytes(data)
    options = [str(images), "--no-suggestions", "--prompt", "What?", "--out", str(folder / "out")]
    options += ["--password-file", str(password_file)]
    with start_server_process(folder, "label", options) as server:
        owner = PageClient(server.port)
        probes = {
            "owner's page": partial(get_status, server.port, "/", {"Cookie": owner.cookie}),
            "sign-in page": partial(get_status, server.port, "/sign-in", {}),
        }
        return run_attacks(server, make_label_attacks(server.port, number), clients, probes)


def main() -> None:
    """Attack the servers and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--servers", default="serve,web,label", help="comma-separated")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {
        "command": " ".join(["python benchmarks/hostile_load.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{
                name: metadata.version(name) for name in ("pillow", "uvicorn", "starlette", "torch")
            },
        },
    }
    measures = {
        "serve": measure_api_server,
        "web": measure_chat_page,
        "label": measure_label_page,
    }
    for name in options.servers.split(","):
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measures[name](options.requests, options.clients, Path(folder))
        print(json.dumps({name: results[name]}, indent=1), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
