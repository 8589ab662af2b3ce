"""Check memory, disk space and process limits of the machine."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finesight.doctor.diagnosis import Diagnosis, format_command, make_error, make_ok, make_warning
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
    "proc",
    "sysfs",
    "cgroup",
    "devpts",
    "mqueue",
    "squashfs",
    "iso9660",
    "devtmpfs",
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
    locations = [
        inspect_location("models", _get_hub_cache(environment)),
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


def _get_hub_cache(environment: Mapping[str, str]) -> Path:
    """Return the cache folder of huggingface_hub."""
    hf_home = environment.get("HF_HOME")
    cache_home = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(hf_home or os.path.join(cache_home, "huggingface")))


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
        if (
            file_system_type not in _VIRTUAL_FILE_SYSTEMS
            and file_system_type != "tmpfs"
            and os.access(path, os.W_OK)
            and path.is_dir()
        ):
            candidates.append(inspect_location("disk", path))
    writable = [location for location in candidates if location.is_writable]
    return max(writable, key=lambda location: location.free_bytes, default=None)


def check_machine(machine: MachineInfo) -> list[Diagnosis]:
    """Compare the memory, disk space and limits of a machine with recommended values."""
    diagnoses = [
        make_ok(
            "machine",
            f"Python {machine.python_version}, {machine.platform_name}, {machine.num_cpus}"
            f" cores, {machine.available_memory / GB:.3g} of"
            f" {machine.total_memory / GB:.3g} GB memory available",
        )
    ]
    for location in machine.locations:
        diagnoses.append(_check_free_space(location, machine.largest_location))
    return [*diagnoses, *_check_memory(machine), *_check_limits(machine)]


def _check_free_space(location: WriteLocation, largest_location: WriteLocation | None) -> Diagnosis:
    location_text = f"{location.folder} ({location.role})"
    free_text = f"{location.free_bytes / GB:.3g} GB free"
    if not location.is_writable:
        return make_error(
            "not-writable",
            f"{location_text} is not writable",
            why="it belongs to another user, is read-only, or is not a folder",
            remedy=_relocate_command(location, largest_location),
        )
    if location.free_bytes >= RECOMMENDED_FREE_BYTES[location.role]:
        return make_ok("disk", f"{location_text}: {free_text}")
    make_diagnosis = make_error if location.free_bytes < MIN_FREE_BYTES else make_warning
    return make_diagnosis(
        "disk-full",
        f"{location_text}: {free_text}",
        why=f"{RECOMMENDED_FREE_BYTES[location.role] / GB:.3g} GB is recommended; writes fail"
        " if the disk is full",
        remedy=_relocate_command(location, largest_location),
    )


def _relocate_command(location: WriteLocation, largest_location: WriteLocation | None) -> str:
    """Return a shell command that selects a folder on a disk with more free space.

    If no disk has enough space, the command lists the largest folders of the full disk.
    """
    if (
        largest_location is None
        or largest_location.free_bytes < RECOMMENDED_FREE_BYTES[location.role]
    ):
        return largest_files_command(_find_existing_parent(location.folder))
    folder = str(largest_location.folder / "finesight")
    mkdir = format_command("mkdir", "-p", folder)
    if location.role == "models":
        return f"{mkdir} && export HF_HOME={format_command(folder)}"
    if location.role == "temporary files":
        return f"{mkdir} && export TMPDIR={format_command(folder)}"
    return f"{mkdir} && cd {format_command(folder)}"


def largest_files_command(folder: Path) -> str:
    """Return the shell command that lists the largest folders within a folder."""
    return f"du -xh --max-depth=2 {format_command(str(folder))} | sort -h | tail -n 20"


def _check_memory(machine: MachineInfo) -> Iterator[Diagnosis]:
    if machine.available_memory < LOW_MEMORY_BYTES:
        make_diagnosis = make_error if machine.available_memory < MIN_MEMORY_BYTES else make_warning
        yield make_diagnosis(
            "low-memory",
            f"{machine.available_memory / GB:.3g} GB of memory is available",
            why="loading a 2B model needs 5 GB; the system kills processes that exceed the"
            " available memory",
            remedy="ps -eo rss,pid,comm --sort=-rss | head",
        )


def _check_limits(machine: MachineInfo) -> Iterator[Diagnosis]:
    if machine.free_shm is not None and machine.free_shm < LOW_SHM_BYTES:
        make_diagnosis = make_error if machine.free_shm < MIN_SHM_BYTES else make_warning
        yield make_diagnosis(
            "low-shared-memory",
            f"/dev/shm has {machine.free_shm / 1e6:.3g} MB free",
            why="data loader workers exchange images there and crash if it is full",
            remedy="sudo mount -o remount,size=8G /dev/shm   # for a container: docker run"
            " --shm-size=8g; or train with train.num_workers=0",
        )
    if machine.max_open_files < MIN_OPEN_FILES:
        yield make_error(
            "low-open-files-limit",
            f"a process may open only {machine.max_open_files} files",
            why="data shards, data loader workers and the server need more",
            remedy="ulimit -n 4096",
        )
