"""A hub behind a proxy that refuses, with a bad token, or not there: servers on this machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from doctoring import codes, exported, only, shell
from hub_servers import TOKEN, HuggingFace, Serving, serving
from huggingface_hub import constants

from finesight.doctor import hubs
from finesight.doctor.environment import PROXIES
from finesight.doctor.findings import Finding

VARIABLES = (*PROXIES, "no_proxy", "NO_PROXY", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy and no token of this machine."""
    for name in (*VARIABLES, "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{tmp_path}/token")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    with serving(HuggingFace) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


class Refusing(BaseHTTPRequestHandler):
    """A proxy that lets nothing through."""

    status = 403

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on the screen."""


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Refusing]]:
    class Mine(Refusing):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_address[1]}")
    yield Mine
    server.shutdown()
    server.server_close()


def judged(hub: hubs.Hub = "huggingface") -> list[Finding]:
    return hubs.judge(hubs.ask(hub, dict(os.environ)))


def type_in(remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy, as if typed into the shell that starts the next command."""
    after = exported(remedy, dict(os.environ))
    for name in VARIABLES:
        if name in after:
            monkeypatch.setenv(name, after[name])
        else:
            monkeypatch.delenv(name, raising=False)


def test_a_hub_that_answers_is_fine(hub: Serving) -> None:
    assert [one.severity for one in judged()] == ["fine"]
    assert all(asked.token is None for asked in hub.asked)


def test_a_proxy_that_refuses_is_found_and_passed_by(
    hub: Serving, proxy: type[Refusing], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = only(judged(), "proxy-refuses")
    assert "http_proxy" in found.what
    type_in(found.remedy, monkeypatch)
    assert codes(judged()) == []


def test_a_proxy_that_nobody_is_behind_is_found_and_passed_by(
    hub: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    found = only(judged(), "proxy-refuses")
    type_in(found.remedy, monkeypatch)
    assert codes(judged()) == []


def test_a_proxy_that_wants_a_login_is_told(
    proxy: type[Refusing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "status", 407)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http_proxy" in only(judged(), "proxy-login").remedy


def test_a_bad_token_is_found_and_unset(hub: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    found = only(judged(), "token-refused")
    assert "HF_TOKEN" in found.what
    assert "hf_revoked" not in str(found)
    type_in(found.remedy, monkeypatch)
    assert codes(judged()) == []


def test_a_bad_token_that_was_stored_is_logged_out(
    hub: Serving, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored = tmp_path / "token"
    stored.write_text("hf_revoked")
    found = only(judged(), "token-refused")
    assert str(stored) in found.what
    done = shell(found.remedy, {"HF_TOKEN_PATH": str(stored), "HF_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert codes(judged()) == []


def test_a_good_token_goes_to_the_hub_alone(hub: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert only(judged(), "token").severity == "fine"
    assert [asked.token for asked in hub.asked] == [None, f"Bearer {TOKEN}"]


def test_no_hub_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = only(judged(), "hub-unreachable")
    assert found.remedy == "unset HF_ENDPOINT"
    monkeypatch.delenv("HF_ENDPOINT")
    assert "--hub modelscope" in only(judged(), "hub-unreachable").remedy
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    found = only(judged("modelscope"), "hub-unreachable")
    assert found.remedy == "unset MODELSCOPE_ENDPOINT"


def test_a_bad_moment_is_a_hint() -> None:
    down = hubs.Reached("https://x.org", hubs.Answered(503), None, None, "", ())
    assert only(hubs.judge(down), "hub-down").severity == "hint"


def test_offline_nothing_is_asked(hub: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert only(judged(), "hub-offline").severity == "hint"
    assert hub.asked == []
