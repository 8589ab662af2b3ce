"""Check the machine: memory, disks, limits, environment variables, NVIDIA GPUs and torch.

`python -m finesight.doctor.machine_check` prints the properties of torch and its GPUs as JSON: the
import of torch may crash, so that a child process probes them.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from finesight.doctor.diagnosis import Diagnosis, join_command, make_diagnosis
from finesight.doctor.package_check import InstalledPackages, install_command
from finesight.host_memory import available_memory, num_allowed_cpus, total_memory

GB = 1_000_000_000
MIN_FREE_BYTES = 50_000_000
"""Free disk space of a write location below which an error is reported."""

_HOST = r"([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?"
_HF_TOKEN = ("token", r"hf_[!-~]+(?<!['\"])", "hf_ and letters, without quotes or spaces")
_VARIABLES: Mapping[str, tuple[str, str, str]] = {
    **dict.fromkeys(
        ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
        ("proxy", rf"(https?|socks5h?)://([^@\s]*@)?{_HOST}/?", "http://HOST:PORT"),
    ),
    "HF_ENDPOINT": ("endpoint", rf"https?://{_HOST}(/\S*)?", "https://HOST"),
    # finesight adds the scheme for ModelScope; huggingface_hub uses its variable unchanged.
    "MODELSCOPE_ENDPOINT": ("endpoint", rf"(https?://)?{_HOST}(/\S*)?", "https://HOST"),
    **dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"), _HF_TOKEN),
    "MODELSCOPE_API_TOKEN": ("token", r"(?!Bearer|['\"])[!-~]+", "a token without quotes"),
}
"""Kind, regular expression and expected form of the environment variables."""

COMPILED_PACKAGES = ("numpy", "PIL", "safetensors", "tokenizers", "triton.language", "bitsandbytes")
"""Modules with compiled code that may be incompatible. Missing ones are ignored."""

CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def check_machine(environment: Mapping[str, str], working_dir: Path) -> Iterator[Diagnosis]:
    """Compare memory, disk space and limits of this machine with recommended values.

    Environment variables may set the folders for models and temporary files.
    """
    memory = available_memory()
    yield make_diagnosis(
        "machine",
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        cpus=num_allowed_cpus(),
        free=memory / GB,
        total=total_memory() / GB,
    )
    cache_home = environment.get("XDG_CACHE_HOME") or "~/.cache"
    hub_cache = environment.get("HF_HOME") or os.path.join(cache_home, "huggingface")
    temp_dir = environment.get("TMPDIR") or tempfile.gettempdir()
    # A model with 2 billion parameters has 4.4 GB, checkpoints of a small run a few hundred MB.
    yield _check_location("models", Path(hub_cache).expanduser(), 10 * GB)
    yield _check_location("temporary files", Path(temp_dir), GB)
    yield _check_location("current folder", working_dir, 2 * GB)
    shm_path = Path("/dev/shm")
    shm = GB
    if shm_path.is_dir():
        shm = shutil.disk_usage(shm_path).free
    max_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for code, value, minimum, recommended in (
        ("low-memory", memory, GB, 6 * GB),
        ("low-shared-memory", shm, 16_000_000, 128_000_000),
        ("low-open-files-limit", max_files, 256, 256),
    ):
        if value < recommended:
            yield make_diagnosis(code, value < minimum, free=value / GB, limit=value)


def _check_location(role: str, folder: Path, needed: int) -> Diagnosis:
    """Check free space and permissions of a folder, which may not exist yet."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    values = {"location": f"{folder} ({role})", "free": free / GB, "needed": needed / GB}
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        remedy = join_command("ls", "-ld", existing)
        return make_diagnosis("not-writable", **values, remedy=remedy)
    if free >= needed:
        return make_diagnosis("disk", **values)
    remedy = f"du -xh --max-depth=2 {join_command(existing)} | sort -h | tail -n 20"
    return make_diagnosis("disk-full", free < MIN_FREE_BYTES, **values, remedy=remedy)


def check_environment(environment: Mapping[str, str]) -> list[Diagnosis]:
    """Check the environment variables. Diagnoses never contain values, which may be secret."""
    diagnoses = []
    for name, value in environment.items():
        kind, pattern, expected = _VARIABLES.get(name, ("", "", ""))
        if not value:
            continue
        if kind and not re.fullmatch(pattern, value):
            diagnoses.append(make_diagnosis(f"{kind}-malformed", name=name, expected=expected))
        elif value.startswith("socks5") and kind == "proxy":
            if importlib.util.find_spec("socksio") is None:
                install = install_command("socksio")
                diagnoses.append(make_diagnosis("proxy-socks", name=name, install=install))
        elif name in CERTIFICATE_VARIABLES and not Path(value).expanduser().exists():
            diagnoses.append(make_diagnosis("certificates-missing", name=name, value=value))
        elif name == "HF_HUB_OFFLINE" and value.upper() in ("1", "ON", "YES", "TRUE"):
            diagnoses.append(make_diagnosis("offline"))
    return diagnoses or [make_diagnosis("environment")]


