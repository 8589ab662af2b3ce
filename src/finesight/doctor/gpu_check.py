"""Check NVIDIA GPUs, their driver, and the build of torch."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finesight.doctor import probe_process
from finesight.doctor.diagnosis import Diagnosis, format_command, make_error, make_ok, make_warning
from finesight.doctor.package_check import PIP_COMMAND, InstalledPackages

TORCH_TIMEOUT_S = 120.0
"""Seconds to import torch in a child process. A slow disk needs many of them."""

NVIDIA_VENDOR_ID = "0x10de"
"""Vendor ID of NVIDIA on the PCI bus."""

MIN_BF16_CAPABILITY = (8, 0)
"""Minimum CUDA compute capability for bf16 matrix products."""

MAX_USED_FRACTION = 0.1
"""Fraction of GPU memory in use by other processes above which a warning is given."""

CUDA_VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"

C_COMPILERS = ("gcc", "clang")
"""Compilers that Triton searches if the environment variable CC is unset."""


@dataclass(frozen=True, slots=True)
class GpuSystem:
    """GPU information from the operating system, collected without torch.

    Attributes:
        num_pci_gpus: Number of NVIDIA GPUs on the PCI bus.
        driver_version: Version of the loaded kernel module. None if no driver is loaded.
        driver_cuda_version: Newest CUDA version (major, minor) that the driver supports. None
            without the driver library.
        has_nvidia_smi: True if nvidia-smi is in PATH.
        visible_devices: Value of CUDA_VISIBLE_DEVICES. None if unset.
        os_id: Field `ID` of /etc/os-release.
        is_container: True in a Docker or Podman container.
        gpu_processes: Processes on the GPUs, as listed by nvidia-smi.
        missing_build_tools: Build tools that Triton needs and that are not installed.
    """

    num_pci_gpus: int
    driver_version: str | None
    driver_cuda_version: tuple[int, int] | None
    has_nvidia_smi: bool
    visible_devices: str | None
    os_id: str
    is_container: bool
    gpu_processes: tuple[str, ...] = ()
    missing_build_tools: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """GPU properties that torch reports.

    Attributes:
        name: Name of the GPU model.
        capability: CUDA compute capability, major and minor.
        total_bytes: GPU memory.
        free_bytes: Free GPU memory. None if the query failed.
        error: Error of a test matrix product. Empty if it succeeded.
    """

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int | None
    error: str


@dataclass(frozen=True, slots=True)
class TorchInfo:
    """Installed torch and its GPUs.

    Attributes:
        version: Version of torch.
        module_file: File that was imported.
        cuda_version: CUDA version of the build. None for a CPU build.
        arch_list: GPU architectures for which the build has kernels.
        cuda_warnings: Warnings of torch about unavailable GPUs.
        gpus: Available GPUs.
        broken_packages: Other packages that fail to import, with the error.
        error: Error of importing torch. All other attributes are empty then.
    """

    version: str = ""
    module_file: str = ""
    cuda_version: str | None = None
    arch_list: tuple[str, ...] = ()
    cuda_warnings: tuple[str, ...] = ()
    gpus: tuple[GpuInfo, ...] = ()
    broken_packages: Mapping[str, str] | None = None
    error: str = ""


def inspect_gpu_system(environment: Mapping[str, str], root: Path = Path("/")) -> GpuSystem:
    """Inspect the PCI bus, the driver and its library without using a GPU.

    Args:
        environment: Environment variables.
        root: Root of the file system.
    """
    os_release = root / "etc" / "os-release"
    os_release_text = os_release.read_text(encoding="utf-8") if os_release.is_file() else ""
    entries = dict(line.split("=", 1) for line in os_release_text.splitlines() if "=" in line)
    nvidia_smi = shutil.which("nvidia-smi", path=environment.get("PATH"))
    return GpuSystem(
        num_pci_gpus=_count_pci_gpus(root),
        driver_version=_read_driver_version(root),
        driver_cuda_version=_read_driver_cuda_version(),
        has_nvidia_smi=nvidia_smi is not None,
        gpu_processes=_list_gpu_processes(nvidia_smi) if nvidia_smi else (),
        visible_devices=environment.get(CUDA_VISIBLE_DEVICES),
        os_id=entries.get("ID", "").strip('"'),
        is_container=(root / ".dockerenv").exists() or (root / "run" / ".containerenv").exists(),
        missing_build_tools=tuple(_find_missing_build_tools(environment)),
    )


def _find_missing_build_tools(environment: Mapping[str, str]) -> Iterator[str]:
    path = environment.get("PATH")
    if not environment.get("CC") and not any(
        shutil.which(compiler, path=path) for compiler in C_COMPILERS
    ):
        yield "C compiler"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        yield "Python.h"


def _count_pci_gpus(root: Path) -> int:
    devices = root / "sys" / "bus" / "pci" / "devices"
    vendor_files = [
        path for path in devices.glob("*/vendor") if path.read_text().strip() == NVIDIA_VENDOR_ID
    ]
    # 0x03: display controller. GPUs also have audio devices.
    device_classes = [path.with_name("class").read_text() for path in vendor_files]
    return sum(device_class.startswith("0x03") for device_class in device_classes)


def _read_driver_version(root: Path) -> str | None:
    path = root / "proc" / "driver" / "nvidia" / "version"
    if not path.is_file():
        return None
    words = path.read_text().splitlines()[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def _list_gpu_processes(nvidia_smi: str) -> tuple[str, ...]:
    command = [
        nvidia_smi,
        "--query-compute-apps=pid,process_name,used_memory",
        "--format=csv,noheader",
    ]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in completed.stdout.splitlines() if line.strip())


def _read_driver_cuda_version() -> tuple[int, int] | None:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0 or not version.value:
        return None
    return version.value // 1000, version.value % 1000 // 10


def probe_torch(extra_env: Mapping[str, str] | None = None) -> TorchInfo:
    """Import torch in a child process and query its GPUs.

    Args:
        extra_env: Additional environment variables of the child process.
    """
    result = probe_process.run_probe(
        "finesight.doctor.torch_probe", [], TORCH_TIMEOUT_S, extra_env or {}
    )
    try:
        payload: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return TorchInfo(error=result.error or "no output")
    gpus = [{**gpu, "capability": tuple(gpu["capability"])} for gpu in payload["gpus"]]
    return TorchInfo(
        version=payload["version"],
        module_file=payload["module_file"],
        cuda_version=payload["cuda_version"],
        arch_list=tuple(payload["arch_list"]),
        cuda_warnings=tuple(payload["cuda_warnings"]),
        gpus=tuple(GpuInfo(**gpu) for gpu in gpus),
        broken_packages=payload["broken_packages"],
    )


def check_gpus(
    gpu_system: GpuSystem,
    torch_info: TorchInfo,
    packages: InstalledPackages,
    environment: Mapping[str, str],
) -> list[Diagnosis]:
    """Check torch and each GPU, including the result of a small matrix product.

    Checks that depend on a failed one are omitted.
    """
    if torch_info.error:
        return [_diagnose_broken_torch(torch_info, environment)]
    build_target = f"CUDA {torch_info.cuda_version}" if torch_info.cuda_version else "a CPU"
    diagnoses = [make_ok("torch", f"torch {torch_info.version}, built for {build_target}")]
    diagnoses += [*_check_shadowed_torch(torch_info, packages), *_check_broken_packages(torch_info)]
    if torch_info.gpus:
        diagnoses += [
            diagnosis
            for index in range(len(torch_info.gpus))
            for diagnosis in _check_gpu(index, gpu_system, torch_info)
        ]
        return [
            *diagnoses,
            *_check_build_tools(gpu_system, packages),
            *_check_nvidia_smi(gpu_system),
        ]
    return [*diagnoses, _diagnose_no_gpu(gpu_system, torch_info)]


def _diagnose_broken_torch(torch_info: TorchInfo, environment: Mapping[str, str]) -> Diagnosis:
    reinstall = format_command(*PIP_COMMAND, "install", "--force-reinstall", "torch")
    path_variables = [name for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if environment.get(name)]
    unset_commands = (
        [f"unset {' '.join(path_variables)}   # keep it unset if this fixes the import"]
        if path_variables
        else []
    )
    return make_error(
        "torch-broken",
        f"torch fails to import: {torch_info.error}",
        why="training and inference require torch"
        + (
            f"; {' and '.join(path_variables)} may add incompatible libraries"
            if path_variables
            else ""
        ),
        remedy="\n".join([*unset_commands, reinstall]),
    )


def _check_shadowed_torch(
    torch_info: TorchInfo, packages: InstalledPackages
) -> Iterator[Diagnosis]:
    """Detect a torch module in another folder that hides the installed package."""
    installed = packages.by_name.get("torch")
    if not installed or not torch_info.module_file:
        return
    if not Path(torch_info.module_file).resolve().is_relative_to(installed[0].folder.resolve()):
        yield make_error(
            "torch-shadowed",
            f"torch is imported from {torch_info.module_file}, not from {installed[0].folder}",
            why="a folder in PYTHONPATH, or the current folder, shadows the installed package",
            remedy="unset PYTHONPATH; cd ~",
        )


def _check_broken_packages(torch_info: TorchInfo) -> Iterator[Diagnosis]:
    for name, error in (torch_info.broken_packages or {}).items():
        package = {"PIL": "pillow", "triton.language": "triton"}.get(name, name)
        yield make_error(
            "package-broken",
            f"{name} is installed but fails to import: {error}",
            why="its files are corrupt, of another version, or shadowed by a folder of the"
            " same name",
            remedy=format_command(
                *PIP_COMMAND, "install", "--force-reinstall", "--no-deps", package
            ),
        )


def _check_gpu(index: int, gpu_system: GpuSystem, torch_info: TorchInfo) -> list[Diagnosis]:
    gpu = torch_info.gpus[index]
    capability = ".".join(map(str, gpu.capability))
    if gpu.error:
        return [_diagnose_failing_gpu(index, gpu, torch_info)]
    bf16 = "bf16" if gpu.capability >= MIN_BF16_CAPABILITY else "fp16 (no bf16 support)"
    memory_text = f"{(gpu.free_bytes or 0) / 1e9:.3g} of {gpu.total_bytes / 1e9:.3g} GB free"
    diagnoses = [
        make_ok("gpu", f"GPU {index}: {gpu.name}, {capability}, {memory_text}, uses {bf16}")
    ]
    used_fraction = 1 - (gpu.free_bytes or 0) / gpu.total_bytes
    if used_fraction > MAX_USED_FRACTION:
        diagnoses.append(_diagnose_busy_gpu(index, used_fraction, gpu_system, torch_info))
    return diagnoses


def _check_build_tools(gpu_system: GpuSystem, packages: InstalledPackages) -> Iterator[Diagnosis]:
    """Check for the C compiler and headers that Triton needs to build its kernel launcher."""
    if not gpu_system.missing_build_tools or "triton" not in packages.by_name:
        return
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    install_commands = {
        "debian": f"sudo apt install gcc libc6-dev python{version}-dev",
        "ubuntu": f"sudo apt install gcc libc6-dev python{version}-dev",
        "fedora": f"sudo dnf install gcc python{version}-devel",
        "arch": "sudo pacman -S gcc",
    }
    yield make_error(
        "no-compiler",
        f"no {' and no '.join(gpu_system.missing_build_tools)}: Triton needs them to build"
        " its kernel launcher",
        why="GPU training and inference fail at the first kernel",
        remedy=install_commands.get(gpu_system.os_id, "conda install -c conda-forge c-compiler"),
    )


def _diagnose_busy_gpu(
    index: int, used_fraction: float, gpu_system: GpuSystem, torch_info: TorchInfo
) -> Diagnosis:
    """Report a GPU that other processes use, and suggest another one.

    The GPU with the most free memory is suggested.
    """
    free_bytes = [gpu.free_bytes or 0 for gpu in torch_info.gpus]
    least_used = free_bytes.index(max(free_bytes))
    remedy = f"export {CUDA_VISIBLE_DEVICES}={list_visible_devices(len(free_bytes))[least_used]}"
    if least_used == index:
        remedy = "nvidia-smi --query-compute-apps=pid,process_name,used_memory --format=csv"
    process_note = (
        f" ({'; '.join(gpu_system.gpu_processes[:4])})" if gpu_system.gpu_processes else ""
    )
    return make_warning(
        "gpu-busy",
        f"GPU {index}: other processes use {used_fraction:.0%} of its memory{process_note}",
        why="a run that fits an idle GPU may fail to start or run out of memory",
        remedy=remedy,
    )


def install_torch_command() -> str:
    """Return the shell command that installs torch for the driver of this machine.

    The package installer uv selects the build.
    """
    uv_install = (sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable)
    install = format_command(
        *uv_install, "--reinstall-package", "torch", "--torch-backend=auto", "torch>=2.11"
    )
    return f"{format_command(*PIP_COMMAND, 'install', 'uv')} && {install}"


def _diagnose_failing_gpu(index: int, gpu: GpuInfo, torch_info: TorchInfo) -> Diagnosis:
    capability = "".join(map(str, gpu.capability))
    lacks_kernels = torch_info.arch_list and not any(
        _supports_capability(arch, gpu.capability) for arch in torch_info.arch_list
    )
    if lacks_kernels or "no kernel image" in gpu.error:
        return make_error(
            "torch-wrong-build",
            f"GPU {index}: torch {torch_info.version} has no kernels for {gpu.name}"
            f" (sm_{capability})",
            why=f"the build supports {', '.join(torch_info.arch_list)}",
            remedy=install_torch_command(),
        )
    return make_error(
        "gpu-fails",
        f"GPU {index}: {gpu.name} fails: {gpu.error}",
        why="a product of two small matrices failed",
        remedy=f"nvidia-smi --query-gpu=index,name,ecc.errors.uncorrected.volatile.total,"
        f"memory.used --format=csv --id={index}",
    )


def _supports_capability(arch: str, capability: tuple[int, int]) -> bool:
    """Return whether code for an architecture runs on a GPU.

    Machine code (`sm_90`, `sm_90a`) runs on GPUs of the same major version with the same or a later
    minor version. Intermediate code (`compute_90`) runs on all later GPUs.

    Args:
        arch: Architecture as torch names it.
        capability: CUDA compute capability of the GPU.
    """
    code_kind, _, number = arch.partition("_")
    digits = "".join(filter(str.isdigit, number))
    if not digits:
        return False
    built_for = int(digits[:-1] or 0), int(digits[-1])
    if code_kind == "compute":
        return built_for <= capability
    return built_for[0] == capability[0] and built_for <= capability


def _check_nvidia_smi(gpu_system: GpuSystem) -> list[Diagnosis]:
    if gpu_system.has_nvidia_smi:
        return []
    return [
        make_warning(
            "no-nvidia-smi",
            "nvidia-smi is not in PATH",
            why="finesight works without it, but cannot list other processes on the GPUs",
            remedy="ls /usr/bin/nvidia-smi /usr/lib/wsl/lib/nvidia-smi /usr/local/nvidia/bin",
        )
    ]


def _diagnose_no_gpu(gpu_system: GpuSystem, torch_info: TorchInfo) -> Diagnosis:
    """Report the reason for which torch finds no GPU."""
    has_gpu = gpu_system.num_pci_gpus or gpu_system.driver_version or gpu_system.driver_cuda_version
    if not has_gpu:
        return make_ok(
            "no-gpu", "no NVIDIA GPU: training and inference run on the CPU, which is slow"
        )
    if gpu_system.driver_cuda_version is None:
        return _diagnose_missing_driver(gpu_system)
    driver_cuda = ".".join(map(str, gpu_system.driver_cuda_version))
    driver = f"driver {gpu_system.driver_version or '?'} (CUDA {driver_cuda})"
    if torch_info.cuda_version is None:
        return make_error(
            "torch-without-cuda",
            f"torch {torch_info.version} is a CPU build, but there is a GPU with {driver}",
            why="torch does not use the GPU",
            remedy=install_torch_command(),
        )
    if gpu_system.visible_devices is not None:
        return make_error(
            "gpus-hidden",
            f"{CUDA_VISIBLE_DEVICES} is {gpu_system.visible_devices!r}, and torch finds no GPU",
            why="the variable hides all GPUs, or names one that does not exist",
            remedy=f"unset {CUDA_VISIBLE_DEVICES}",
        )
    required = tuple(int(number) for number in torch_info.cuda_version.split(".")[:2])
    if gpu_system.driver_cuda_version[0] < required[0]:
        return make_error(
            "driver-outdated",
            f"{driver} is older than CUDA {torch_info.cuda_version} of torch",
            why="a driver supports CUDA up to its own major version",
            remedy=install_torch_command(),
        )
    return make_error(
        "gpu-unreachable",
        f"torch finds no GPU with {driver}:"
        f" {' '.join(torch_info.cuda_warnings)[:300] or 'no reason'}",
        why="common causes: a driver update that requires a restart, or nvidia-fabricmanager"
        " is not running on a system with several GPUs",
        remedy="sudo reboot",
    )


_DRIVER_COMMANDS: Mapping[str, Sequence[str]] = {
    "ubuntu": ("sudo ubuntu-drivers install", "sudo reboot"),
    "debian": ("sudo apt install nvidia-driver", "sudo reboot"),
    "fedora": ("sudo dnf install akmod-nvidia", "sudo reboot"),
    "arch": ("sudo pacman -S nvidia", "sudo reboot"),
}
"""Shell commands that install a GPU driver, by `ID` of /etc/os-release."""


def _diagnose_missing_driver(gpu_system: GpuSystem) -> Diagnosis:
    if gpu_system.is_container:
        return make_error(
            "no-driver",
            "an NVIDIA GPU is on the bus, but the driver library is missing in this container",
            why="torch cannot use the GPU",
            remedy="docker run --gpus all IMAGE",
        )
    steps = _DRIVER_COMMANDS.get(gpu_system.os_id, ("xdg-open https://www.nvidia.com/drivers",))
    return make_error(
        "no-driver",
        f"{max(gpu_system.num_pci_gpus, 1)} NVIDIA GPU(s) without a driver (libcuda.so.1"
        " is missing)",
        why="torch cannot use the GPU",
        remedy="\n".join(steps),
    )


def list_visible_devices(num_devices: int) -> list[str]:
    """Return the value of CUDA_VISIBLE_DEVICES that selects each visible GPU alone."""
    names = [
        name.strip() for name in os.environ.get(CUDA_VISIBLE_DEVICES, "").split(",") if name.strip()
    ]
    return names[:num_devices] if names else [str(index) for index in range(num_devices)]
