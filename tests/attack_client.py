"""Server process for load tests, with memory measurement and concurrent attackers."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from hostile_requests import (
    CHAT,
    HostileRequest,
    make_chat_body,
    make_image_content,
    make_small_image,
)

MODEL = "finesight-tiny"
MIB = 1 << 20


@dataclass
class AttackStats:
    """Statistics of an attack: durations, statuses, and memory in bytes."""

    health: list[float] = field(default_factory=list)
    ordinary: list[tuple[float, int]] = field(default_factory=list)
    hostile: Counter[tuple[str, int]] = field(default_factory=Counter)
    largest_process: int = 0


@dataclass
class AttackedServer:
    """Process of `finesight serve` with the bundled model and its workers."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    def read_memory(self) -> dict[int, int]:
        """Return the resident bytes of the server and its descendants by process."""
        found = {}
        for process in list_process_tree(self.process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                found[process.pid] = process.memory_info().rss
        return found

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[float, int]:
        """Send a request and return its duration and status."""
        url, headers = f"http://127.0.0.1:{self.port}{path}", {"Content-Type": "application/json"}
        began = time.monotonic()
        answer = httpx.request(method, url, content=body, headers=headers, timeout=300)
        return time.monotonic() - began, answer.status_code

    def make_ordinary_body(self, number: int) -> bytes:
        """Make an ordinary request. Every second one contains an image."""
        text = {"type": "text", "text": f"What is number {number}?"}
        return make_chat_body(
            MODEL, [make_image_content(make_small_image("PNG")), text] if number % 2 else [text]
        )


@contextlib.contextmanager
def start_server_process(
    folder: Path, name: str = "serve", options: Iterable[str] = ()
) -> Iterator[AttackedServer]:
    """Start the server or the chat page, and stop it at the end of the block."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "finesight", name, MODEL, "--port", "0", "--device", "cpu"]
    command += options
    with open(log, "w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://" in line, f"the server has not started: {log.read_text()}"
        yield AttackedServer(process, int(line.rsplit(":", 1)[1].split("/")[0]), log)
    finally:
        process.terminate()
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_attack(
    server: AttackedServer, requests: Iterable[HostileRequest], clients: int
) -> AttackStats:
    """Send requests from concurrent clients, in parallel to ordinary requests."""
    stats, waiting, lock = AttackStats(), iter(requests), threading.Lock()
    over = threading.Event()

    def send() -> None:
        while True:
            with lock:
                request = next(waiting, None)
            if request is None:
                return
            status = request.send(server.port, 300)
            with lock:
                stats.hostile[request.name, status] += 1

    def check_health() -> None:
        stats.health.append(server.request("GET", "/health")[0])

    def ask() -> None:
        number = len(stats.ordinary)
        stats.ordinary.append(server.request("POST", CHAT, server.make_ordinary_body(number)))

    def measure_memory() -> None:
        stats.largest_process = max(stats.largest_process, *server.read_memory().values())

    def repeat(work: Callable[[], None], seconds: float) -> None:
        while not over.is_set():
            work()
            over.wait(seconds)

    ordinary_requests = [
        threading.Thread(target=repeat, args=args)
        for args in ((check_health, 0.05), (ask, 0.1), (measure_memory, 0.3))
    ]
    attackers = [threading.Thread(target=send) for _ in range(clients)]
    for thread in (*ordinary_requests, *attackers):
        thread.start()
    for thread in attackers:
        thread.join()
    over.set()
    for thread in ordinary_requests:
        thread.join()
    return stats


def list_process_tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def list_running(pids: Iterable[int], timeout_s: float = 60.0) -> list[int]:
    """Wait for the end of processes, and return those that still run after the timeout."""
    end = time.monotonic() + timeout_s
    while (running := [*filter(is_running, pids)]) and time.monotonic() < end:
        time.sleep(0.02)
    return running


def is_running(pid: int) -> bool:
    """Check if a process exists and is no zombie; it may end at any time."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
