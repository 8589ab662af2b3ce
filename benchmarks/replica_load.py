"""Kill a replica of `finesight serve --data-parallel-size` under load, and check all answers.

    python benchmarks/replica_load.py MODEL [--seconds 60] [--clients 12] [--replicas 2]
        [--kills 1] [--device auto] [--seed 0] [--out FILE]

The requests are mixed: short and long conversations, new, repeated and uploaded images, with and
without streaming, 1 to 64 tokens, all greedy. A server with one process answers each of them first.
Then, clients send random ones to the server with replicas, and the script kills random replicas
with SIGKILL. Only requests that a killed replica was answering may fail, with status 503 and
`Retry-After`, or with an error event in a stream. The clients send these again. All other answers
must equal those of the first server. The script prints a summary as JSON, and exits with 1 if an
answer is lost or differs.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import platform
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from serve_load import make_image_url, read_server_metrics, run_server

NUM_CONVERSATIONS, NUM_TURNS, NUM_IMAGES = 8, 3, 24
RESTART_TIMEOUT_S = 300.0
UPLOADED = "uploaded"
"""Placeholder of the ID of the uploaded image, which differs between servers."""


def make_requests() -> list[dict[str, Any]]:
    """Make the bodies of all requests, without `stream`."""
    rng = random.Random(0)
    requests: list[list[dict[str, Any]]] = []
    for number in range(NUM_CONVERSATIONS):
        # Each turn extends the conversation, some by a long text.
        messages: list[dict[str, Any]] = []
        for turn in range(NUM_TURNS):
            words = " ".join(str(rng.randrange(1000)) for _ in range(rng.choice((2, 150))))
            content = [{"type": "text", "text": f"Turn {turn} of {number}: {words}"}]
            if turn == 0 and number % 2:
                content.insert(0, make_image_part(make_image_url(number)))
            messages = [*messages, {"role": "user", "content": content}]
            requests.append(messages)
            messages = [*messages, {"role": "assistant", "content": f"Answer {turn}."}]
    for number in range(NUM_IMAGES):
        # Half of the images occur several times.
        url = make_image_url(100 + number % (NUM_IMAGES // 2) if number % 2 else 200 + number)
        text = {"type": "text", "text": f"What is in the image? Question {number}."}
        requests.append([{"role": "user", "content": [make_image_part(url), text]}])
    requests.append([{"role": "user", "content": "Hello"}])
    part = {"type": "file", "file": {"file_id": UPLOADED}}
    requests.append([{"role": "user", "content": [part, {"type": "text", "text": "And here?"}]}])
    return [{"messages": one, "max_tokens": rng.randint(1, 64)} for one in requests]


def make_image_part(url: str) -> dict[str, Any]:
    """Make the part of a message with an image."""
    return {"type": "image_url", "image_url": {"url": url}}


@dataclass
class Client:
    """Client of a server at a port of this machine."""

    port: int
    model: str
    file_id: str = ""

    def upload(self) -> None:
        """Upload the image to which a request refers."""
        image = base64.b64decode(make_image_url(1).partition(",")[2])
        head = '--x\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n'
        start = head.format("purpose", "") + "vision\r\n"
        start += head.format("file", '; filename="a.jpg"')
        content = start.encode() + image + b"\r\n--x--\r\n"
        status, _, answer = self.send("/v1/files", content, "multipart/form-data; boundary=x")
        assert status == 200, f"status {status} of the upload: {answer!r}"
        self.file_id = json.loads(answer)["id"]

    def send(
        self, path: str, content: bytes, content_type: str = "application/json"
    ) -> tuple[int, dict[str, str], bytes]:
        """Send a POST request, and return status, headers and body of the response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        with contextlib.closing(connection):
            connection.request("POST", path, content, {"Content-Type": content_type})
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return response.status, headers, response.read()

    def ask(self, request: dict[str, Any], *, stream: bool) -> str | float:
        """Return the answer as text, or the seconds until it may be sent again.

        Raises ValueError for other errors and for incomplete responses.
        """
        text = json.dumps({**request, "model": self.model, "stream": stream})
        content = text.replace(UPLOADED, self.file_id).encode()
        status, headers, body = self.send("/v1/chat/completions", content)
        if status == 503 and "retry-after" in headers:
            return float(headers["retry-after"])
        if status != 200:
            raise ValueError(f"status {status}: {body[:200]!r}")
        if not stream:
            choice = json.loads(body)["choices"][0]
            message = choice["message"]
            return json.dumps([message["content"], message["raw_text"], choice["finish_reason"]])
        *events, end, rest = body.decode().split("\n\n")
        if (end, rest) != ("data: [DONE]", ""):
            raise ValueError(f"a stream that ends with {end!r:.100}{rest!r:.100}")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        if error := chunks[-1].get("error"):
            if error["code"] != "replica_ended":
                raise ValueError(f"error event {error}")
            return 1.0
        choices = [chunk["choices"][0] for chunk in chunks]
        content_text = "".join(one["delta"].get("content", "") for one in choices)
        last = choices[-1]
        return json.dumps([content_text, last["delta"]["raw_text"], last["finish_reason"]])


