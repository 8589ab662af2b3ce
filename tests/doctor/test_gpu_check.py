"""Cards, drivers and torch builds: judged from facts, and from planted files and programs."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from doctor_fixtures import find_diagnosis, list_codes, run_remedy

from finesight.doctor import gpu_check, package_check
from finesight.doctor.gpu_check import GpuInfo, GpuSystem, TorchInfo
from finesight.doctor.probes import ProbeResult, run_probe

NONE = package_check.InstalledPackages({}, (), True)
BARE = GpuSystem(0, None, None, False, None, "ubuntu", False)
DRIVEN = GpuSystem(1, "550.54.14", (12, 4), True, None, "ubuntu", False)
H200 = GpuInfo("NVIDIA H200", (9, 0), 150 * 10**9, 149 * 10**9, "")
CPU = TorchInfo("2.13.0+cpu", "", None)
CUDA = TorchInfo("2.13.0+cu126", "", "12.6", ("sm_80", "sm_90"), (), (H200,), {})


def diagnose(seen: GpuSystem, torch: TorchInfo, **environment: str) -> list[gpu_check.Diagnosis]:
    return list(gpu_check.check_gpus(seen, torch, NONE, environment))


def test_working_gpu_has_no_issue() -> None:
    found = diagnose(DRIVEN, CUDA)
    assert list_codes(found) == list_codes(found, "warning") == []
    assert "H200" in find_diagnosis(found, "gpu").what
    assert "bf16" in find_diagnosis(found, "gpu").what


def test_missing_compiler_is_an_issue_with_triton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check.sysconfig, "get_path", lambda name: str(tmp_path))
    assert gpu_check.inspect_gpu_system({"PATH": str(tmp_path)}, tmp_path).missing_build_tools == (
        "C compiler",
        "Python.h",
    )
    (tmp_path / "Python.h").touch()
    (tmp_path / "clang").touch(mode=0o755)
    assert gpu_check.inspect_gpu_system({"PATH": str(tmp_path)}, tmp_path).missing_build_tools == ()
    assert (
        gpu_check.inspect_gpu_system({"PATH": "", "CC": "tcc"}, tmp_path).missing_build_tools == ()
    )
    triton = package_check.InstalledPackage("triton", "3.7.1", tmp_path)
    bare = replace(DRIVEN, missing_build_tools=("C compiler",))
    found = gpu_check.check_gpus(bare, CUDA, replace(NONE, by_name={"triton": (triton,)}), {})
    assert "apt install gcc" in find_diagnosis(found, "no-compiler").remedy
    assert list_codes(gpu_check.check_gpus(bare, CUDA, NONE, {})) == []


def test_missing_gpu_is_no_issue() -> None:
    assert list_codes(diagnose(BARE, CPU)) == []


def test_gpu_without_driver_is_detected(tmp_path: Path) -> None:
    device = tmp_path / "sys" / "bus" / "pci" / "devices" / "0000:01:00.0"
    valid = device.with_name("0000:01:00.1")
    for path, kind in ((device, "0x030000"), (valid, "0x040300")):
        path.mkdir(parents=True)
        (path / "vendor").write_text("0x10de\n")
        (path / "class").write_text(f"{kind}\n")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "os-release").write_text('NAME="Fedora Linux"\nID=fedora\n')
    seen = gpu_check.inspect_gpu_system({"PATH": str(tmp_path)}, tmp_path)
    assert (seen.num_pci_gpus, seen.driver_version, seen.has_nvidia_smi) == (1, None, False)
    found = find_diagnosis(diagnose(replace(seen, driver_cuda_version=None), CPU), "no-driver")
    assert found.remedy.splitlines() == ["sudo dnf install akmod-nvidia", "sudo reboot"]
    (tmp_path / ".dockerenv").touch()
    seen = gpu_check.inspect_gpu_system({"PATH": str(tmp_path)}, tmp_path)
    found = find_diagnosis(diagnose(replace(seen, driver_cuda_version=None), CPU), "no-driver")
    assert "--gpus all" in found.remedy


def test_driver_version_is_read(tmp_path: Path) -> None:
    about = tmp_path / "proc" / "driver" / "nvidia" / "version"
    about.parent.mkdir(parents=True)
    about.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\n"
    )
    assert gpu_check.inspect_gpu_system({}, tmp_path).driver_version == "580.65.06"


@pytest.mark.parametrize(
    ("seen", "torch", "code", "word"),
    [
        (DRIVEN, CPU, "torch-without-cuda", "--torch-backend=auto"),
        (
            DRIVEN,
            replace(CUDA, cuda_version="13.0", gpus=()),
            "driver-outdated",
            "--torch-backend=auto",
        ),
        (
            replace(DRIVEN, driver_cuda_version=None),
            replace(CUDA, gpus=()),
            "no-driver",
            "ubuntu-drivers",
        ),
        (DRIVEN, replace(CUDA, gpus=(), cuda_warnings=("error 802",)), "gpu-unreachable", "reboot"),
        (
            DRIVEN,
            replace(CUDA, gpus=(replace(H200, capability=(12, 0), error="no kernel image"),)),
            "torch-wrong-build",
            "--torch-backend=auto",
        ),
        (
            DRIVEN,
            replace(CUDA, gpus=(replace(H200, error="uncorrectable ECC error"),)),
            "gpu-fails",
            "nvidia-smi",
        ),
    ],
)
def test_torch_and_driver_mismatch(seen: GpuSystem, torch: TorchInfo, code: str, word: str) -> None:
    found = diagnose(seen, torch)
    assert list_codes(found) == [code]
    assert word in find_diagnosis(found, code).remedy


def test_remedy_unsets_hidden_gpus() -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": "-1", "PATH": "/usr/bin:/bin"}
    seen = replace(DRIVEN, visible_devices=gpu_check.inspect_gpu_system(hidden).visible_devices)
    found = find_diagnosis(diagnose(seen, replace(CUDA, gpus=())), "gpus-hidden")
    after = run_remedy(found.remedy, hidden)
    assert gpu_check.inspect_gpu_system(after).visible_devices is None


def test_old_gpu_uses_fp16_and_busy_gpu_is_reported() -> None:
    t4 = GpuInfo("Tesla T4", (7, 5), 16 * 10**9, 10 * 10**9, "")
    found = diagnose(
        replace(DRIVEN, has_nvidia_smi=False), replace(CUDA, gpus=(t4,), arch_list=("sm_75",))
    )
    assert list_codes(found) == []
    assert "fp16" in find_diagnosis(found, "gpu").what
    assert list_codes(found, "warning") == ["gpu-busy", "no-nvidia-smi"]


def test_gpu_used_by_others_is_avoided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '4242, python, 90000 MiB'\n")
    smi.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = gpu_check.inspect_gpu_system({"PATH": str(tmp_path)})
    assert seen.gpu_processes == ("4242, python, 90000 MiB",)
    taken = replace(H200, free_bytes=50 * 10**9)
    around = {"PATH": "/usr/bin:/bin"}
    found = find_diagnosis(diagnose(seen, replace(CUDA, gpus=(taken, H200))), "gpu-busy")
    assert "4242, python" in found.what
    assert run_remedy(found.remedy, around)["CUDA_VISIBLE_DEVICES"] == "1"
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_check.inspect_gpu_system({"PATH": str(tmp_path)}).gpu_processes == ()


@pytest.mark.parametrize(
    ("kernel", "capability", "runs"),
    [
        ("sm_90", (9, 0), True),
        ("sm_90a", (9, 0), True),
        ("sm_86", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_90", (12, 0), False),
        ("compute_90", (12, 0), True),
        ("sm_120", (12, 0), True),
        ("gfx90a", (9, 0), False),
    ],
)
def test_kernel_architecture_compatibility(
    kernel: str, capability: tuple[int, int], runs: bool
) -> None:
    """Check by a failing GPU, whose error is attributed to the build without such kernels."""
    failing = replace(H200, capability=capability, error="failed")
    found = diagnose(DRIVEN, replace(CUDA, gpus=(failing,), arch_list=(kernel,)))
    assert list_codes(found) == ["gpu-fails" if runs else "torch-wrong-build"]


def test_broken_torch_import_is_found_and_fixed(tmp_path: Path) -> None:
    planted = tmp_path / "torch"
    planted.mkdir()
    (planted / "__init__.py").write_text("raise ImportError('libcudart.so.12: no such file')\n")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    torch = gpu_check.probe_torch({"PYTHONPATH": path})
    assert "libcudart" in torch.error
    found = find_diagnosis(diagnose(DRIVEN, torch, PYTHONPATH=path), "torch-broken")
    first = found.remedy.splitlines()[0]
    after = run_remedy(first.partition("#")[0], {"PYTHONPATH": path, "PATH": "/usr/bin:/bin"})
    assert "PYTHONPATH" not in after


FAKE_TORCH = """\
import types, warnings
__version__, version = "2.13.0+cu126", types.SimpleNamespace(cuda="12.6")


