"""Harmful environment variables: detected, and fixed by the remedy."""

from __future__ import annotations

import os

import pytest
from doctor_fixtures import list_codes, run_remedy

from finesight.doctor import network_check

PATH = {"PATH": os.environ["PATH"]}


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("HTTPS_PROXY", "proxy.example.org:3128", "proxy-malformed"),
        ("https_proxy", "htp://proxy:3128", "proxy-malformed"),
        ("http_proxy", "http://", "proxy-malformed"),
        ("all_proxy", "http://proxy:port", "proxy-malformed"),
        ("HF_ENDPOINT", "hf-mirror.example.org", "endpoint-malformed"),
        ("MODELSCOPE_ENDPOINT", "https://", "endpoint-malformed"),
        ("HF_TOKEN", "hf_abc\n", "token-malformed"),
        ("HF_TOKEN", "Bearer hf_abc", "token-malformed"),
        ("HF_TOKEN", "'hf_abc'", "token-malformed"),
        ("HF_TOKEN", "sk-abc", "token-malformed"),
        ("MODELSCOPE_API_TOKEN", "ключ", "token-malformed"),
        ("SSL_CERT_FILE", "/nowhere/ca.pem", "certificates-missing"),
    ],
)
def test_bad_variable_is_found_and_remedy_fixes_it(name: str, value: str, code: str) -> None:
    around = {**PATH, name: value}
    (found,) = network_check.check_environment(around)
    assert (found.code, found.severity) == (code, "error")
    assert name in found.what
    assert list_codes(network_check.check_environment(run_remedy(found.remedy, around))) == []


def test_proxy_without_scheme_keeps_its_host() -> None:
    around = {**PATH, "https_proxy": "proxy.example.org:3128"}
    (found,) = network_check.check_environment(around)
    assert run_remedy(found.remedy, around)["https_proxy"] == "http://proxy.example.org:3128"


def test_secrets_are_never_printed() -> None:
    around = {"HF_TOKEN": "hf_secret secret", "https_proxy": "htp://me:secret@proxy:3128"}
    for found in network_check.check_environment(around):
        assert "secret" not in f"{found.what} {found.why} {found.remedy}"


@pytest.mark.parametrize(
    "around",
    [
        {},
        {"https_proxy": "http://me:pass@proxy:3128", "HF_TOKEN": "hf_abcDEF123"},
        {"HF_ENDPOINT": "http://127.0.0.1:8080", "MODELSCOPE_ENDPOINT": "www.modelscope.cn"},
        {"SSL_CERT_FILE": __file__, "MODELSCOPE_API_TOKEN": "ms-123"},
    ],
)
def test_valid_environment_has_no_issue(around: dict[str, str]) -> None:
    (found,) = network_check.check_environment(around)
    assert found.severity == "ok"


def test_socks_proxy_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    around = {"all_proxy": "socks5://127.0.0.1:1080"}
    monkeypatch.setattr(network_check.importlib.util, "find_spec", lambda name: None)
    (found,) = network_check.check_environment(around)
    assert found.remedy.endswith("-m pip install socksio")


def test_offline_mode_is_a_hint() -> None:
    (found,) = network_check.check_environment({**PATH, "HF_HUB_OFFLINE": "1"})
    assert found.severity == "warning"
    assert "HF_HUB_OFFLINE" not in run_remedy(found.remedy, {**PATH, "HF_HUB_OFFLINE": "1"})
