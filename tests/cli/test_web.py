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
from unittest.mock import Mock

import pytest

from finesight.app.page_access import resolve_password
from finesight.errors import UserError
from finesight.serve import http_protocol


def test_invalid_options_are_rejected(tmp_path, cli):
    def reject(*options: object) -> str:
        return str(cli("web", "finesight-tiny", *options, code=2).err)

    short = ("--password-file", tmp_path / "short")
    short[1].write_text("123456789012345\n")
    for options in ((), ("--host", "0.0.0.0"), ("--trusted-proxy", "127.0.0.1")):
        error = reject(*options, *short)
        assert "the password has 15 characters" in error
        assert "expected: at least 16" in error
    assert "--no-auth is given with" in reject(*short, "--no-auth")
    assert "gone: no such file" in reject("--password-file", tmp_path / "gone")
    assert "10.0.0.300" in reject("--trusted-proxy", "10.0.0.300")
    assert "*" in reject("--trusted-proxy", "*")
    for options in (["--thinking"], ["--reasoning-effort", "low"]):
        assert "expected: no" in reject("--port", 0, "--device", "cpu", *options)
    assert "cannot listen on 192.0.2.1" in reject("--host", "192.0.2.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen on 127.0.0.1" in reject("--port", taken.getsockname()[1])


@pytest.mark.parametrize("command", ["serve", "web"])
def test_secret_that_others_can_read_is_reported(tmp_path, monkeypatch, cli, command):
    monkeypatch.setattr(http_protocol, "bind_socket", Mock(side_effect=UserError("no server")))
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef\n")
    option = "--key-file" if command == "serve" else "--password-file"
    for mode, is_warned in ((0o644, True), (0o604, True), (0o600, False)):
        file.chmod(mode)
        error = cli(command, "finesight-tiny", option, file, code=2).err
        assert (f"chmod 600 {file}" in error) == is_warned, error


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


def test_public_host_requires_a_password(tmp_path: Path):
    command = [sys.executable, "-m", "finesight", "web", "finesight-tiny", "--device", "cpu"]
    browser, opened = tmp_path / "browser.sh", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    variables = {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with (
        subprocess.Popen(
            [*command, "--host", "0.0.0.0", "--port", "0", "--open"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | variables | {"BROWSER": f"{browser} %s"},
            text=True,
        ) as page,
        ExitStack() as stack,
    ):
        # Otherwise, a failed assertion would wait for the server.
        stack.callback(page.kill)
        address = page.stdout.readline()
        assert len(page.stdout.readline().removeprefix("password: ").strip()) >= 16
        # The socket is bound; requests wait until the page is ready.
        local = f"http://127.0.0.1:{address.strip().rsplit(':', 1)[1]}"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{local}/chats", timeout=60)
        assert [*tmp_path.glob("finesight-web-*")] != []
        # The browser is started beside the first requests.
        while not opened.exists() or not opened.read_text():
            time.sleep(0.02)
        assert opened.read_text() == address
        page.send_signal(signal.SIGTERM)
        _, complaints = page.communicate(timeout=60)
    assert (page.returncode, complaints) == (0, "")
    assert [*tmp_path.glob("finesight-web-*")] == []