class GpuSystem(NamedTuple):
    """GPU information from the operating system, collected without torch.

    `driver_version` is that of the loaded kernel module. `driver_cuda_version` is the newest CUDA
    version of the driver library. Both are None if there is no driver.
    """

    num_pci_gpus: int = 0
    driver_version: str | None = None
    driver_cuda_version: tuple[int, int] | None = None
    is_container: bool = False
    missing_build_tools: tuple[str, ...] = ()


class GpuInfo(NamedTuple):
    """GPU as seen by torch, with the error of a test matrix product or ""."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    error: str


class TorchInfo(NamedTuple):
    """Installed torch and its GPUs, or the error of importing torch.

    `cuda_version` is None for a CPU build. `broken_packages` are other packages that fail to
    import, with the error.
    """

    version: str = ""
    module_file: str = ""
    cuda_version: str | None = None
    arch_list: tuple[str, ...] = ()
    cuda_warnings: tuple[str, ...] = ()
    gpus: tuple[GpuInfo, ...] = ()
    broken_packages: Mapping[str, str] = {}
    error: str = ""


def inspect_gpu_system(environment: Mapping[str, str], root: Path = Path("/")) -> GpuSystem:
    """Inspect the PCI bus, the driver and its library without using a GPU."""
    return GpuSystem(
        driver_version=_read_driver_version(root / "proc" / "driver" / "nvidia" / "version"),
        num_pci_gpus=_count_pci_gpus(root / "sys" / "bus" / "pci" / "devices"),
        missing_build_tools=_list_missing_build_tools(environment),
        driver_cuda_version=_read_driver_cuda_version(),
        is_container=(root / ".dockerenv").exists() or (root / "run" / ".containerenv").exists(),
    )


def _read_driver_version(file: Path) -> str | None:
    """Return the version of the loaded kernel module; None without one."""
    if not file.is_file():
        return None
    lines = file.read_text().splitlines()
    if not lines or not lines[0].strip():
        return None
    words = lines[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def _count_pci_gpus(devices: Path) -> int:
    # 0x10de: NVIDIA. 0x03: display controller, because GPUs also have audio devices.
    count = 0
    for file in devices.glob("*/vendor"):
        if file.read_text().strip() == "0x10de":
            device_class = file.with_name("class").read_text()
            count += device_class.startswith("0x03")
    return count


def _list_missing_build_tools(environment: Mapping[str, str]) -> tuple[str, ...]:
    """List the tools that Triton needs and that are not installed."""
    missing = []
    # Triton searches for these compilers if CC is not set.
    compilers = (shutil.which(name, path=environment.get("PATH")) for name in ("gcc", "clang"))
    if not (environment.get("CC") or any(compilers)):
        missing.append("C compiler")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        missing.append("Python.h")
    return tuple(missing)


def _read_driver_cuda_version() -> tuple[int, int] | None:
    with suppress(OSError):
        library = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int(0)
        if library.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
            return version.value // 1000, version.value % 1000 // 10
    return None


def probe_torch(extra_env: Mapping[str, str] | None = None, timeout_s: float = 120.0) -> TorchInfo:
    """Import torch in a child process, which may crash or hang, and query its GPUs."""
    command = [sys.executable, "-m", "finesight.doctor.machine_check"]
    try:
        completed = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env={**os.environ, **(extra_env or {})},
        )
    except subprocess.TimeoutExpired:
        return TorchInfo(error=f"timed out after {timeout_s:g} s")
    if completed.returncode:
        error = (completed.stderr.strip() or "no output").splitlines()[-1].strip()[:300]
        if completed.returncode < 0:
            error = f"killed by {signal.Signals(-completed.returncode).name}: {error}"
        return TorchInfo(error=error)
    return TypeAdapter(TorchInfo).validate_json(completed.stdout.splitlines()[-1])


def _query_torch() -> TorchInfo:
    """Return the properties of torch and its GPUs."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    num_gpus = 0
    arch_list: tuple[str, ...] = ()
    cuda_warnings: tuple[str, ...] = ()
    if available:
        num_gpus = torch.cuda.device_count()
        arch_list = tuple(torch.cuda.get_arch_list())
    else:
        cuda_warnings = tuple(str(warning.message) for warning in caught)
    return TorchInfo(
        str(torch.__version__),
        torch.__file__ or "",
        torch.version.cuda,
        arch_list=arch_list,
        cuda_warnings=cuda_warnings,
        gpus=tuple(map(_probe_gpu, range(num_gpus))),
        broken_packages=_find_broken_packages(),
    )


