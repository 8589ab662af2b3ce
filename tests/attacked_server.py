"""A server in a process of its own, what it takes while it is attacked, and who attacks it."""

from __future__ import annotations

import contextlib
import http.client
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

from hostile_requests import CHAT, Hostile, chat, image_part, small_image

MODEL = "finesight-tiny"
MIB = 1 << 20


@dataclass
class Figures:
    """What was measured during an attack: seconds of requests, statuses, and bytes of memory."""

    health: list[float] = field(default_factory=list)
    ordinary: list[tuple[float, int]] = field(default_factory=list)
    hostile: Counter[tuple[str, int]] = field(default_factory=Counter)
    slowest: float = 0.0
    largest_process: int = 0

    def __str__(self) -> str:
        health, ordinary = sorted(self.health), sorted(seconds for seconds, _ in self.ordinary)
        lines = [f"  {name}: {status} x {n}" for (name, status), n in sorted(self.hostile.items())]
        return "\n".join(
            [
                f"hostile requests: {sum(self.hostile.values())}, slowest {self.slowest:.1f} s",
                *lines,
                f"health: {len(health)} requests, median {health[len(health) // 2]:.3f} s,"
                f" slowest {health[-1]:.3f} s",
                f"ordinary: {len(ordinary)} requests, median {ordinary[len(ordinary) // 2]:.2f} s,"
                f" slowest {ordinary[-1]:.2f} s",
                f"largest process: {self.largest_process >> 20} MiB",
            ]
        )


@dataclass
class AttackedServer:
    """`finesight serve` of the package's own model, with its workers."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    def memory(self) -> dict[int, int]:
        """Resident bytes of the server and of all processes below it, by process."""
        found = {}
        for pid in _below(self.process.pid):
            with contextlib.suppress(OSError):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                found[pid] = pages * os.sysconf("SC_PAGE_SIZE")
        return found

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[float, int]:
        """Seconds and status of a request."""
        began = time.monotonic()
        there = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        with contextlib.closing(there):
            there.request(method, path, body, {"Content-Type": "application/json"})
            answer = there.getresponse()
            answer.read()
        return time.monotonic() - began, answer.status

    def ordinary(self, number: int) -> bytes:
        """An ordinary question: every second one shows an image."""
        text = {"type": "text", "text": f"What is number {number}?"}
        return chat(MODEL, [image_part(small_image("PNG")), text] if number % 2 else [text])


@contextlib.contextmanager
def attacked_server(folder: Path) -> Iterator[AttackedServer]:
    """Start the server, and end it in the end."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "finesight", "serve", MODEL, "--port", "0", "--device", "cpu"]
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


def attack(server: AttackedServer, requests: Iterable[Hostile], clients: int) -> Figures:
    """Send the requests from so many clients at once, with ordinary ones beside them."""
    figures, waiting, lock = Figures(), iter(requests), threading.Lock()
    over = threading.Event()

    def send() -> None:
        while True:
            with lock:
                request = next(waiting, None)
            if request is None:
                return
            began = time.monotonic()
            status = request.send(server.port, 300)
            with lock:
                figures.hostile[request.name, status] += 1
                figures.slowest = max(figures.slowest, time.monotonic() - began)

    def check_health() -> None:
        figures.health.append(server.ask("GET", "/health")[0])

    def ask() -> None:
        number = len(figures.ordinary)
        figures.ordinary.append(server.ask("POST", CHAT, server.ordinary(number)))

    def weigh() -> None:
        figures.largest_process = max(figures.largest_process, *server.memory().values())

    def often(work: Callable[[], None], seconds: float) -> None:
        while not over.is_set():
            work()
            over.wait(seconds)

    beside = [
        threading.Thread(target=often, args=args)
        for args in ((check_health, 0.05), (ask, 0.1), (weigh, 0.3))
    ]
    attackers = [threading.Thread(target=send) for _ in range(clients)]
    for thread in (*beside, *attackers):
        thread.start()
    for thread in attackers:
        thread.join()
    over.set()
    for thread in beside:
        thread.join()
    return figures


def _below(pid: int) -> set[int]:
    """A process and all below it."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
                parents[int(entry)] = int(stat[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found