class Product:
    def __matmul__(self, other): return self
    def __getitem__(self, place): return self
    def item(self): return 16


def ones(*shape, device):
    if device == "cuda:1":
        raise RuntimeError("CUDA error: no kernel image is available for execution\\nmore")
    return Product()


class cuda:
    is_available = staticmethod(lambda: AVAILABLE or warnings.warn("driver too old") or False)
    get_arch_list = staticmethod(lambda: ["sm_80", "sm_90"])
    device_count = staticmethod(lambda: 2)
    mem_get_info = staticmethod(lambda index: (7, 8))
    get_device_properties = staticmethod(
        lambda index: types.SimpleNamespace(name="X", major=9 + index, minor=0, total_memory=8)
    )
"""


@pytest.mark.parametrize("available", [True, False])
def test_torch_reports_every_gpu(tmp_path: Path, available: bool) -> None:
    """By a torch that only looks like one: what a machine with cards answers."""
    (tmp_path / "torch.py").write_text(f"AVAILABLE = {available}\n{FAKE_TORCH}")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    torch = gpu_check.probe_torch({"PYTHONPATH": path})
    assert (torch.error, torch.cuda_version) == ("", "12.6")
    if not available:
        assert (torch.gpus, torch.cuda_warnings) == ((), ("driver too old",))
        return
    first, second = torch.gpus
    assert first == GpuInfo("X", (9, 0), 8, 7, "")
    assert second.error == "CUDA error: no kernel image is available for execution"
    found = diagnose(DRIVEN, replace(torch, broken_packages={}))
    assert list_codes(found) == ["torch-wrong-build"]


def test_shadowing_torch_module_is_found(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(f"AVAILABLE = False\n{FAKE_TORCH}")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    torch = replace(gpu_check.probe_torch({"PYTHONPATH": path}), broken_packages={})
    found = find_diagnosis(
        gpu_check.check_gpus(BARE, torch, package_check.list_packages(), {}), "torch-shadowed"
    )
    assert str(tmp_path) in found.what
    after = run_remedy(found.remedy, {"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": "/"})
    assert "PYTHONPATH" not in after


def test_crashed_child_process_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    (tmp_path / "hangs.py").write_text("import time\nprint('{}', flush=True)\ntime.sleep(60)\n")
    monkeypatch.syspath_prepend(tmp_path)
    more = {"PYTHONPATH": str(tmp_path)}
    assert "SIGSEGV" in run_probe(["-m", "dies"], 30, more).error
    hung = run_probe(["-m", "hangs"], 0.5, more)
    assert "timed out" in hung.error
    assert run_probe(["-m", "torch_less"], 30, more).error.startswith("/")


def test_foreign_torch_and_broken_packages_are_reported(tmp_path: Path) -> None:
    mine = package_check.InstalledPackage("torch", "2.13.0", tmp_path / "site-packages")
    installed = package_check.InstalledPackages({"torch": (mine,)}, (), True)
    torch = replace(
        CPU,
        module_file=str(tmp_path / "torch" / "__init__.py"),
        broken_packages={"PIL": "ImportError: x"},
    )
    found = list(gpu_check.check_gpus(BARE, torch, installed, {}))
    assert list_codes(found) == ["torch-shadowed", "package-broken"]
    assert find_diagnosis(found, "package-broken").remedy.endswith("pillow")
    torch = replace(CPU, module_file=str(tmp_path / "site-packages" / "torch" / "__init__.py"))
    assert list_codes(gpu_check.check_gpus(BARE, torch, installed, {})) == []


def test_torch_output_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"name": "X", "capability": [8, 6], "total_bytes": 2, "free_bytes": 1, "error": ""}
    output = {
        "version": "2",
        "module_file": "f",
        "cuda_version": "12.8",
        "arch_list": ["sm_86"],
        "cuda_warnings": [],
    }
    line = json.dumps({**output, "gpus": [card], "broken_packages": {}})
    ended = ProbeResult(f"a warning\n{line}\n", "")
    monkeypatch.setattr(gpu_check.probes, "run_probe", lambda *_: ended)
    assert gpu_check.probe_torch().gpus == (GpuInfo("X", (8, 6), 2, 1, ""),)


def test_visible_gpus_are_tested_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert gpu_check.list_visible_devices(2) == ["3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpu_check.list_visible_devices(2) == ["0", "1"]
