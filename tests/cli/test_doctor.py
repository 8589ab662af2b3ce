"""Tests of the command `finesight doctor`: diagnoses, output, exit codes."""

import json
import socket

import pytest
from case_files import load_cases

from finesight.cli.app import run_command
from finesight.doctor import machine_check
from finesight.doctor.diagnosis import format_diagnoses, load_catalog, make_diagnosis
from finesight.doctor.machine_check import TorchInfo


def test_diagnosis_lines_and_commands():
    unfinished = {"progress": "a", "checkpoint": "b", "kind": "c", "reason": "d", "repeated": ""}
    found = {
        "one": (
            make_diagnosis("offline"),
            make_diagnosis("torch", False, version="a\x1b", target="b"),
        ),
        "two": (make_diagnosis("unfinished", recipe="e\nf", **unfinished),),
    }
    assert list(format_diagnoses(found)) == load_cases("doctor")["printed_diagnoses"]
    for code, entry in load_catalog().items():
        assert {"what"} <= set(entry) <= {"what", "why", "severity", "remedy", "step"}, code
        assert ("why" in entry) == bool(entry.keys() & {"remedy", "step"}), code


@pytest.fixture
def diagnose(monkeypatch, capsys):
    """Diagnose a machine with a healthy torch, without network."""
    monkeypatch.setattr(machine_check, "probe_torch", lambda: TorchInfo("2.13.0+cpu"))
    for name in ("HF_TOKEN", "https_proxy", "http_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)

    def refused(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)

    def run():
        code = run_command(["doctor", "--json"])
        found = json.loads(capsys.readouterr().out)["diagnoses"]
        errors = {one["code"] for one in found if one["severity"] == "error"}
        assert code == (2 if errors else 0)
        return found, errors

    return run


def test_machine_is_diagnosed(diagnose):
    found, _ = diagnose()
    sections = dict.fromkeys(one["section"] for one in found)
    assert list(sections) == ["machine", "packages", "torch and GPUs", "environment", "extras"]
    assert all(one["remedy"] and one["why"] for one in found if one["severity"] != "ok")


def test_injected_error_exits_with_2_and_remedy_clears_it(diagnose, monkeypatch, cli):
    _, before = diagnose()
    monkeypatch.setenv("HF_TOKEN", "no token at all")
    assert "           $ unset HF_TOKEN " in cli("doctor", code=2).out
    assert diagnose()[1] == before | {"token-malformed"}


def test_models_and_adapters_are_diagnosed(tmp_path, cli):
    assert "complete model of the family qwen2_vl" in cli("doctor", "finesight-tiny").out
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter_model.safetensors" in cli("doctor", tmp_path, code=2).out
    error = cli("doctor", "Qwen/Qwen2-VL-2B-Instruct", code=2).err
    assert "no folder" in error
    assert "finesight download" in error
