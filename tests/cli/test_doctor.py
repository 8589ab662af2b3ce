"""Tests of the command `finesight doctor`: diagnoses, output, exit codes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from finesight.cli.app import run_command
from finesight.doctor import diagnostics
from finesight.doctor.diagnosis import format_diagnoses, load_catalog, make_diagnosis
from finesight.doctor.machine_check import TorchInfo
from finesight.errors import UserError

FOUND = {
    "one": (
        make_diagnosis("offline"),
        make_diagnosis("torch", "warning", version="a\x1b", target="b"),
    ),
    "two": (
        make_diagnosis(
            *("unfinished",),
            **{"progress": "a", "checkpoint": "b", "kind": "c", "reason": "d", "repeated": ""},
            recipe="e\nf",
        ),
    ),
}


def test_diagnosis_lines_and_commands() -> None:
    assert list(format_diagnoses(FOUND)) == [
        "one",
        "  warning  HF_HUB_OFFLINE is set",
        "           why: downloads are disabled; only cached files are available",
        "           $ unset HF_HUB_OFFLINE",
        "  warning  torch a\\x1b, built for b",
        "two",
        "  ERROR    the run is a; b",
        "           why: c: d",
        "           $ finesight train e",
        "           $ f --resume",
        "1 error, 2 warnings",
    ]


@pytest.fixture
def healthy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine with a healthy torch."""
    monkeypatch.setattr(diagnostics.machine_check, "probe_torch", lambda: TorchInfo("2.13.0+cpu"))
    for name in ("HF_TOKEN", "https_proxy", "http_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("healthy_machine")
def test_machine_is_diagnosed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "--json"]) in (0, 2)
    output = json.loads(capsys.readouterr().out)
    sections = dict.fromkeys(one["section"] for one in output["diagnoses"])
    assert list(sections) == ["machine", "packages", "torch and GPUs", "environment", "extras"]
    assert all(
        one["remedy"] and one["why"] for one in output["diagnoses"] if one["severity"] != "ok"
    )


@pytest.mark.usefixtures("healthy_machine")
def test_injected_error_exits_with_2_and_remedy_clears_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def errors() -> set[str]:
        run_command(["doctor", "--json"])
        output = json.loads(capsys.readouterr().out)
        return {one["code"] for one in output["diagnoses"] if one["severity"] == "error"}

    before = errors()
    monkeypatch.setenv("HF_TOKEN", "no token at all")
    assert run_command(["doctor"]) == 2
    assert "           $ unset HF_TOKEN " in capsys.readouterr().out
    assert errors() == before | {"token-malformed"}


@pytest.mark.usefixtures("healthy_machine")
def test_network_is_not_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("somebody asked the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    assert run_command(["doctor"]) in (0, 2)


def test_model_is_diagnosed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "finesight-tiny"]) == 0
    assert "complete model of the family qwen2_vl" in capsys.readouterr().out


def test_adapter_is_diagnosed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert run_command(["doctor", str(tmp_path)]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().out


def test_unknown_subject_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "Qwen/Qwen2-VL-2B-Instruct"]) == 2
    error = capsys.readouterr().err
    assert "no folder" in error
    assert "finesight download" in error


def test_diagnosis_works_with_broken_torch(tmp_path: Path) -> None:
    """A broken torch must not break `doctor`."""
    (tmp_path / "torch.py").write_text("raise OSError('broken')\n")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import finesight.cli.app, finesight.doctor.diagnostics as e\n"
        "try: e.diagnose('nothing')\nexcept e.UserError: print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr


def test_issue_requires_a_remedy() -> None:
    for code, entry in load_catalog().items():
        is_ok = entry.get("severity") == "ok"
        assert set(entry) - {"severity"} == ({"what"} if is_ok else {"what", "why", "remedy"}), code
    with pytest.raises(KeyError):
        make_diagnosis("gpu", index=0)
    with pytest.raises(UserError):
        diagnostics.diagnose("no such thing")
