"""A hub behind a proxy that refuses, with a bad token, or not there: servers on this machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from doctor_fixtures import find_diagnosis, list_codes, run_remedy, run_shell
from fake_hub_servers import TOKEN, FakeHubServer, HuggingFaceHandler, run_hub_server
from huggingface_hub import constants

from finesight.doctor import network_check
from finesight.doctor.diagnosis import Diagnosis
from finesight.doctor.network_check import PROXY_VARIABLES

VARIABLES = (*PROXY_VARIABLES, "no_proxy", "NO_PROXY", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy and no token of this machine."""
    for name in (*VARIABLES, "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{tmp_path}/token")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHubServer]:
    with run_hub_server(HuggingFaceHandler) as server:
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


def diagnose(hub: network_check.HubService = "huggingface") -> list[Diagnosis]:
    return network_check.check_hub(hub, dict(os.environ))


def set_remedy_env(remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy, as if typed into the shell that starts the next command."""
    after = run_remedy(remedy, dict(os.environ))
    for name in VARIABLES:
        if name in after:
            monkeypatch.setenv(name, after[name])
        else:
            monkeypatch.delenv(name, raising=False)


def test_reachable_hub_has_no_issue(hub: FakeHubServer) -> None:
    assert [one.severity for one in diagnose()] == ["ok"]
    assert all(asked.token is None for asked in hub.requests)


def test_refusing_proxy_is_found_and_bypassed(
    hub: FakeHubServer, proxy: type[Refusing], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_diagnosis(diagnose(), "proxy-rejects")
    assert "http_proxy" in found.what
    set_remedy_env(found.remedy, monkeypatch)
    assert list_codes(diagnose()) == []


def test_dead_proxy_is_found_and_bypassed(
    hub: FakeHubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    found = find_diagnosis(diagnose(), "proxy-rejects")
    set_remedy_env(found.remedy, monkeypatch)
    assert list_codes(diagnose()) == []


def test_proxy_login_is_reported(proxy: type[Refusing], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "status", 407)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http_proxy" in find_diagnosis(diagnose(), "proxy-authentication").remedy


def test_invalid_token_is_found_and_unset(
    hub: FakeHubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    found = find_diagnosis(diagnose(), "token-rejected")
    assert "HF_TOKEN" in found.what
    assert "hf_revoked" not in str(found)
    set_remedy_env(found.remedy, monkeypatch)
    assert list_codes(diagnose()) == []


def test_invalid_stored_token_is_logged_out(
    hub: FakeHubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored = tmp_path / "token"
    stored.write_text("hf_revoked")
    found = find_diagnosis(diagnose(), "token-rejected")
    assert str(stored) in found.what
    done = run_shell(found.remedy, {"HF_TOKEN_PATH": str(stored), "HF_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert list_codes(diagnose()) == []


def test_token_is_sent_only_to_the_hub(hub: FakeHubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert find_diagnosis(diagnose(), "token").severity == "ok"
    assert [asked.token for asked in hub.requests] == [None, f"Bearer {TOKEN}"]


def test_unreachable_hub_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = find_diagnosis(diagnose(), "hub-unreachable")
    assert found.remedy == "unset HF_ENDPOINT"
    monkeypatch.delenv("HF_ENDPOINT")
    assert "--hub modelscope" in find_diagnosis(diagnose(), "hub-unreachable").remedy
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    found = find_diagnosis(diagnose("modelscope"), "hub-unreachable")
    assert found.remedy == "unset MODELSCOPE_ENDPOINT"


def test_temporary_hub_error_is_a_hint(
    proxy: type[Refusing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "status", 503)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert find_diagnosis(diagnose(), "hub-down").severity == "warning"


def test_offline_mode_sends_no_requests(
    hub: FakeHubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_diagnosis(diagnose(), "hub-offline").severity == "warning"
    assert hub.requests == []
