"""The machine itself: memory, room on its disks, and what it grants a process."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finesight.doctor.findings import Finding, fault, fine, hint, typed
from finesight.memory import allowed_cores, free_memory, whole_memory

GB = 1_000_000_000
FULL = 50_000_000
"""Free bytes below which nothing of use can be written."""

ROOM = {"models": 10 * GB, "temporary files": GB, "this folder": 2 * GB}
"""Free bytes that each place should have: a model of two billion weights takes 4.4 GB, the
checkpoints of a small run a few hundred million bytes."""

MEMORY, SCARCE = GB, 6 * GB
"""Available bytes below which nothing can be done, and below which a model of two billion weights
cannot be read."""

SHARED, SHARED_LITTLE = 16_000_000, 128_000_000
"""Bytes of /dev/shm below which reading processes die, and below which large pictures make them."""

FILES = 256
"""Open files that a process should be allowed."""

_NO_DISKS = ("proc", "sysfs", "cgroup", "devpts", "mqueue", "squashfs", "iso9660", "devtmpfs")


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is written: what, its folder (or the nearest one that exists), the free bytes
    of its disk, and whether this user may write there."""

    role: str
    folder: Path
    free: int
    writable: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """What the system says. Bytes; `shared` is what is free in /dev/shm, None without one;
    `roomiest` is the place that this user may write to with the most room."""

    python: str
    system: str
    cores: int
    memory: int
    available: int
    shared: int | None
    files: int
    places: tuple[Place, ...]
    roomiest: Place | None


def gather(environment: Mapping[str, str], here: Path) -> Machine:
    """Look at this machine. Nothing is written."""
    shared = Path("/dev/shm")
    places = [
        place("models", _cache(environment)),
        place("temporary files", Path(environment.get("TMPDIR") or tempfile.gettempdir())),
        place("this folder", here),
    ]
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=allowed_cores(),
        memory=whole_memory(),
        available=free_memory(),
        shared=shutil.disk_usage(shared).free if shared.is_dir() else None,
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        places=tuple(places),
        roomiest=_roomiest(places),
    )


def _cache(environment: Mapping[str, str]) -> Path:
    """Where models that are fetched will lie, as huggingface_hub finds it."""
    home = environment.get("HF_HOME")
    beside = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(home or os.path.join(beside, "huggingface")))


def place(role: str, folder: Path) -> Place:
    """Where `folder` is or will be."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return Place(role, folder, shutil.disk_usage(there).free, writable)


def _roomiest(places: Sequence[Place]) -> Place | None:
    found = [*places, place("home", Path.home())]
    mounts = Path("/proc/mounts")
    for line in mounts.read_text().splitlines() if mounts.is_file() else ():
        _, folder, kind, *_ = line.split()
        path = Path(folder.encode().decode("unicode_escape"))
        if kind not in _NO_DISKS and kind != "tmpfs" and os.access(path, os.W_OK) and path.is_dir():
            found.append(place("disk", path))
    able = [place for place in found if place.writable]
    return max(able, key=lambda place: place.free, default=None)


def judge(machine: Machine) -> list[Finding]:
    """Memory, disks and limits, each against what finesight needs."""
    found = [
        fine(
            "machine",
            f"Python {machine.python}, {machine.system}, {machine.cores} cores,"
            f" {machine.available / GB:.3g} of {machine.memory / GB:.3g} GB of memory available",
        )
    ]
    for place in machine.places:
        found.append(_room(place, machine.roomiest))
    return [*found, *_memory_findings(machine), *_limits(machine)]


def _room(place: Place, roomiest: Place | None) -> Finding:
    where = f"{place.folder} ({place.role})"
    free = f"{place.free / GB:.3g} GB free"
    if not place.writable:
        return fault(
            "not-writable",
            f"{where} cannot be written to",
            why="it belongs to another user, is read-only, or is no folder",
            remedy=_elsewhere(place, roomiest),
        )
    if place.free >= ROOM[place.role]:
        return fine("disk", f"{where}: {free}")
    make = fault if place.free < FULL else hint
    return make(
        "disk-full",
        f"{where}: {free}",
        why=f"{ROOM[place.role] / GB:.3g} GB should be; what is written is refused when it is full",
        remedy=_elsewhere(place, roomiest),
    )


def _elsewhere(place: Place, roomiest: Place | None) -> str:
    """The command that takes this to where there is room, or that shows what takes the room."""
    if roomiest is None or roomiest.free < ROOM[place.role]:
        return largest(place.folder)
    folder = str(roomiest.folder / "finesight")
    made = typed("mkdir", "-p", folder)
    if place.role == "models":
        return f"{made} && export HF_HOME={typed(folder)}"
    if place.role == "temporary files":
        return f"{made} && export TMPDIR={typed(folder)}"
    return f"{made} && cd {typed(folder)}"


def largest(folder: Path) -> str:
    """The command that shows what takes the room of a disk."""
    return f"du -xh --max-depth=2 {typed(str(folder))} | sort -h | tail -n 20"


def _memory_findings(machine: Machine) -> Iterator[Finding]:
    if machine.available < SCARCE:
        make = fault if machine.available < MEMORY else hint
        yield make(
            "memory-short",
            f"{machine.available / GB:.3g} GB of memory are available",
            why="a model of two billion weights is read through 5 GB; the system ends programs that"
            " take more than there is, without a word",
            remedy="ps -eo rss,pid,comm --sort=-rss | head",
        )


def _limits(machine: Machine) -> Iterator[Finding]:
    if machine.shared is not None and machine.shared < SHARED_LITTLE:
        make = fault if machine.shared < SHARED else hint
        yield make(
            "shared-memory-short",
            f"/dev/shm has {machine.shared / 1e6:.3g} MB free",
            why="reading processes hand their pictures over there, and die where it is full",
            remedy="sudo mount -o remount,size=8G /dev/shm"
            "   # of a container: docker run --shm-size=8g; or train with train.workers=0",
        )
    if machine.files < FILES:
        yield fault(
            "few-files",
            f"a process may open {machine.files} files",
            why="shards, reading processes and the server have more open",
            remedy="ulimit -n 4096",
        )
