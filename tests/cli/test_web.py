from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finesight.cli.app import app
from finesight.errors import UserError


def _refusal(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["web", "finesight-tiny", *map(str, arguments)])
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_passwords_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "short").write_text("1234567\n")
    assert "a password of 7 characters" in _refusal("--password-file", tmp_path / "short")
    assert "cannot be read" in _refusal("--password-file", tmp_path / "gone")
    assert "--open is given together" in _refusal("--password-file", tmp_path / "short", "--open")


def test_a_port_that_is_taken_is_refused_before_the_model_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot listen at 127.0.0.1" in _refusal("--port", taken.getsockname()[1])
    assert "cannot listen at 192.0.2.1" in _refusal("--host", "192.0.2.1")


@pytest.mark.parametrize("options", [[], ["--open"]])
def test_beyond_this_machine_there_is_a_password_unless_told(options: list[str], tmp_path: Path):
    command = [sys.executable, "-m", "finesight", "web", "finesight-tiny", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [*command, "--host", "0.0.0.0", "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment | {"PYTHONUNBUFFERED": "1"},
        text=True,
    ) as page:
        assert page.stdout is not None
        port = int(page.stdout.readline().rsplit(":", 1)[1])
        if not options:
            assert len(page.stdout.readline().removeprefix("password: ").strip()) >= 16
        # The socket is bound; the page behind it answers as soon as it is there.
        status = _status(f"http://127.0.0.1:{port}/config")
        assert status == (200 if options else 401)
        assert [*tmp_path.glob("finesight-web-*")] != []
        page.send_signal(signal.SIGTERM if options else signal.SIGINT)
        _, complaints = page.communicate(timeout=60)
    assert (page.returncode, complaints) == (0, "")
    assert [*tmp_path.glob("finesight-web-*")] == []


def _status(address: str) -> int:
    while True:
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as refusal:
            return refusal.code
        except urllib.error.URLError:
            continue
