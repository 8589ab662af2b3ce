"""Load on `finesight serve`, held for minutes: is anything lost, and does its memory grow?

    python benchmarks/serve_load.py MODEL [--minutes 10] [--clients 32] [--device auto] [--out FILE]

A server of its own, and clients that ask without a pause: half of them about pictures never seen
before, half about one of a few; a third reads a stream, and one question in ten is let go while its
answer grows. Prints a line of JSON every ten seconds: memory of the server in MB (with that of the
card, where nvidia-smi says it), its threads and open files, free pages of its cache, questions and
tokens so far. The last line compares the memory of the last third with that of the second, gives
what was lost, and the pages that are free when all is quiet again. Features of pictures are kept
for when they come again, on the device, up to a bound (64 MiB on a CPU, `infer.rows`): until then
memory grows by them, with finesight-tiny by 31 KB for each new picture.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import itertools
import json
import os
import platform
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from PIL import Image

EVERY = 10.0
"""Seconds between two lines."""

KNOWN = 8
"""Pictures that are asked about again and again."""

LONGEST = 64


def picture(seed: int) -> str:
    """A picture of noise as a data URL."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (112, 168, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


class Load:
    """Clients of one server, until they are told to stop; `ends` counts how questions ended."""

    def __init__(self, port: int, model: str, clients: int) -> None:
        self._port, self._model = port, model
        self._numbers = itertools.count(1)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._known = [picture(seed) for seed in range(KNOWN)]
        self.ends: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._ask_on) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let all clients finish what they have asked."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask_on(self) -> None:
        while not self._stop.is_set():
            number = next(self._numbers)
            try:
                end = self._ask(number)
            except Exception as error:
                end = f"lost: {type(error).__name__}: {error}"[:100]
            with self._lock:
                self.ends[end] += 1

    def _ask(self, number: int) -> str:
        rng = random.Random(number)
        url = rng.choice(self._known) if rng.random() < 0.5 else picture(1000 + number)
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}}]
        parts += [{"type": "text", "text": f"What is in picture {number}? Tell me more."}]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": rng.randint(1, LONGEST),
            "temperature": 1.0,
            "stream": number % 3 == 0,
        }
        there = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        with contextlib.closing(there):
            kind = {"Content-Type": "application/json"}
            there.request("POST", "/v1/chat/completions", json.dumps(body), kind)
            if number % 10 == 1:
                time.sleep(rng.random() / 10)
                return "let go"
            answer = there.getresponse()
            content = answer.read()
        if answer.status != 200:
            return f"status {answer.status}"
        if body["stream"]:
            return "done" if content.endswith(b"[DONE]\n\n") else "lost: a stream without its end"
        return "done" if json.loads(content)["choices"] else "lost: no choice"


def metrics(port: int) -> dict[str, float]:
    """The server's own figures, by name with labels."""
    there = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(there):
        there.request("GET", "/metrics")
        text = there.getresponse().read().decode()
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in rows}


def memory(process: int) -> dict[str, float]:
    """What a process holds now: MB in memory and on the card, threads and open files."""
    status = Path(f"/proc/{process}/status").read_text()
    resident = int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])
    found: dict[str, float] = {
        "memory_mb": round(resident / 1000, 1),
        "threads": int(re.findall(r"Threads:\s+(\d+)", status)[0]),
        "open_files": len(os.listdir(f"/proc/{process}/fd")),
    }
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        card = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
        found["card_mb"] = sum(map(float, card.stdout.split()))
    return found


@contextlib.contextmanager
def served(model: str, device: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """The server as a program, its port, and the name that its model has."""
    command = [sys.executable, "-m", "finesight", "serve", model, "--port", "0", "--device", device]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "FINESIGHT_KEY": ""}
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert program.stdout is not None
        line = program.stdout.readline()
        found = re.search(r"serving ([^, ]+).* at http://127.0.0.1:(\d+)/v1", line)
        assert found is not None, f"the server says {line!r}"
        yield program, int(found[2]), found[1]
    finally:
        program.terminate()
        program.wait(120)


def observed(
    program: subprocess.Popen[str], port: int, load: Load, seconds: float
) -> list[dict[str, Any]]:
    """A row every ten seconds while the load lasts, printed as it comes."""
    start = time.monotonic()
    rows = []
    while time.monotonic() - start < seconds:
        time.sleep(EVERY)
        figures = metrics(port)
        rows.append(
            {
                "seconds": round(time.monotonic() - start),
                **memory(program.pid),
                "pages_free": int(figures["finesight_cache_pages_free"]),
                "questions": sum(load.ends.values()),
                "answer_tokens": int(figures.get('finesight_tokens_total{kind="answer"}', 0)),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Hold the load, and say what became of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with served(options.model, options.device) as (program, port, name):
        before = metrics(port)
        load = Load(port, name, options.clients)
        rows = observed(program, port, load, 60 * options.minutes)
        load.stop()
        time.sleep(2)
        after = metrics(port)
    third = max(1, len(rows) // 3)
    second, last = rows[third : 2 * third] or rows[:third], rows[-third:]
    summary: dict[str, Any] = {
        "command": f"serve_load.py {options.model} --minutes {options.minutes:g}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        + platform.python_version(),
        "versions": {n: metadata.version(n) for n in ("torch", "fastapi", "uvicorn", "llguidance")},
        "ends": dict(load.ends),
        "lost": sum(count for end, count in load.ends.items() if end not in ("done", "let go")),
        "pages": [int(f["finesight_cache_pages_free"]) for f in (before, after)],
        "running": int(after["finesight_running"]),
        "exit_code": program.returncode,
    }
    for key in ("memory_mb", "card_mb"):
        if key in rows[0]:
            means = [mean(row[key] for row in part) for part in (second, last)]
            summary[f"{key}_second_and_last_third"] = [round(value, 1) for value in means]
    print(json.dumps(summary))
    if options.out is not None:
        options.out.write_text(json.dumps({**summary, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
