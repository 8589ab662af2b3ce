"""Check NVIDIA GPUs, their driver, the build of torch, and a short training on each device."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finesight.doctor import probes
from finesight.doctor.diagnosis import Diagnosis, join_command, make_diagnosis
from finesight.doctor.machine_check import GB
from finesight.doctor.package_check import InstalledPackages, install_command

TORCH_TIMEOUT_S = 120.0
"""Time limit for importing torch, which may be on a slow disk."""

SMOKE_TEST_TIMEOUT_S = 180.0
"""Time limit of the smoke test per device: about 10 s, longer if kernels are compiled."""

SMOKE_TEST_STAGES = ("load", "data", "train", "generate")

MIN_BF16_CAPABILITY = (8, 0)
"""Minimum CUDA compute capability for bf16 matrix products."""

MAX_USED_FRACTION = 0.1
"""Fraction of GPU memory in use by other processes above which a warning is given."""

CUDA_VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"

_DRIVER_COMMANDS = {
    "ubuntu": "sudo ubuntu-drivers install\nsudo reboot",
    "debian": "sudo apt install nvidia-driver\nsudo reboot",
    "fedora": "sudo dnf install akmod-nvidia\nsudo reboot",
    "arch": "sudo pacman -S nvidia\nsudo reboot",
}
"""Shell commands that install a GPU driver, by `ID` of /etc/os-release."""

_COMPILER_COMMANDS = {
    **dict.fromkeys(("debian", "ubuntu"), "sudo apt install gcc libc6-dev python{}-dev"),
    "fedora": "sudo dnf install gcc python{}-devel",
    "arch": "sudo pacman -S gcc",
    "": "conda install -c conda-forge c-compiler",
}
"""Shell commands that install a compiler and Python headers, by `ID` of /etc/os-release."""


@dataclass(frozen=True, slots=True)
class GpuSystem:
    """GPU information from the operating system, collected without torch.

    Attributes:
        driver_version: Version of the loaded kernel module. None if no driver is loaded.
        driver_cuda_version: Newest CUDA version (major, minor) that the driver supports. None
            without the driver library.
        visible_devices: Value of CUDA_VISIBLE_DEVICES. None if unset.
        os_id: Field `ID` of /etc/os-release.
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
    """GPU as seen by torch.

    Attributes:
        capability: CUDA compute capability, major and minor.
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
        cuda_version: CUDA version of the build. None for a CPU build.
        arch_list: GPU architectures for which the build has kernels.
        cuda_warnings: Warnings of torch about unavailable GPUs.
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
    path = environment.get("PATH")
    os_release = root / "etc" / "os-release"
    os_release_text = os_release.read_text(encoding="utf-8") if os_release.is_file() else ""
    entries = dict(line.split("=", 1) for line in os_release_text.splitlines() if "=" in line)
    driver_file = root / "proc" / "driver" / "nvidia" / "version"
    driver_words = driver_file.read_text().splitlines()[0].split() if driver_file.is_file() else []
    versions = (word for word in driver_words if word[0].isdigit() and "." in word)
    # 0x10de: NVIDIA. 0x03: display controller, because GPUs also have audio devices.
    vendor_files = (root / "sys" / "bus" / "pci" / "devices").glob("*/vendor")
    nvidia_files = [file for file in vendor_files if file.read_text().strip() == "0x10de"]
    classes = [file.with_name("class").read_text() for file in nvidia_files]
    nvidia_smi = shutil.which("nvidia-smi", path=path)
    missing_tools = []
    # Triton searches for these compilers if CC is not set.
    if not environment.get("CC") and not any(shutil.which(c, path=path) for c in ("gcc", "clang")):
        missing_tools.append("C compiler")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing_tools.append("Python.h")
    return GpuSystem(
        num_pci_gpus=sum(device_class.startswith("0x03") for device_class in classes),
        driver_version=next(versions, "unknown") if driver_words else None,
        driver_cuda_version=_read_driver_cuda_version(),
        has_nvidia_smi=nvidia_smi is not None,
        gpu_processes=_list_gpu_processes(nvidia_smi) if nvidia_smi else (),
        visible_devices=environment.get(CUDA_VISIBLE_DEVICES),
        os_id=entries.get("ID", "").strip('"'),
        is_container=(root / ".dockerenv").exists() or (root / "run" / ".containerenv").exists(),
        missing_build_tools=tuple(missing_tools),
    )


def _list_gpu_processes(nvidia_smi: str) -> tuple[str, ...]:
    query = "--query-compute-apps=pid,process_name,used_memory"
    command = [nvidia_smi, query, "--format=csv,noheader"]
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
    arguments = ["-m", probes.__name__, "torch"]
    result = probes.run_probe(arguments, TORCH_TIMEOUT_S, extra_env or {})
    try:
        payload: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return TorchInfo(error=result.error or "no output")
    gpus = [GpuInfo(**gpu | {"capability": tuple(gpu["capability"])}) for gpu in payload["gpus"]]
    lists = {name: tuple(payload[name]) for name in ("arch_list", "cuda_warnings")}
    return TorchInfo(**payload | lists | {"gpus": tuple(gpus)})


def check_gpus(
    gpu_system: GpuSystem,
    torch_info: TorchInfo,
    packages: InstalledPackages,
    environment: Mapping[str, str],
) -> Iterator[Diagnosis]:
    """Check torch and each GPU, including the result of a small matrix product.

    Checks that depend on a failed one are omitted.
    """
    if torch_info.error:
        variables = [name for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if environment.get(name)]
        commands = install_command("--force-reinstall", "torch")
        path_note = ""
        if variables:
            path_note = f"; {' and '.join(variables)} may add incompatible libraries"
            unset = f"unset {' '.join(variables)}   # keep it unset if this fixes the import"
            commands = f"{unset}\n{commands}"
        values = {"error": torch_info.error, "path_note": path_note, "commands": commands}
        yield make_diagnosis("torch-broken", **values)
        return
    target = f"CUDA {torch_info.cuda_version}" if torch_info.cuda_version else "a CPU"
    yield make_diagnosis("torch", version=torch_info.version, target=target)
    installed = packages.by_name.get("torch")
    module_file = Path(torch_info.module_file).resolve()
    if installed and torch_info.module_file:
        folder = installed[0].folder
        if not module_file.is_relative_to(folder.resolve()):
            yield make_diagnosis("torch-shadowed", file=torch_info.module_file, folder=folder)
    for name, error in (torch_info.broken_packages or {}).items():
        package = {"PIL": "pillow", "triton.language": "triton"}.get(name, name)
        install = install_command("--force-reinstall", "--no-deps", package)
        yield make_diagnosis("package-broken", name=name, error=error, install=install)
    if not torch_info.gpus:
        yield _diagnose_no_gpu(gpu_system, torch_info)
        return
    for index in range(len(torch_info.gpus)):
        yield from _check_gpu(index, gpu_system, torch_info)
    if gpu_system.missing_build_tools and "triton" in packages.by_name:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        yield make_diagnosis(
            "no-compiler",
            missing=" and no ".join(gpu_system.missing_build_tools),
            install=_COMPILER_COMMANDS.get(gpu_system.os_id, _COMPILER_COMMANDS[""]).format(
                version
            ),
        )
    if not gpu_system.has_nvidia_smi:
        yield make_diagnosis("no-nvidia-smi")


def _check_gpu(index: int, gpu_system: GpuSystem, torch_info: TorchInfo) -> Iterator[Diagnosis]:
    """Check a GPU. For one that other processes use, the one with most free memory is suggested."""
    gpu = torch_info.gpus[index]
    if gpu.error:
        runs = any(_supports_capability(arch, gpu.capability) for arch in torch_info.arch_list)
        lacks_kernels = bool(torch_info.arch_list) and not runs
        yield make_diagnosis(
            "torch-wrong-build" if lacks_kernels or "no kernel image" in gpu.error else "gpu-fails",
            index=index,
            name=gpu.name,
            error=gpu.error,
            version=torch_info.version,
            capability="".join(map(str, gpu.capability)),
            architectures=", ".join(torch_info.arch_list),
            install=install_torch_command(),
        )
        return
    free_bytes = [one.free_bytes or 0 for one in torch_info.gpus]
    yield make_diagnosis(
        "gpu",
        index=index,
        name=gpu.name,
        capability=".".join(map(str, gpu.capability)),
        free=free_bytes[index] / GB,
        total=gpu.total_bytes / GB,
        precision="bf16" if gpu.capability >= MIN_BF16_CAPABILITY else "fp16 (no bf16 support)",
    )
    used_fraction = 1 - free_bytes[index] / gpu.total_bytes
    if used_fraction > MAX_USED_FRACTION:
        least_used = free_bytes.index(max(free_bytes))
        device = list_visible_devices(len(free_bytes))[least_used]
        query = "nvidia-smi --query-compute-apps=pid,process_name,used_memory --format=csv"
        processes = "; ".join(gpu_system.gpu_processes[:4])
        yield make_diagnosis(
            "gpu-busy",
            index=index,
            used=used_fraction,
            processes=f" ({processes})" if processes else "",
            remedy=query if least_used == index else f"export {CUDA_VISIBLE_DEVICES}={device}",
        )


def _supports_capability(arch: str, capability: tuple[int, int]) -> bool:
    """Return whether code for an architecture runs on a GPU.

    Machine code (`sm_90`, `sm_90a`) runs on GPUs of the same major version with the same or a later
    minor version. Intermediate code (`compute_90`) runs on all later GPUs.
    """
    code_kind, _, number = arch.partition("_")
    digits = "".join(filter(str.isdigit, number))
    if not digits:
        return False
    built_for = int(digits[:-1] or 0), int(digits[-1])
    is_compatible = code_kind == "compute" or built_for[0] == capability[0]
    return is_compatible and built_for <= capability


def install_torch_command() -> str:
    """Return the shell command that installs the build of torch for the driver, selected by uv."""
    uv_install = (sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable)
    options = ("--reinstall-package", "torch", "--torch-backend=auto", "torch>=2.11")
    return f"{install_command('uv')} && {join_command(*uv_install, *options)}"


def _diagnose_no_gpu(gpu_system: GpuSystem, torch_info: TorchInfo) -> Diagnosis:
    """Report the reason for which torch finds no GPU."""
    cuda_version = gpu_system.driver_cuda_version
    if not (gpu_system.num_pci_gpus or gpu_system.driver_version or cuda_version):
        return make_diagnosis("no-gpu")
    if cuda_version is None:
        if gpu_system.is_container:
            return make_diagnosis("no-driver.container")
        download = "xdg-open https://www.nvidia.com/drivers"
        install = _DRIVER_COMMANDS.get(gpu_system.os_id, download)
        return make_diagnosis("no-driver", count=max(gpu_system.num_pci_gpus, 1), install=install)
    version = ".".join(map(str, cuda_version))
    values = {
        "driver": f"driver {gpu_system.driver_version or '?'} (CUDA {version})",
        "version": torch_info.version,
        "cuda": torch_info.cuda_version,
        "visible": gpu_system.visible_devices,
        "install": install_torch_command(),
        "reason": " ".join(torch_info.cuda_warnings)[:300] or "no reason",
    }
    if torch_info.cuda_version is None:
        return make_diagnosis("torch-without-cuda", **values)
    if gpu_system.visible_devices is not None:
        return make_diagnosis("gpus-hidden", **values)
    is_outdated = cuda_version[0] < int(torch_info.cuda_version.partition(".")[0])
    return make_diagnosis("driver-outdated" if is_outdated else "gpu-unreachable", **values)


def list_visible_devices(num_devices: int) -> list[str]:
    """Return the value of CUDA_VISIBLE_DEVICES that selects each visible GPU alone."""
    names = [name.strip() for name in os.environ.get(CUDA_VISIBLE_DEVICES, "").split(",")]
    return [*filter(None, names)][:num_devices] or [str(index) for index in range(num_devices)]


def check_smoke_tests(torch_info: TorchInfo) -> Iterator[Diagnosis]:
    """Run the smoke test on the CPU and on each GPU. Temporary files are deleted."""
    names = list_visible_devices(len(torch_info.gpus))
    # GPUs are tested in parallel, each in its own process.
    with ThreadPoolExecutor(max(1, len(names))) as pool:
        results = [("CPU", *_run_smoke_test(None))]
        gpu_results = zip(names, pool.map(_run_smoke_test, names), strict=True)
        working = []
        for index, (name, (stages, error)) in enumerate(gpu_results):
            results.append((f"GPU {index}", stages, error))
            working += [] if error else [name]
    for device, stages, error in results:
        advice = "exclude this GPU from runs"
        remedy = f"export {CUDA_VISIBLE_DEVICES}={','.join(working) or '-1'}"
        if device == "CPU":
            advice = "run the command for the full error"
            remedy = "finesight quickstart --out trial"
        yield make_diagnosis(
            "smoke-test.failed" if error else "smoke-test",
            device=device,
            passed="; ".join(stages) or "no stage",
            stage=SMOKE_TEST_STAGES[min(len(stages), len(SMOKE_TEST_STAGES) - 1)],
            error=error,
            advice=advice,
            remedy=remedy,
        )


def _run_smoke_test(visible_device: str | None) -> tuple[list[str], str]:
    """Return the stages that have passed on a GPU, or on the CPU for None, and the error."""
    with tempfile.TemporaryDirectory(prefix="finesight-doctor-") as folder:
        # Use temporary caches and no hub.
        extra_env = {"HF_ASSETS_CACHE": str(Path(folder) / "assets"), "HF_HUB_OFFLINE": "1"}
        if visible_device is not None:
            extra_env[CUDA_VISIBLE_DEVICES] = visible_device
        device_type = "cpu" if visible_device is None else "cuda"
        arguments = ["-m", probes.__name__, "smoke-test", device_type, folder]
        result = probes.run_probe(arguments, SMOKE_TEST_TIMEOUT_S, extra_env)
    stages = []
    for line in result.stdout.splitlines():
        if line.startswith("{"):
            stage = json.loads(line)
            what = f" ({stage['what']})" if stage["what"] else ""
            stages.append(f"{stage['stage']} {stage['seconds']:.1f} s{what}")
    return stages, result.error
