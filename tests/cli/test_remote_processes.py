"""Tests of hub access in subprocesses: endpoint variables and kills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub_servers import FakeHubServer, HuggingFaceHandler, ModelScopeHandler, run_hub_server
from hub_fixtures import make_image_cell, make_parquet

ROWS = make_parquet([{"image": make_image_cell(n), "text": f"number {n}"} for n in range(200)])
COLUMNS = ("--map", "image=image", "--map", "answer=text", "--prompt", "Which?")
BLOCKED = """
import socket, sys
def refuse(*arguments, **more):
    raise SystemExit(f"the network was touched: {arguments[1:]}")
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.create_connection = refuse
from finesight.cli.app import run_command
sys.exit(run_command(sys.argv[1:]))
"""


@pytest.fixture(params=["hf", "modelscope"])
def hub(request: pytest.FixtureRequest) -> Iterator[tuple[str, FakeHubServer]]:
    with run_hub_server(
        {"hf": HuggingFaceHandler, "modelscope": ModelScopeHandler}[request.param]
    ) as server:
        server.repositories["datasets/Some/set"] = {"data/train-0.parquet": ROWS}
        yield request.param, server
        server.faults.resume_event.set()


def make_environment(server: FakeHubServer, folder: Path, **more: str) -> dict[str, str]:
    retained = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    addresses = {"HF_ENDPOINT": server.url, "MODELSCOPE_ENDPOINT": server.url}
    return {**retained, **addresses, "HF_HOME": str(folder / "home"), **more}


def start(server: FakeHubServer, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "finesight", "import", *arguments],
        env=make_environment(server, folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def samples(out: Path) -> list[str]:
    lines = (out / "data.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"][1]["content"][0]["text"] for line in lines]


def test_killed_import_resumes(hub: tuple[str, FakeHubServer], tmp_path: Path) -> None:
    name, server = hub
    arguments = (f"{name}:Some/set", str(tmp_path / "out"), *COLUMNS)
    server.faults.stalls["data/train-0.parquet"] = 5_000
    process = start(server, tmp_path, *arguments)
    assert server.faults.stalled_event.wait(60), "the import did not ask for the file"
    (partial,) = wait_for_partial_file(tmp_path / "home", 5_000)
    process.kill()
    process.communicate()
    assert not (tmp_path / "out").exists()
    assert partial.stat().st_size == 5_000
    process = start(server, tmp_path, *arguments)
    output = "".join(process.communicate(timeout=120))
    assert process.returncode == 0, output
    assert samples(tmp_path / "out") == [f"number {n}" for n in range(200)]
    assert [asked.range for asked in server.lfs_requests] == [None, "bytes=5000-"]
    assert not partial.exists()


def wait_for_partial_file(folder: Path, size: int) -> list[Path]:
    """Wait until a partial file has this size."""
    for _ in range(600):
        found = [path for path in folder.rglob(".*.partial") if path.stat().st_size >= size]
        if found:
            return found
        time.sleep(0.1)
    return []


def test_offline_import_with_blocked_sockets(
    hub: tuple[str, FakeHubServer], tmp_path: Path
) -> None:
    name, server = hub
    process = start(server, tmp_path, f"{name}:Some/set", str(tmp_path / "one"), *COLUMNS)
    output = "".join(process.communicate(timeout=120))
    assert process.returncode == 0, output
    requested = len(server.requests)

    def offline(source: str, out: str) -> subprocess.CompletedProcess[str]:
        arguments = ["import", source, str(tmp_path / out), *COLUMNS]
        return subprocess.run(
            [sys.executable, "-c", BLOCKED, *arguments],
            env=make_environment(server, tmp_path, HF_HUB_OFFLINE="1"),
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    done = offline(f"{name}:Some/set", "two")
    assert done.returncode == 0, done.stderr
    assert samples(tmp_path / "two") == samples(tmp_path / "one")
    done = offline(f"{name}:Some/other", "three")
    assert done.returncode == 2, done.stderr
    assert "is not downloaded, and HF_HUB_OFFLINE is set" in done.stderr
    assert len(server.requests) == requested
