"""Disks that are full or kill their process at a chosen operation."""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from finesight.files import storage


class FailingDisk(storage.FileSystem):
    """Fails at write operation `fail_at` and all later ones, in the middle of writing data."""

    counted: tuple[str, ...] = ("make_folder", "create", "open_append", "sync", "sync_path")

    def __init__(self, fail_at: int) -> None:
        self.operations_left = fail_at

    def __getattribute__(self, name: str) -> Any:
        if name in type(self).counted:
            self._count_operation()
        return super().__getattribute__(name)

    def _count_operation(self) -> None:
        self.operations_left -= 1
        if self.operations_left <= 0:
            self.fail()

    def fail(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(self, file: int, data: memoryview) -> int:
        if self.operations_left == 1:
            super().write(file, data[: len(data) // 2])
        self._count_operation()
        return super().write(file, data)


class CrashingDisk(FailingDisk):
    """Kills its process at operation `fail_at`; counts renames and removals, too."""

    counted = (*FailingDisk.counted, "rename", "truncate", "remove")

    def fail(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class PowerLossDisk(CrashingDisk):
    """A crash of the machine: what was not flushed by then is lost, as far as a disk may lose it.

    Below `root`, files keep half of what was written since they were last flushed, folders lose
    the entries made since, and renames are undone whose folder was not flushed after them.
    """

    def __init__(self, fail_at: int, root: Path) -> None:
        super().__init__(fail_at)
        self.root = root
        files = [path for path in root.rglob("*") if path.is_file()]
        self.flushed = {path.stat().st_ino: path.stat().st_size for path in files}
        folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
        self.entries = {path.stat().st_ino: set(os.listdir(path)) for path in folders}
        self.renames: list[tuple[Path, Path, bytes | None]] = []

    def create(self, path: Path) -> int:
        file = super().create(path)
        self.flushed[os.fstat(file).st_ino] = 0
        return file

    def sync(self, file: int) -> None:
        super().sync(file)
        self.flushed[os.fstat(file).st_ino] = os.fstat(file).st_size

    def sync_path(self, path: Path) -> None:
        super().sync_path(path)
        if path.is_dir():
            self.entries[path.stat().st_ino] = set(os.listdir(path))
            self.renames = [rename for rename in self.renames if rename[1].parent != path]
        else:
            self.flushed[path.stat().st_ino] = path.stat().st_size

    def rename(self, source: Path, target: Path) -> None:
        before = target.read_bytes() if target.is_file() else None
        super().rename(source, target)
        self.renames.append((source, target, before))

    def fail(self) -> None:
        """Lose what may be lost, then die."""
        for source, target, before in reversed(self.renames):
            target.rename(source)
            if before is not None:
                target.write_bytes(before)
                self.flushed[target.stat().st_ino] = len(before)
        for folder, folders, files in os.walk(self.root):
            durable_bytes = self.entries.get(Path(folder).stat().st_ino, set())
            for name in set(folders) - durable_bytes:
                shutil.rmtree(Path(folder) / name)
                folders.remove(name)
            for path in (Path(folder) / name for name in files):
                if path.name not in durable_bytes:
                    path.unlink()
                    continue
                sure, size = self.flushed.get(path.stat().st_ino, 0), path.stat().st_size
                if size > sure:
                    os.truncate(path, sure + (size - sure) // 2)
        super().fail()


def run_in_crashing_child(
    crash_at: int, action: Callable[[Path], None], store: Path, crash: str = "process"
) -> bool:
    """Run an action in a child that crashes at a file operation; return whether it completed."""
    child = os.fork()
    if child == 0:
        disk = PowerLossDisk(crash_at, store) if crash == "power" else CrashingDisk(crash_at)
        with patch.object(storage, "file_system", disk):
            action(store)
        if crash == "power" and os.fork() == 0:
            disk.fail()
        elif crash == "power":
            os.wait()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL, f"child ended {status}"
    return os.WIFEXITED(status)
