"""A disk that kills its process at a chosen operation, for tests of what a crash leaves."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from finesight import storage


class DyingDisk(storage.Disk):
    """Kills its process before the operation with number `last`, in the middle of a write."""

    def __init__(self, last: int) -> None:
        self.left = last

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
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
