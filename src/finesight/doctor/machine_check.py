"""Check memory, disk space and process limits of the machine."""

from __future__ import annotations

import os
import platform
import resource
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finesight.doctor.diagnosis import Diagnosis, DiagnosisSeverity, make_diagnosis
from finesight.host_memory import available_memory, num_allowed_cpus, total_memory

GB = 1_000_000_000
MIN_FREE_BYTES = 50_000_000
"""Minimum free disk space of each write location in bytes. Less is an error."""

RECOMMENDED_FREE_BYTES = {"models": 10 * GB, "temporary files": GB, "current folder": 2 * GB}
"""Recommended free disk space of each write location in bytes. Less is a warning.

A model with 2 billion parameters has 4.4 GB. Checkpoints of a small run have a few hundred MB.
"""

MIN_MEMORY_BYTES, LOW_MEMORY_BYTES = GB, 6 * GB
"""Available memory in bytes below which an error or a warning is reported.

Below the first value, runs fail. Below the second, a model with 2 billion parameters does not fit.
"""

MIN_SHM_BYTES, LOW_SHM_BYTES = 16_000_000, 128_000_000
"""Free space of /dev/shm in bytes below which an error or a warning is reported.

Below the first value, data loading always fails. Below the second, it fails with large images.
"""

MIN_OPEN_FILES = 256
"""Minimum limit of the system on open files per process."""

_VIRTUAL_FILE_SYSTEMS = (
    *("proc", "sysfs", "cgroup", "devpts", "mqueue", "squashfs", "iso9660", "devtmpfs", "tmpfs"),
)


@dataclass(frozen=True, slots=True)
class WriteLocation:
    """Folder to which finesight writes. It may not exist yet.

    Attributes:
        role: Purpose of the folder, such as `models`.
        folder: Path of the folder.
        free_bytes: Free disk space of the folder or its nearest existing parent.
        is_writable: True if the folder or its nearest existing parent is writable.
    """

    role: str
    folder: Path
    free_bytes: int
    is_writable: bool


@dataclass(frozen=True, slots=True)
class MachineInfo:
    """Hardware and limits of a machine. Sizes are in bytes.

    Attributes:
        num_cpus: Number of CPU cores that this process may use.
        free_shm: Free space of /dev/shm. None if it does not exist.
        max_open_files: Limit on open files per process.
        locations: Folders to which finesight writes.
        largest_location: Writable folder on the disk with the most free space.
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
    shm_path = Path("/dev/shm")
    cache_home = environment.get("XDG_CACHE_HOME") or "~/.cache"
    hub_cache = environment.get("HF_HOME") or os.path.join(cache_home, "huggingface")
    locations = [
        inspect_location("models", Path(os.path.expanduser(hub_cache))),
        inspect_location(
            "temporary files", Path(environment.get("TMPDIR") or tempfile.gettempdir())
        ),
        inspect_location("current folder", working_dir),
    ]
    return MachineInfo(
        python_version=platform.python_version(),
        platform_name=f"{platform.system()} {platform.machine()}",
        num_cpus=num_allowed_cpus(),
        total_memory=total_memory(),
        available_memory=available_memory(),
        free_shm=shutil.disk_usage(shm_path).free if shm_path.is_dir() else None,
        max_open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locations=tuple(locations),
        largest_location=_find_largest_location(locations),
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


def _find_largest_location(locations: Sequence[WriteLocation]) -> WriteLocation | None:
    candidates = [*locations, inspect_location("home", Path.home())]
    mounts = Path("/proc/mounts")
    for line in mounts.read_text().splitlines() if mounts.is_file() else ():
        _, folder, file_system_type, *_ = line.split()
        path = Path(folder.encode().decode("unicode_escape"))
        if file_system_type not in _VIRTUAL_FILE_SYSTEMS and path.is_dir():
            candidates.append(inspect_location("disk", path))
    writable = [location for location in candidates if location.is_writable]
    return max(writable, key=lambda location: location.free_bytes, default=None)


def check_machine(machine: MachineInfo) -> Iterator[Diagnosis]:
    """Compare the memory, disk space and limits of a machine with recommended values."""
    free_memory = machine.available_memory
    yield make_diagnosis(
        "machine",
        python=machine.python_version,
        platform=machine.platform_name,
        cpus=machine.num_cpus,
        free=free_memory / GB,
        total=machine.total_memory / GB,
    )
    for location in machine.locations:
        yield _check_location(location, machine.largest_location)
    if free_memory < LOW_MEMORY_BYTES:
        is_low = free_memory < MIN_MEMORY_BYTES
        severity: DiagnosisSeverity = "error" if is_low else "warning"
        yield make_diagnosis("low-memory", severity, free=free_memory / GB)
    if machine.free_shm is not None and machine.free_shm < LOW_SHM_BYTES:
        severity = "error" if machine.free_shm < MIN_SHM_BYTES else "warning"
        yield make_diagnosis("low-shared-memory", severity, free=machine.free_shm / 1e6)
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
        folder = shlex.join([str(largest.folder / "finesight")])
        select = {"models": "export HF_HOME=", "temporary files": "export TMPDIR="}
        remedy = f"mkdir -p {folder} && {select.get(location.role, 'cd ')}{folder}"
    if not location.is_writable:
        return make_diagnosis("not-writable", location=text, remedy=remedy)
    severity: DiagnosisSeverity = "error" if free < MIN_FREE_BYTES else "warning"
    values = {"location": text, "free": free / GB, "needed": needed / GB, "remedy": remedy}
    return make_diagnosis("disk-full", severity, **values)


def largest_files_command(folder: Path) -> str:
    """Return the shell command that lists the largest folders within a folder."""
    return f"du -xh --max-depth=2 {shlex.join([str(folder)])} | sort -h | tail -n 20"
