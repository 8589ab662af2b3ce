"""Tests of hub access in subprocesses: endpoint variables and kills."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from container_fixtures import make_parquet
from fake_hub_servers import FakeHubServer, HuggingFaceHandler, ModelScopeHandler, run_hub_server
from hub_fixtures import get_text, make_image_cell

from finesight.samples.sample import read_samples

ROWS = make_parquet([{"image": make_image_cell(n), "text": f"number {n}"} for n in range(200)])
COLUMNS = ("--map", "image=image", "--map", "answer=text", "--prompt", "Which?")
PROGRAM = (
    "import sys\nfrom finesight.cli.app import run_command\nsys.exit(run_command(sys.argv[1:]))"
)


@pytest.fixture(params=["hf", "modelscope"])
def hub(request: pytest.FixtureRequest) -> Iterator[tuple[str, FakeHubServer]]:
    handler = {"hf": HuggingFaceHandler, "modelscope": ModelScopeHandler}[request.param]
    with run_hub_server(handler) as server:
        server.repositories["datasets/Some/set"] = {"data/train-0.parquet": ROWS}
        yield request.param, server
        server.faults.resume_event.set()


def start_import(server: FakeHubServer, source: str, out: Path) -> subprocess.Popen[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables |= {"HF_ENDPOINT": server.url, "MODELSCOPE_ENDPOINT": server.url}
    variables |= {"HF_HOME": str(out.parent / "home")}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "import", source, str(out), *COLUMNS],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_partial_file(folder: Path, size: int) -> Path:
    """Wait until a partial file has this size."""
    for _ in range(600):
        for path in folder.rglob(".*.partial"):
            with suppress(FileNotFoundError):  # a complete file was renamed
                if path.stat().st_size >= size:
                    return path
        time.sleep(0.1)
    raise AssertionError("no partial file")


def test_killed_import_resumes(hub, tmp_path):
    name, server = hub
    source, out = f"{name}:Some/set", tmp_path / "out"
    server.faults.stalls["data/train-0.parquet"] = 5_000
    process = start_import(server, source, out)
    assert server.faults.stalled_event.wait(60), "the import did not ask for the file"
    partial = wait_for_partial_file(tmp_path / "home", 5_000)
    process.kill()
    process.communicate()
    assert not out.exists()
    assert partial.stat().st_size == 5_000
    process = start_import(server, source, out)
    output = process.communicate(timeout=120)
    assert process.returncode == 0, output
    answers = [get_text(sample, 1) for sample in read_samples(out / "data.jsonl")]
    assert answers == [f"number {n}" for n in range(200)]
    assert [asked.range for asked in server.lfs_requests] == [None, "bytes=5000-"]
    assert not partial.exists()
