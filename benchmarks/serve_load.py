"""Check `finesight serve` for lost requests and memory growth under continuous load.

    python benchmarks/serve_load.py MODEL [--minutes 10] [--clients 32] [--device auto] [--out FILE]

The script starts a server and clients that send requests without pause. Half of the requests use
new images, half one of a few repeated images. A third of the requests stream, and one in ten is
cancelled during generation. Every ten seconds, the script prints a line of JSON: memory of the
server in MB (with GPU memory if nvidia-smi reports it), threads, open files, free KV-cache blocks,
requests and tokens so far. The last line compares memory in the second and last third, and contains
the lost requests and the free blocks at idle. The server caches image features on the device up to
a limit (64 MiB on a CPU, `infer/model_runner.py`). Memory grows until then, by 31 KB per new image
with finesight-tiny.
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

SAMPLE_INTERVAL_S = 10.0
"""Seconds between two lines."""

NUM_REPEATED_IMAGES = 8
"""Number of repeated images."""

MAX_NEW_TOKENS = 64


def make_image_url(seed: int) -> str:
    """Return an image of noise as a data URL."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (112, 168, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


class LoadGenerator:
    """Clients of one server that run until `stop`; `outcomes` counts the results of requests."""

    def __init__(self, port: int, model: str, clients: int) -> None:
        self._port, self._model = port, model
        self._request_ids = itertools.count(1)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._repeated_images = [make_image_url(seed) for seed in range(NUM_REPEATED_IMAGES)]
        self.outcomes: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._run_client) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let all clients finish their current request."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run_client(self) -> None:
        while not self._stop.is_set():
            number = next(self._request_ids)
            try:
                outcome = self._send_request(number)
            except Exception as error:
                outcome = f"lost: {type(error).__name__}: {error}"[:100]
            with self._lock:
                self.outcomes[outcome] += 1

    def _send_request(self, number: int) -> str:
        rng = random.Random(number)
        url = (
            rng.choice(self._repeated_images)
            if rng.random() < 0.5
            else make_image_url(1000 + number)
        )
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}}]
        parts += [{"type": "text", "text": f"What is in image {number}? Describe details."}]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": rng.randint(1, MAX_NEW_TOKENS),
            "temperature": 1.0,
            "stream": number % 3 == 0,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        with contextlib.closing(connection):
            kind = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), kind)
            if number % 10 == 1:
                time.sleep(rng.random() / 10)
                return "cancelled"
            answer = connection.getresponse()
            content = answer.read()
        if answer.status != 200:
            return f"status {answer.status}"
        if body["stream"]:
            return "done" if content.endswith(b"[DONE]\n\n") else "lost: incomplete stream"
        return "done" if json.loads(content)["choices"] else "lost: no choice"


def read_server_metrics(port: int) -> dict[str, float]:
    """Read the metrics of the server, by name with labels."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in rows}


def process_memory(pid: int) -> dict[str, float]:
    """Return the memory and GPU memory of a process in MB, its threads and open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])
    usage: dict[str, float] = {
        "memory_mb": round(resident / 1000, 1),
        "threads": int(re.findall(r"Threads:\s+(\d+)", status)[0]),
        "open_files": len(os.listdir(f"/proc/{pid}/fd")),
    }
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        card = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
        usage["card_mb"] = sum(map(float, card.stdout.split()))
    return usage


@contextlib.contextmanager
def run_server(model: str, device: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """Run the server as a subprocess. Yields its process, port and model name."""
    command = [sys.executable, "-m", "finesight", "serve", model, "--port", "0", "--device", device]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "FINESIGHT_KEY": ""}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"serving ([^, ]+).* at http://127.0.0.1:(\d+)/v1", line)
        assert match is not None, f"the server printed {line!r}"
        yield process, int(match[2]), match[1]
    finally:
        process.terminate()
        process.wait(120)


def sample_memory(
    process: subprocess.Popen[str], port: int, load: LoadGenerator, seconds: float
) -> list[dict[str, Any]]:
    """Print a row every ten seconds during the load, and return all rows."""
    start = time.monotonic()
    rows = []
    while time.monotonic() - start < seconds:
        time.sleep(SAMPLE_INTERVAL_S)
        server_metrics = read_server_metrics(port)
        rows.append(
            {
                "seconds": round(time.monotonic() - start),
                **process_memory(process.pid),
                "num_free_blocks": int(server_metrics["finesight_kv_cache_blocks_free"]),
                "requests": sum(load.outcomes.values()),
                "completion_tokens": int(
                    server_metrics.get('finesight_tokens_total{kind="completion"}', 0)
                ),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Run the load and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with run_server(options.model, options.device) as (program, port, name):
        before = read_server_metrics(port)
        load = LoadGenerator(port, name, options.clients)
        rows = sample_memory(program, port, load, 60 * options.minutes)
        load.stop()
        time.sleep(2)
        after = read_server_metrics(port)
    third = max(1, len(rows) // 3)
    second, last = rows[third : 2 * third] or rows[:third], rows[-third:]
    summary: dict[str, Any] = {
        "command": f"serve_load.py {options.model} --minutes {options.minutes:g}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        + platform.python_version(),
        "versions": {
            n: metadata.version(n) for n in ("torch", "starlette", "uvicorn", "llguidance")
        },
        "outcomes": dict(load.outcomes),
        "lost": sum(
            count
            for outcome, count in load.outcomes.items()
            if outcome not in ("done", "cancelled")
        ),
        "num_free_blocks": [int(f["finesight_kv_cache_blocks_free"]) for f in (before, after)],
        "num_running": int(after["finesight_requests_running"]),
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
