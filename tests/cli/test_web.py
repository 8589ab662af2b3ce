from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finesight.cli.app import app
from finesight.cli.servers import resolve_password
from finesight.errors import UserError


def run_rejected(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["web", "finesight-tiny", *map(str, arguments)])
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_invalid_passwords_are_rejected(tmp_path):
    (tmp_path / "short").write_text("123456789012345\n")
    for options in ((), ("--host", "0.0.0.0"), ("--trusted-proxy", "127.0.0.1")):
        text = run_rejected(*options, "--password-file", tmp_path / "short")
        assert "the password has 15 characters" in text
        assert "expected: at least 16" in text
    assert "10.0.0.300" in run_rejected("--trusted-proxy", "10.0.0.300")
    assert "*" in run_rejected("--trusted-proxy", "*")
    assert "cannot be read" in run_rejected("--password-file", tmp_path / "gone")
    assert "--no-auth is given with" in run_rejected(
        "--password-file", tmp_path / "short", "--no-auth"
    )


@pytest.mark.parametrize(
    ("host", "no_auth", "proxies", "is_open"),
    [
        ("127.0.0.1", False, (), True),
        ("127.0.0.1", False, ("127.0.0.1",), False),
        ("localhost", False, ("10.0.0.0/24",), False),
        ("0.0.0.0", False, (), False),
        ("127.0.0.1", True, ("127.0.0.1",), True),
    ],
)
def test_pages_behind_a_proxy_have_a_password(host, no_auth, proxies, is_open):
    password, is_generated = resolve_password(host, None, no_auth, proxies)
    assert ((password is None), is_generated) == (is_open, not is_open)


def test_unsupported_thinking_mode_is_rejected():
    for options in (["--thinking"], ["--reasoning-effort", "low"]):
        assert "expected: no" in run_rejected("--port", 0, "--device", "cpu", *options)


def test_occupied_port_is_rejected_before_model_load():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot listen on 127.0.0.1" in run_rejected("--port", taken.getsockname()[1])
    assert "cannot listen on 192.0.2.1" in run_rejected("--host", "192.0.2.1")


@pytest.mark.parametrize("options", [[], ["--no-auth"]])
def test_public_host_requires_a_password_unless_open(options: list[str], tmp_path: Path):
    command = [sys.executable, "-m", "finesight", "web", "finesight-tiny", "--device", "cpu"]
    browser = tmp_path / "browser.sh"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    environment["BROWSER"] = f"{browser} %s"
    with (
        subprocess.Popen(
            [*command, "--host", "0.0.0.0", "--port", "0", "--open", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            text=True,
        ) as page,
        ExitStack() as stack,
    ):
        # Otherwise, a failed assertion would wait for the server.
        stack.callback(page.kill)
        address = page.stdout.readline()
        port = int(address.rsplit(":", 1)[1])
        if not options:
            assert len(page.stdout.readline().removeprefix("password: ").strip()) >= 16
        # The socket is bound; requests wait until the page is ready.
        status = _status(f"http://127.0.0.1:{port}/config")
        assert status == (200 if options else 401)
        assert [*tmp_path.glob("finesight-web-*")] != []
        # The browser is started beside the first requests.
        while not (opened := tmp_path / "opened").exists() or not opened.read_text():
            time.sleep(0.02)
        assert opened.read_text() == address
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
            time.sleep(0.05)
