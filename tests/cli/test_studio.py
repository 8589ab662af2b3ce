import signal
import subprocess
import sys
from contextlib import ExitStack
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import HTTPCookieProcessor, build_opener

import pytest


def test_page_shows_the_workspace(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "a.yaml").write_text("model: finesight-tiny\ndata: {train: a.jsonl}\n")
    command = [sys.executable, "-m", "finesight", "studio", "work", "--port", "0"]
    with (
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as studio,
        ExitStack() as stack,
    ):
        # Otherwise, a failed assertion would wait for the server.
        stack.callback(studio.kill)
        address = studio.stdout.readline().strip()
        password = studio.stdout.readline().strip().removeprefix("password: ")
        opener = build_opener(HTTPCookieProcessor(CookieJar()))
        with pytest.raises(HTTPError, match="401"):
            opener.open(f"{address}/view/report", timeout=60)
        opener.open(f"{address}/sign-in", f"password={password}".encode(), timeout=60).close()
        # The socket is bound; the request waits until the page is ready.
        with opener.open(f"{address}/?step=train", timeout=60) as answer:
            page = answer.read().decode()
        assert "a.yaml" in page
        studio.send_signal(signal.SIGINT)
        assert studio.wait(60) == 0


def test_invalid_arguments_are_rejected(cli) -> None:
    cli("studio", "missing", code=2)
    cli("studio", ".", "--port", "99999", code=2)