def _probe_gpu(index: int) -> GpuInfo:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free_bytes = 0
    error = ""
    try:
        free_bytes = torch.cuda.mem_get_info(index)[0]
        ones = torch.ones(16, 16, device=f"cuda:{index}")
        if (ones @ ones)[0, 0].item() != 16:
            error = "a product of two matrices is incorrect"
    except (RuntimeError, AssertionError) as failure:
        error = str(failure).strip().splitlines()[0]
    capability = (properties.major, properties.minor)
    return GpuInfo(properties.name, capability, properties.total_memory, free_bytes, error)


def _find_broken_packages() -> dict[str, str]:
    """Return the installed modules that fail to import, each with its error."""
    broken = {}
    for name in COMPILED_PACKAGES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                broken[name] = str(error)
        except Exception as error:  # packages may raise any exception
            broken[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    return broken


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
        install = install_command("--force-reinstall", "torch")
        values = {"error": torch_info.error, "variables": " ".join(variables), "install": install}
        code = "torch-broken"
        if variables:
            code = "torch-broken.path"
        yield make_diagnosis(code, **values)
        return
    target = "a CPU"
    if torch_info.cuda_version:
        target = f"CUDA {torch_info.cuda_version}"
    yield make_diagnosis("torch", version=torch_info.version, target=target)
    module_file = Path(torch_info.module_file).resolve()
    for package in packages.get("torch", ())[:1]:
        folder = Path(str(package.locate_file("")))
        if not module_file.is_relative_to(folder.resolve()):
            yield make_diagnosis("torch-shadowed", file=module_file, folder=folder)
    for name, error in torch_info.broken_packages.items():
        package_name = {"PIL": "pillow", "triton.language": "triton"}.get(name, name)
        install = install_command("--force-reinstall", "--no-deps", package_name)
        yield make_diagnosis("package-broken", name=name, error=error, install=install)
    if not torch_info.gpus:
        yield _diagnose_no_gpu(gpu_system, torch_info, environment)
        return
    for index in range(len(torch_info.gpus)):
        yield from _check_gpu(index, torch_info)
    if gpu_system.missing_build_tools and "triton" in packages:
        missing = " and no ".join(gpu_system.missing_build_tools)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        yield make_diagnosis("no-compiler", missing=missing, version=version)


def _check_gpu(index: int, torch_info: TorchInfo) -> Iterator[Diagnosis]:
    gpu = torch_info.gpus[index]
    used_fraction = 1 - gpu.free_bytes / gpu.total_bytes
    values = {
        **gpu._asdict(),
        "index": index,
        "version": torch_info.version,
        "capability": ".".join(map(str, gpu.capability)),
        "architectures": ", ".join(torch_info.arch_list),
        "free": gpu.free_bytes / GB,
        "total": gpu.total_bytes / GB,
        "used": used_fraction,
        "precision": "bf16" if gpu.capability >= (8, 0) else "fp16 (no bf16 support)",
        "install": _install_torch_command(),
    }
    if gpu.error:
        is_wrong_build = "no kernel image" in gpu.error
        code = "torch-wrong-build" if is_wrong_build else "gpu-fails"
        yield make_diagnosis(code, **values)
        return
    yield make_diagnosis("gpu", **values)
    if used_fraction > 0.1:
        yield make_diagnosis("gpu-busy", **values)


def _install_torch_command() -> str:
    """Return the shell command that installs the torch build that uv selects for the driver."""
    uv_install = (sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable)
    options = ("--reinstall-package", "torch", "--torch-backend=auto", "torch>=2.11")
    return f"{install_command('uv')} && {join_command(*uv_install, *options)}"


def _diagnose_no_gpu(
    gpu_system: GpuSystem, torch_info: TorchInfo, environment: Mapping[str, str]
) -> Diagnosis:
    """Report the reason for which torch finds no GPU."""
    cuda_version = gpu_system.driver_cuda_version
    driver_version = gpu_system.driver_version
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if not (gpu_system.num_pci_gpus or driver_version or cuda_version):
        code = "no-gpu"
    elif cuda_version is None:
        code = "no-driver.container" if gpu_system.is_container else "no-driver"
    elif torch_info.cuda_version is None:
        code = "torch-without-cuda"
    elif visible is not None:
        code = "gpus-hidden"
    elif cuda_version[0] < int(torch_info.cuda_version.partition(".")[0]):
        code = "driver-outdated"
    else:
        code = "gpu-unreachable"
    return make_diagnosis(
        code,
        count=max(gpu_system.num_pci_gpus, 1),
        driver=f"driver {driver_version or '?'} (CUDA {'.'.join(map(str, cuda_version or '?'))})",
        version=torch_info.version,
        cuda=torch_info.cuda_version,
        visible=visible,
        install=_install_torch_command(),
        reason=" ".join(torch_info.cuda_warnings)[:300] or "no reason",
    )


if __name__ == "__main__":
    print(TypeAdapter(TorchInfo).dump_json(_query_torch()).decode())
