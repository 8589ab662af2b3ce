"""Disks that kill their process at a chosen operation, for tests of what a crash leaves."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from finesight import storage


class DyingDisk(storage.Disk):
    """Kills its process before the operation with number `last`, in the middle of a write."""

    def __init__(self, last: int) -> None:
        self.left = last

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.die()

    def die(self) -> None:
        """End this process as nothing can prevent."""
        os.kill(os.getpid(), signal.SIGKILL)

    def make_folder(self, path: Path) -> None:
        self._count()
        super().make_folder(path)

    def create(self, path: Path) -> int:
        self._count()
        return super().create(path)

    def open_to_append(self, path: Path) -> int:
        self._count()
        return super().open_to_append(path)

    def write(self, file: int, data: memoryview) -> int:
        if self.left == 1:
            super().write(file, data[: len(data) // 2])
        self._count()
        return super().write(file, data)

    def sync(self, file: int) -> None:
        self._count()
        super().sync(file)

    def sync_path(self, path: Path) -> None:
        self._count()
        super().sync_path(path)

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)

    def truncate(self, path: Path, size: int) -> None:
        self._count()
        super().truncate(path, size)

    def remove_file(self, path: Path) -> None:
        self._count()
        super().remove_file(path)

    def remove_tree(self, path: Path) -> None:
        self._count()
        super().remove_tree(path)


class PowerCut(DyingDisk):
    """A crash of the machine: what was not flushed by then is lost, as far as a disk may lose it.

    Below `root`, files keep half of what was written since they were last flushed, folders lose
    the entries made since, and renames are undone whose folder was not flushed after them.
    """

    def __init__(self, last: int, root: Path) -> None:
        super().__init__(last)
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

    def die(self) -> None:
        """Lose what may be lost, then die."""
        for source, target, before in reversed(self.renames):
            target.rename(source)
            if before is not None:
                target.write_bytes(before)
                self.flushed[target.stat().st_ino] = len(before)
        for folder, folders, files in os.walk(self.root):
            kept = self.entries.get(Path(folder).stat().st_ino, set())
            for name in set(folders) - kept:
                shutil.rmtree(Path(folder) / name)
                folders.remove(name)
            for path in (Path(folder) / name for name in files):
                if path.name not in kept:
                    path.unlink()
                    continue
                sure, size = self.flushed.get(path.stat().st_ino, 0), path.stat().st_size
                if size > sure:
                    os.truncate(path, sure + (size - sure) // 2)
        super().die()


def in_dying_child(
    last: int, action: Callable[[Path], None], store: Path, crash: str = "process"
) -> bool:
    """Whether `action` got through in a child that dies before its operation number `last`, alone
    or with the power; when it got through, the power goes off after it."""
    child = os.fork()
    if child == 0:
        disk = PowerCut(last, store) if crash == "power" else DyingDisk(last)
        with storage.using(disk):
            action(store)
        if crash == "power" and os.fork() == 0:
            disk.die()
        elif crash == "power":
            os.wait()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL, f"child ended {status}"
    return os.WIFEXITED(status)
