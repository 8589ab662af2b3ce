"""Memory, disks, limits, environment variables, GPUs and torch: detected, and fixed by remedies."""

import os
import shlex
import subprocess
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import pytest
from case_files import load_cases
from doctor_fixtures import find_diagnosis, list_codes, run_remedy

from finesight.doctor import machine_check
from finesight.doctor.machine_check import GB, GpuInfo, GpuSystem, TorchInfo

CASES = load_cases("doctor")
PATH = {"PATH": os.environ["PATH"]}
DRIVEN = GpuSystem(1, "550.54.14", (12, 4))
H200 = GpuInfo("NVIDIA H200", (9, 0), 150 * GB, 149 * GB, "")
CUDA = TorchInfo("2.13.0+cu126", cuda_version="12.6", arch_list=("sm_80", "sm_90"), gpus=(H200,))


def diagnose(folder, monkeypatch, free=500 * GB, **environment):
    monkeypatch.setattr(machine_check.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    return list(machine_check.check_machine({"HF_HOME": str(folder), **environment}, folder))


def test_healthy_machine_has_no_issue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = diagnose(tmp_path, monkeypatch)
    assert list_codes(found) == []
    assert [one.code for one in found][:4] == ["machine", "disk", "disk", "disk"]


def test_file_instead_of_cache_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    found = diagnose(tmp_path, monkeypatch, HF_HOME=str(tmp_path / "file"))
    assert str(tmp_path / "file") in find_diagnosis(found, "not-writable").what


@pytest.mark.parametrize(
    ("name", "value", "code", "severity"), CASES["test_scarce_resources_are_reported"]
)
def test_scarce_resources_are_reported(name, value, code, severity, tmp_path, monkeypatch):
    (tmp_path / "my models" / "large").mkdir(parents=True)
    if name == "limit":
        monkeypatch.setattr(machine_check.resource, "getrlimit", lambda _: (value, value))
    elif name == "available_memory":
        monkeypatch.setattr(machine_check, name, lambda: value)
    free = value if name == "free" else 500 * GB
    found = [
        one
        for one in diagnose(tmp_path / "my models", monkeypatch, free, TMPDIR=str(tmp_path))
        if one.code == code
    ]
    assert found[0].severity == severity
    assert found[0].why
    if code in ("disk-full", "low-memory"):
        command = ["bash", "-o", "pipefail", "-c", found[0].remedy]
        done = subprocess.run(command, capture_output=True, text=True, check=code == "disk-full")
        assert "large" in done.stdout or code == "low-memory"
    if code == "low-open-files-limit":
        script = f"ulimit -Sn 200 && {found[0].remedy} && ulimit -n"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert int(done.stdout) >= 256


@pytest.mark.parametrize(("name", "value", "kind"), CASES["malformed_variables"])
def test_bad_variable_is_found_and_remedy_fixes_it(name: str, value: str, kind: str) -> None:
    around = {**PATH, name: value}
    (found,) = machine_check.check_environment(around)
    assert (found.code, found.severity) == (f"{kind}-malformed", "error")
    assert name in found.what
    assert "secret" not in f"{found.what} {found.why} {found.remedy}"
    remedy = found.remedy.partition("#")[0]
    assert list_codes(machine_check.check_environment(run_remedy(remedy, around))) == []


@pytest.mark.parametrize("environment", CASES["valid_environments"])
def test_valid_environment_has_no_issue(environment: dict[str, str]) -> None:
    assert [one.severity for one in machine_check.check_environment(environment)] == ["ok"]


@pytest.mark.parametrize(
    ("environment", "code", "severity"), CASES["test_harmful_variable_is_found"]
)
def test_harmful_variable_is_found(environment, code, severity, monkeypatch):
    monkeypatch.setattr(machine_check.importlib.util, "find_spec", lambda name: None)
    (found,) = machine_check.check_environment(environment)
    assert (found.code, found.severity) == (code, severity)
    if code != "proxy-socks":
        assert not set(environment) & set(run_remedy(found.remedy, {**PATH, **environment}))
    else:
        assert found.remedy.endswith("-m pip install socksio")


def diagnose_gpus(system, torch_info, has_packages=False, **environment):
    packages = {name: [distribution("torch")] for name in ("torch", "triton") if has_packages}
    return list(machine_check.check_gpus(system, torch_info, packages, environment))


def test_working_gpus_have_no_issue() -> None:
    found = diagnose_gpus(DRIVEN, CUDA)
    assert list_codes(found) == list_codes(found, "warning") == []
    assert "H200, 9.0, 149 of 150 GB free, uses bf16" in find_diagnosis(found, "gpu").what
    assert list_codes(diagnose_gpus(GpuSystem(), TorchInfo("2.13.0+cpu"))) == []


def test_old_gpu_uses_fp16_and_busy_gpu_is_reported() -> None:
    t4 = GpuInfo("Tesla T4", (7, 5), 16 * GB, 10 * GB, "")
    found = diagnose_gpus(DRIVEN, CUDA._replace(gpus=(t4,)))
    assert list_codes(found, "warning") == ["gpu-busy"]
    assert "fp16" in find_diagnosis(found, "gpu").what


@pytest.mark.parametrize(("system", "torch_info", "gpu", "code", "word"), CASES["gpus"])
def test_torch_and_driver_mismatch(system, torch_info, gpu, code, word):
    gpus = () if gpu is None else (H200._replace(**gpu),)
    module_file = str(distribution("torch").locate_file("torch/__init__.py"))
    info = CUDA._replace(gpus=gpus, module_file=module_file)._replace(**torch_info)
    found = diagnose_gpus(DRIVEN._replace(**system), info, has_packages=True)
    assert list_codes(found) == [code]
    assert word in find_diagnosis(found, code).remedy


def test_remedy_unsets_hidden_gpus() -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": "-1", "PATH": "/usr/bin:/bin"}
    found = find_diagnosis(diagnose_gpus(DRIVEN, CUDA._replace(gpus=()), **hidden), "gpus-hidden")
    assert "CUDA_VISIBLE_DEVICES" not in run_remedy(found.remedy, hidden)


def test_gpu_system_is_inspected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_check.sysconfig, "get_path", lambda name: str(tmp_path))
    device = tmp_path / "sys" / "bus" / "pci" / "devices" / "0000:01:00.0"
    for path, kind in ((device, "0x030000"), (device.with_name("0000:01:00.1"), "0x040300")):
        path.mkdir(parents=True)
        (path / "vendor").write_text("0x10de\n")
        (path / "class").write_text(f"{kind}\n")
    path = {"PATH": str(tmp_path)}
    system = machine_check.inspect_gpu_system(path, tmp_path)
    assert (system.num_pci_gpus, system.driver_version, system.is_container) == (1, None, False)
    assert system.missing_build_tools == ("C compiler", "Python.h")
    driver = tmp_path / "proc" / "driver" / "nvidia" / "version"
    driver.parent.mkdir(parents=True)
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module  580.65.06  Release\n")
    (tmp_path / ".dockerenv").touch()
    (tmp_path / "Python.h").touch()
    (tmp_path / "clang").touch(mode=0o755)
    system = machine_check.inspect_gpu_system(path, tmp_path)
    assert (system.driver_version, system.is_container) == ("580.65.06", True)
    assert system.missing_build_tools == ()
    assert machine_check.inspect_gpu_system({"CC": "tcc", "PATH": ""}).missing_build_tools == ()


