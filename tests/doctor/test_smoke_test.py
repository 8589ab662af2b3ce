"""The trial on a device: every stage on the CPU, and a device that fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from doctor_fixtures import find_diagnosis

from finesight.doctor import gpu_check, probes
from finesight.doctor.gpu_check import GpuInfo, TorchInfo
from finesight.doctor.probes import ProbeResult


def test_all_stages_pass_on_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probes, "NUM_STEPS", 3)
    probes.run_smoke_stages("cpu", tmp_path)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["stage"] for line in lines] == list(gpu_check.SMOKE_TEST_STAGES)
    assert "loss" in lines[2]["what"]


def test_each_gpu_is_tested_and_files_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []

    def ended(words: list[str], seconds: float, more: dict[str, str]) -> ProbeResult:
        folders.append(Path(words[4]))
        shown = more.get("CUDA_VISIBLE_DEVICES")
        assert (words[3] == "cpu") == (shown is None)
        lines = [
            json.dumps({"stage": s, "seconds": 0.5, "what": "x"})
            for s in gpu_check.SMOKE_TEST_STAGES
        ]
        return ProbeResult(
            "\n".join(lines[:2] if shown == "1" else lines), "no" if shown == "1" else ""
        )

    monkeypatch.setattr(gpu_check.probes, "run_probe", ended)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    card = GpuInfo("X", (9, 0), 1, 1, "")
    found = list(gpu_check.check_smoke_tests(TorchInfo("2", gpus=(card, card))))
    assert [one.what.partition(":")[0] for one in found] == ["CPU", "GPU 0", "GPU 1"]
    assert not any(folder.exists() for folder in folders)
    assert [one.severity for one in found] == ["ok", "ok", "error"]
    assert "stage train failed: no" in found[2].what
    assert found[2].remedy == "export CUDA_VISIBLE_DEVICES=0"


def test_failing_cpu_suggests_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = ProbeResult('{"stage": "load", "seconds": 1, "what": ""}', "Illegal instruction")
    monkeypatch.setattr(gpu_check.probes, "run_probe", lambda *_: failed)
    found = find_diagnosis(gpu_check.check_smoke_tests(TorchInfo("2")), "smoke-test")
    assert found.severity == "error"
    assert "stage data failed: Illegal instruction" in found.what
    assert found.remedy.startswith("finesight quickstart")
