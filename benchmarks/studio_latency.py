"""Measure the start of the studio, and its pages while a training runs beside it.

    python benchmarks/studio_latency.py [--samples 300] [--rounds 20] [--out FILE]

`first_page_s` is the time from the command to the first complete page of an empty folder, of
several starts. The second studio opens a folder with a data set, a check and a run that is still
training on all cores. Each round requests the page of each step once. Prints one JSON object with
the seconds of the pages: median and maximum.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import yaml

from finesight import api
from finesight.app.studio_view import STEPS

sys.path.insert(0, str(Path(__file__).parents[1] / "pretraining"))
from synthetic_tasks.dataset_writer import write_task
from synthetic_tasks.tasks import SyntheticTask

MAX_STARTUP_S = 60.0


def request_page(port: int, path: str, expected: str = "") -> float:
    """Request a page that contains a text, and return the seconds until its last byte."""
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        content = response.read()
        if (
            response.status != http.HTTPStatus.OK
            or b"</html>" not in content
            or expected.encode() not in content
        ):
            raise RuntimeError(f"{path} answered {response.status}: {content[:200]!r}")
    finally:
        connection.close()
    return time.perf_counter() - start


@contextmanager
def open_studio(folder: Path) -> Iterator[tuple[int, float]]:
    """Run a studio, and yield its port and the seconds until its first page."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = ("--no-auth", "--port", str(port), "--api-port", "0")
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "finesight", "studio", str(folder), *options],
        stdout=subprocess.DEVNULL,
    )
    try:
        while True:
            if process.poll() is not None or time.perf_counter() - start > MAX_STARTUP_S:
                raise RuntimeError("the studio did not start")
            with suppress(ConnectionError):
                request_page(port, "/")
                break
            time.sleep(0.01)
        yield port, time.perf_counter() - start
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def start_training(work: Path, num_samples: int) -> subprocess.Popen[bytes]:
    """Start a run of the folder, and return its process after the first steps."""
    data = write_task(work / "mine", SyntheticTask("formula", "unseen"), num_samples, 0, "formula")
    recipe = {
        "model": "finesight-tiny",
        "data": {"train": str(data), "eval": str(data)},
        "train": {"steps": 100_000, "batch_size": 16, "device": "cpu"},
        "eval": {"metric": "latex", "limit": 20},
        "output_dir": str(work / "runs/mine"),
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    api.check_data(data, html=work / "mine/check.html")
    process = subprocess.Popen(
        [sys.executable, "-m", "finesight", "train", str(work / "recipe.yaml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = work / "runs/mine/metrics.jsonl"
    while not metrics.exists() or b'"step_s"' not in metrics.read_bytes():
        if process.poll() is not None:
            raise RuntimeError(f"the training ended with exit code {process.returncode}")
        time.sleep(0.5)
    return process


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, starts = Path(folder), []
        for number in range(args.starts):
            (work / f"empty{number}").mkdir()
            with open_studio(work / f"empty{number}") as (_, seconds):
                starts.append(seconds)
        work = work / "work"
        work.mkdir()
        training = start_training(work, args.samples)
        paths = {step: f"/?step={step}&run=runs/mine&data=mine" for step in STEPS}
        durations: dict[str, list[float]] = {step: [] for step in STEPS}
        try:
            with open_studio(work) as (port, _):
                for _ in range(args.rounds):
                    for step, path in paths.items():
                        durations[step].append(request_page(port, path, "mine"))
                        # A user reads a page before the next one.
                        time.sleep(0.2)
        finally:
            training.send_signal(signal.SIGINT)
            training.wait(120)
    result = {
        "command": " ".join(["python benchmarks/studio_latency.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {name: metadata.version(name) for name in ("torch", "starlette", "finesight")},
        "first_page_s": [round(one, 2) for one in sorted(starts)],
        "beside_training_s": {
            step: {"median": round(statistics.median(all_s), 3), "max": round(max(all_s), 3)}
            for step, all_s in durations.items()
        },
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