@pytest.mark.parametrize(
    ("content", "version"),
    [("", None), ("\n", None), (" \nNVRM version: 580.65.06\n", None), ("NVRM\n", "unknown")],
)
def test_driver_file_without_version(tmp_path: Path, content: str, version: str | None) -> None:
    driver = tmp_path / "proc" / "driver" / "nvidia" / "version"
    driver.parent.mkdir(parents=True)
    driver.write_text(content)
    assert machine_check.inspect_gpu_system({}, tmp_path).driver_version == version


def probe(folder: Path, torch_source: str) -> TorchInfo:
    """Probe a module that replaces torch."""
    (folder / "torch.py").write_text(torch_source)
    return machine_check.probe_torch({"PYTHONPATH": python_path(folder)}, timeout_s=30)


def python_path(folder: Path) -> str:
    return f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


def test_every_gpu_of_torch_is_reported(tmp_path: Path) -> None:
    info = probe(tmp_path, f"AVAILABLE = True\n{CASES['fake_torch']}")
    assert (info.error, info.cuda_version, info.arch_list) == ("", "12.6", ("sm_80", "sm_90"))
    assert info.gpus[0] == GpuInfo("X", (9, 0), 8, 7, "")
    assert info.gpus[1].error == "CUDA error: no kernel image is available for execution"
    info = probe(tmp_path, f"AVAILABLE = False\n{CASES['fake_torch']}")
    assert (info.gpus, info.cuda_warnings) == ((), ("driver too old",))


@pytest.mark.parametrize(
    ("source", "error"), CASES["test_broken_torch_is_found_and_remedy_unsets_the_path"]
)
def test_broken_torch_is_found_and_remedy_unsets_the_path(tmp_path, source, error):
    info, path = probe(tmp_path, source), python_path(tmp_path)
    assert error in info.error
    found = find_diagnosis(diagnose_gpus(DRIVEN, info, PYTHONPATH=path), "torch-broken")
    first = shlex.join(shlex.split(found.remedy.splitlines()[0], comments=True))
    assert "PYTHONPATH" not in run_remedy(first, {"PYTHONPATH": path, "PATH": "/usr/bin:/bin"})


def test_hanging_torch_is_reported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(60)\n")
    info = machine_check.probe_torch({"PYTHONPATH": python_path(tmp_path)}, timeout_s=0.5)
    assert info.error == "timed out after 0.5 s"
