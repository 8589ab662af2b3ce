"""Check memory, disk space and process limits of the machine."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from finesight.doctor.diagnosis import Diagnosis, join_command, make_diagnosis
from finesight.host_memory import available_memory, num_allowed_cpus, total_memory

GB = 1_000_000_000
MIN_FREE_BYTES = 50_000_000
"""Free disk space of a write location below which an error is reported."""

RECOMMENDED_FREE_BYTES = {"models": 10 * GB, "temporary files": GB, "current folder": 2 * GB}
"""Free disk space of each write location below which a warning is reported.

A model with 2 billion parameters has 4.4 GB. Checkpoints of a small run have a few hundred MB.
"""

MIN_MEMORY_BYTES, LOW_MEMORY_BYTES = GB, 6 * GB
"""Available memory below which runs fail, or a model with 2 billion parameters does not fit."""

MIN_SHM_BYTES, LOW_SHM_BYTES = 16_000_000, 128_000_000
"""Free space of /dev/shm below which data loading always fails, or fails with large images."""

MIN_OPEN_FILES = 256

_VIRTUAL_FILE_SYSTEMS = (
    *("proc", "sysfs", "cgroup", "devpts", "mqueue", "squashfs", "iso9660", "devtmpfs", "tmpfs"),
)


@dataclass(frozen=True, slots=True)
class WriteLocation:
    """Folder to which finesight writes, which may not exist yet, and its purpose (`role`).

    Free space and permission are those of the nearest existing parent.
    """

    role: str
    folder: Path
    free_bytes: int
    is_writable: bool


@dataclass(frozen=True, slots=True)
class MachineInfo:
    """Hardware and limits of a machine. Sizes are in bytes, `free_shm` is that of /dev/shm.

    `largest_location` is the writable folder on the disk with the most free space.
    """

    python_version: str
    platform_name: str
    num_cpus: int
    total_memory: int
    available_memory: int
    free_shm: int | None
    max_open_files: int
    locations: tuple[WriteLocation, ...]
    largest_location: WriteLocation | None


def inspect_machine(environment: Mapping[str, str], working_dir: Path) -> MachineInfo:
    """Inspect the hardware and limits of this machine without writing files.

    Args:
        environment: Environment variables, which may set folders for models and temporary files.
        working_dir: Current folder.
    """
    shm_path, mounts = Path("/dev/shm"), Path("/proc/mounts")
    cache_home = environment.get("XDG_CACHE_HOME") or "~/.cache"
    hub_cache = environment.get("HF_HOME") or os.path.join(cache_home, "huggingface")
    temp_dir = environment.get("TMPDIR") or tempfile.gettempdir()
    folders = (Path(os.path.expanduser(hub_cache)), Path(temp_dir), working_dir)
    locations = tuple(map(inspect_location, RECOMMENDED_FREE_BYTES, folders))
    candidates = [*locations, inspect_location("home", Path.home())]
    for line in mounts.read_text().splitlines() if mounts.is_file() else ():
        _, folder, file_system_type, *_ = line.split()
        path = Path(folder.encode().decode("unicode_escape"))
        if file_system_type not in _VIRTUAL_FILE_SYSTEMS and path.is_dir():
            candidates.append(inspect_location("disk", path))
    writable = [location for location in candidates if location.is_writable]
    return MachineInfo(
        python_version=platform.python_version(),
        platform_name=f"{platform.system()} {platform.machine()}",
        num_cpus=num_allowed_cpus(),
        total_memory=total_memory(),
        available_memory=available_memory(),
        free_shm=shutil.disk_usage(shm_path).free if shm_path.is_dir() else None,
        max_open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locations=locations,
        largest_location=max(writable, key=lambda one: one.free_bytes, default=None),
    )


def inspect_location(role: str, folder: Path) -> WriteLocation:
    """Inspect the free disk space and permissions of a folder that may not exist yet."""
    folder = folder.absolute()
    existing = _find_existing_parent(folder)
    is_writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return WriteLocation(role, folder, shutil.disk_usage(existing).free, is_writable)


def _find_existing_parent(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_machine(machine: MachineInfo) -> Iterator[Diagnosis]:
    """Compare the memory, disk space and limits of a machine with recommended values."""
    memory, shm = machine.available_memory, machine.free_shm
    yield make_diagnosis(
        "machine",
        python=machine.python_version,
        platform=machine.platform_name,
        cpus=machine.num_cpus,
        free=memory / GB,
        total=machine.total_memory / GB,
    )
    for location in machine.locations:
        yield _check_location(location, machine.largest_location)
    if memory < LOW_MEMORY_BYTES:
        is_error = memory < MIN_MEMORY_BYTES
        yield make_diagnosis("low-memory", "error" if is_error else "warning", free=memory / GB)
    if shm is not None and shm < LOW_SHM_BYTES:
        is_error = shm < MIN_SHM_BYTES
        yield make_diagnosis(
            "low-shared-memory", "error" if is_error else "warning", free=shm / 1e6
        )
    if machine.max_open_files < MIN_OPEN_FILES:
        yield make_diagnosis("low-open-files-limit", limit=machine.max_open_files)


def _check_location(location: WriteLocation, largest: WriteLocation | None) -> Diagnosis:
    """Check a write location.

    The remedy selects a folder on the disk with the most free space, or lists the largest folders
    of a full disk.
    """
    text = f"{location.folder} ({location.role})"
    needed, free = RECOMMENDED_FREE_BYTES[location.role], location.free_bytes
    if location.is_writable and free >= needed:
        return make_diagnosis("disk", location=text, free=free / GB)
    if largest is None or largest.free_bytes < needed:
        remedy = largest_files_command(_find_existing_parent(location.folder))
    else:
        folder = join_command(largest.folder / "finesight")
        select = {"models": "export HF_HOME=", "temporary files": "export TMPDIR="}
        remedy = f"mkdir -p {folder} && {select.get(location.role, 'cd ')}{folder}"
    if not location.is_writable:
        return make_diagnosis("not-writable", location=text, remedy=remedy)
    values = {"location": text, "free": free / GB, "needed": needed / GB, "remedy": remedy}
    is_error = free < MIN_FREE_BYTES
    return make_diagnosis("disk-full", "error" if is_error else "warning", **values)


def largest_files_command(folder: Path) -> str:
    """Return the shell command that lists the largest folders within a folder."""
    return f"du -xh --max-depth=2 {join_command(folder)} | sort -h | tail -n 20"