@dataclass
class ReplicaLoad:
    """Clients that send random requests until `close`, and compare the answers."""

    client: Client
    requests: Sequence[dict[str, Any]]
    expected: Sequence[str]
    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[float, float]] = field(default_factory=list)
    """Start and end of each request with a retryable error."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, number: int) -> None:
        """Run one client."""
        rng = random.Random(1000 * self.seed + number)
        while not self._stop.is_set():
            index, stream = rng.randrange(len(self.requests)), rng.random() < 0.5
            try:
                outcome = self._ask(index, stream=stream)
            except Exception as error:
                outcome = f"lost: {type(error).__name__}: {error}"[:200]
            with self._lock:
                self.outcomes[outcome] += 1

    def _ask(self, index: int, *, stream: bool) -> str:
        is_repeated = False
        while True:
            start = time.monotonic()
            answer = self.client.ask(self.requests[index], stream=stream)
            if isinstance(answer, str):
                break
            with self._lock:
                self.failures.append((start, time.monotonic()))
            is_repeated = True
            time.sleep(answer)
        if answer != self.expected[index]:
            return f"different: {answer[:80]} instead of {self.expected[index][:80]}"
        return "repeated" if is_repeated else "done"

    def close(self) -> None:
        """Let all clients finish their current request."""
        self._stop.set()


def list_children(pid: int) -> list[int]:
    """Return the process IDs of the children of a process."""
    return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def sum_metric(port: int, metric: str) -> int:
    """Return the sum of a metric over the replicas."""
    return int(sum(n for name, n in read_server_metrics(port).items() if name.startswith(metric)))


def measure_cache(port: int) -> float:
    """Return the fraction of prompt tokens from the prefix caches."""
    counts = dict.fromkeys(("prompt", "cached"), 0.0)
    for name, value in read_server_metrics(port).items():
        for kind in counts:
            if name.startswith("finesight_tokens_total") and f'kind="{kind}"' in name:
                counts[kind] += value
    return round(counts["cached"] / max(1.0, counts["prompt"]), 3)


def run_load(options: argparse.Namespace) -> dict[str, Any]:
    """Return the summary of the answers of both servers."""
    requests = make_requests()
    with run_server(options.model, options.device) as (_, port, name):
        client = Client(port, name)
        client.upload()
        with ThreadPoolExecutor(options.clients) as pool:
            expected = [*pool.map(lambda one: client.ask(one, stream=False), requests)]
    rng, kills = random.Random(options.seed), list[tuple[float, float, float]]()
    extra = ("--data-parallel-size", str(options.replicas))
    with run_server(options.model, options.device, *extra) as (process, port, name):
        client = Client(port, name)
        client.upload()
        load = ReplicaLoad(client, requests, [*map(str, expected)], options.seed)
        # After an error, the clients end before the pool waits for them.
        with ThreadPoolExecutor(options.clients) as pool, contextlib.closing(load):
            jobs = [pool.submit(load.run, number) for number in range(options.clients)]
            start = time.monotonic()
            for number in range(options.kills):
                # The last replica can restart before the end.
                share = (number + rng.uniform(0.2, 0.5)) / options.kills
                time.sleep(max(0.0, start + share * options.seconds - time.monotonic()))
                killed, before = rng.choice(list_children(process.pid)), time.monotonic()
                os.kill(killed, signal.SIGKILL)
                # Until the process has ended, its socket accepts connections.
                while killed in list_children(process.pid):
                    time.sleep(0.001)
                after = time.monotonic()
                while sum_metric(port, "finesight_replica_restarts") <= number or (
                    sum_metric(port, "finesight_replica_ready") < options.replicas
                ):
                    seconds = time.monotonic() - after
                    assert seconds < RESTART_TIMEOUT_S, f"no restart within {seconds:.0f} s"
                    time.sleep(0.2)
                kills.append((before, after, time.monotonic()))
            time.sleep(max(0.0, start + options.seconds - time.monotonic()))
            load.close()
            for job in jobs:
                job.result()
        cached = measure_cache(port)
    late = [
        (start, end)
        for start, end in load.failures
        if not any(start <= after and before <= end for before, after, _ in kills)
    ]
    done = load.outcomes["done"] + load.outcomes["repeated"]
    return {
        "requests": sum(load.outcomes.values()),
        "equal_answers": done,
        "retryable_errors": len(load.failures),
        "retryable_errors_of_requests_not_in_flight_at_a_kill": len(late),
        "lost_or_different": {k: n for k, n in load.outcomes.items() if n and ":" in k},
        "kills": len(kills),
        "seconds_until_restarted": [round(ready - before, 1) for before, _, ready in kills],
        "cached_fraction_of_prompt_tokens": cached,
        "exit_code": process.returncode,
    }


def main() -> int:
    """Run the load and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    words = ("seconds", "clients", "replicas", "kills", "seed")
    flags = " ".join(f"--{name} {vars(options)[name]:g}" for name in words)
    summary = {
        "command": f"python benchmarks/replica_load.py {options.model} {flags}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        + platform.python_version(),
        "versions": {n: metadata.version(n) for n in ("torch", "starlette", "uvicorn", "httpx2")},
        **run_load(options),
    }
    print(json.dumps(summary))
    if options.out is not None:
        options.out.write_text(json.dumps(summary, indent=1) + "\n")
    late = "retryable_errors_of_requests_not_in_flight_at_a_kill"
    return 1 if summary["lost_or_different"] or summary[late] or summary["exit_code"] else 0


if __name__ == "__main__":
    sys.exit(main())
